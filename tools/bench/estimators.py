"""Whole estimates, advantages and targets from rewards and values, ours beside torchrl's and the usual loop in one run.

4.19 M actions in 1024 episodes, float32, one thread: `equal`, all of one length, and `lognormal`, lengths of sigma 0.9
cut at nine medians, as answers of a language model are. Ours takes `Episodes`, one flat column without padding; the
peers take rows padded to the longest episode, with torchrl's next values shifted beforehand: building either is not
timed. Ours as users call it, with all its checks and the explained variance, which the peers do not compute.

Peers: torchrl's loop and its vectorised form, and the loop that RL2 and most trainers have, written anew here: padded
rows, one step after the other for all episodes, columns stacked, without the whitening that follows there.

Each candidate is a process of its own, and candidates take turns. Before anything is timed, its result on every action
is asserted equal to a float64 loop to 1e-4, relative and absolute (the vectorised form cuts its kernel at 1e-7). Shown
are medians over all calls of all rounds. While timing, malloc keeps freed memory, for all alike: pages the system hands
out anew would cost more than the arithmetic. Extra memory is the peak of resident memory in one call over what was
resident before it, results included, in a process where malloc is left as it is.

    python tools/bench/estimators.py [--estimators gae td_lambda vtrace] [--rounds 3] [--calls 3]

The peer needs `pip install torchrl==0.14.1`; without it torchrl's rows say "not measured".

Prediction, written before the first run, for gae: the solve is 20 ms of CPU time and all the rest 10 to 25 ms, theirs
some 140 and 240, so 4x and 7x at equal lengths; lognormal lengths pad them to six times as many actions and change
nothing for us: 25x and 40x. Memory: theirs 140 and 420 MiB, ours five columns of 16, 80 MiB; padded six times that.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from posttrain.data import Episodes, offsets_of
from posttrain.protocols import Estimator
from processes import KEEP_FREED, ONE_THREAD, extra_peak, in_a_process, medians

EPISODES, LENGTH = 1024, 4096
GAMMA, LAM = 1.0, 0.95
FLAT = ("rewards", "values", "logprobs", "behavior_logprobs")
Result = tuple[Any, Any]
"""Advantages and targets."""


@dataclass(frozen=True)
class Prepared:
    """A call with its inputs ready, and how its result becomes flat columns."""

    call: Callable[[], Result]
    flat: Callable[[Any], np.ndarray]


Candidate = Callable[[Episodes], Prepared]


def episodes_of(lengths: np.ndarray) -> Episodes:
    """Terminated episodes with rewards, values and both log-probs."""
    rng, N, E = np.random.default_rng(0), int(lengths.sum()), len(lengths)
    columns: dict[str, Any] = {name: rng.standard_normal(N, dtype=np.float32) for name in FLAT}
    columns["behavior_logprobs"] = columns["logprobs"] + 0.1 * columns["behavior_logprobs"]
    return Episodes(offsets=offsets_of(lengths), terminated=np.ones(E, bool), group=np.arange(E), **columns)


def lognormal_lengths(episodes: int, length: int) -> np.ndarray:
    """The shape of answers' lengths, scaled to the same number of actions as `episodes` of `length`."""
    shape = np.minimum(np.random.default_rng(1).lognormal(sigma=0.9, size=episodes), 9.0)
    lengths: np.ndarray = np.maximum(1, shape * (episodes * length / shape.sum())).astype(np.int64)
    lengths[lengths.argmax()] += episodes * length - lengths.sum()
    return lengths


LENGTHS: Mapping[str, Callable[[int, int], np.ndarray]] = {
    "equal": lambda episodes, length: np.full(episodes, length), "lognormal": lognormal_lengths}


def padded(column: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[E, longest] rows of a flat column, 0 behind their ends."""
    lengths = np.diff(offsets)
    rows = np.zeros((len(lengths), lengths.max()), column.dtype)
    rows[inside(offsets)] = column
    return rows


def inside(offsets: np.ndarray) -> np.ndarray:
    """[E, longest] bool, what is no padding."""
    lengths = np.diff(offsets)
    return np.asarray(np.arange(lengths.max()) < lengths[:, None])


def loop_in_float64(decay: np.ndarray, x: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """y_t = x_t + decay_t y_(t+1), one action after the other for all episodes, the definition itself."""
    a, y = (padded(column.astype(np.float64), offsets).T.copy() for column in (decay, x))
    for t in range(len(y) - 2, -1, -1):
        y[t] += a[t] * y[t + 1]
    return np.asarray(y.T[inside(offsets)])


def next_of(column: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The number after each action, 0 after the last of an episode."""
    following = np.append(column[1:], column.dtype.type(0))
    following[offsets[1:] - 1] = 0
    return following


def reference(episodes: Episodes, rho: np.ndarray, lam: float) -> Result:
    """Of all three estimators: V-trace with a lambda, its ratios `rho` all 1 for the other two."""
    r, v = (np.asarray(column, np.float64) for column in (episodes.rewards, episodes.values))
    delta = r + GAMMA * next_of(v, episodes.offsets) - v
    errors = loop_in_float64(GAMMA * lam * rho, rho * delta, episodes.offsets)
    return rho * (delta + GAMMA * lam * next_of(errors, episodes.offsets)), v + errors


def on_policy(episodes: Episodes) -> Result:
    return reference(episodes, np.ones(len(episodes.rewards)), LAM)


def off_policy(episodes: Episodes) -> Result:
    log_ratio = np.asarray(episodes.logprobs, np.float64) - np.asarray(episodes.behavior_logprobs)
    return reference(episodes, np.minimum(1.0, np.exp(log_ratio)), 1.0)


def _gae() -> Estimator:
    from posttrain_estimators.multistep import GAE

    return GAE(gamma=GAMMA, lam=LAM)


def _td_lambda() -> Estimator:
    from posttrain_estimators.multistep import TDLambda

    return TDLambda(gamma=GAMMA, lam=LAM)


def _vtrace() -> Estimator:
    from posttrain_estimators.offpolicy import VTrace

    return VTrace(gamma=GAMMA)


def ours(estimator: Callable[[], Estimator], in_torch: bool, episodes: Episodes) -> Prepared:
    """The estimator as users call it."""
    if in_torch:
        import torch

        columns: dict[str, Any] = {name: torch.from_numpy(getattr(episodes, name)) for name in FLAT}
        episodes = replace(episodes, **columns)
    how = estimator()

    def call() -> Result:
        estimate = how(episodes)
        return estimate.advantages, estimate.targets
    return Prepared(call, np.asarray)


def rl2_loop(episodes: Episodes) -> Prepared:
    """Padded rows, columns from last to first, stacked."""
    import torch

    rewards, values = (torch.from_numpy(padded(getattr(episodes, name), episodes.offsets)) for name in FLAT[:2])

    def call() -> Result:
        next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
        deltas = rewards + GAMMA * next_values - values
        gae, backwards = torch.zeros(len(deltas)), []
        for t in reversed(range(deltas.shape[1])):
            gae = deltas[:, t] + GAMMA * LAM * gae
            backwards.append(gae)
        advantages = torch.stack(backwards[::-1], dim=1)
        return advantages, advantages + values
    return Prepared(call, lambda rows: np.asarray(rows)[inside(episodes.offsets)])


def torchrl(function: Callable[[Any, dict[str, Any], dict[str, Any]], Result], episodes: Episodes) -> Prepared:
    """A function of torchrl's, called with rows of shape [E, longest, 1] that are prepared here."""
    import torch

    functional, offsets = importlib.import_module("torchrl.objectives.value.functional"), episodes.offsets
    rows = {name: torch.from_numpy(padded(getattr(episodes, name), offsets))[..., None] for name in FLAT}
    done = torch.zeros(rows["rewards"].shape, dtype=torch.bool)
    done[torch.arange(len(offsets) - 1), torch.from_numpy(np.diff(offsets) - 1)] = True
    following = torch.from_numpy(padded(next_of(np.asarray(episodes.values), offsets), offsets))[..., None]
    given = {"state_value": rows["values"], "next_state_value": following, "reward": rows["rewards"], "done": done,
             "terminated": done}
    logs = {"log_pi": rows["logprobs"], "log_mu": rows["behavior_logprobs"]}
    return Prepared(lambda: function(functional, given, logs),
                    lambda rows: np.asarray(rows)[..., 0][inside(offsets)])


def _torchrl_gae(name: str, functional: Any, given: dict[str, Any], logs: dict[str, Any]) -> Result:
    advantages, targets = getattr(functional, name)(GAMMA, LAM, **given)
    return advantages, targets


def _torchrl_td_lambda(name: str, functional: Any, given: dict[str, Any], logs: dict[str, Any]) -> Result:
    without = {key: column for key, column in given.items() if key != "state_value"}
    targets = getattr(functional, name)(GAMMA, LAM, **without)
    return targets - given["state_value"], targets


def _torchrl_vtrace(functional: Any, given: dict[str, Any], logs: dict[str, Any]) -> Result:
    advantages, targets = functional.vtrace_advantage_estimate(GAMMA, **logs, **given)
    return advantages, targets


@dataclass(frozen=True)
class Question:
    """One estimator: what it must give, and who computes it."""

    reference: Callable[[Episodes], Result]
    candidates: Mapping[str, Candidate]


def _question(reference: Callable[[Episodes], Result], estimator: Callable[[], Estimator],
              **peers: Candidate) -> Question:
    return Question(reference, {"ours, NumPy": partial(ours, estimator, False),
                                "ours, torch": partial(ours, estimator, True),
                                **{name.replace("_", " "): peer for name, peer in peers.items()}})


QUESTIONS: Mapping[str, Question] = {
    "gae": _question(
        on_policy, _gae,
        torchrl_loop=partial(torchrl, partial(_torchrl_gae, "generalized_advantage_estimate")),
        torchrl_vectorised=partial(torchrl, partial(_torchrl_gae, "vec_generalized_advantage_estimate")),
        RL2_loop=rl2_loop),
    "td_lambda": _question(
        on_policy, _td_lambda,
        torchrl_loop=partial(torchrl, partial(_torchrl_td_lambda, "td_lambda_return_estimate")),
        torchrl_vectorised=partial(torchrl, partial(_torchrl_td_lambda, "vec_td_lambda_return_estimate"))),
    "vtrace": _question(off_policy, _vtrace, torchrl_loop=partial(torchrl, _torchrl_vtrace))}


@dataclass(frozen=True)
class Case:
    """One candidate at one choice of lengths."""

    estimator: str
    lengths: str
    name: str

    @property
    def arguments(self) -> list[str]:
        """Of this script's process that measures it."""
        return ["--case", self.estimator, self.lengths, self.name]

    def prepared(self, episodes: int, length: int) -> Prepared:
        return QUESTIONS[self.estimator].candidates[self.name](episodes_of(LENGTHS[self.lengths](episodes, length)))


def peak_of_one_call(case: Case) -> dict[str, Any]:
    """MiB; a call on small inputs comes before, so that nothing is imported in the one that counts."""
    case.prepared(4, 64).call()
    return {"MiB": [extra_peak(case.prepared(EPISODES, LENGTH).call)]}


def seconds_of_calls(case: Case, expected: str, calls: int) -> dict[str, Any]:
    """Wall and CPU ms of each call; the one before them is compared with `expected` and not counted."""
    prepared = case.prepared(EPISODES, LENGTH)
    with np.load(expected) as columns:
        for name, column in zip(("advantages", "targets"), prepared.call(), strict=True):
            np.testing.assert_allclose(prepared.flat(column), columns[name], rtol=1e-4, atol=1e-4, err_msg=str(case))
    wall, cpu = [], []
    for _ in range(calls):
        start = time.perf_counter(), time.process_time()
        result = prepared.call()
        stop = time.perf_counter(), time.process_time()
        del result
        wall.append((stop[0] - start[0]) * 1e3)
        cpu.append((stop[1] - start[1]) * 1e3)
    return {"wall": wall, "cpu": cpu}


def measure(cases: list[Case], rounds: int, calls: int) -> dict[Case, dict[str, float]]:
    """Medians of each case."""
    taken: dict[Case, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        expected = {(case.estimator, case.lengths): f"{folder}/{case.estimator}-{case.lengths}.npz" for case in cases}
        for (estimator, lengths), path in expected.items():
            episodes = episodes_of(LENGTHS[lengths](EPISODES, LENGTH))
            advantages, targets = QUESTIONS[estimator].reference(episodes)
            np.savez(path, advantages=advantages, targets=targets)
        for case in cases:
            measured = in_a_process(__file__, [*case.arguments, "--memory"], ONE_THREAD)
            taken[case] = {**measured, "wall": [], "cpu": []}
        for _ in range(rounds):
            for case in cases:
                where = expected[case.estimator, case.lengths]
                measured = in_a_process(__file__, [*case.arguments, "--expected", where, "--calls", str(calls)],
                                        {**ONE_THREAD, **KEEP_FREED})
                for clock, numbers in measured.items():
                    taken[case][clock] += numbers
    return {case: medians(numbers) for case, numbers in taken.items()}


def table(cases: list[Case], medians: Mapping[Case, Mapping[str, float]]) -> Iterator[str]:
    """Rows of the table; ratios are a peer's CPU time and memory over those of ours."""
    yield (f"{'estimator, lengths':22s} {'candidate':20s} {'wall ms':>8s} {'CPU ms':>8s} {'extra MiB':>9s}"
           "   CPU over ours: NumPy  torch   memory over ours: NumPy  torch")
    for case in cases:
        head = f"{case.estimator + ', ' + case.lengths:22s} {case.name:20s} "
        if case not in medians:
            yield head + "not measured: pip install torchrl==0.14.1"
            continue
        mine = medians[case]
        row = head + f"{mine['wall']:8.1f} {mine['cpu']:8.1f} {mine['MiB']:9.0f}"
        if not case.name.startswith("ours"):
            base = [medians[replace(case, name=f"ours, {framework}")] for framework in ("NumPy", "torch")]
            cpu, memory = ([mine[name] / ours[name] for ours in base] for name in ("cpu", "MiB"))
            row += f"   {cpu[0]:20.1f} {cpu[1]:6.1f} {memory[0]:25.1f} {memory[1]:6.1f}"
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--estimators", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=3)
    for internal in ("--case", "--expected"):
        parser.add_argument(internal, nargs=3 if internal == "--case" else None, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        if importlib.util.find_spec("torch") and not given.case[2].endswith("NumPy"):
            import torch

            torch.set_num_threads(1)
        case = Case(*given.case)
        measured = peak_of_one_call(case) if given.memory else seconds_of_calls(case, given.expected, given.calls)
        print(json.dumps(measured))
        return
    cases = [Case(estimator, lengths, name) for estimator in given.estimators for lengths in given.lengths
             for name in QUESTIONS[estimator].candidates]
    here = [case for case in cases
            if not case.name.startswith("torchrl") or importlib.util.find_spec("torchrl") is not None]
    medians = measure(here, given.rounds, given.calls)
    longest = LENGTHS["lognormal"](EPISODES, LENGTH).max()
    print(f"{EPISODES * LENGTH / 1e6:.2f} M actions in {EPISODES} episodes, float32, one thread; the longest of the "
          f"lognormal ones has {longest}, so padding makes {EPISODES * longest / 1e6:.1f} M of them")
    print("\n".join(table(cases, medians)))


if __name__ == "__main__":
    main()
