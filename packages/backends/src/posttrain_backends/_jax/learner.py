"""A flax model that scores tokens and is trained: the `Learner` of the flax backend.

Gradients are sums, kept per slot in the parameters' own type, so how a step is split does not change it. Every call
waits for its results, so that running out of memory is met where it happens. Knows buckets, a loss and an optimiser;
not which model computes the hidden states.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from posttrain.comm import Comm, SingleProcess
from posttrain.data import Array, Metric, Metrics, MicroBatch, Rollouts, TokenOutputs, to_numpy
from posttrain.errors import ConfigError
from posttrain.loss import SHARED
from posttrain.protocols import Objective, Optimization, Output, Sampler, Scorer, Tokenizer

from posttrain_backends._jax.buckets import columns, rectangle
from posttrain_backends._jax.compiled import ACCUMULATED, MIXED, READ, SCORED, Compiled, Forward, slots_of
from posttrain_backends._jax.loading import fitted, read_head, write_model, write_tensors
from posttrain_backends._jax.memory import translating_memory_errors
from posttrain_backends._jax.model import Params, Structure
from posttrain_backends._jax.optimizer import NamedAdamW
from posttrain_backends._jax.placement import Placement
from posttrain_backends.engines import Batched
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
_GRAMIAN_COLUMNS = 2**20
"""Gradient entries of one slot that `gramian` holds in float64 at a time."""


@final
class JaxLearner:
    """See `posttrain.protocols.Learner`. Without `optimization` it scores only and holds no gradients and no moments.

    `config` is written beside the weights that are saved. `head_rows` are the rows of one chunk of logits, 0 for as
    many as suit the vocabulary; gradients are summed over the ranks of `comm`, whose learners hold equal weights. Heads
    of values and of action values are those of `TorchLearner`, and begin at 0.
    """

    def __init__(self, structure: Structure, params: Params, config: Mapping[str, object], placement: Placement, *,
                 optimization: Optimization | None = None, value_heads: int = 0, action_value_heads: int = 0,
                 head_rows: int = 0, comm: Comm = SingleProcess()) -> None:
        self.structure, self.placement, self._config, self._comm = structure, placement, config, comm
        self._exact = any(x.dtype == jnp.float64 for x in structure.shapes.values())
        self._dtype = np.dtype(np.float64 if self._exact else np.float32)
        self._forward = Forward(structure, head_rows)
        with self.scope():
            traits: dict[str, Any] = {}
            self.vocab_size, self._width = jax.eval_shape(
                partial(_looked_at, structure, traits), structure.shapes).shape
            self.max_positions, self.compute_dtype = traits["max_positions"], traits["compute_dtype"]
            self._params = {**{name: placement.weight(name, x) for name, x in params.items()},
                            **self._zero_head("value_head", value_heads),
                            **self._zero_head("action_value_head", action_value_heads * self.vocab_size)}
            self._optimizer = NamedAdamW(self._params, optimization) if optimization else None
        self._sums: dict[str, dict[str, jax.Array]] = {}
        self._version, self._bad_steps, self._summed, self._compilations = 0, 0, False, 0
        self._reference: JaxLearner | None = None

    def scope(self) -> AbstractContextManager[object]:
        """Where arrays of the model are made and computed with: 64 bits are off in JAX unless they are asked for."""
        return jax.enable_x64(self._exact)

    def _zero_head(self, head: str, outputs: int) -> dict[str, jax.Array]:
        shapes = {f"{head}.weight": (outputs, self._width), f"{head}.bias": (outputs,)} if outputs else {}
        return {name: self.placement.weight(name, np.zeros(shape, self._dtype)) for name, shape in shapes.items()}

    def _of_head(self, head: str) -> dict[str, jax.Array]:
        """`weight` and `bias`; nothing where there is no such head."""
        return {name: self._params[full] for name in ("weight", "bias") if (full := f"{head}.{name}") in self._params}

    # ---- what the model says

    @property
    def provides(self) -> frozenset[Output]:
        values = {Output.VALUES, Output.BOOTSTRAP_VALUES} if self._of_head("value_head") else set()
        actions = {Output.ACTION_VALUES, Output.EXPECTED_ACTION_VALUES} if self._of_head("action_value_head") else set()
        compared = {Output.REFERENCE_KL} if self._reference is not None else set()
        return frozenset({Output.LOGPROBS, Output.ENTROPY} | values | actions | compared)

    @property
    def version(self) -> int:
        """Optimiser steps taken: a skipped step leaves the weights, and so the version, as they are."""
        return self._version

    def score(self, rollouts: Rollouts, outputs: frozenset[Output], temperature: float) -> TokenOutputs:
        """Outputs of all actions in one forward pass, as NumPy; columns that nobody asked for are None, and log-probs
        NaN. Raises `MemoryExhausted`."""
        require_outputs("flax", outputs, self.provides)
        N, E = len(rollouts.source), rollouts.n_episodes
        ends = np.maximum(np.cumsum(rollouts.episode_tokens) - 1, 0)

        def scored() -> dict[str, Any]:
            at = self._at(rollouts.tokens, rollouts.offsets, rollouts.source, ends, outputs)
            reference = self._reference_at(rollouts.tokens, rollouts.offsets, rollouts.source, outputs)
            found: dict[str, Any] = self._run(SCORED, (outputs, self._reference_compute), (
                self._params, at, self._dtype.type(temperature), reference))
            return found
        with self.scope():
            out = translating_memory_errors(scored)
        found: dict[str, Any] = {name: np.array(to_numpy(x)[..., :E if "bootstrap" in name else N])
                                 for name, x in out.items()}
        return TokenOutputs(**found)

    def _run(self, compiled: Compiled, constants: tuple[Any, ...], given: tuple[Any, ...]) -> Any:
        """A compiled function of this model."""
        constants = (self._forward, *constants)
        self._compilations += compiled.is_new(constants, given)
        return compiled(constants, given)

    def _at(self, tokens: Array, offsets: np.ndarray, source: Array, last: Array,
            outputs: frozenset[Output]) -> dict[str, jax.Array]:
        """The rectangle of the actions at `source`, on its devices."""
        ends = np.asarray(last)[:len(last) if outputs & AT_THE_END else 0]
        made = rectangle(tokens, offsets, source, ends, max_positions=self.max_positions, rows=self.placement.rows)
        return {name: self.placement.sequences(x) if name == "tokens" else self.placement.column(x)
                for name, x in made.arrays().items()}

    def sampler(self, tokenizer: Tokenizer, engine: Batched, *, shared: bool) -> Sampler:
        """What draws from this model; see `posttrain_backends.engines.Decoding`."""
        from posttrain_backends._jax.generate import JaxSampler

        return JaxSampler(self.structure, self._trunk, self._version, tokenizer, engine, shared=shared)

    # ---- the model that it is compared with

    def compare_with(self, reference: Scorer) -> None:
        """Say the KL to this model from now on, as it is at the time; see `posttrain.protocols.Comparing`."""
        if not isinstance(reference, JaxLearner):
            raise incomparable(f"the reference is a {type(reference).__name__}, whose output matrix a flax learner "
                               "cannot read")
        if reference.vocab_size != self.vocab_size:
            raise incomparable(f"the reference has a vocabulary of {reference.vocab_size}, the policy one of "
                               f"{self.vocab_size}")
        if reference.devices != self.devices:
            raise incomparable(f"the reference is on {_named(reference.devices)}, the policy on {_named(self.devices)}")
        self._reference = reference

    @property
    def devices(self) -> frozenset[jax.Device]:
        """Where the weights lie."""
        return frozenset(next(iter(self._params.values())).sharding.device_set)

    @property
    def _reference_compute(self) -> Any:
        return None if self._reference is None else self._reference.compute_dtype

    def _reference_at(self, tokens: Array, offsets: np.ndarray, source: Array,
                      outputs: frozenset[Output]) -> tuple[jax.Array, jax.Array] | None:
        """What the reference's logits at the actions are made of, where somebody asks for the KL to it."""
        if self._reference is None or Output.REFERENCE_KL not in outputs:
            return None
        other = self._reference
        with other.scope():
            at = other._at(tokens, offsets, source, np.zeros(0, np.int64), frozenset())
            found: tuple[jax.Array, jax.Array] = other._run(READ, (), (other._trunk(), at))
        return found

    # ---- one optimiser step

    def accumulate(self, batch: MicroBatch, objective: Objective, coef: Mapping[str, float]) -> Metrics:
        """Add the gradients of one part to their slots; an empty part adds nothing. Raises `MemoryExhausted`."""
        self._trained()
        require_outputs("flax", objective.outputs, self.provides)
        require_differentiable(objective)
        slots = slots_of(objective)

        def accumulated() -> dict[str, Any]:
            for slot in slots:
                self._slot(slot)  # for an empty part too, so that all ranks hold the same slots
            if len(batch.source) == 0:
                return {"terms": {}, "metrics": {}}
            offsets = offsets_of_tokens(batch.sequence, batch.positions)
            at = self._at(batch.tokens, offsets, batch.source, batch.last, objective.outputs)
            reference = self._reference_at(batch.tokens, offsets, batch.source, objective.outputs)
            sums = {slot: self._sums.pop(slot) for slot in slots}  # used up by the call, also where it fails
            found, reported = self._run(ACCUMULATED, (objective, self._reference_compute), (
                self._params, sums, at, jax.tree.map(self.placement.column, columns(batch, self._dtype)),
                {name: self._dtype.type(x) for name, x in coef.items()}, reference))
            self._sums.update(jax.block_until_ready(found))
            return dict(reported)
        with self.scope():
            reported = translating_memory_errors(accumulated)
        terms = {f"loss/{name}": Metric(float(x), reduction="sum") for name, x in reported["terms"].items()}
        return Metrics({**terms, **{name: Metric(float(x), float(w)) for name, (x, w) in reported["metrics"].items()}})

    def _trained(self) -> NamedAdamW:
        """The optimiser. Raises `RuntimeError` where the model is for scoring."""
        if self._optimizer is None:
            raise RuntimeError("this model was loaded for scoring (LoadRequest.optimization is None)")
        return self._optimizer

    def _slot(self, slot: str) -> dict[str, jax.Array]:
        """The slot's gradients by parameter, zero to begin with."""
        if slot not in self._sums:
            self._sums[slot] = {name: self.placement.weight(name, np.zeros(p.shape, p.dtype))
                                for name, p in self._params.items()}
        return self._sums[slot]

    def _sum_over_ranks(self) -> None:
        """Make every rank's sums those of all ranks, once per step: all slots, all parameters, in one order."""
        if self._comm.size == 1 or self._summed:
            return
        self._sums = {slot: {name: self.placement.weight(name, np.asarray(self._comm.sum(to_numpy(g)), g.dtype))
                             for name, g in sums.items()} for slot, sums in self._sums.items()}
        self._summed = True

    def gramian(self, slots: Sequence[str], parameters: str = "") -> np.ndarray:
        """[m, m] float64 inner products of the slots' gradients, over parameters whose name the pattern is found in."""
        chosen = [name for name in self._params if re.search(parameters, name)]
        if not chosen:
            raise ConfigError([f"no parameter matches {parameters!r}; names are like {next(iter(self._params))!r}"])
        G = np.zeros((len(slots), len(slots)))
        with self.scope():
            for slot in slots:
                self._slot(slot)
            self._sum_over_ranks()
            for name in chosen:
                rows = [to_numpy(self._sums[slot][name]).ravel() for slot in slots]
                for start in range(0, rows[0].size, _GRAMIAN_COLUMNS):
                    J = np.stack([row[start:start + _GRAMIAN_COLUMNS] for row in rows]).astype(np.float64)
                    G += J @ J.T
        return G

    def apply(self, weights: Mapping[str, float] | None = None) -> Metrics:
        """Mix the slots (`shared` counts once where it is not named), clip, step. Raises `Diverged` after more than
        `max_bad_steps` consecutive steps whose gradient is not finite. Metric `timing/compilations`: how many
        functions were compiled since the step before."""
        optimizer = self._trained()
        with self.scope():
            if not self._sums:
                self._slot(SHARED)
            self._sum_over_ranks()
            gradients, norm = self._mixed(weights)
            lr = optimizer.lr
            finite = bool(np.isfinite(norm))
            broken = [] if finite else [name for name, g in gradients.items() if not np.isfinite(to_numpy(g)).all()]
            if finite:
                self._params = optimizer.step(self._params, gradients, norm)
                self._version += 1
        fresh, self._compilations = self._compilations, 0
        metrics = Metrics({"lr": Metric(lr, reduction="last"), "skipped": Metric(float(not finite), reduction="sum"),
                           "timing/compilations": Metric(float(fresh), reduction="sum"),
                           **({"grad_norm": Metric(norm)} if finite else {})})
        self._bad_steps = 0 if finite else self._bad_steps + 1
        self.discard()
        if self._bad_steps > optimizer.settings.max_bad_steps:
            raise diverged(self._bad_steps, broken, len(self._params))
        return metrics

    def _mixed(self, weights: Mapping[str, float] | None) -> tuple[dict[str, jax.Array], float]:
        """The gradients that are stepped by, made in the first slot's place, and their norm."""
        if weights is not None:
            weights = {SHARED: 1.0, **weights}
            require_weights_of_slots(self._sums, weights)
        factors = [self._dtype.type(1.0 if weights is None else weights[slot]) for slot in self._sums]
        first, *others = self._sums.values()
        self._sums = {}
        gradients, norm = MIXED(first, others, factors)
        return gradients, float(norm)

    def discard(self) -> None:
        """Forget the step's gradients: their memory is free until the next part. Nothing here is random."""
        self._sums, self._summed = {}, False

    # ---- weights and state

    def _trunk(self) -> dict[str, jax.Array]:
        return {name: self._params[name] for name in self.structure.paths}

    def params(self) -> Iterator[tuple[str, Array]]:
        """The model's parameters, live; heads of values and action values are no part of a policy."""
        yield from self._trunk().items()

    def load_params(self, items: Iterable[tuple[str, Array]], version: int) -> None:
        """Replace all the model's weights. Raises `ConfigError` where names or shapes do not fit."""
        with self.scope():
            self._params |= fitted(items, self._trunk(), self.placement.weight, "the given set of weights")
        self._version = version

    def state(self) -> Mapping[str, np.ndarray]:
        """Copies of weights, moments and counters, by flat names."""
        counters = (self._version, self._bad_steps, self._optimizer.steps if self._optimizer else 0)
        return {**{name: np.array(to_numpy(x)) for name, x in self._live()},
                **{name: np.array(value, np.int64) for name, value in zip(_COUNTERS, counters)}}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue exactly where `state` was taken. Raises `ConfigError` where it is another model's."""
        if missing := [name for name in _COUNTERS if name not in arrays]:
            raise ConfigError([f"{name} is missing" for name in missing], title="the saved state is not a learner's:")
        tensors = {name: x for name, x in arrays.items() if name not in _COUNTERS}
        with self.scope():
            found = fitted(tensors.items(), dict(self._live()), self._placed, "the saved state")
            if self._optimizer is not None:
                self._optimizer.resume(int(arrays["steps"]), found)
        self._params = {name: found[f"weights.{name}"] for name in self._params}
        self._version, self._bad_steps = int(arrays["version"]), int(arrays["bad_steps"])
        self.discard()

    def _placed(self, name: str, x: Any) -> jax.Array:
        """An entry of `state` where the parameter lies that it is of."""
        return self.placement.weight(name.partition(".")[2], x)

    def _live(self) -> Iterator[tuple[str, jax.Array]]:
        """Every array that resuming needs, by the name it has in `state`."""
        for name, x in self._params.items():
            yield f"weights.{name}", x
        if self._optimizer is not None:
            yield from self._optimizer.arrays()

    def save(self, directory: Path) -> None:
        """Write the model's folder and, for each head there is, `value_head.safetensors` and
        `action_value_head.safetensors`."""
        write_model(Path(directory), self._config, self._trunk())
        for head, file in HEAD_FILES.items():
            if tensors := self._of_head(head):
                write_tensors(Path(directory) / file, tensors)

    def load_heads(self, folder: Path) -> None:
        """Take the heads that `save` wrote to the folder; one that it does not hold stays as it is. Raises
        `ConfigError` where one is of other sizes, as with another number of reward columns."""
        with self.scope():
            for head, file in HEAD_FILES.items():
                own = self._of_head(head)
                if own and (found := read_head(folder, file)):
                    put = partial(self._put_head, head)
                    taken = fitted(found.items(), own, put, f"the {head.replace('_', ' ')} in {folder}")
                    self._params |= {f"{head}.{name}": x for name, x in taken.items()}

    def _put_head(self, head: str, name: str, x: Any) -> jax.Array:
        return self.placement.weight(f"{head}.{name}", x)


def _named(devices: frozenset[jax.Device]) -> str:
    return ", ".join(sorted(map(str, devices)))


def _looked_at(structure: Structure, traits: dict[str, Any], params: Params) -> jax.Array:
    """The output matrix; puts what else is asked of the model itself into `traits`."""
    model = structure.bound(params)
    traits |= {"max_positions": model.max_positions, "compute_dtype": model.compute_dtype}
    return model.output_weight
