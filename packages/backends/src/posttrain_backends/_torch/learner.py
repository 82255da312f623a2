"""A torch model that scores tokens and is trained: the `Learner` of every torch backend.

Gradients are sums, kept per slot in the parameters' own type (float32, or float64 for a float64 model), so how a step
is split does not change it. Knows ragged batches, a loss and an optimiser; not which model computes the hidden states.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from posttrain.comm import Comm, SingleProcess
from posttrain.data import Array, Loss, Metric, Metrics, MicroBatch, Rollouts, TokenOutputs, to_numpy
from posttrain.errors import ConfigError
from posttrain.loss import SHARED
from posttrain.ops import ops_of
from posttrain.protocols import Memory, Objective, Optimization, Output, Sampler, Scorer, Tokenizer
from posttrain.watermark import Watermark
from torch import Tensor, nn

from posttrain_backends._torch import guard
from posttrain_backends._torch.head import (
    Readout,
    chosen_action_values,
    chosen_logprobs,
    compared_logprobs,
    expected_values,
    walk,
)
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.logits import PLAIN, Form
from posttrain_backends._torch.memory import (
    memory_of_device,
    snapshot_where_it_fails,
    translating_memory_errors,
    watermark_of,
)
from posttrain_backends._torch.models import files
from posttrain_backends._torch.models.interface import (
    AdaptedLanguageModel,
    Identified,
    LanguageModel,
    Rebalanced,
    Routed,
    Trunk,
    ValueModel,
)
from posttrain_backends._torch.models.mixture import Routes, replayed
from posttrain_backends._torch.one_pass import READ, LossOfChunks, takes_one_pass
from posttrain_backends._torch.optimizer import NamedAdamW
from posttrain_backends._torch.sharing import computed
from posttrain_backends._torch.unadapted import Unadapted
from posttrain_backends.engines import Batched, require_quantizable
from posttrain_backends.families.files import HEAD_FILES
from posttrain_backends.learning import (
    AT_THE_END,
    diverged,
    incomparable,
    require_differentiable,
    require_outputs,
    require_weights_of_slots,
)
from posttrain_backends.ragged import offsets_of_tokens

_COUNTERS = ("version", "bad_steps", "steps")
"""Entries of `state` that are single numbers."""
_FROZEN = "frozen_weights"
"""Entry of `state` that tells the weights which it leaves out, where there are any."""
_GRAMIAN_COLUMNS = 2**20
"""Gradient entries of one slot that `gramian` holds in float64 at a time."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Actions:
    """Tokens of one forward pass, and where in them actions and episodes' ends lie."""

    tokens: Tensor
    """[U] those that are computed."""
    layout: Layout
    before: Tensor
    """[N] the token before each action: it gives the action's log-prob, and the value of the state before it."""
    chosen: Tensor
    """[N] the id of each action."""
    last: Tensor
    """[E] the last token of each episode; [0] where nobody asks for it."""
    place: np.ndarray
    """[M] where each given token is among those computed; -1 where it is not."""
    routes: Routes
    """The experts that are replayed; it is told the others."""


_TRAINING_ONLY = frozenset({Output.EXPERT_LOAD})
"""Outputs that look at a whole optimiser step."""


@final
class TorchLearner:
    """See `posttrain.protocols.Learner`. Without `optimization` it scores only and holds no gradients and no moments.

    `head_rows` are the rows of one chunk of logits, 0 for as many as suit the device, and `form` is what reads them;
    gradients are summed over the ranks of `comm`, whose learners hold equal weights. A model of values alone brings its
    own value head, and has no action values: those are averaged under the model's own policy.

    An action-value head is a matrix [V, H] and a bias [V] on the trunk's last hidden state, one beside the other for
    each of `action_value_heads` reward columns; as much to train as an output matrix each. It begins at 0, as a value
    head does, and is trained in full where the trunk has an adapter.
    """

    def __init__(self, model: LanguageModel | ValueModel, *, optimization: Optimization | None = None,
                 value_heads: int = 0, action_value_heads: int = 0, head_rows: int = 0,
                 comm: Comm = SingleProcess(), form: Form = PLAIN) -> None:
        self._language = None if isinstance(model, ValueModel) else model
        self.trunk: Trunk = model
        weight = model.value_head.weight if isinstance(model, ValueModel) else model.output_weight
        self.device, self._dtype = weight.device, weight.dtype
        self._head_rows, self._form, self._version = head_rows, form, 0
        self.value_head = model.value_head if isinstance(model, ValueModel) else _zero_head(value_heads, weight)
        if self._language is None:
            require_no_action_values(action_value_heads, "this model")
        self.action_value_head = _zero_head(action_value_heads * len(weight), weight)
        self._parameters = {n: p for n, p in self._named_parameters() if p.requires_grad} if optimization else {}
        if not optimization:
            for _, p in self._named_parameters():
                p.requires_grad_(False)
        self._optimizer = NamedAdamW(self._parameters, optimization) if optimization else None
        self._gradients: dict[str, dict[str, Tensor]] = {}
        self._comm, self._summed = comm, False
        self._bad_steps = 0
        self._reference: TorchLearner | Unadapted | None = None
        self._start: dict[str, Tensor] | None = None
        self._routed = model if isinstance(model, Routed) and model.mixtures else None
        self._sent: dict[int, Tensor] = {}

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.trunk.named_parameters()
        for head, module in self._heads():
            for name, p in module.named_parameters():
                yield f"{head}.{name}", p

    def _heads(self) -> Iterator[tuple[str, nn.Linear]]:
        """Those there are, by name."""
        if self.value_head is not None:
            yield "value_head", self.value_head
        if self.action_value_head is not None:
            yield "action_value_head", self.action_value_head

    # ---- what the model says

    @property
    def model(self) -> LanguageModel:
        """The language model. Raises `ConfigError` where values are all that the model gives."""
        if self._language is None:
            raise ConfigError(["this model gives values and no log-probs; it can be a critic alone"])
        return self._language

    @property
    def provides(self) -> frozenset[Output]:
        tokens = {Output.LOGPROBS, Output.ENTROPY} if self._language is not None else set()
        values = {Output.VALUES, Output.BOOTSTRAP_VALUES} if self.value_head is not None else set()
        actions = {Output.ACTION_VALUES, Output.EXPECTED_ACTION_VALUES} if self.action_value_head is not None else set()
        compared = {Output.REFERENCE_KL} if self._reference is not None else set()
        return frozenset(tokens | values | actions | compared)

    @property
    def version(self) -> int:
        """Optimiser steps taken: a skipped step leaves the weights, and so the version, as they are."""
        return self._version

    def score(self, rollouts: Rollouts, outputs: frozenset[Output], temperature: float) -> TokenOutputs:
        """Outputs of all actions in one forward pass, as NumPy; columns that nobody asked for are None, and log-probs
        NaN. Raises `MemoryExhausted`."""
        self._check_outputs(outputs)

        @torch.no_grad()
        def scored() -> TokenOutputs:
            ends = np.maximum(np.cumsum(rollouts.episode_tokens) - 1, 0)
            actions = self._actions(rollouts.tokens, rollouts.offsets, rollouts.source, ends, outputs, rollouts.routes)
            reference = self._reference_at(rollouts.tokens, rollouts.offsets, rollouts.source, outputs)
            return self._outputs(actions, outputs, temperature, reference)
        out = translating_memory_errors(scored)
        return _to_host(out)

    def _actions(self, tokens: Array, offsets: np.ndarray, source: Array, last: Array, outputs: frozenset[Output],
                 routes: np.ndarray | None = None, load: np.ndarray | None = None) -> _Actions:
        """Actions at `source` of tokens whose sequences begin at `offsets`, and the least that must be computed."""
        tokens, before = np.asarray(tokens), np.asarray(source) - 1
        ends = np.asarray(last)[:len(last) if outputs & AT_THE_END else 0]
        need = computed(tokens, offsets, np.concatenate([before, ends]), self.device,
                        shared=self.trunk.shares_prompts, routes=routes)
        return _Actions(self._ids(tokens[need.kept]), need.layout, self._ids(need.place[before]),
                        self._ids(tokens[before + 1]), self._ids(need.place[ends]), need.place,
                        self._routes(None if routes is None else routes[need.kept], load))

    def _routes(self, routes: np.ndarray | None, load: np.ndarray | None) -> Routes:
        """Of the tokens that are computed, with the load [L, E] of a step; a model without experts has none."""
        if self._routed is None:
            return Routes()
        layers, E = self._routed.mixtures, self._routed.experts
        given = {} if routes is None else replayed(routes, layers, E, self._routed.experts_per_token, self.device)
        if load is None:
            return Routes(given)
        shares = np.pad(load, ((0, 0), (0, E - load.shape[1])))  # experts behind the last one in use have none
        return Routes(given, dict(zip(layers, torch.from_numpy(shares).to(self.device, self._dtype), strict=True)))

    def _expert_load(self, actions: _Actions) -> Tensor:
        """[M] see `Output.EXPERT_LOAD`; 0 of tokens that are not computed."""
        assert self._routed is not None
        agreement = torch.stack([actions.routes.agreement[layer] for layer in self._routed.mixtures])
        none = agreement.new_zeros(1)
        return torch.cat([agreement.mean(dim=0) * self._routed.experts, none])[self._ids(actions.place)]

    def _hidden(self, actions: _Actions) -> Tensor:
        """[U, H]"""
        if self._routed is None:
            return self.trunk.hidden(actions.tokens, actions.layout)
        return self._routed.hidden(actions.tokens, actions.layout, actions.routes)

    def _outputs(self, actions: _Actions, outputs: frozenset[Output], temperature: float,
                 reference: Readout | None) -> TokenOutputs:
        hidden = self._hidden(actions)
        before = hidden.index_select(0, actions.before)
        logprobs, entropy = torch.full((len(before),), float("nan"), dtype=self._dtype, device=self.device), None
        reference_kl, with_entropy = None, Output.ENTROPY in outputs
        if reference is not None:
            logprobs, entropy, reference_kl = compared_logprobs(
                before, self.model.output_weight, actions.chosen, reference, temperature=temperature,
                rows=self._head_rows, entropy=with_entropy, compute=self.trunk.compute_dtype, form=self._form)
        elif outputs & {Output.LOGPROBS, Output.ENTROPY}:
            logprobs, entropy = chosen_logprobs(
                before, self.model.output_weight, actions.chosen, temperature=temperature,
                rows=self._head_rows, entropy=with_entropy, compute=self.trunk.compute_dtype, form=self._form)
        if outputs & READ:
            self._check_head(before, actions.chosen, logprobs, entropy, temperature)
        last = hidden[actions.last]
        expected, expected_last = self._expected_action_values(before, last, temperature) \
            if Output.EXPECTED_ACTION_VALUES in outputs else (None, None)
        return TokenOutputs(
            logprobs=logprobs, entropy=entropy, reference_kl=reference_kl,
            bootstrap_values=self._values(last) if Output.BOOTSTRAP_VALUES in outputs else None,
            expected_action_values=expected, expected_bootstrap_values=expected_last,
            aux={Output.EXPERT_LOAD: self._expert_load(actions)} if Output.EXPERT_LOAD in outputs else {},
            **self._beside_logits(before, actions.chosen, outputs))

    def _beside_logits(self, before: Tensor, chosen: Tensor, outputs: frozenset[Output]) -> dict[str, Array]:
        """Outputs of actions that heads other than the output matrix give, [k, N] each, by `TokenOutputs` field."""
        values = {"values": self._values(before)} if Output.VALUES in outputs else {}
        return values if Output.ACTION_VALUES not in outputs else {
            **values, "action_values": chosen_action_values(before, *self._action_value_matrices(), chosen)}

    def _check_head(self, before: Tensor, chosen: Tensor, logprobs: Tensor, entropy: Tensor | None,
                    temperature: float) -> None:
        """Raise `Diverged` where the head is wrong; see `guard.py`."""
        guard.require_logprobs(logprobs)
        if len(before) and self._version % guard.EVERY == 0:
            guard.require_plain_form(before, self.model.output_weight, chosen, logprobs, entropy,
                                     temperature=temperature, compute=self.trunk.compute_dtype)

    def _values(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [k, n]."""
        assert self.value_head is not None
        return F.linear(hidden.to(self._dtype), self.value_head.weight, self.value_head.bias).t()

    def _action_value_matrices(self) -> tuple[Tensor, Tensor]:
        """The action-value head as [k, V, H] and [k, V]."""
        assert self.action_value_head is not None
        V, H = self.model.output_weight.shape
        return self.action_value_head.weight.view(-1, V, H), self.action_value_head.bias.view(-1, V)

    def _expected_action_values(self, before: Tensor, last: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """[N, H] and [E, H] -> [k, N] and [k, E]."""
        both = expected_values(
            torch.cat([before, last]), self.model.output_weight, *self._action_value_matrices(),
            temperature=temperature, rows=self._head_rows, compute=self.trunk.compute_dtype)
        return both[:, :len(before)], both[:, len(before):]

    def _check_outputs(self, outputs: frozenset[Output]) -> None:
        require_outputs("torch", outputs, self.provides, " from this model" if self._language is None else "")

    def _ids(self, x: Array) -> Tensor:
        return torch.from_numpy(np.asarray(x, dtype=np.int64)).to(self.device)

    def held(self) -> Mapping[str, int]:
        """See `posttrain.protocols.Accounted`."""
        parameters = dict(self._named_parameters())
        buffers = [x for name, x in self.trunk.state_dict().items() if name not in parameters]
        kept: dict[str, list[Tensor]] = {
            "parameters": [*parameters.values()], "buffers": buffers,
            "gradients": [g for sums in self._gradients.values() for g in sums.values()],
            "optimiser": [x for _, x in self._optimizer.arrays()] if self._optimizer else []}
        return {name: sum(int(x.nbytes) for x in tensors) for name, tensors in kept.items()}

    def watermark(self) -> Watermark | None:
        """See `posttrain.protocols.Accounted`."""
        return watermark_of(self.device)

    def explain(self, folder: Path) -> None:
        """See `posttrain.protocols.Accounted`."""
        snapshot_where_it_fails(self.device, folder)

    def memory(self) -> Memory:
        """See `posttrain.protocols.Metered`."""
        return memory_of_device(self.device)

    def base(self) -> Scorer | None:
        """The model before its adapter; see `posttrain.protocols.Adapted`."""
        model = self.trunk
        return Unadapted(self, model) if isinstance(model, AdaptedLanguageModel) and model.has_adapter else None

    def sampler(self, tokenizer: Tokenizer, engine: Batched, *, shared: bool) -> Sampler:
        """What draws from this model; see `posttrain_backends.engines.Decoding`."""
        from posttrain_backends._torch.drawn import drawn_from
        from posttrain_backends._torch.generate import TorchSampler

        if engine.quantize is not None:
            require_quantizable(self, engine.quantize)
        return TorchSampler(drawn_from(self, engine.quantize, shared=shared), tokenizer, engine, self.version)

    # ---- the model that it is compared with

    def compare_with(self, reference: Scorer) -> None:
        """Say the KL to this model from now on, as it is at the time; see `posttrain.protocols.Comparing`."""
        if not isinstance(reference, TorchLearner | Unadapted):
            raise incomparable(f"the reference is a {type(reference).__name__}, whose output matrix a torch learner "
                               "cannot read")
        other, own = reference.output_weight, self.model.output_weight
        if len(other) != len(own):
            raise incomparable(f"the reference has a vocabulary of {len(other)}, the policy one of {len(own)}")
        if other.device != own.device:
            raise incomparable(f"the reference is on {other.device}, the policy on {own.device}")
        self._reference = reference

    @property
    def output_weight(self) -> Tensor:
        """[V, H]. Raises `ConfigError` where values are all that the model gives."""
        return self.model.output_weight

    @torch.no_grad()
    def readout(self, tokens: Array, offsets: np.ndarray, source: Array) -> Readout:
        """What the logits are made of that the actions at `source` are drawn from."""
        actions = self._actions(tokens, offsets, source, np.zeros(0, np.int64), frozenset())
        hidden = self._hidden(actions)
        return Readout(hidden.index_select(0, actions.before), self.output_weight.detach(), self.trunk.compute_dtype)

    def _reference_at(self, tokens: Array, offsets: np.ndarray, source: Array,
                      outputs: frozenset[Output]) -> Readout | None:
        """The reference at the actions, where somebody asks for the KL to it."""
        if self._reference is None or Output.REFERENCE_KL not in outputs:
            return None
        return self._reference.readout(tokens, offsets, source)

    # ---- one optimiser step

    def accumulate(self, batch: MicroBatch, objective: Objective, coef: Mapping[str, float]) -> Metrics:
        """Add the gradients of one part to their slots; an empty part adds nothing. Raises `MemoryExhausted`."""
        if self._optimizer is None:
            raise RuntimeError("this model was loaded for scoring (LoadRequest.optimization is None)")
        has_load = self._routed is not None and Output.EXPERT_LOAD in batch.constants
        self._check_outputs(objective.outputs - (_TRAINING_ONLY if has_load else frozenset()))
        require_differentiable(objective)
        if self._start is None:
            self._start = _random_state(self.device)

        def accumulated() -> Metrics:
            for slot in (*objective.slots, *([SHARED] if len(objective.slots) > 1 else [])):
                self._sums(slot)  # for an empty part too, so that all ranks hold the same slots
            if len(batch.source) == 0:
                return Metrics()
            offsets = offsets_of_tokens(batch.sequence, batch.positions)
            reference = self._reference_at(batch.tokens, offsets, batch.source, objective.outputs)
            actions = self._actions(batch.tokens, offsets, batch.source, batch.last, objective.outputs, batch.routes,
                                    batch.constants.get(Output.EXPERT_LOAD))
            way = self._in_one_pass if takes_one_pass(objective) else self._in_two_passes
            metrics = way(actions, objective, coef, self._on_device(replace(batch, routes=None)), reference)
            self._count(actions)
            return metrics
        return translating_memory_errors(accumulated)

    def _in_two_passes(self, actions: _Actions, objective: Objective, coef: Mapping[str, float], batch: MicroBatch,
                       reference: Readout | None) -> Metrics:
        """Any loss: one backward pass per slot, each through logits that are computed anew."""
        out = self._outputs(actions, objective.outputs, batch.temperature, reference)
        loss = objective(ops_of(out.logprobs), out, batch, coef)
        totals = _by_slot(loss)
        for i, (slot, total) in enumerate(totals.items()):
            self._backward(slot, [total], retain=i + 1 < len(totals))
        return _loss_metrics(loss)

    def _in_one_pass(self, actions: _Actions, objective: Objective, coef: Mapping[str, float], batch: MicroBatch,
                     reference: Readout | None) -> Metrics:
        """A loss that is a sum over actions: its gradient is formed while the output matrix is gone through."""
        (slot,), weight = objective.slots, self.model.output_weight
        before = self._hidden(actions).index_select(0, actions.before)
        beside = self._beside_logits(before, actions.chosen, objective.outputs)
        loss = LossOfChunks(objective, coef, batch, beside, {name: torch.zeros_like(x) for name, x in beside.items()})
        own = next((total for name, total in self._sums(slot).items() if self._parameters[name] is weight), None)
        d_weight = torch.zeros_like(weight) if own is None and weight.requires_grad else own
        reading, d_before = walk(
            before, weight, actions.chosen, loss, d_weight=d_weight, reference=reference, temperature=batch.temperature,
            rows=self._head_rows, entropy=Output.ENTROPY in objective.outputs, compute=self.trunk.compute_dtype,
            form=self._form)
        self._check_head(before, actions.chosen, reading.logprobs, reading.entropy, batch.temperature)
        gradients = [(before, d_before), (weight, d_weight if own is None else None),
                     *((x, loss.d_beside[name]) for name, x in beside.items())]
        if going_on := [(x, gradient) for x, gradient in gradients if gradient is not None and x.requires_grad]:
            self._backward(slot, *zip(*going_on))
        return sum((_loss_metrics(part) for part in loss.losses), Metrics())

    def _on_device(self, batch: MicroBatch) -> MicroBatch:
        """The same batch in tensors: integers as int64, numbers in the type of the parameters."""
        def moved(x: Any) -> Any:
            if isinstance(x, Mapping):
                return {name: moved(value) for name, value in x.items()}
            if x is None or isinstance(x, float):
                return x
            x = np.asarray(x)
            return torch.from_numpy(x).to(self.device, self._dtype) if x.dtype.kind == "f" else self._ids(x)
        return replace(batch, **{f.name: moved(getattr(batch, f.name)) for f in fields(batch)})

    def _count(self, actions: _Actions) -> None:
        """Add the tokens that each expert of each layer was sent."""
        if self._routed is None:
            return
        copies = self._ids(np.bincount(actions.place[actions.place >= 0]))  # tokens that each computed one stands for
        for layer in self._routed.mixtures:
            ids = actions.routes.chosen[layer]
            here = copies.new_zeros(self._routed.experts).index_add_(0, ids.flatten(), copies.repeat_interleave(
                ids.shape[1]))
            self._sent[layer] = self._sent.get(layer, 0) + here

    def _sent_over_ranks(self) -> np.ndarray:
        """[L, E] the step's tokens by layer and expert; [0, 0] without experts."""
        if self._routed is None:
            return np.zeros((0, 0), np.int64)
        nothing = torch.zeros(self._routed.experts, dtype=torch.int64)
        return self._comm.sum(np.stack([to_numpy(self._sent.get(layer, nothing)) for layer in self._routed.mixtures]))

    def _sums(self, slot: str) -> dict[str, Tensor]:
        """The slot's gradients by parameter, zero to begin with; they exist for all, so `apply` allocates none."""
        if slot not in self._gradients:
            self._gradients[slot] = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        return self._gradients[slot]

    def _backward(self, slot: str, tensors: Sequence[Tensor], gradients: Sequence[Tensor] | None = None, *,
                  retain: bool = False) -> None:
        """From tensors, with their gradients where they are no numbers, straight into the slot's own sums."""
        for name, total in self._sums(slot).items():
            self._parameters[name].grad = total
        torch.autograd.backward(tensors, gradients, retain_graph=retain)
        for p in self._parameters.values():
            p.grad = None

    def _sum_over_ranks(self) -> None:
        """Make every rank's sums those of all ranks, once per step: all slots, all parameters, in one order."""
        if self._comm.size == 1 or self._summed:
            return
        for sums in self._gradients.values():
            for gradient in sums.values():
                gradient.copy_(torch.from_numpy(self._comm.sum(to_numpy(gradient))))
        self._summed = True

    def gramian(self, slots: Sequence[str], parameters: str = "") -> np.ndarray:
        """[m, m] float64 inner products of the slots' gradients, over parameters whose name the pattern is found in."""
        chosen = [name for name in self._parameters if re.search(parameters, name)]
        if not chosen:
            raise ConfigError([f"no parameter matches {parameters!r}; names are like {next(iter(self._parameters))!r}"])
        self._sum_over_ranks()
        G = torch.zeros(len(slots), len(slots), dtype=torch.float64, device=self.device)
        for name in chosen:
            rows = [self._sums(slot)[name].flatten() for slot in slots]
            for columns in zip(*(torch.split(row, _GRAMIAN_COLUMNS) for row in rows)):
                J = torch.stack(columns).double()
                G += J @ J.t()
        return to_numpy(G)

    @torch.no_grad()
    def apply(self, weights: Mapping[str, float] | None = None) -> Metrics:
        """Mix the slots (`shared` counts once where it is not named), clip, step. Raises `Diverged` after more than
        `max_bad_steps` consecutive steps whose gradient is not finite."""
        if self._optimizer is None:
            raise RuntimeError("this model was loaded for scoring (LoadRequest.optimization is None)")
        self._sum_over_ranks()
        sent = self._sent_over_ranks()
        gradients = self._mixed({SHARED: 1.0, **weights} if weights is not None else None)
        norm = torch.nn.utils.get_total_norm(gradients.values(), error_if_nonfinite=False)
        lr, finite = self._optimizer.lr, bool(torch.isfinite(norm))
        metrics = Metrics({"lr": Metric(lr, reduction="last"), "skipped": Metric(float(not finite), reduction="sum")})
        metrics += load_metrics(sent)
        if finite:
            for name, p in self._parameters.items():
                p.grad = gradients[name]
            if self._optimizer.settings.clip_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(
                    self._parameters.values(), self._optimizer.settings.clip_norm, norm)
            self._optimizer.step()
            if isinstance(self.trunk, Rebalanced):
                self.trunk.rebalance(sent)
            self._version += 1
            metrics += {"grad_norm": Metric(float(norm))}
        self._bad_steps = 0 if finite else self._bad_steps + 1
        self._forget()
        if self._bad_steps > self._optimizer.settings.max_bad_steps:
            broken = [name for name, g in gradients.items() if not torch.isfinite(g).all()]
            raise diverged(self._bad_steps, broken, len(gradients))
        return metrics

    def _mixed(self, weights: Mapping[str, float] | None) -> dict[str, Tensor]:
        """The weighted sum of all slots by parameter, made in the first slot's place."""
        if weights is not None:
            require_weights_of_slots(self._gradients, weights)
        first, *others = self._gradients or [SHARED]
        mixed = self._sums(first)
        for name, gradient in mixed.items():
            if weights is not None:
                gradient.mul_(weights[first])
            for slot in others:
                gradient.add_(self._gradients[slot][name], alpha=1.0 if weights is None else weights[slot])
        return mixed

    def discard(self) -> None:
        """Forget the step's gradients and put the random state back to where the step began."""
        if self._start is not None:
            _set_random_state(self._start, self.device)
        self._forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what comes next is planned smaller, and must not fail on fragments

    def _forget(self) -> None:
        self._gradients, self._start, self._summed, self._sent = {}, None, False, {}
        for p in self._parameters.values():
            p.grad = None

    # ---- weights and state

    def params(self) -> Iterator[tuple[str, Array]]:
        """The model's parameters and buffers, live; heads of values and action values are no part of a policy."""
        yield from self.trunk.state_dict().items()

    def load_params(self, items: Iterable[tuple[str, Array]], version: int) -> None:
        """Replace all the model's weights. Raises `ConfigError` where names or shapes do not fit."""
        files.copy_named(items, self.trunk.state_dict(), "the given set of weights")
        self._version = version

    def state(self) -> Mapping[str, np.ndarray]:
        """Copies of weights, moments, counters and random state, by flat names."""
        counters = (self._version, self._bad_steps, self._optimizer.steps if self._optimizer else 0)
        return {**{name: to_numpy(x).copy() for name, x in self._live()},
                **{name: np.array(value, np.int64) for name, value in zip(_COUNTERS, counters)},
                **self._frozen(),
                **{f"random.{name}": to_numpy(x).copy() for name, x in _random_state(self.device).items()}}

    def _frozen(self) -> dict[str, np.ndarray]:
        """What tells the weights that `state` leaves out, by its name there."""
        found = self.trunk.fingerprint() if isinstance(self.trunk, Identified) else None
        return {} if found is None else {_FROZEN: to_numpy(found)}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue exactly where `state` was taken. Raises `ConfigError` where it is another model's."""
        if missing := [name for name in (*_COUNTERS, "random.cpu") if name not in arrays]:
            raise ConfigError([f"{name} is missing" for name in missing], title="the saved state is not a learner's:")
        counters = {name: int(arrays[name]) for name in _COUNTERS}
        random = {name.removeprefix("random."): torch.from_numpy(np.array(x)) for name, x in arrays.items()
                  if name.startswith("random.")}
        for name, own in _random_state(self.device).items():
            if name in random and random[name].shape != own.shape:
                raise ConfigError([f"random.{name} holds {len(random[name])} bytes, torch's generator {len(own)}"],
                                  title="the saved state is of another version of torch:")
        if (frozen := self._frozen()).keys() & arrays.keys() and (frozen[_FROZEN] != arrays[_FROZEN]).any():
            raise ConfigError(["the quantised weights are others than those that this adapter was trained on"],
                              title="the saved state does not fit the model:",
                              next_step="Put back the folder that policy.weights names as it was, or begin a new run.")
        tensors = ((name, torch.from_numpy(np.array(x))) for name, x in arrays.items()
                   if name not in (*counters, *frozen) and not name.startswith("random."))
        files.copy_named(tensors, dict(self._live()), "the saved state")
        self._version, self._bad_steps = counters["version"], counters["bad_steps"]
        if self._optimizer is not None:
            self._optimizer.resume(counters["steps"])
        self._forget()
        _set_random_state(random, self.device)

    def _live(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that resuming needs, by the name it has in `state`."""
        for name, tensor in self.trunk.state_dict().items():
            yield f"weights.{name}", tensor
        for head, module in self._heads():
            for name, tensor in module.state_dict().items():
                yield f"weights.{head}.{name}", tensor
        if self._optimizer is not None:
            yield from self._optimizer.arrays()

    def save(self, directory: Path) -> None:
        """Write the model's folder and, for each head there is, `value_head.safetensors` and
        `action_value_head.safetensors`."""
        self.trunk.save(Path(directory))
        for head, module in self._heads() if self._language is not None else ():  # else it is the model's own
            files.write_head(Path(directory), HEAD_FILES[head], module.state_dict())

    def load_heads(self, folder: Path) -> None:
        """Take the heads that `save` wrote to the folder; one that it does not hold stays as it is. Raises
        `ConfigError` where one is of other sizes, as with another number of reward columns."""
        for head, module in self._heads():
            if found := files.read_head(folder, HEAD_FILES[head]):
                files.copy_named(found.items(), module.state_dict(), f"the {head.replace('_', ' ')} in {folder}")


def require_no_action_values(heads: int, what: str) -> None:
    """Raise `ConfigError` where action values are asked of a model without log-probs."""
    if heads:
        raise ConfigError(
            [f"{what} gives no log-probs, so it can have no action values: those are averaged under the model's own "
             "policy"],
            next_step="Take critic: policy, whose trunk carries the action-value head, or a causal language model as "
                      "critic.")


def _zero_head(outputs: int, weight: Tensor) -> nn.Linear | None:
    """A linear read-out that begins at 0, so that the first values are 0 whatever the trunk; None without outputs."""
    if not outputs:
        return None
    head = nn.Linear(weight.shape[1], outputs, device="meta", dtype=weight.dtype).to_empty(device=weight.device)
    for p in head.parameters():
        nn.init.zeros_(p)
    return head


def _to_host(out: TokenOutputs) -> TokenOutputs:
    """The same columns as NumPy arrays."""
    def moved(x: Array | None) -> np.ndarray | None:
        return None if x is None else to_numpy(x)
    return TokenOutputs(
        logprobs=to_numpy(out.logprobs), entropy=moved(out.entropy), reference_kl=moved(out.reference_kl),
        values=moved(out.values), bootstrap_values=moved(out.bootstrap_values), action_values=moved(out.action_values),
        expected_action_values=moved(out.expected_action_values),
        expected_bootstrap_values=moved(out.expected_bootstrap_values))


def _by_slot(loss: Loss) -> dict[str, Tensor]:
    """What is differentiated in each slot; terms that depend on no parameter are left out."""
    totals: dict[str, Tensor] = {}
    for term in loss.terms.values():
        scaled = term.coef * term.total
        if isinstance(scaled, Tensor) and scaled.requires_grad:
            totals[term.slot] = totals[term.slot] + scaled if term.slot in totals else scaled
    return totals


def _loss_metrics(loss: Loss) -> Metrics:
    def number(x: Array | float) -> float:
        return float(to_numpy(x))
    terms = {f"loss/{name}": Metric(number(term.total), reduction="sum") for name, term in loss.terms.items()}
    means = {name: Metric(number(total), number(weight)) for name, (total, weight) in loss.metrics.items()}
    return Metrics({**terms, **means})


def load_metrics(sent: np.ndarray) -> Metrics:
    """Of the tokens sent to each expert of each layer [L, E]: the largest and the smallest share, and the entropy of
    the shares (at most log E), as means over layers; nothing without experts or tokens.

    >>> {name: round(x, 3) for name, x in load_metrics(np.array([[3, 1], [2, 2]])).values_by_name().items()}
    {'experts/largest_share': 0.625, 'experts/smallest_share': 0.375, 'experts/entropy': 0.628}
    """
    if not sent.any():
        return Metrics()
    share = sent / sent.sum(axis=1, keepdims=True)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=1)
    found = {"largest_share": share.max(axis=1), "smallest_share": share.min(axis=1), "entropy": entropy}
    return Metrics({f"experts/{name}": Metric(float(x.mean())) for name, x in found.items()})


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """torch's generators of the host and of the device, by device type."""
    device_state = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **device_state}


def _set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
