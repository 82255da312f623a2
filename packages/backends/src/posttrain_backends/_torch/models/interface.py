"""What the learner and the engines ask of a model: hidden states of ragged tokens, and an output matrix.

Knows no model, no loss and no sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, final, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models.grouped import SharedPrompts
from posttrain_backends._torch.models.mixture import Routes


@final
@dataclass(frozen=True, slots=True, eq=False)
class KVCache:
    """Keys (after the rotary embedding) and values of B rows of up to T tokens, allocated once."""

    keys: list[Tensor]
    """Per layer [B, kv_heads, T, D]."""
    values: list[Tensor]
    """Per layer [B, kv_heads, T, D]."""
    weights: Sequence[object] = ()
    """Per layer, what the model prepared for decoding with the weights it had when the cache was made."""

    @property
    def rows(self) -> int:
        return self.keys[0].shape[0]

    @property
    def columns(self) -> int:
        return self.keys[0].shape[2]

    def room(self, rows: int, columns: int) -> KVCache:
        """An empty cache of another size, without weights."""
        def zeros(layers: list[Tensor]) -> list[Tensor]:  # not empty: what a masked cell holds must be finite
            return [x.new_zeros(rows, x.shape[1], columns, x.shape[3]) for x in layers]
        return KVCache(zeros(self.keys), zeros(self.values))

    def write(self, rows: Tensor, positions: Tensor, keys: list[Tensor], values: list[Tensor]) -> None:
        """Put the keys and values [m, kv_heads, D] of each layer at (rows[m], positions[m])."""
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            self.keys[layer][rows, :, positions] = k.to(self.keys[layer].dtype)
            self.values[layer][rows, :, positions] = v.to(self.values[layer].dtype)


@final
@dataclass(frozen=True, slots=True, eq=False)
class StateCache:
    """What a recurrent model keeps of B rows: of one size however long they are, allocated once."""

    windows: list[Tensor]
    """Per layer, the last inputs of its convolution: [B, K-1, E], the newest last; as the library has them in its own
    models."""
    states: list[Tensor]
    """Per layer, the state of its recurrence: [B, heads, P, N]; as the library has it in its own models."""

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, [B, ...] each."""
        return [*self.windows, *self.states]


@final
@dataclass(frozen=True, slots=True, eq=False)
class HybridCache:
    """What a model keeps of B rows some of whose layers attend to all tokens, and others keep a state."""

    attention: KVCache
    recurrent: StateCache


class Trunk(Protocol):
    """Hidden states of flat ragged tokens, each from the tokens up to it."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type matrices are multiplied in."""
        ...

    @property
    def max_positions(self) -> int | None:
        """Longest sequence; None where the model sets no limit."""
        ...

    @property
    def shares_prompts(self) -> bool:
        """Whether it is worth giving `hidden` a layout whose sequences share tokens: they are computed once."""
        ...

    def hidden(self, tokens: Tensor, layout: Layout) -> Tensor:
        """[M] token ids -> [M, H], what the output matrix or the value head is applied to."""
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """The precision the model computes in. `hidden`, `prefill` and `decode` enter it themselves; a loop over
        `decode` holds it open, so that the weights are cast once and not in every step."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def state_dict(self) -> Mapping[str, Tensor]:
        """Parameters and buffers under canonical names, live."""
        ...

    def requires_grad_(self, requires_grad: bool = True, /) -> Trunk: ...
    def save(self, folder: Path) -> None:
        """Write what the model can be loaded from: safetensors and `config.json`."""
        ...


@runtime_checkable
class LanguageModel(Trunk, Protocol):
    """A causal language model on flat ragged tokens."""

    @property
    def output_weight(self) -> Tensor:
        """[V, H]; logits are `hidden @ output_weight.T`."""
        ...

    @property
    def module(self) -> nn.Module:
        """What computes; linear layers in it may be replaced by others."""
        ...


class NativeModel(LanguageModel, Protocol):
    """A language model of ours or the user's, which is made first and given its weights then."""

    def load(self, folder: Path) -> None:
        """Take the weights of a folder. Raises `ConfigError` where they do not fit."""
        ...


@runtime_checkable
class ValueModel(Trunk, Protocol):
    """A trunk with a read-out of values and no output matrix: a critic that was a reward model, say."""

    @property
    def value_head(self) -> nn.Linear:
        """H -> one value per reward column; in none of `named_parameters` and `state_dict`, but written by `save`."""
        ...


@runtime_checkable
class AdaptedLanguageModel(LanguageModel, Protocol):
    """A language model that may have an adapter, which alone is trained, on weights that stay as they are."""

    @property
    def has_adapter(self) -> bool: ...

    def without_adapter(self) -> AbstractContextManager[None]:
        """Inside, the model computes what it did before it was given the adapter."""
        ...

    def weights_under_adapter(self) -> Mapping[str, Tensor]:
        """Parameters and buffers by the names they have without the adapter, live; each storage once."""
        ...


@runtime_checkable
class Identified(Trunk, Protocol):
    """A trunk that may have weights which no state holds, as nothing changes them: they are read from where the
    configuration says."""

    def fingerprint(self) -> Tensor | None:
        """[32] uint8, equal for equal weights of this kind; None where the state holds all."""
        ...


@runtime_checkable
class CachedLanguageModel(LanguageModel, Protocol):
    """A language model that can continue from cached keys and values."""

    def new_cache(self, rows: int, columns: int) -> KVCache:
        """An empty cache of the model's own shape, type and device."""
        ...

    def prefill(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """[M] -> hidden [M, H] and per layer keys and values, each [M, kv_heads, D]."""
        ...

    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache, rows: slice | None = None) -> Tensor:
        """One token [B] per cache row at `positions` [B] -> hidden [B, H].

        Writes its keys and values there and attends to positions up to its own. `rows` names the cache rows where
        they are not all.
        """
        ...


@runtime_checkable
class GroupedLanguageModel(CachedLanguageModel, Protocol):
    """A language model that can read keys and values of a prompt once for all rows that continue it."""

    def decode_grouped(self, tokens: Tensor, positions: Tensor, cache: KVCache, prompts: SharedPrompts,
                       rows: slice | None = None, routes: Routes | None = None) -> Tensor:
        """`decode` where the cache holds what comes behind the prompts: a row's token goes to the column of its
        position less the length of its prompt."""
        ...


@runtime_checkable
class Routed(CachedLanguageModel, Protocol):
    """A language model whose layers may be mixtures of experts: each forward pass can be told, and tells, where tokens
    went."""

    @property
    def mixtures(self) -> tuple[int, ...]:
        """The layers with experts."""
        ...

    @property
    def experts(self) -> int:
        """In each of them."""
        ...

    @property
    def experts_per_token(self) -> int: ...
    def hidden(self, tokens: Tensor, layout: Layout, routes: Routes | None = None) -> Tensor: ...
    def prefill(self, tokens: Tensor, layout: Layout,
                routes: Routes | None = None) -> tuple[Tensor, list[Tensor], list[Tensor]]: ...
    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache, rows: slice | None = None,
               routes: Routes | None = None) -> Tensor: ...


@runtime_checkable
class Rebalanced(Routed, Protocol):
    """A mixture that is led to an even load beside the loss, as by a bias in its routers' choice."""

    def rebalance(self, sent: np.ndarray) -> None:
        """Move by what an optimiser step sent to each expert of each layer, [L, E] tokens."""
        ...


@runtime_checkable
class RecurrentLanguageModel(LanguageModel, Protocol):
    """A language model that can continue from a state, which does not grow with the tokens it has read."""

    def new_states(self, rows: int) -> StateCache:
        """The states of rows that have read nothing, of the model's own shape, type and device."""
        ...

    def read(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, StateCache]:
        """[M] -> hidden [M, H], and the state that each of the S sequences, none of them empty, ends with."""
        ...

    def step(self, tokens: Tensor, cache: StateCache, rows: slice | None = None) -> Tensor:
        """One token [B] per row of the cache -> hidden [B, H]; the row's state moves on in place. `rows` names the
        cache rows where they are not all."""
        ...


@runtime_checkable
class HybridLanguageModel(LanguageModel, Protocol):
    """A language model that can continue from keys and values of some of its layers and states of others."""

    def new_pasts(self, rows: int, columns: int) -> HybridCache:
        """Of rows that have read nothing, of the model's own shape, type and device."""
        ...

    def read_pasts(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor], list[Tensor], StateCache]:
        """[M] -> hidden [M, H]; keys and values of each layer that has some, [M, kv_heads, D] each; and the states
        that each of the S sequences, none of them empty, ends with."""
        ...

    def step_at(self, tokens: Tensor, positions: Tensor, cache: HybridCache, rows: slice | None = None) -> Tensor:
        """One token [B] per row of the cache at `positions` [B] -> hidden [B, H]; keys, values and states move on in
        place. `rows` names the cache rows where they are not all."""
        ...


@runtime_checkable
class Refusing(Protocol):
    """A model that may be found unfit to be drawn from."""

    @property
    def refusal(self) -> str:
        """Why an answer drawn from it token by token is not one of the model that is trained; empty where it is."""
        ...


Precision = Literal["float32", "bf16", "float64"]
PARAMETER_DTYPE: Mapping[str, torch.dtype] = {
    "float32": torch.float32, "bf16": torch.float32, "float64": torch.float64}
COMPUTE_DTYPE: Mapping[str, torch.dtype] = {**PARAMETER_DTYPE, "bf16": torch.bfloat16}
"""Precision -> the type of parameters, and the type matrices are multiplied in."""


def autocast_to(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Multiplies matrices in bfloat16 where `precision` is `bf16`, else leaves types alone; parameters keep theirs."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
