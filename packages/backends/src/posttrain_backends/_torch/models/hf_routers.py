"""The mixtures of experts of transformers whose routers are known: how each weighs the experts that it chooses, so that
others can be put in their place, and what files call their weights. Knows no forward pass.

Sources: Jiang et al. 2024 (2401.04088); Yang et al. 2024 and 2025 (2407.10671, 2505.09388); DeepSeek-AI 2024
(2412.19437), equations 12 to 16, and GLM-4.5 Team 2025 (2508.06471), whose routers choose by a bias beside the scores.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor, nn

from posttrain_backends.families.shape import FAMILIES

_TINY = 1e-20
"""Keeps a sum of scores that are all 0 from dividing by it."""
_PARTS = frozenset({"experts", "router"})
"""Last names of the modules that mixtures of transformers have."""
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@final
@dataclass(frozen=True, slots=True)
class Weighing:
    """How a router makes the weights of a token's experts from its logits."""

    scores: Callable[[Tensor], Tensor]
    """[M, E] logits -> [M, E] positive, of all experts."""
    normalised: bool
    """Whether the weights of a token's experts are divided by their sum."""
    scale: float = 1.0

    def weights(self, scores: Tensor, ids: Tensor) -> Tensor:
        """[M, E] and [M, k] -> [M, k]; of all scores, so that replayed experts have gradients, too."""
        chosen = scores.gather(1, ids)
        return self.scale * (chosen / (chosen.sum(dim=-1, keepdim=True) + _TINY) if self.normalised else chosen)


def shares(scores: Tensor) -> Tensor:
    """[M, E] -> [M, E] rows that add up to 1: those of a load (2412.19437, equations 17 to 20)."""
    return scores / (scores.sum(dim=-1, keepdim=True) + _TINY)


def _softmax(logits: Tensor) -> Tensor:
    return logits.float().softmax(dim=-1)


def _sigmoid(logits: Tensor) -> Tensor:
    return logits.float().sigmoid()


@final
@dataclass(frozen=True, slots=True)
class MixtureFamily:
    """The mixtures of one `model_type`. Their routers have a `weight` [E, H] and give something [M, E], weights [M, k]
    and ids [M, k]; their experts are joined in memory and apart in files."""

    router: str
    """Class of its routers."""
    weighing: Callable[[Any], Weighing]
    """Router -> how it weighs."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Parts of parameters' names -> what its files call them."""


def _always(router: Any) -> Weighing:
    return Weighing(_softmax, normalised=True)


def _as_set(router: Any) -> Weighing:
    return Weighing(_softmax, normalised=bool(router.norm_topk_prob))


def _scaled(router: Any) -> Weighing:
    return Weighing(_sigmoid, bool(router.norm_topk_prob), float(router.routed_scaling_factor))


MIXTURES: Mapping[str, MixtureFamily] = {
    "mixtral": MixtureFamily("MixtralTopKRouter", _always, FAMILIES["mixtral"].names),
    "qwen2_moe": MixtureFamily("Qwen2MoeTopKRouter", _as_set),
    "qwen3_moe": MixtureFamily("Qwen3MoeTopKRouter", _as_set),
    "deepseek_v3": MixtureFamily("DeepseekV3TopkRouter", _scaled),
    "glm4_moe": MixtureFamily("Glm4MoeTopkRouter", _scaled),
}
BIAS = "e_score_correction_bias"
"""The buffer [E] of a router that is added to its scores where it chooses, and not where it weighs."""


def parts_of_mixtures(module: nn.Module) -> list[str]:
    """Names of the modules that make it a mixture of experts; none where it is not one."""
    return [name for name, _ in module.named_modules() if name.rpartition(".")[2] in _PARTS]


def routers_of(module: nn.Module, family: MixtureFamily) -> dict[int, Any]:
    """Its routers by the number of their layer among all layers."""
    found = {name: part for name, part in module.named_modules() if type(part).__name__ == family.router}
    return {int(match[1]): part for name, part in found.items() if (match := _LAYER.search(name))}


def named_as_in_files(model_type: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Live views of a module's tensors under the names of its files, where each matrix of each expert has its own.

    >>> import torch
    >>> list(named_as_in_files("mixtral", {"model.layers.0.mlp.experts.down_proj": torch.zeros(2, 3, 4)}))
    ['model.layers.0.block_sparse_moe.experts.0.w2.weight', 'model.layers.0.block_sparse_moe.experts.1.w2.weight']
    """
    if model_type not in MIXTURES:
        return dict(tensors)
    names = MIXTURES[model_type].names
    return {".".join(names.get(part, part) for part in name.split(".")): x
            for joined, tensor in tensors.items() for name, x in _apart(joined, tensor)}


def _apart(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor as it is, or the matrices of experts that are joined in it: gates above what they gate."""
    prefix, experts, matrix = name.rpartition(".experts.")
    if not experts or matrix not in ("gate_up_proj", "down_proj"):
        yield name, tensor
        return
    halves = zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1)) if matrix == "gate_up_proj" else ((matrix, tensor),)
    for part, joined in halves:
        for e, own in enumerate(joined):
            yield f"{prefix}{experts}{e}.{part}.weight", own
