"""Mixtures of experts of transformers whose tokens' experts are recorded and replayed, by hooks on their routers.

A hook takes the experts that are replayed in place of those that its router chose, weighs them by the router's own
scores of all experts, and notes where tokens went. Knows no learner and no loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from posttrain.errors import ConfigError
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain_backends._torch.layout import Block, Layout
from posttrain_backends._torch.models.hf import (
    TOLERANCE,
    CachedHFModel,
    HFModel,
    HFTrunk,
    exactly,
    probe_tokens,
)
from posttrain_backends._torch.models.hf_routers import (
    BIAS,
    MIXTURES,
    MixtureFamily,
    Weighing,
    parts_of_mixtures,
    routers_of,
    shares,
)
from posttrain_backends._torch.models.interface import KVCache, Precision
from posttrain_backends._torch.models.mixture import Routes, router_logits

if TYPE_CHECKING:
    from posttrain_backends.hf import HF


@final
class Switch:
    """Where the routers of a module find the routes of what is computed just now; None leaves them alone."""

    def __init__(self) -> None:
        self.routes: Routes | None = None

    def when_computed_anew(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Around a layer whose activations are not kept, and around its second pass, which is behind the first of
        others: there it follows the same routes."""
        return nullcontext(), Following(self, self.routes)


@final
class Following:
    """Inside, the routers follow `routes`. May be entered again, as once for each of several losses."""

    def __init__(self, switch: Switch, routes: Routes | None) -> None:
        self._switch, self._routes = switch, routes
        self._before: list[Routes | None] = []

    def __enter__(self) -> None:
        self._before.append(self._switch.routes)
        self._switch.routes = self._routes

    def __exit__(self, *raised: object) -> None:
        self._switch.routes = self._before.pop()


@final
class RouterHook:
    """Replaces the experts that the router of one layer chose; an object, so that a copied model has its own."""

    def __init__(self, layer: int, weighing: Weighing, switch: Switch) -> None:
        self._layer, self._weighing, self._switch = layer, weighing, switch

    def __call__(self, router: Any, given: tuple[Tensor], out: tuple[Tensor, Tensor, Tensor]) -> Any:
        if self._switch.routes is None:
            return out
        first, weights, best = out  # first are logits or, in transformers 5.5, probabilities: so logits are made anew
        scores = self._weighing.scores(router_logits(given[0].flatten(0, -2), router.weight))
        ids = self._switch.routes.of(self._layer, shares(scores), best)
        return first, self._weighing.weights(scores, ids).to(weights.dtype), ids


@final
class RoutedHFModel(CachedHFModel):
    """A mixture that says where tokens went, and can be told; see `Routed` and, with a `bias_rate`, `Rebalanced`."""

    def __init__(self, causal: PreTrainedModel, family: MixtureFamily, precision: Precision, *,
                 gradient_checkpointing: bool = False, bias_rate: float = 0.0) -> None:
        self._switch, self._bias_rate = Switch(), bias_rate
        self._whole: Routes | None = None
        self._tokens = 0
        super().__init__(causal, precision, gradient_checkpointing=gradient_checkpointing)
        self._routers = dict(sorted(routers_of(causal, family).items()))
        for layer, router in self._routers.items():
            router.register_forward_hook(RouterHook(layer, family.weighing(router), self._switch))
        if gradient_checkpointing:
            causal.gradient_checkpointing_enable(
                {"use_reentrant": False, "context_fn": self._switch.when_computed_anew})

    @property
    def mixtures(self) -> tuple[int, ...]:
        return tuple(self._routers)

    @property
    def experts(self) -> int:
        return int(next(iter(self._routers.values())).num_experts)

    @property
    def experts_per_token(self) -> int:
        return int(next(iter(self._routers.values())).top_k)

    def hidden(self, tokens: Tensor, layout: Layout, routes: Routes | None = None) -> Tensor:
        with self._routed(routes, len(tokens)):
            return super().hidden(tokens, layout)

    def prefill(self, tokens: Tensor, layout: Layout,
                routes: Routes | None = None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        with self._routed(routes, len(tokens)):
            return super().prefill(tokens, layout)

    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache, rows: slice | None = None,
               routes: Routes | None = None) -> Tensor:
        with Following(self._switch, routes):
            return super().decode(tokens, positions, cache, rows)

    @contextmanager
    def _routed(self, routes: Routes | None, tokens: int) -> Iterator[None]:
        """Of a pass over so many tokens, block by block."""
        self._whole, self._tokens = routes, tokens
        try:
            yield
        finally:
            self._whole = None

    @contextmanager
    def _over_block(self, block: Block | None) -> Iterator[None]:
        whole = self._whole
        if whole is None or block is None:
            with Following(self._switch, whole):
                yield
            return
        part = whole.over(block.gather)
        with Following(self._switch, part):
            yield
        whole.note(part, block.gather, block.scatter, self._tokens)

    @torch.no_grad()
    def rebalance(self, sent: np.ndarray) -> None:
        """b_e + u sign(mean load - load of e) in each layer, from a step's tokens by layer and expert [L, E] (Wang et
        al. 2024, arXiv 2408.15664, algorithm 1)."""
        if not self._bias_rate:
            return
        below = np.sign(sent.sum(axis=1, keepdims=True) - sent.shape[1] * sent)  # in whole numbers, so that 0 is 0
        for router, direction in zip(self._routers.values(), below, strict=True):
            bias = getattr(router, BIAS)
            bias.add_(torch.from_numpy(direction).to(bias), alpha=self._bias_rate)


# ---- what is chosen and proved before a mixture is used


def choose_experts(causal: PreTrainedModel, spec: HF) -> None:
    """Let transformers multiply the experts as `spec.experts` says, proved equal to one expert after the other. Raises
    `ConfigError`."""
    name = type(causal).__name__
    if not parts_of_mixtures(causal):
        if spec.experts != "auto":
            raise ConfigError([f"policy.experts is {spec.experts}, and {name} has no experts; leave it out"])
        return
    if not causal._can_set_experts_implementation():
        if spec.experts != "auto":
            raise ConfigError([f"policy.experts is {spec.experts}, and {name} computes its experts in one way alone; "
                               "leave it out"])
        return
    # The library's grouped product multiplies in the type of the weights, float32 here, which CUDA has not.
    plain = causal.device.type == "cpu" and spec.precision == "float32"
    chosen = spec.experts if spec.experts != "auto" else "grouped_mm" if plain else "eager"
    try:
        error = experts_error(causal, chosen)
    except (RuntimeError, ValueError, ImportError) as raised:
        raise ConfigError([f"policy.experts: {chosen} does not run on {causal.device.type}: "
                           f"{str(raised).splitlines()[0]}"], next_step="Take experts: auto.") from raised
    if error > TOLERANCE:
        raise ConfigError([f"policy.experts: {chosen} gives {name} other hidden states than eager (they differ by "
                           f"{error:.1e} of the largest)"], next_step="Take experts: eager.")


@torch.no_grad()
def experts_error(causal: PreTrainedModel, chosen: str) -> float:
    """Largest difference between hidden states with experts as `chosen` and one after the other, relative; leaves them
    as chosen."""
    trunk = HFTrunk(causal, causal.get_input_embeddings().weight, "float32")
    tokens, _ = probe_tokens(trunk, [8])
    found = {}
    for name in ("eager", chosen):
        causal.set_experts_implementation(name)
        found[name] = trunk.run(tokens[None]).last_hidden_state
    return float((found[chosen] - found["eager"]).abs().max() / found["eager"].abs().max())


def with_routes(model: HFModel, spec: HF) -> HFModel:
    """The model, its experts recorded and replayed where it has some. Raises `ConfigError` where that cannot be."""
    causal, family = model.causal, MIXTURES.get(model.causal.config.model_type)
    routers = routers_of(causal, family) if family else {}
    _check_bias(spec, causal, routers)
    if not spec.router_replay or not parts_of_mixtures(causal):
        return model
    if family is None or not routers:
        raise _unknown(causal, "by a router that is not known here")
    if not isinstance(model, CachedHFModel):
        raise _unknown(causal, "and is drawn from without a cache, beside which alone they are recorded")
    try:
        routed = RoutedHFModel(causal, family, model.precision, gradient_checkpointing=spec.gradient_checkpointing,
                               bias_rate=spec.expert_bias_rate)
        error = replay_error(routed)
    except (AttributeError, TypeError, ValueError) as raised:  # as of DeepSeek-V3 in transformers 5.5
        raise _unknown(causal, "by a router that gives no logits, weights and ids in this version of transformers"
                       ) from raised
    if error > TOLERANCE:
        raise _unknown(causal, f"by a router that weighs them otherwise than is known here (replayed, hidden states "
                               f"differ by {error:.1e} of the largest)")
    return routed


def _unknown(causal: PreTrainedModel, why: str) -> ConfigError:
    return ConfigError(
        [f"{type(causal).__name__} sends tokens to experts {why}: those of a rollout cannot be replayed in training"],
        next_step=f"Replayed are {', '.join(sorted(MIXTURES))}. With policy.router_replay: false it trains without: "
                  "its routers then choose anew, and a token's log-prob may be that of other experts.")


def _check_bias(spec: HF, causal: PreTrainedModel, routers: Mapping[int, nn.Module]) -> None:
    """Raise `ConfigError` where `expert_bias_rate` would move nothing, or what must stay."""
    name = type(causal).__name__
    why = (f"{name} has no experts" if not parts_of_mixtures(causal) else
           "without policy.router_replay no load of experts is known" if not spec.router_replay else
           f"the routers of {name} have no bias" if any(
               BIAS not in dict(router.named_buffers()) for router in routers.values()) else
           "with policy.adapter the model stays as it is" if spec.adapter is not None else "")
    if spec.expert_bias_rate and why:
        raise ConfigError([f"policy.expert_bias_rate is {spec.expert_bias_rate}, and {why}"],
                          next_step="Leave it out; update.expert_balance_coef evens out the load of any mixture that "
                                    "is replayed, by a loss.")


@torch.no_grad()
def replay_error(model: RoutedHFModel) -> float:
    """Largest difference between hidden states of tokens by the routers alone and with the experts they chose replayed,
    relative."""
    tokens, layout = probe_tokens(model, [5, 3])
    with exactly(model):
        free, noted = model.hidden(tokens, layout), Routes()
        model.hidden(tokens, layout, noted)
        again = model.hidden(tokens, layout, Routes(noted.chosen))
    return float((again - free).abs().max() / free.abs().max())
