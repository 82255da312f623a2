"""Mixtures of experts: a router sends each token to the best few of many SwiGLU MLPs, beside one that reads all tokens.

Sources: Shazeer et al. 2017 (1701.06538) for top-k routing, Fedus et al. 2021 (2101.03961) for routers in float32, Dai
et al. 2024 (2401.06066) for shared experts. Tokens are sorted by expert and multiplied group by group. Knows no losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from posttrain.errors import ConfigError
from torch import Tensor, nn

_ALIGNED = 16
"""Rows of what is multiplied in groups are multiples of so many bytes."""
_GROUPED: Mapping[str, frozenset[torch.dtype]] = {
    "cpu": frozenset({torch.float32, torch.bfloat16, torch.float16}), "cuda": frozenset({torch.bfloat16})}
"""Device -> the types that torch multiplies in groups there."""


@final
class Routes:
    """The experts that each token of one forward pass goes to, by layer.

    Those `given` (layer -> [M, k], -1 where the router is free) are replayed, the others noted when they are chosen.
    What is noted holds: a layer that is computed anew for its gradients takes the same experts. With the `load` of
    layers (layer -> [E] shares f_e) the routers' agreement with it is noted, too: layer -> [M] sum_e f_e p_e.
    """

    def __init__(self, given: Mapping[int, Tensor] | None = None, load: Mapping[int, Tensor] | None = None) -> None:
        self._given, self._load = given or {}, load or {}
        self.chosen: dict[int, Tensor] = {}
        self.agreement: dict[int, Tensor] = {}

    def of(self, layer: int, scores: Tensor, best: Tensor) -> Tensor:
        """[M, k] expert ids of a layer whose router scored the experts [M, E], and likes `best` [M, k] most."""
        if layer not in self.chosen:
            given = self._given.get(layer)
            self.chosen[layer] = best if given is None else torch.where(given >= 0, given, best)
        if layer in self._load:  # also in a layer that is computed anew, whose operations must be the same
            self.agreement.setdefault(layer, (scores * self._load[layer]).sum(dim=-1))  # no product in bfloat16
        return self.chosen[layer]

    def over(self, cells: Tensor) -> Routes:
        """For a pass over `cells` [C], tokens of this one, some of them more than once."""
        return Routes({layer: ids.index_select(0, cells) for layer, ids in self._given.items()}, self._load)

    def note(self, part: Routes, cells: Tensor, first: Tensor, tokens: int) -> None:
        """Take what a pass over `cells` of so many tokens noted, of those at `first` [m] alone."""
        places = cells[first]
        for layer, ids in part.chosen.items():
            self.chosen.setdefault(layer, ids.new_full((tokens, ids.shape[1]), -1))[places] = ids[first]
        for layer, agreement in part.agreement.items():
            so_far = self.agreement.get(layer, agreement.new_zeros(tokens))
            self.agreement[layer] = so_far.index_copy(0, places, agreement[first])

    def joined(self) -> Tensor:
        """[M, L, k] int16, what was chosen in each layer."""
        return torch.stack([self.chosen[layer] for layer in sorted(self.chosen)], dim=1).short()


def recorded(joined: Tensor, experts: int) -> np.ndarray:
    """`Routes.joined`, -1 where nothing was chosen, as `Rollouts.routes` has it.

    >>> recorded(torch.tensor([[[0, 3]], [[-1, -1]]]).short(), experts=4).tolist()
    [[[0, 3]], [[255, 255]]]
    """
    return joined.cpu().numpy().astype(np.uint8 if experts < np.iinfo(np.uint8).max else np.uint16)


def replayed(routes: np.ndarray, layers: Sequence[int], experts: int, k: int,
             device: torch.device) -> dict[int, Tensor]:
    """What is `recorded` [M, L, k], as `Routes` are given it, for a model whose `layers` choose k of so many experts.
    Raises `ConfigError` where it is of another model."""
    ids = routes.astype(np.int64)
    ids[routes == np.iinfo(routes.dtype).max] = -1
    if ids.shape[1:] != (len(layers), k) or ids.max(initial=-1) >= experts:
        raise ConfigError(
            [f"the rollouts hold {ids.shape[2]} experts a token in {ids.shape[1]} layers, numbered up to "
             f"{ids.max(initial=-1)}; the policy chooses {k} of {experts} in {len(layers)} layers"],
            next_step="Draw with the policy's own model, or train without its routes: Rollouts.routes=None.")
    return dict(zip(layers, torch.from_numpy(ids).to(device).unbind(1)))


class Experts(nn.Module):
    """E SwiGLU MLPs, joined in memory; `state_dict` has live views of each under its own name, as files have."""

    def __init__(self, experts: int, hidden_size: int, size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, size))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        gate_up, down = (p if keep_vars else p.detach() for p in (self.gate_up_proj, self.down_proj))
        gate, up = gate_up.chunk(2, dim=1)
        for name, joined in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            destination.update({f"{prefix}{e}.{name}.weight": matrix for e, matrix in enumerate(joined)})


@final
@dataclass(frozen=True, slots=True, eq=False)
class MixtureWeights:
    """The routed part of one layer, as a function of what it reads."""

    layer: int
    router: Tensor
    """[E, H], in the parameters' type whatever the matrices are multiplied in."""
    gate_up: Tensor
    """[E, 2 I, H]"""
    down: Tensor
    """[E, H, I]"""
    per_token: int
    normalised: bool
    """Whether the weights of a token's experts add up to 1."""

    def __call__(self, x: Tensor, routes: Routes) -> Tensor:
        """[M, H] -> [M, H], in the router's type."""
        scores = router_scores(x, self.router)
        ids = routes.of(self.layer, scores, scores.detach().topk(self.per_token, dim=-1).indices)
        weights = scores.gather(1, ids)  # of all scores, so that replayed experts have gradients, too
        if self.normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weighted_experts(x.to(self.gate_up.dtype), ids, weights, self.gate_up, self.down)


def router_scores(x: Tensor, router: Tensor) -> Tensor:
    """[M, H] and [E, H] -> [M, E] probabilities."""
    return router_logits(x, router).softmax(dim=-1)


def router_logits(x: Tensor, router: Tensor) -> Tensor:
    """[M, H] and [E, H] -> [M, E]; never in bfloat16, where experts near a tie would swap."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(router.dtype), router)


def weighted_experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """sum_j weights[m, j] expert_ids[m, j](x[m]): x [M, H], ids and weights [M, k] -> [M, H]."""
    M, k = ids.shape
    order = ids.flatten().argsort(stable=True)
    counts = ids.new_zeros(len(gate_up)).index_add_(0, ids.flatten(), torch.ones_like(order))
    read = x.index_select(0, order // k)
    gate, up = grouped_linear(read, gate_up, counts).chunk(2, dim=-1)
    made = grouped_linear(F.silu(gate) * up, down, counts)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(M * k, device=order.device))
    return (made.index_select(0, place).view(M, k, -1) * weights[:, :, None]).sum(dim=1)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The first counts[0] rows of x [n, K] times weight[0].T, the next counts[1] times weight[1].T, ... -> [n, N]."""
    if multiplies_in_groups(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).int())
    return linear_by_linear(x, weight, counts)


def multiplies_in_groups(x: Tensor, weight: Tensor) -> bool:
    """Whether torch has a grouped product for this device, this type, and rows [n, K] and [n, N] of these lengths."""
    aligned = all(length * x.element_size() % _ALIGNED == 0 for length in weight.shape[1:])
    return aligned and x.dtype in _GROUPED.get(x.device.type, ())


def linear_by_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`grouped_linear` as one product after the other, for any type and size."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.cat([F.linear(rows, matrix) for rows, matrix in zip(torch.split(x, counts.tolist()), weight)])
