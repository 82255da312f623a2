"""The native Mamba-2 language model: layers of a gated state-space recurrence behind a short convolution.

Source: Dao & Gu 2024 (2405.21060), section 7.1 and figure 6; the steps begin as in Gu & Dao 2023 (2312.00752), section
3.6. Parameters carry the names of Hugging Face's files, so weights are exchanged without a table. Linear layers, the
convolution and the recurrence all run on flat [M, ...] tokens (`ssd.py`), so nothing is padded. Knows no losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models.files import copy_named, read_weights, write_model
from posttrain_backends._torch.models.interface import (
    COMPUTE_DTYPE,
    PARAMETER_DTYPE,
    Precision,
    StateCache,
    autocast_to,
)
from posttrain_backends._torch.models.lean import Norm
from posttrain_backends._torch.models.projections import normed, plain_state
from posttrain_backends._torch.models.scan import Scan, by_torch
from posttrain_backends._torch.models.ssd import Packing, convolve, convolve_step, ssd_step
from posttrain_backends.families.files import drop_tied
from posttrain_backends.families.mamba2 import Mamba2Shape, config_of

EMBEDDING, OUTPUT = "backbone.embeddings.weight", "lm_head.weight"
_FIRST_STEPS = (1e-3, 0.1)
"""Between which the steps of a new model's heads lie, evenly in their logarithm."""
_FIRST_DECAYS = (1.0, 16.0)
"""Between which -A lies for a new model's heads."""


@final
class GatedNorm(nn.Module):
    """An RMSNorm of y silu(z), over the heads of each group on their own."""

    def __init__(self, shape: Mamba2Shape) -> None:
        super().__init__()
        self.groups, self.eps = shape.n_groups, shape.layer_norm_epsilon
        self.weight = nn.Parameter(torch.ones(shape.inner_size))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """[M, I], [M, I] -> [M, I]."""
        gated = (y * F.silu(z)).view(len(y), self.groups, -1)
        return F.rms_norm(gated, gated.shape[-1:], eps=self.eps).view_as(y) * self.weight


@final
class Mixer(nn.Module):
    """The Mamba-2 block of one layer. All but its two projections is computed in the parameters' type: what a state
    sums up over a sequence is more than bfloat16 holds."""

    def __init__(self, shape: Mamba2Shape) -> None:
        super().__init__()
        self.shape = shape
        I, E = shape.inner_size, shape.conv_size
        self.in_proj = nn.Linear(shape.hidden_size, I + E + shape.num_heads, shape.use_bias)
        self.conv1d = nn.Conv1d(E, E, shape.conv_kernel, groups=E, bias=shape.use_conv_bias)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.ones(shape.num_heads)) for _ in range(3))
        self.norm = GatedNorm(shape)
        self.out_proj = nn.Linear(I, shape.hidden_size, shape.use_bias)

    def forward(self, x: Tensor, norm: Norm, packing: Packing, scan: Scan) -> tuple[Tensor, Tensor, Tensor]:
        """[M, H] -> [M, H], and of the sequences at `packing.ends` the windows [S, K-1, E] and states [S, heads, P, N];
        reads `norm` of x."""
        def mixed(inputs: Tensor) -> tuple[Tensor, Tensor]:
            return convolve(inputs, self.conv1d.weight, self.conv1d.bias, packing)

        def recurred(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
            return scan(u, dt, A, B, C, packing)
        return self._around(x, norm, mixed, recurred)

    def step(self, x: Tensor, norm: Norm, window: Tensor, state: Tensor) -> Tensor:
        """`forward` for one token [B, H] per row of `window` and `state`, which move on in place."""
        def mixed(inputs: Tensor) -> tuple[Tensor, Tensor]:
            return convolve_step(inputs, self.conv1d.weight, self.conv1d.bias, window), window

        def recurred(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
            return ssd_step(u * dt[..., None], (dt * A).exp(), B, C, state), state
        return self._around(x, norm, mixed, recurred)[0]

    def _around(self, x: Tensor, norm: Norm, mixed: Callable[[Tensor], tuple[Tensor, Tensor]],
                recurred: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
                ) -> tuple[Tensor, Tensor, Tensor]:
        """The block, with its convolution and its recurrence in whichever form."""
        s, exact = self.shape, self.A_log.dtype
        (projected,) = normed(x, norm, self.in_proj)
        with torch.autocast(x.device.type, enabled=False):
            z, inputs, dt = torch.split(projected.to(exact), [s.inner_size, s.conv_size, s.num_heads], dim=-1)
            convolved, window = mixed(inputs)
            u, B, C = torch.split(F.silu(convolved), [s.inner_size, *[s.n_groups * s.state_size] * 2], dim=-1)
            u = u.reshape(-1, s.num_heads, s.head_dim)
            B, C = (v.reshape(-1, s.n_groups, s.state_size) for v in (B, C))
            dt = F.softplus(dt + self.dt_bias).clamp(*s.time_step_limit)
            y, state = recurred(u, dt, -self.A_log.exp(), B, C)
            gated = self.norm((y + self.D[:, None] * u).flatten(-2), z)
        return self.out_proj(gated), window, state


@final
class Mamba2Layer(nn.Module):
    """A mixer behind its norm and beside a residual path."""

    def __init__(self, shape: Mamba2Shape) -> None:
        super().__init__()
        self.norm, self.mixer = Norm(shape.hidden_size, shape.layer_norm_epsilon), Mixer(shape)

    def forward(self, x: Tensor, packing: Packing, scan: Scan) -> tuple[Tensor, Tensor, Tensor]:
        mixed, window, state = self.mixer(x, self.norm, packing, scan)
        return x + mixed, window, state

    def step(self, x: Tensor, window: Tensor, state: Tensor) -> Tensor:
        """See `Mixer.step`."""
        return x + self.mixer.step(x, self.norm, window, state)


@final
class Backbone(nn.Module):
    """Embedding, layers and the final norm, under the names of the files."""

    def __init__(self, shape: Mamba2Shape) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Mamba2Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm_f = Norm(shape.hidden_size, shape.layer_norm_epsilon)


@final
class Mamba2(nn.Module):
    """A Mamba-2 model on flat ragged tokens; see `RecurrentLanguageModel` for its interface.

    Parameters are float32 (float64 where `precision` says so); `bf16` computes the projections in bfloat16 by autocast.
    `gradient_checkpointing` keeps only the layers' inputs and computes the rest anew in the backward pass.
    """

    def __init__(self, shape: Mamba2Shape, *, seed: int = 0, device: torch.device | str = "cpu",
                 precision: Precision = "float32", gradient_checkpointing: bool = False,
                 scan: Scan = by_torch) -> None:
        super().__init__()
        self.shape, self.precision, self.gradient_checkpointing = shape, precision, gradient_checkpointing
        self.scan = scan
        """The recurrence over whole sequences."""
        with torch.device("meta"):  # nothing is allocated or drawn twice
            self.backbone = Backbone(shape)
            if not shape.tie_word_embeddings:
                self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.to(PARAMETER_DTYPE[precision]).to_empty(device=device)
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Drawn in float32 on the host: equal on all devices and types."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            p.copy_(_first(name, p.shape, self.shape.num_hidden_layers, generator))

    @property
    def output_weight(self) -> Tensor:
        return self.backbone.embeddings.weight if self.shape.tie_word_embeddings else self.lm_head.weight

    @property
    def module(self) -> nn.Module:
        return self

    @property
    def compute_dtype(self) -> torch.dtype:
        return COMPUTE_DTYPE[self.precision]

    @property
    def max_positions(self) -> None:
        """None: a state has no length."""
        return None

    @property
    def shares_prompts(self) -> bool:
        """No: a shared prompt would have to end a pass of its own, whose state the answers then go on from."""
        return False

    def autocast(self) -> AbstractContextManager[object]:
        return autocast_to(self.precision, self.output_weight.device)

    def hidden(self, tokens: Tensor, layout: Layout) -> Tensor:
        """[M] token ids -> [M, H] after the final norm. Tokens that sequences share are computed in each of them."""
        if len(layout.cells) > len(tokens):
            cells = torch.from_numpy(layout.cells).to(tokens.device)
            apart = Layout.from_offsets(layout.offsets, tokens.device)
            first = torch.from_numpy(layout.offsets).to(tokens.device)[layout.rows] + layout.positions
            return self.hidden(tokens[cells], apart)[first]
        if not len(tokens):
            return cast(Tensor, self.backbone.norm_f(self.backbone.embeddings(tokens)))
        return self._hidden(tokens, layout, final=False)[0]

    def read(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, StateCache]:
        """[M] -> hidden [M, H], and the state that each sequence ends with; see `RecurrentLanguageModel`."""
        return self._hidden(tokens, layout, final=True)

    def _hidden(self, tokens: Tensor, layout: Layout, *, final: bool) -> tuple[Tensor, StateCache]:
        """Both; without `final` the cache is one of no rows."""
        cache = StateCache([], [])
        with self.autocast():
            x = F.embedding(tokens, self.backbone.embeddings.weight)
            packing = Packing.of(layout, self.shape.chunk_size, self.shape.conv_kernel, final=final)
            for layer in self.backbone.layers:
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    x, window, state = checkpoint(
                        layer, x, packing, self.scan, use_reentrant=False, preserve_rng_state=False)
                else:
                    x, window, state = layer(x, packing, self.scan)
                cache.windows.append(window)
                cache.states.append(state)
            return cast(Tensor, self.backbone.norm_f(x)), cache

    def new_states(self, rows: int) -> StateCache:
        s, like = self.shape, self.output_weight
        def zeros(*size: int) -> list[Tensor]:
            return [like.new_zeros(rows, *size) for _ in self.backbone.layers]
        return StateCache(zeros(s.conv_kernel - 1, s.conv_size), zeros(s.num_heads, s.head_dim, s.state_size))

    def step(self, tokens: Tensor, cache: StateCache, rows: slice | None = None) -> Tensor:
        """One token [B] per row of the cache -> hidden [B, H]; see `RecurrentLanguageModel.step`."""
        with self.autocast():
            x = F.embedding(tokens, self.backbone.embeddings.weight)
            for layer, window, state in zip(self.backbone.layers, cache.windows, cache.states, strict=True):
                if rows is not None:
                    window, state = window[rows], state[rows]
                x = cast(Mamba2Layer, layer).step(x, window, state)
            return cast(Tensor, self.backbone.norm_f(x))

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder."""
        write_model(folder, config_of(self.shape), plain_state(self))

    def load(self, folder: Path) -> None:
        """Take the weights of a folder, in whatever type they are. Raises `ConfigError` where they do not fit."""
        weights = read_weights(folder)
        if self.shape.tie_word_embeddings:
            drop_tied(weights, OUTPUT, EMBEDDING, folder)
        copy_named(weights.items(), self.state_dict(), f"policy.weights {folder}")


def _first(name: str, size: torch.Size, layers: int, generator: torch.Generator) -> Tensor:
    """What a parameter of a new model is: a matrix evenly within 1 / sqrt(its inputs), those that write to the residual
    path smaller by sqrt(layers), the embedding N(0, 0.02^2); steps and decays by their bounds; else 1, a bias 0."""
    kind = ".".join(name.split(".")[-2:])
    if kind == "mixer.A_log":
        return torch.empty(size).uniform_(*_FIRST_DECAYS, generator=generator).log_()
    if kind == "mixer.dt_bias":
        steps = torch.empty(size).uniform_(*map(math.log, _FIRST_STEPS), generator=generator).exp_()
        return steps + torch.log(-torch.expm1(-steps))  # softplus takes it back
    if kind == "embeddings.weight":
        return torch.empty(size).normal_(0, 0.02, generator=generator)
    if len(size) == 1:
        return torch.full(size, float(not kind.endswith("bias")))
    bound = 1 / math.sqrt(size[1:].numel()) / (math.sqrt(layers) if kind == "out_proj.weight" else 1.0)
    return torch.empty(size).uniform_(-bound, bound, generator=generator)
