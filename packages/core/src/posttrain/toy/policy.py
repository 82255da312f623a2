"""The table of logits as a backend: scores tokens, and is trained by derivatives taken as differences.

The next token depends on the last one alone: logits[last token], values[last token]. Knows no sampling.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import numpy as np

from posttrain.comm import Comm, SingleProcess
from posttrain.data import Array, Metric, Metrics, MicroBatch, Rollouts, TokenOutputs, to_numpy
from posttrain.errors import ConfigError, Diverged
from posttrain.loss import SHARED
from posttrain.ops import ops_of
from posttrain.protocols import LoadRequest, Objective, Optimization, Output

TABLE, VALUES = "logits", "values"
"""Names of the parameters."""
_STEP = 1e-5
"""Of central differences, in nats: their error is of the order of its square."""


@final
@dataclass(frozen=True, slots=True)
class Toy:
    """logits [V, V] of the next token by the last one, all 0 at first: a uniform policy."""

    weights: str = field(default="", metadata={"path": True})
    """A folder that a run of it wrote (`RUN/policy`); empty begins at 0."""

    @property
    def framework(self) -> str:
        return "numpy"

    @property
    def provides(self) -> frozenset[Output]:
        return frozenset({Output.LOGPROBS, Output.ENTROPY, Output.VALUES, Output.BOOTSTRAP_VALUES})

    def load(self, request: LoadRequest) -> ToyLearner:
        """Raises `ConfigError` where action values are asked for, and where the saved table has another size than the
        tokenizer's vocabulary."""
        if request.action_value_heads:
            raise ConfigError(["the toy policy gives no action values; use an estimator that needs none"])
        learner = ToyLearner(request.vocab_size, request.value_heads, request.optimization, request.comm)
        if self.weights:
            learner.read(Path(self.weights))
        return learner


@final
class ToyLearner:
    """See `posttrain.protocols.Learner`. Adam with a constant rate; derivatives of an objective are differences.

    NumPy differentiates nothing, so the derivative of the loss by each log-prob, entropy and value is a central
    difference in float64, with every `ops.stop_gradient` held at its value; from there on the chain rule is written
    out. That is 2 N evaluations of the objective: for toys.
    """

    def __init__(self, vocab_size: int, value_heads: int, optimization: Optimization | None,
                 comm: Comm = SingleProcess()) -> None:
        if optimization is not None and (optimization.schedule != "constant" or optimization.weight_decay):
            raise ConfigError(["the toy policy has neither a schedule nor weight decay; set optimizer.schedule: "
                               "constant and optimizer.weight_decay: 0"])
        self.version, self.steps, self.bad_steps = 0, 0, 0
        self.optimization, self._comm, self._summed = optimization, comm, False
        self.parameters = {TABLE: np.zeros((vocab_size, vocab_size)), VALUES: np.zeros((value_heads, vocab_size))}
        self._moments = {(moment, name): np.zeros_like(p)
                         for moment in ("m", "v") for name, p in self.parameters.items() if optimization is not None}
        self._gradients: dict[str, dict[str, np.ndarray]] = {}

    @property
    def provides(self) -> frozenset[Output]:
        values = {Output.VALUES, Output.BOOTSTRAP_VALUES} if len(self.parameters[VALUES]) else set()
        return frozenset({Output.LOGPROBS, Output.ENTROPY} | values)

    def log_softmax(self, before: np.ndarray, temperature: float) -> np.ndarray:
        """[N] last tokens -> [N, V] log-probs of the next one."""
        z = self.parameters[TABLE][before] / temperature
        z = z - z.max(axis=1, keepdims=True)
        found: np.ndarray = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        return found

    def score(self, rollouts: Rollouts, outputs: frozenset[Output], temperature: float) -> TokenOutputs:
        ends = np.cumsum(rollouts.episode_tokens) - 1
        return self._outputs(rollouts.tokens, rollouts.source, ends, outputs, temperature)

    def _outputs(self, tokens: np.ndarray, source: np.ndarray, last: np.ndarray, outputs: frozenset[Output],
                 temperature: float) -> TokenOutputs:
        self._require(outputs)
        logp, V = self.log_softmax(tokens[source - 1], temperature), self.parameters[VALUES]
        return TokenOutputs(
            logprobs=logp[np.arange(len(source)), tokens[source]],
            entropy=_entropy(logp) if Output.ENTROPY in outputs else None,
            values=V[:, tokens[source - 1]] if Output.VALUES in outputs else None,
            bootstrap_values=V[:, tokens[last]] if Output.BOOTSTRAP_VALUES in outputs else None)

    def _require(self, outputs: frozenset[Output]) -> None:
        if missing := outputs - self.provides:
            raise ConfigError([f"the toy policy gives no {', '.join(sorted(missing))}"])

    def _settings(self) -> Optimization:
        if self.optimization is None:
            raise RuntimeError("this table was loaded for scoring (LoadRequest.optimization is None)")
        return self.optimization

    def accumulate(self, batch: MicroBatch, objective: Objective, coef: Mapping[str, float]) -> Metrics:
        """Add the gradients of one part to their slots; an empty part adds nothing."""
        self._settings()
        self._require(objective.outputs)
        for slot in (*objective.slots, *([SHARED] if len(objective.slots) > 1 else [])):
            self._sums(slot)
        if len(batch.source) == 0:
            return Metrics()
        out = self._outputs(batch.tokens, batch.source, batch.last, objective.outputs, batch.temperature)
        held = _Held()
        ops = replace(ops_of(out.logprobs), stop_gradient=held)

        def totals(out: TokenOutputs) -> dict[str, float]:
            """slot -> what is differentiated in it."""
            held.begin()
            found: dict[str, float] = {}
            for term in objective(ops, out, batch, coef).terms.values():
                found[term.slot] = found.get(term.slot, 0.0) + float(term.coef * term.total)
            return found
        loss = objective(ops, out, batch, coef)
        for slot, columns in _differences(totals, out).items():
            self._add(slot, columns, batch)
        terms = {f"loss/{name}": Metric(float(term.total), reduction="sum") for name, term in loss.terms.items()}
        means = {name: Metric(float(total), float(weight)) for name, (total, weight) in loss.metrics.items()}
        return Metrics({**terms, **means})

    def _add(self, slot: str, columns: Mapping[str, np.ndarray], batch: MicroBatch) -> None:
        """Chain rule from d loss / d column to the table and the values."""
        before, chosen = batch.tokens[batch.source - 1], batch.tokens[batch.source]
        logp = self.log_softmax(before, batch.temperature)
        p, sums = np.exp(logp), self._sums(slot)
        dz = -p * columns["logprobs"][:, None]
        dz[np.arange(len(chosen)), chosen] += columns["logprobs"]
        if "entropy" in columns:
            above = np.where(p > 0, logp, 0.0) + _entropy(logp)[:, None]
            dz -= p * above * columns["entropy"][:, None]
        np.add.at(sums[TABLE], before, dz / batch.temperature)
        if "values" in columns:
            np.add.at(sums[VALUES].T, before, columns["values"].T)

    def _sums(self, slot: str) -> dict[str, np.ndarray]:
        return self._gradients.setdefault(slot, {name: np.zeros_like(p) for name, p in self.parameters.items()})

    def gramian(self, slots: Sequence[str], parameters: str = "") -> np.ndarray:
        """See `Learner.gramian`. Raises `ConfigError` where no parameter matches."""
        chosen = [name for name in self.parameters if re.search(parameters, name)]
        if not chosen:
            raise ConfigError([f"no parameter matches {parameters!r}; there are {TABLE!r} and {VALUES!r}"])
        self._sum_over_ranks()
        J = np.stack([np.concatenate([self._sums(slot)[name].ravel() for name in chosen]) for slot in slots])
        return np.asarray(J @ J.T)

    def _sum_over_ranks(self) -> None:
        """Make every rank's sums those of all ranks, once per step."""
        if not self._summed:
            self._gradients = {slot: {name: self._comm.sum(g) for name, g in sums.items()}
                               for slot, sums in self._gradients.items()}
        self._summed = True

    def apply(self, weights: Mapping[str, float] | None = None) -> Metrics:
        """Raises `Diverged` after more than `max_bad_steps` steps in a row whose gradient is not finite."""
        settings = self._settings()
        share = {SHARED: 1.0, **weights} if weights is not None else dict.fromkeys(self._gradients, 1.0)
        if unnamed := sorted(self._gradients.keys() - share.keys()):
            raise ValueError(f"slots {unnamed} have gradients but no weight; weights were given for {sorted(share)}")
        self._sum_over_ranks()
        mixed = {name: sum((share[slot] * sums[name] for slot, sums in self._gradients.items()), np.zeros_like(p))
                 for name, p in self.parameters.items()}
        self.discard()
        norm = float(np.sqrt(sum((g * g).sum() for g in mixed.values())))
        lr = settings.lr * (min(1.0, self.steps / settings.warmup_steps) if settings.warmup_steps else 1.0)
        if not np.isfinite(norm):
            self.bad_steps += 1
            if self.bad_steps > settings.max_bad_steps:
                raise Diverged(f"the gradient was not finite in {self.bad_steps} consecutive steps")
            return Metrics(lr=Metric(lr, reduction="last"), skipped=Metric(1.0, reduction="sum"))
        self.bad_steps, self.steps, self.version = 0, self.steps + 1, self.version + 1
        scale = min(1.0, settings.clip_norm / (norm + 1e-6)) if settings.clip_norm else 1.0
        for name, p in self.parameters.items():
            self._adam(name, p, scale * mixed[name], lr, settings)
        return Metrics(lr=Metric(lr, reduction="last"), grad_norm=Metric(norm), skipped=Metric(0.0, reduction="sum"))

    def _adam(self, name: str, p: np.ndarray, g: np.ndarray, lr: float, settings: Optimization) -> None:
        """Kingma and Ba 2015, algorithm 1, in place."""
        m, v, (b1, b2) = self._moments["m", name], self._moments["v", name], settings.betas
        m[:], v[:] = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p -= lr * (m / (1 - b1 ** self.steps)) / (np.sqrt(v / (1 - b2 ** self.steps)) + settings.eps)

    def discard(self) -> None:
        self._gradients, self._summed = {}, False

    def params(self) -> Iterator[tuple[str, Array]]:
        yield TABLE, self.parameters[TABLE]

    def load_params(self, items: Iterable[tuple[str, Array]], version: int) -> None:
        """Raises `ConfigError` where names or sizes do not fit; then nothing is written."""
        table, given = self.parameters[TABLE], {name: to_numpy(array) for name, array in items}
        problems = [f"{name} is unknown to the toy policy" for name in given if name != TABLE]
        if TABLE not in given:
            problems.append(f"{TABLE} is missing")
        elif given[TABLE].shape != table.shape:
            problems.append(f"{TABLE} has shape {given[TABLE].shape}, the toy policy has {table.shape}")
        if problems:
            raise ConfigError(problems, title="the given weights do not fit:")
        table[:] = given[TABLE]
        self.version = version

    def state(self) -> Mapping[str, np.ndarray]:
        return {**{f"weights.{name}": p.copy() for name, p in self.parameters.items()},
                **{f"{moment}.{name}": x.copy() for (moment, name), x in self._moments.items()},
                "counters": np.array([self.version, self.steps, self.bad_steps])}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Raises `ConfigError` where it is another learner's."""
        own = self.state()
        if wrong := sorted(name for name in own if name not in arrays or arrays[name].shape != own[name].shape):
            raise ConfigError([f"the saved state is not this toy policy's: {', '.join(wrong)}"])
        for name, p in self.parameters.items():
            p[:] = arrays[f"weights.{name}"]
        for (moment, name), x in self._moments.items():
            x[:] = arrays[f"{moment}.{name}"]
        self.version, self.steps, self.bad_steps = (int(x) for x in arrays["counters"])
        self.discard()

    def save(self, directory: Path) -> None:
        """Write `table.json`."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "table.json").write_text(json.dumps({n: p.tolist() for n, p in self.parameters.items()}))

    def read(self, directory: Path) -> None:
        """Put the table of a folder in place; values too, where there are as many heads."""
        try:
            saved = json.loads((directory / "table.json").read_text())
        except OSError as error:
            raise ConfigError([f"{directory} holds no table.json: {error.strerror}"]) from error
        self.load_params([(TABLE, np.array(saved[TABLE]))], 0)
        if np.shape(saved[VALUES]) == self.parameters[VALUES].shape:
            self.parameters[VALUES][:] = np.array(saved[VALUES])


def _entropy(logp: np.ndarray) -> np.ndarray:
    """[N, V] -> [N] nats; a token that is never drawn adds nothing."""
    p = np.exp(logp)
    found: np.ndarray = -(p * np.where(p > 0, logp, 0.0)).sum(axis=1)
    return found


class _Held:
    """`stop_gradient` where derivatives are differences: the first evaluation's values, in the order of the calls."""

    def __init__(self) -> None:
        self._values: list[Array] = []
        self._next = 0

    def begin(self) -> None:
        """Another evaluation begins."""
        self._next = 0

    def __call__(self, x: Array) -> Array:
        if self._next == len(self._values):
            self._values.append(np.array(x))
        self._next += 1
        return self._values[self._next - 1]


def _differences(totals: Callable[[TokenOutputs], dict[str, float]],
                 out: TokenOutputs) -> dict[str, dict[str, np.ndarray]]:
    """slot -> column -> derivative of the slot's total by each of the column's numbers."""
    names = [name for name in ("logprobs", "entropy", "values") if getattr(out, name) is not None]
    found = {slot: {name: np.zeros_like(getattr(out, name)) for name in names} for slot in totals(out)}
    for name in names:
        at = np.array(getattr(out, name))
        columns: dict[str, Any] = {name: at}
        moved = replace(out, **columns)
        for i in np.ndindex(at.shape):
            there = at[i]
            at[i] = there + _STEP
            above = totals(moved)
            at[i] = there - _STEP
            below = totals(moved)
            at[i] = there
            for slot, derivatives in found.items():
                derivatives[name][i] = (above[slot] - below[slot]) / (2 * _STEP)
    return found
