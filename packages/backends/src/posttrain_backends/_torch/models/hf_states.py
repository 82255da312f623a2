"""Recurrent and hybrid models of transformers that go on from their states. Knows no learner and no sampling.

What a layer keeps of a row is a state of one size (a convolution's last inputs, the sum of a recurrence), keys and
values, or both. The library's own cache layers are given views of our rows, which they read and write in place. Prompts
are padded on the left where states are wanted: nothing may follow a row's last token. That steps equal reading whole
sequences is proved before a model is drawn from; where an architecture of the library does not keep it, that is said.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, cast, final

import numpy as np
import torch
import transformers
from posttrain.errors import ConfigError
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models.hf import (
    TOLERANCE,
    CacheRow,
    HFModel,
    HFTrunk,
    cached_or_not,
    exactly,
    parameters_of,
    probe_tokens,
    tolerance,
)
from posttrain_backends._torch.models.hf_attention import additive_mask
from posttrain_backends._torch.models.interface import HybridCache, KVCache, Precision, StateCache
from posttrain_backends.ragged import similar_lengths

log = logging.getLogger(__name__)

_NAMES = ("past_key_values", "cache_params")
"""What architectures call their cache."""
_UNLIKE = (TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError, NotImplementedError)
"""What a module raises whose cache is not what it seems to be."""
_FORCED = (0.7, 0.7)
"""A limit of steps that no step keeps by itself."""


@final
@dataclass(frozen=True, slots=True)
class _Kept:
    """What one layer keeps."""

    windows: tuple[int, ...]
    """Numbers of its convolutions' states."""
    states: tuple[int, ...]
    """Numbers of its recurrences' states."""
    keys: bool
    """Whether keys and values."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """What a pass over whole rows gives."""

    hidden: Tensor
    """[M, H]"""
    keys: list[Tensor]
    """[M, kv_heads, D] of each layer that has some."""
    values: list[Tensor]
    recurrent: StateCache
    """At the end of each row."""


class _Stateful(HFModel):
    """What recurrent and hybrid models have in common."""

    def __init__(self, causal: PreTrainedModel, precision: Precision, *, gradient_checkpointing: bool = False) -> None:
        super().__init__(causal, precision, gradient_checkpointing=gradient_checkpointing)
        self.refusal = ""
        """See `Refusing`."""
        self._cache_name = next(name for name in _NAMES if name in parameters_of(self.trunk))
        cache = self._new()
        if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
            raise ValueError("some of its layers see a window of tokens")
        with torch.no_grad():
            self.run(torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=True, **self._given(cache))
        self._kept = [_kept(layer) for layer in cache.layers]

    def _new(self) -> DynamicCache:
        return DynamicCache(config=self.causal.config)

    def _given(self, cache: Cache) -> dict[str, Cache]:
        return {self._cache_name: cache}

    def _one(self) -> _Read:
        """Of one token: what the rows of a cache look like, in the types they are computed in now."""
        with torch.no_grad():
            return self._whole(torch.zeros(1, dtype=torch.long, device=self.device),
                               Layout.from_offsets([0, 1], self.device))

    def _no_states(self, rows: int, like: StateCache) -> StateCache:
        windows, states = ([x.new_zeros(rows, *x.shape[1:]) for x in kind] for kind in (like.windows, like.states))
        return StateCache(windows, states)

    def _whole(self, tokens: Tensor, layout: Layout) -> _Read:
        """[M] tokens of sequences none of which is empty, in rows of similar length."""
        groups = similar_lengths(np.diff(layout.offsets))
        with self.autocast(), self._mode():
            parts = [self._rows(tokens, layout.offsets[group], np.diff(layout.offsets)[group]) for group in groups]
        row = torch.from_numpy(np.argsort(np.concatenate(groups))).to(self.device)
        cell = torch.cat([place for place, _ in parts]).argsort()

        def cells(named: str) -> list[Tensor]:
            return [torch.cat(x)[cell] for x in zip(*(getattr(read, named) for _, read in parts), strict=True)]

        def rows(named: str) -> list[Tensor]:
            return [torch.cat(x)[row] for x in zip(*(getattr(read.recurrent, named) for _, read in parts), strict=True)]
        return _Read(torch.cat([read.hidden for _, read in parts])[cell], cells("keys"), cells("values"),
                     StateCache(rows("windows"), rows("states")))

    def _rows(self, tokens: Tensor, starts: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, _Read]:
        """Sequences that begin at `starts` [n], padded on the left with copies of their first tokens -> the places of
        their m tokens, and what is read there."""
        position = np.arange(lengths.max()) - (lengths.max() - lengths)[:, None]
        real = torch.from_numpy(position >= 0).to(self.device)
        position = np.maximum(position, 0)
        place = torch.from_numpy(starts[:, None] + position).to(self.device)
        cache, mask = self._new(), {} if bool(real.all()) else {"attention_mask": real.long()}
        out = self.run(tokens[place], torch.from_numpy(position).to(self.device), use_cache=True, **mask,
                       **self._given(cache))
        keyed = [layer for layer, kept in zip(cache.layers, self._kept, strict=True) if kept.keys]
        pairs = list(zip(cache.layers, self._kept, strict=True))
        return place[real], _Read(
            out.last_hidden_state[real], [layer.keys.transpose(1, 2)[real] for layer in keyed],
            [layer.values.transpose(1, 2)[real] for layer in keyed],
            StateCache([layer.conv_states[i] for layer, kept in pairs for i in kept.windows],
                       [layer.recurrent_states[i] for layer, kept in pairs for i in kept.states]))

    def _on(self, tokens: Tensor, positions: Tensor, attention: KVCache, recurrent: StateCache, used: slice) -> Tensor:
        """One token [B] at `positions` [B] of each row `used` -> hidden [B, H]."""
        columns = int(positions.max()) + 1 if attention.keys else 1
        place = torch.arange(len(tokens), device=tokens.device)
        rows = iter([CacheRow(k[used], v[used], place, positions, columns)
                     for k, v in zip(attention.keys, attention.values, strict=True)])
        windows, states = (iter([x[used] for x in kind]) for kind in (recurrent.windows, recurrent.states))
        layers = [_continued(layer, kept, rows, windows, states)
                  for layer, kept in zip(self._new().layers, self._kept, strict=True)]
        mask = {"attention_mask": self._up_to(positions, columns)} if attention.keys else {}
        with self.autocast(), self._mode(), self._masked_attention():
            out = self.run(tokens[:, None], positions[:, None], use_cache=True, **mask,
                           **self._given(Cache(layers=layers)))
        return cast(Tensor, out.last_hidden_state)[:, 0]

    def _up_to(self, positions: Tensor, columns: int) -> Tensor:
        """[B, 1, 1, columns] 0 where a token sees, and the least number where it does not."""
        reached = torch.arange(columns, device=positions.device) <= positions[:, None]
        return additive_mask(reached, self.compute_dtype)[:, None, None, :]


@final
class RecurrentHFModel(_Stateful):
    """A module whose every layer keeps states alone; a `RecurrentLanguageModel`."""

    def new_states(self, rows: int) -> StateCache:
        return self._no_states(rows, self._one().recurrent)

    def read(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, StateCache]:
        found = self._whole(tokens, layout)
        return found.hidden, found.recurrent

    def step(self, tokens: Tensor, cache: StateCache, rows: slice | None = None) -> Tensor:
        return self._on(tokens, torch.zeros_like(tokens), KVCache([], []), cache, rows or slice(None))


@final
class HybridHFModel(_Stateful):
    """A module some of whose layers keep keys and values of all tokens; a `HybridLanguageModel`."""

    def new_pasts(self, rows: int, columns: int) -> HybridCache:
        one = self._one()
        keys, values = ([x.new_zeros(rows, x.shape[1], columns, x.shape[2]) for x in kind]
                        for kind in (one.keys, one.values))
        return HybridCache(KVCache(keys, values), self._no_states(rows, one.recurrent))

    def read_pasts(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor], list[Tensor], StateCache]:
        found = self._whole(tokens, layout)
        return found.hidden, found.keys, found.values, found.recurrent

    def step_at(self, tokens: Tensor, positions: Tensor, cache: HybridCache, rows: slice | None = None) -> Tensor:
        return self._on(tokens, positions, cache.attention, cache.recurrent, rows or slice(None))


def _kept(layer: Any) -> _Kept:
    """What a layer of the library's cache has kept of a token."""
    def those(named: str) -> tuple[int, ...]:
        if not isinstance(states := getattr(layer, named, {}), dict):
            raise ValueError(f"transformers {transformers.__version__} keeps states in an older form")
        return tuple(i for i, x in states.items() if x is not None)
    return _Kept(those("conv_states"), those("recurrent_states"), getattr(layer, "keys", None) is not None)


def _continued(layer: Any, kept: _Kept, rows: Iterator[CacheRow], windows: Iterator[Tensor],
               states: Iterator[Tensor]) -> Any:
    """A new layer of the library's cache, with what ours has kept."""
    if not kept.windows and not kept.states:
        return next(rows) if kept.keys else layer
    for i in kept.windows:
        layer.conv_states[i], layer.is_conv_states_initialized[i] = next(windows), True
        layer.conv_kernel_size[i] = layer.conv_states[i].shape[-1]
    for i in kept.states:
        layer.recurrent_states[i], layer.is_recurrent_states_initialized[i] = next(states), True
    layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)
    if kept.keys:  # both in one layer: it is asked for keys by the same names
        row = next(rows)
        layer.update, layer.get_mask_sizes, layer.get_seq_length = row.update, row.get_mask_sizes, row.get_seq_length
    return layer


# ---- what is proved before a model is drawn from


def drawable(causal: PreTrainedModel, precision: Precision, *, gradient_checkpointing: bool,
             cache: Literal["auto", "never"]) -> HFModel:
    """The model with the cache that its architecture has, where drawing with it is proved equal to reading whole
    sequences; see `HF.cache`."""
    if cache == "never":
        return HFModel(causal, precision, gradient_checkpointing=gradient_checkpointing)
    if not is_recurrent(causal.config):
        return cached_or_not(causal, precision, gradient_checkpointing=gradient_checkpointing)
    try:
        hybrid = _attends(causal.config)
        model = (HybridHFModel if hybrid else RecurrentHFModel)(
            causal, precision, gradient_checkpointing=gradient_checkpointing)
        refusal = _refusal(model)
    except _UNLIKE as raised:
        log.warning("%s is drawn from without a cache of states, which is slow: %s: %s", type(causal).__name__,
                    type(raised).__name__, raised)
        return HFModel(causal, precision, gradient_checkpointing=gradient_checkpointing)
    model.refusal = refusal
    return model


def is_recurrent(config: Any) -> bool:
    """Whether some of the layers keep a state; older versions of the library do not say."""
    return any(hasattr(layer, "recurrent_states") for layer in _layers(config))


def _attends(config: Any) -> bool:
    """Whether some of the layers keep keys and values."""
    return any(hasattr(layer, "keys") for layer in _layers(config))


def _layers(config: Any) -> Sequence[Any]:
    try:
        return cast(Sequence[Any], DynamicCache(config=config).layers)
    except _UNLIKE:  # a config that does not know its layers' types
        return ()


def _refusal(model: _Stateful) -> str:
    """Why answers drawn with the model's cache would not be those it is trained on; empty where they are."""
    name = f"{type(model.causal).__name__} of transformers {transformers.__version__}"
    if not (error := state_error(model)) <= tolerance(model.causal):
        return (f"{name} computes other hidden states token by token than of whole sequences: they differ by "
                f"{error:.1e} of the largest")
    if (limit := step_limit(model)) and not (error := forced_limit_error(model)) <= tolerance(model.causal):
        return (f"{name} keeps its steps within {limit} (time_step_limit) in whole sequences, and does not token by "
                f"token: hidden states differ by {error:.1e} of the largest where all steps meet the limit")
    return ""


@torch.no_grad()
def state_error(model: _Stateful) -> float:
    """Largest difference between hidden states of rows that are read padded on the left and then token by token, and
    of the same sequences whole and each on its own, relative to the largest."""
    lengths, first = [9, 4, 6], [6, 1, 3]
    tokens, layout = probe_tokens(model, lengths)
    device, starts = model.device, torch.from_numpy(layout.offsets[:-1]).to(model.device)
    begun = layout.positions < torch.tensor(first, device=device)[layout.rows]
    with exactly(model):
        whole = torch.cat([model.run(part[None]).last_hidden_state[0] for part in torch.split(tokens, lengths)])
        _, before = probe_tokens(model, first)
        read = model._whole(tokens[begun], before)
        keys, values = ([x.new_zeros(len(first), x.shape[1], max(lengths), x.shape[2]) for x in kind]
                        for kind in (read.keys, read.values))
        attention = KVCache(keys, values)
        attention.write(before.rows, before.positions, read.keys, read.values)
        errors = [read.hidden - whole[begun]]
        for step in range(3):
            now = torch.tensor(first, device=device) + step
            errors.append(model._on(tokens[starts + now], now, attention, read.recurrent, slice(None))
                          - whole[starts + now])
    return float(torch.cat(errors).abs().max() / whole.abs().max())


def step_limit(model: HFTrunk) -> tuple[float, float] | None:
    """The limit of Mamba-2's steps, where there is one."""
    limits = [tuple(module.time_step_limit) for module in _limited(model)]
    return next((limit for limit in limits if limit != (0.0, inf)), None)


def forced_limit_error(model: _Stateful) -> float:
    """`state_error` where every step of the model meets its limit."""
    modules = _limited(model)
    before = [module.time_step_limit for module in modules]
    for module in modules:
        module.time_step_limit = _FORCED
    try:
        return state_error(model)
    finally:
        for module, limit in zip(modules, before, strict=True):
            module.time_step_limit = limit


def _limited(model: HFTrunk) -> list[Any]:
    return [module for module in model.causal.modules() if getattr(module, "time_step_limit", None) is not None]


@torch.no_grad()
def require_grouped_norm(causal: PreTrainedModel) -> None:
    """Raise `ConfigError` where Mamba-2's norm mixes its groups of heads, as old versions of the library do: weights
    trained elsewhere would give other logits."""
    groups = getattr(causal.config, "n_groups", 1)
    if causal.config.model_type != "mamba2" or groups == 1:
        return
    norm = next(module.norm for module in causal.modules() if hasattr(module, "A_log"))
    one = torch.ones(1, 1, len(norm.weight), dtype=norm.weight.dtype, device=norm.weight.device)
    other = one.clone()
    other[..., :one.shape[-1] // groups] = 8.0
    last = slice(-one.shape[-1] // groups, None)
    moved = float((norm(one, one) - norm(other, one))[..., last].abs().max() / norm(one, one)[..., last].abs().max())
    if moved > TOLERANCE:
        raise ConfigError(
            [f"Mamba2ForCausalLM of transformers {transformers.__version__} norms the {groups} groups of its heads as "
             f"one (n_groups): a larger first group moves the last by {moved:.1e}; Mamba-2's authors norm each"],
            next_step="Take the native Mamba-2 (policy: {use: ssm, weights: ...}), or a newer transformers.")
