"""The pure functions of a learner that are compiled: what a model says of actions, and the gradients of a loss.

Compiled once for each bucket of sizes and each objective, which is a constant of the function; coefficients, the
temperature and all numbers are arguments. Knows no optimiser and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import jax
import jax.numpy as jnp
from posttrain.data import Loss, MicroBatch, TokenOutputs
from posttrain.loss import SHARED
from posttrain.ops import ops_of
from posttrain.protocols import Objective, Output

from posttrain_backends._jax.head import Reading, Readout, chosen_values, expected_values, read
from posttrain_backends._jax.model import JaxModel, Params, Structure
from posttrain_backends._jax.optimizer import norm_of

Arrays = Mapping[str, Any]
_READ = frozenset({Output.LOGPROBS, Output.ENTROPY, Output.REFERENCE_KL})
"""Outputs that come of the output matrix."""


@final
@dataclass(frozen=True, slots=True)
class Forward:
    """What the model of a structure says of the tokens of a `Rectangle`: a constant of what is compiled."""

    structure: Structure
    rows: int
    """Of a chunk of logits; 0 as suits the vocabulary."""

    def hidden(self, model: JaxModel, at: Arrays) -> jax.Array:
        """[S * T, H]"""
        tokens = at["tokens"]
        found = model.hidden(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
        return found.reshape(-1, found.shape[-1])

    def readout(self, params: Params, at: Arrays) -> tuple[jax.Array, jax.Array]:
        """What the logits are made of that the actions are drawn from: hidden states [N, H], the output matrix."""
        model = self.structure.bound(params)
        return self.hidden(model, at)[at["before"]], model.output_weight

    def outputs(self, params: Params, at: Arrays, asked: frozenset[Output], temperature: Any,
                reference: tuple[jax.Array, jax.Array] | None = None, reference_compute: Any = None) -> dict[str, Any]:
        """Fields of `TokenOutputs` that were asked for, and log-probs, NaN where nobody asks for them."""
        model: JaxModel = self.structure.bound(params)
        hidden, weight, compute = self.hidden(model, at), model.output_weight, model.compute_dtype
        before, chosen = hidden[at["before"]], at["chosen"]
        reading = read(before, weight, chosen, temperature, compute=compute, rows=self.rows,
                       reference=None if reference is None else Readout(*reference),
                       reference_compute=reference_compute) if asked & _READ else _nothing(before, weight)
        found: dict[str, Any] = {"logprobs": reading.logprobs}
        if Output.ENTROPY in asked:
            found["entropy"] = reading.entropy
        if Output.REFERENCE_KL in asked:
            found["reference_kl"] = reading.kl
        if Output.VALUES in asked:
            found["values"] = _values(params, before)
        if Output.BOOTSTRAP_VALUES in asked:
            found["bootstrap_values"] = _values(params, hidden[at["last"]])
        if Output.ACTION_VALUES in asked:
            found["action_values"] = chosen_values(before, *_action_values(params, weight), chosen)
        if Output.EXPECTED_ACTION_VALUES in asked:
            for name, x in (("expected_action_values", before), ("expected_bootstrap_values", hidden[at["last"]])):
                found[name] = expected_values(x, weight, *_action_values(params, weight), temperature, compute=compute,
                                              rows=self.rows)
        return found

    def accumulated(self, objective: Objective, reference_compute: Any, params: Params, sums: Mapping[str, Params],
                    at: Arrays, batch: Arrays, coef: Mapping[str, Any],
                    reference: tuple[jax.Array, jax.Array] | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """The sums of gradients by slot with those of one part added, and the numbers to report."""
        def totals(params: Params) -> tuple[dict[str, jax.Array], dict[str, Any]]:
            out = TokenOutputs(**self.outputs(params, at, objective.outputs, batch["temperature"], reference,
                                              reference_compute))
            loss = objective(ops_of(out.logprobs), out, MicroBatch(**batch), coef)
            return _by_slot(loss, tuple(sums), out.logprobs.dtype), _reported(loss)
        found, pullback, reported = jax.vjp(totals, dict(params), has_aux=True)
        def added(slot: str, held: Params) -> Params:
            one = {name: jnp.asarray(float(name == slot), x.dtype) for name, x in found.items()}
            (gradients,) = pullback(one)
            return {name: held[name] + g for name, g in gradients.items()}
        return {slot: added(slot, held) for slot, held in sums.items()}, reported


def slots_of(objective: Objective) -> tuple[str, ...]:
    """Those of the objective and, where there are several, the one of what they share."""
    return (*objective.slots, *([SHARED] if len(objective.slots) > 1 else []))


def mixed(first: Params, others: Sequence[Params], weights: Sequence[Any]) -> tuple[dict[str, jax.Array], jax.Array]:
    """The weighted sum of the gradients of all slots, and its norm."""
    def of(name: str) -> jax.Array:
        return sum((w * x[name] for w, x in zip(weights[1:], others)), weights[0] * first[name])
    gradients = {name: of(name) for name in first}
    return gradients, norm_of(gradients)


def _by_slot(loss: Loss, slots: Sequence[str], dtype: Any) -> dict[str, jax.Array]:
    """What is differentiated in each slot. Raises `ValueError` for a term in another one."""
    totals = {slot: jnp.zeros((), dtype) for slot in slots}
    for name, term in loss.terms.items():
        if term.slot not in totals:
            raise ValueError(f"term '{name}' stands in slot {term.slot!r}; the objective has {', '.join(slots)}")
        totals[term.slot] += jnp.asarray(term.coef * term.total, dtype)
    return totals


def _reported(loss: Loss) -> dict[str, Any]:
    return {"terms": {name: term.total for name, term in loss.terms.items()}, "metrics": dict(loss.metrics)}


def _nothing(before: jax.Array, weight: jax.Array) -> Reading:
    nan = jnp.full(len(before), jnp.nan, weight.dtype)
    return Reading(nan, nan)


def _values(params: Params, hidden: jax.Array) -> jax.Array:
    """[n, H] -> [k, n]."""
    weight, bias = params["value_head.weight"], params["value_head.bias"]
    return weight @ hidden.astype(weight.dtype).T + bias[:, None]


def _action_values(params: Params, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The action-value head as [k, V, H] and [k, V]."""
    V, H = weight.shape
    return params["action_value_head.weight"].reshape(-1, V, H), params["action_value_head.bias"].reshape(-1, V)


# ---- compiled once for all learners of equal structure


def _scored(forward: Forward, asked: frozenset[Output], reference_compute: Any, params: Params, at: Arrays,
            temperature: Any, reference: Any) -> dict[str, Any]:
    return forward.outputs(params, at, asked, temperature, reference, reference_compute)


def _read(forward: Forward, params: Params, at: Arrays) -> tuple[jax.Array, jax.Array]:
    return forward.readout(params, at)


def _accumulated(forward: Forward, objective: Objective, reference_compute: Any, params: Params,
                 sums: Mapping[str, Params], at: Arrays, batch: Arrays, coef: Arrays,
                 reference: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return forward.accumulated(objective, reference_compute, params, sums, at, batch, coef, reference)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """A compiled function, and for what it was compiled so far: each set of constants, shapes and devices costs
    seconds, once in a process."""

    call: Callable[..., Any]
    seen: set[Any] = field(default_factory=set)

    def is_new(self, constants: tuple[Any, ...], given: tuple[Any, ...]) -> bool:
        """Whether a call with these has to compile first; asked once for each call."""
        leaves, tree = jax.tree.flatten(given)
        key = constants, tree, tuple(
            (jnp.shape(x), str(jnp.result_type(x)), getattr(x, "sharding", None)) for x in leaves)
        known = key in self.seen
        self.seen.add(key)
        return not known

    def __call__(self, constants: tuple[Any, ...], given: tuple[Any, ...]) -> Any:
        return self.call(*constants, *given)


SCORED = Compiled(jax.jit(_scored, static_argnums=(0, 1, 2)))
READ = Compiled(jax.jit(_read, static_argnums=(0,)))
ACCUMULATED = Compiled(jax.jit(_accumulated, static_argnums=(0, 1, 2), donate_argnums=(4,)))
MIXED = jax.jit(mixed, donate_argnums=(0,))
