"""Causal models of Hugging Face transformers with the interface of `LanguageModel`, or of its trunk. Knows no learner.

The library's own module computes hidden states; the output matrix is applied by the learner in chunks, so the module's
logits never exist. Sequences are padded on the right, block by block, which no causal model sees; where the load-time
probe proves that the module keeps packed sequences apart, they may be packed in one row instead.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from posttrain.errors import ConfigError
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from posttrain_backends._torch.layout import Block, Layout
from posttrain_backends._torch.models.hf_attention import FLEX, additive_mask, block_mask
from posttrain_backends._torch.models.hf_routers import named_as_in_files
from posttrain_backends._torch.models.interface import COMPUTE_DTYPE, KVCache, Precision, autocast_to
from posttrain_backends._torch.quantised import fingerprint, is_quantised, rounds_inputs, save_quantised
from posttrain_backends._torch.quiet import without_bars
from posttrain_backends._torch.trees import Forest, forest
from posttrain_backends._torch.unadapted import switched_off

log = logging.getLogger(__name__)

MASKED = frozenset({"sdpa", "eager"})
"""Attention that takes a mask of our own; another one is changed to torch's while there is one."""
_LARGE_LOGIT = 1e3
"""Far above every soft cap."""
TOLERANCE = 1e-4
"""Of the probes, in float32 and relative to the largest hidden state: what is not exact is far above it."""
_ROUNDED = 0.1
"""Of the probes where layers round their inputs to 8 bits."""


class HFTrunk:
    """Hidden states of a causal module of any read-out.

    `causal` is the whole module; its trunk and its read-out `matrix` [outputs, H] are used apart from each other.
    """

    def __init__(self, causal: PreTrainedModel, matrix: Tensor, precision: Precision, *,
                 gradient_checkpointing: bool = False) -> None:
        self.causal, self.precision = causal, precision
        self.packed = self.trees = False
        """Whether sequences stand in one row, and shared beginnings once: only where a probe proved it exact."""
        self.trunk: nn.Module = causal.base_model
        self._takes_positions = "position_ids" in parameters_of(self.trunk)
        self._trains_in_train_mode = gradient_checkpointing
        self.device, self._width = matrix.device, matrix.shape[1]
        if gradient_checkpointing:
            causal.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def embeddings(self) -> int:
        """Token ids that the module knows."""
        return len(self.causal.get_input_embeddings().weight)

    @property
    def compute_dtype(self) -> torch.dtype:
        return COMPUTE_DTYPE[self.precision]

    @property
    def max_positions(self) -> int | None:
        limit = getattr(self.causal.config, "max_position_embeddings", None)
        return None if limit is None else int(limit)

    @property
    def shares_prompts(self) -> bool:
        """Where the load-time probe proves that the module follows a mask in the form of a tree."""
        return self.trees and not self.packed

    def autocast(self) -> AbstractContextManager[object]:
        return autocast_to(self.precision, self.device)

    def hidden(self, tokens: Tensor, layout: Layout) -> Tensor:
        """[M] token ids -> [M, H]."""
        with self.autocast(), self._mode():
            if self.packed and len(tokens):
                with self._over_block(None):
                    together: Tensor = self.run(tokens[None], layout.positions[None]).last_hidden_state
                return together[0]
            if self.trees and (found := forest(layout, self._width)) is not None:
                return self.over(found, tokens, layout)
            parts = []
            for block in layout.blocks:
                with self._over_block(block):
                    parts.append(block.unpad(self.run(block.pad(tokens)).last_hidden_state))
        return self._in_order(parts, layout)

    def over(self, trees: Forest, tokens: Tensor, layout: Layout) -> Tensor:
        """Hidden states where shared beginnings stand once in a row with all that continue them."""
        parts = []
        for block, sees in zip(trees.blocks, trees.masks, strict=True):
            flex = self.causal.config._attn_implementation == FLEX
            mask = block_mask(sees) if flex else additive_mask(sees, self.compute_dtype)
            with nullcontext() if flex else self._masked_attention(), self._over_block(block):
                out = self.run(block.pad(tokens), block.pad(layout.positions), attention_mask=mask)
            parts.append(block.unpad(out.last_hidden_state))
        return torch.cat(parts).index_select(0, trees.inverse)

    def run(self, tokens: Tensor, positions: Tensor | None = None, **named: Any) -> Any:
        """The trunk on [rows, columns] ids; positions count from 0 in every row where none are given."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        given = {"position_ids": positions} if self._takes_positions else {}
        return self.trunk(input_ids=tokens, **given, **{"use_cache": False, **named})

    def _over_block(self, block: Block | None) -> AbstractContextManager[None]:
        """Around the pass over a block's tokens, or over all as they are."""
        return nullcontext()

    @contextmanager
    def _mode(self) -> Iterator[None]:
        """Gradient checkpointing works in train mode only; dropout is 0 in it, as `load` sees to."""
        if self._trains_in_train_mode:
            self.causal.train(torch.is_grad_enabled())
        yield

    @contextmanager
    def _masked_attention(self) -> Iterator[None]:
        """Attention that takes our mask."""
        config, chosen = self.causal.config, self.causal.config._attn_implementation
        if chosen in MASKED:
            yield
            return
        config._attn_implementation = "sdpa"
        try:
            yield
        finally:
            config._attn_implementation = chosen

    def _in_order(self, parts: Sequence[Tensor], layout: Layout) -> Tensor:
        if not parts:
            return torch.zeros(0, self._width, dtype=self.causal.dtype, device=self.device)
        return parts[0] if layout.inverse is None else torch.cat(list(parts)).index_select(0, layout.inverse)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.causal.named_parameters()

    def state_dict(self) -> Mapping[str, Tensor]:
        """By the names of files, each storage once (tied weights have one name); with an adapter, what it adds."""
        names = self.causal.state_dict()
        adapter = {name: tensor for name, tensor in names.items() if ADAPTER in name}
        return adapter or self._as_in_files(names)

    @property
    def has_adapter(self) -> bool:
        return bool(adapted(self.causal))

    def without_adapter(self) -> AbstractContextManager[None]:
        return switched_off(list(adapted(self.causal).values()))

    def weights_under_adapter(self) -> Mapping[str, Tensor]:
        return self._as_in_files(_unadapted(self.causal))

    def _as_in_files(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return named_as_in_files(self.causal.config.model_type, _without_ties(tensors))

    def requires_grad_(self, requires_grad: bool = True, /) -> HFTrunk:
        self.causal.requires_grad_(requires_grad)
        return self

    def fingerprint(self) -> Tensor | None:
        """Of weights that `state_dict` leaves out and the configuration names; see `Identified`."""
        return fingerprint(self.causal) if self.has_adapter and is_quantised(self.causal) else None

    def save(self, folder: Path) -> None:
        """Write a folder that `from_pretrained` loads; an adapter is merged into the weights it changes, and stands
        beside them where they are quantised."""
        with without_bars():
            if is_quantised(self.causal):
                save_quantised(self.causal, folder)
            else:
                self.causal.save_pretrained(folder, state_dict=merged(self.causal))


class HFModel(HFTrunk):
    """An `AutoModelForCausalLM` without a cache that we can write: engines compute pasts anew."""

    def __init__(self, causal: PreTrainedModel, precision: Precision, *, gradient_checkpointing: bool = False) -> None:
        super().__init__(causal, causal.get_output_embeddings().weight, precision,
                         gradient_checkpointing=gradient_checkpointing)

    @property
    def output_weight(self) -> Tensor:
        weight: Tensor = self.causal.get_output_embeddings().weight
        return weight

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self.causal
        return module


class CachedHFModel(HFModel):
    """A module whose every layer keeps keys and values of all tokens, so that it can continue from our own cache."""

    def __init__(self, causal: PreTrainedModel, precision: Precision, *, gradient_checkpointing: bool = False) -> None:
        super().__init__(causal, precision, gradient_checkpointing=gradient_checkpointing)
        with torch.no_grad():
            tokens = torch.zeros(1, dtype=torch.long, device=self.device)
            _, keys, values = self.prefill(tokens, Layout.from_offsets([0, 1], self.device))
        self._sizes = [(k.shape[1], k.shape[2], v.shape[2]) for k, v in zip(keys, values, strict=True)]

    def prefill(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """[M] -> hidden [M, H], and per layer keys and values, each [M, kv_heads, D]."""
        hidden: list[Tensor] = []
        layers: list[list[tuple[Tensor, Tensor]]] = []
        with self.autocast(), self._mode():
            for block in layout.blocks:
                cache = DynamicCache()
                with self._over_block(block):
                    out = self.run(block.pad(tokens), past_key_values=cache, use_cache=True)
                hidden.append(block.unpad(out.last_hidden_state))
                layers.append([(block.unpad(c.keys.transpose(1, 2)), block.unpad(c.values.transpose(1, 2)))
                               for c in cache.layers])
        columns = [[self._in_order([pair[i] for pair in layer], layout) for layer in zip(*layers)] for i in (0, 1)]
        return self._in_order(hidden, layout), columns[0], columns[1]

    def new_cache(self, rows: int, columns: int) -> KVCache:
        def zeros(width: int) -> list[Tensor]:  # not empty: what a masked cell holds must be finite
            return [torch.zeros(rows, size[0], columns, size[width], dtype=self.compute_dtype, device=self.device)
                    for size in self._sizes]
        return KVCache(zeros(1), zeros(2))

    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache, rows: slice | None = None) -> Tensor:
        """One token [B] per cache row -> hidden [B, H]; see `CachedLanguageModel.decode`."""
        used = slice(None) if rows is None else rows
        columns = int(positions.max()) + 1
        place = torch.arange(len(positions), device=positions.device)
        reached = torch.arange(columns, device=positions.device) <= positions[:, None]
        mask = additive_mask(reached, self.compute_dtype)
        layers = [CacheRow(k[used], v[used], place, positions, columns)
                  for k, v in zip(cache.keys, cache.values, strict=True)]
        with self.autocast(), self._mode(), self._masked_attention():
            out = self.run(tokens[:, None], positions[:, None], attention_mask=mask[:, None, None, :],
                            past_key_values=Cache(layers=layers), use_cache=True)
        hidden: Tensor = out.last_hidden_state
        return hidden[:, 0]


class CacheRow(CacheLayerMixin):  # type: ignore[misc]  # the library is not typed here
    """One layer of our cache, for one step: takes the new keys and values at each row's own position."""

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, positions: Tensor, columns: int) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self._rows, self._positions, self._columns = rows, positions, columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """[B, kv_heads, 1, D] -> all keys and values up to the farthest row's, [B, kv_heads, columns, D]."""
        for cells, new in ((self.keys, key_states), (self.values, value_states)):
            cells[self._rows, :, self._positions] = new[:, :, 0].to(cells.dtype)
        return self.keys[:, :, :self._columns], self.values[:, :, :self._columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._columns, 0

    def get_seq_length(self) -> int:
        return self._columns - 1

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])

    def get_max_cache_shape(self) -> int:
        """Its name before transformers 5.13."""
        return self.get_max_length()


ADAPTER = ".lora_"
"""In the names of the weights that an adapter adds."""
_WRAPPED = ".base_layer."
"""In the names of the weights that an adapter changes."""


def merged(causal: PreTrainedModel) -> dict[str, Tensor]:
    """All weights by the names of the module without its adapter, the adapter's product added; a copy where it is."""
    weights = _unadapted(causal)
    for name, module in adapted(causal).items():
        weight = weights[f"{name}.weight"]
        weights[f"{name}.weight"] = weight + module.get_delta_weight("default").to(weight.dtype)
    return weights


def _unadapted(causal: PreTrainedModel) -> dict[str, Tensor]:
    """The weights under the adapter, by the names of the module without it; live."""
    return {name.replace(_WRAPPED, "."): tensor for name, tensor in causal.state_dict().items() if ADAPTER not in name}


def adapted(causal: nn.Module) -> dict[str, Any]:
    """The layers that have an adapter, by name."""
    return {name: module for name, module in causal.named_modules()
            if f"{ADAPTER[1:]}A" in dict(module.named_children())}


def _without_ties(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each storage under the first of its names."""
    first: dict[tuple[int | str, tuple[int, ...]], str] = {}  # tensors of torchao give 0 for their place
    return {name: t for name, t in tensors.items()
            if first.setdefault((t.data_ptr() or name, tuple(t.shape)), name) == name}


def parameters_of(module: nn.Module) -> frozenset[str]:
    """Names that the module's `forward` takes."""
    return frozenset(inspect.signature(module.forward).parameters)


# ---- what is proved before a model is used


def cached_or_not(causal: PreTrainedModel, precision: Precision, *, gradient_checkpointing: bool) -> HFModel:
    """The model with a cache where drawing with it is proved equal to reading whole sequences, else without."""
    plain = HFModel(causal, precision, gradient_checkpointing=gradient_checkpointing)
    if not attends_to_all(causal.config):
        reason = "its layers do not attend to all tokens"
    else:
        try:
            cached = CachedHFModel(causal, precision, gradient_checkpointing=gradient_checkpointing)
            error = cache_error(cached)
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as raised:
            reason = f"{type(raised).__name__}: {raised}"
        else:
            if error <= tolerance(causal):
                return cached
            reason = f"hidden states differ by {error:.1e} of the largest"
    log.warning("%s is drawn from without a cache of keys and values, which is slow: %s",
                type(causal).__name__, reason)
    return plain


def tolerance(causal: PreTrainedModel) -> float:
    """Of the probes of this module."""
    return _ROUNDED if rounds_inputs(causal) else TOLERANCE


def attends_to_all(config: Any) -> bool:
    """Whether every layer is full attention; a window would be lost in our mask."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return kinds == {"full_attention"} and window is None


@torch.no_grad()
def cache_error(model: CachedHFModel) -> float:
    """Largest difference between hidden states of tokens read one by one and all together, relative to the largest."""
    tokens, layout = probe_tokens(model, [5, 3])
    with exactly(model):
        whole = model.hidden(tokens, layout)
        cache = model.new_cache(2, 6)
        _, keys, values = model.prefill(tokens[[0, 1, 5]], Layout.from_offsets([0, 2, 3], model.device))
        cache.write(torch.tensor([0, 0, 1], device=model.device), torch.tensor([0, 1, 0], device=model.device),
                    keys, values)
        steps = [model.decode(tokens[[2 + i, 6 + i]], torch.tensor([2 + i, 1 + i], device=model.device), cache)
                 for i in range(2)]
    expected = whole[[2, 6, 3, 7]]
    return float((torch.cat(steps) - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def packing_error(model: HFTrunk) -> float:
    """Largest difference between hidden states of two sequences in one row and each on its own, relative."""
    tokens, layout = probe_tokens(model, [5, 3])
    with exactly(model):
        together = model.run(tokens[None], layout.positions[None]).last_hidden_state[0]
        apart = torch.cat([model.run(part[None]).last_hidden_state[0] for part in torch.split(tokens, [5, 3])])
    return float((together - apart).abs().max() / apart.abs().max())


@torch.no_grad()
def tree_error(model: HFTrunk) -> float:
    """Largest difference between hidden states of two sequences that share their beginning in one row, and of each on
    its own, relative."""
    tokens, _ = probe_tokens(model, [7])
    layout = Layout.from_offsets([0, 5, 9], model.device, np.array([0, 1, 2, 3, 4, 0, 1, 5, 6]))
    trees = forest(layout, 2**20)
    assert trees is not None, "two continuations of two tokens are cheaper together"
    with exactly(model):
        together = model.over(trees, tokens, layout)
        apart = [model.run(tokens[rows][None]).last_hidden_state[0] for rows in ([0, 1, 2, 3, 4], [0, 1, 5, 6])]
    expected = torch.cat([apart[0], apart[1][2:]])
    return float((together - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def require_plain_head(model: HFModel) -> None:
    """Raise `ConfigError` where the module's logits are not its hidden states times its output matrix (a bias, a scale,
    a soft cap): the learner would compute others. The product is made large for it, as caps leave small logits alone.
    """
    tokens, _ = probe_tokens(model, [5])
    with exactly(model):
        own = model.run(tokens[None]).last_hidden_state[0] @ model.output_weight.t()
        factor = _LARGE_LOGIT / float(own.abs().max())
        enlarged = model.causal.get_output_embeddings().register_forward_hook(lambda _, given, out: out * factor)
        try:
            logits = model.causal(input_ids=tokens[None], use_cache=False).logits[0] / factor
        finally:
            enlarged.remove()
    if (error := float((logits - own).abs().max() / own.abs().max())) > TOLERANCE:
        raise ConfigError([f"the logits of {type(model.causal).__name__} are not its hidden states times its output "
                           f"matrix (they differ by {error:.1e} of the largest); a bias, scale or soft cap on logits "
                           "is not supported yet"])


def probe_tokens(model: HFTrunk, lengths: Sequence[int]) -> tuple[Tensor, Layout]:
    """Ids of sequences of the given lengths, and where they lie."""
    V, M = model.embeddings, sum(lengths)
    tokens = (torch.arange(1, M + 1, device=model.device) * 7919) % V
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return tokens, Layout.from_offsets(offsets, model.device)


@contextmanager
def exactly(model: HFTrunk) -> Iterator[None]:
    """Probes compare in the parameters' own type."""
    precision, model.precision = model.precision, "float32"
    try:
        yield
    finally:
        model.precision = precision
