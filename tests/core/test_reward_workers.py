"""Reward workers: calls that raise, hang, die or answer wrongly, by each rule; other rows, order and processes."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from needed import first_party
from posttrain.config import RewardEntry, load
from posttrain.data import Metrics, Prompt, Rollouts
from posttrain.errors import ConfigError, PluginError, RewardError
from posttrain.registry import discover
from posttrain.rewards import pool as pools
from posttrain.rewards.calls import Ended, Origin, Overdue, Raised, Returned
from posttrain.rewards.code import Code
from posttrain.rewards.pool import Job, Pool
from posttrain.rewards.scoring import CALL_ROWS, score, summed

GROUPS, SIZE = 12, 4
ROWS = GROUPS * SIZE
SECONDS = 0.4
"""A deadline that a sound call of these tests keeps by far."""


def rollouts(said: Mapping[int, str] = {}) -> Rollouts:
    """48 episodes of one action each; the answers are numbers, but for those in `said`."""
    E = ROWS
    return Rollouts(
        tokens=np.arange(2 * E, dtype=np.int32), offsets=np.arange(0, 2 * E + 1, 2), episode=np.arange(E),
        is_action=np.tile([False, True], E), group=np.repeat(np.arange(GROUPS), SIZE), finish=np.zeros(E, np.int8),
        terminated=np.ones(E, bool), completions=tuple(said.get(e, str(e)) for e in range(E)),
        prompts=tuple(Prompt(text="p", group=e // SIZE, where=f"d.jsonl:{e + 1}") for e in range(E)))


REWARDS = '''
import asyncio, os, signal, sys, time

def act(text):
    """A number is its own reward; a word is a deed."""
    if text == "raise":
        return 1 / 0
    if text == "spin":
        while True:
            pass
    if text == "sleep":
        time.sleep(60)
    if text == "regex":
        import re
        re.match(r"(a+)+$", "a" * 60 + "b")  # holds the interpreter's lock for ages
    if text == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "leak":
        raise MemoryError
    if text == "exit":
        sys.exit(0)
    if text == "none":
        return None
    return float(text)

def deeds(completions, **columns):
    return [act(text) for text in completions]

async def later(completions, **columns):
    await asyncio.sleep(0)
    return list(await asyncio.gather(*(one(text) for text in completions)))

async def one(text):
    await asyncio.sleep(0)
    if text == "sleep":
        await asyncio.sleep(60)
    return act(text)

def short(completions, **columns):
    return [0.0] * (len(completions) - 1)

def within(completions, **columns):
    """Depends on the other rows of a call."""
    return [float(len(completions)) + i for i in range(len(completions))]

def scaled(completions, by=1.0, **columns):
    return [by * float(text) for text in completions]

def pid(completions, **columns):
    return [os.getpid()] * len(completions)

def crowded(completions, **columns):
    if len(completions) > 1:
        time.sleep(60)
    return [1.0]

def loaded_frameworks(completions, **columns):
    return [sum(name in sys.modules for name in ("torch", "jax", "scipy"))] * len(completions)

def threads(completions, **columns):
    return [float(os.environ["OMP_NUM_THREADS"])] * len(completions)
'''

names: dict[str, Any] = {}
exec(compile(REWARDS, "rewards_of_these_tests.py", "exec"), names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards")
    (path / "rewards.py").write_text(REWARDS)
    return path


Make = Callable[..., RewardEntry]


@pytest.fixture(params=["file", "python"])
def make(request: pytest.FixtureRequest, folder: Path) -> Make:
    """An entry for a function of `REWARDS`, named in a file (a fresh worker) or handed over (a forked one)."""
    def made(function: str, **rules: Any) -> RewardEntry:
        origin = Origin(f"{folder / 'rewards.py'}:{function}") if request.param == "file" else None
        return RewardEntry(rules.pop("name", function), names[function], origin=origin, **{"timeout": SECONDS, **rules})
    return made


@pytest.fixture
def forked() -> Make:
    """An entry for a function of `REWARDS` that was handed over: for what does not depend on where it is called."""
    return lambda function, **rules: RewardEntry(
        rules.pop("name", function), names[function], **{"timeout": SECONDS, **rules})


def scored(given: Rollouts, *entries: RewardEntry, count: int = 1, rate: float = 1.0) -> tuple[Rollouts, Metrics]:
    with Pool(entries, count=count) as pool:
        return score(given, entries, pool, rate)


def outcomes(found: Rollouts, name: str) -> list[float]:
    return found.rewards[name][1::2].tolist()


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


def gone(pid: int) -> None:
    """Fails unless the process ends soon; one that nobody has asked for its status has ended."""
    until = time.monotonic() + 3
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "still runs"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def no_orphans() -> Iterator[None]:
    """Every test ends with the processes it began with."""
    before = {p.pid for p in psutil.Process().children()}
    yield
    assert {p.pid for p in psutil.Process().children()} == before


def test_sound_rewards(make: Make) -> None:
    found, metrics = scored(rollouts({5: "none"}), make("deeds"), make("later"))
    for name in ("deeds", "later"):
        assert outcomes(found, name) == [0.0 if e == 5 else e for e in range(ROWS)]
        assert np.flatnonzero(found.excluded[name]).tolist() == [5]
    assert metrics.values_by_name() == {
        "dropped": 0, **{f"{name}/{what}": 0 for name in ("deeds", "later")
                         for what in ("errors", "timeouts", "respawned")}}


@pytest.mark.parametrize("deed", ["spin", "sleep", "regex", "kill", "leak", "exit"])
def test_a_row_that_hangs_or_kills_its_process_leaves_the_others_as_they_are(make: Make, deed: str) -> None:
    """By default its episode alone is left out."""
    start = time.monotonic()
    found, metrics = scored(rollouts({5: deed, 30: "none"}), make("deeds"))
    assert time.monotonic() - start < 2 * SECONDS + 1.5, "twice its deadline: with its neighbours, then alone"
    assert outcomes(found, "deeds") == [0.0 if e in (5, 30) else e for e in range(ROWS)]
    assert np.flatnonzero(found.excluded["deeds"]).tolist() == [5, 30]
    values = metrics.values_by_name()
    assert values["deeds/timeouts"] == 1 == values["dropped"] and values["deeds/errors"] == 0
    assert values["deeds/respawned"] == 2


@pytest.mark.parametrize(("rule", "left_out", "zero"), [
    ("drop_sample", [5], False), ("drop_group", [4, 5, 6, 7], False), ("zero", [], True)])
@pytest.mark.parametrize("deed", ["raise", "kill"])
def test_rules_for_failures(forked: Make, deed: str, rule: Any, left_out: list[int], zero: bool) -> None:
    """An episode that is left out is out of every column, and of their sum."""
    entries = [forked("deeds", on_error=rule, on_timeout=rule), forked("pid", name="other", weight=0.5)]
    found, metrics = scored(rollouts({5: deed}), *entries)
    total = summed(found, entries)
    for column in ("deeds", "other", "reward"):
        assert np.flatnonzero(total.excluded[column]).tolist() == left_out
    assert outcomes(found, "deeds") == [0.0 if e == 5 else e for e in range(ROWS)]
    values = metrics.values_by_name()
    assert (values["deeds/errors"], values["deeds/timeouts"]) == ((1, 0) if deed == "raise" else (0, 1))
    assert values["dropped"] == len(left_out) and values["other/errors"] == 0


def test_columns_of_the_environment_are_left_out_too(forked: Make) -> None:
    given = replace(rollouts({5: "raise"}), rewards={"env": np.ones(2 * ROWS)})
    found, _ = scored(given, forked("deeds", on_error="drop_sample"))
    assert np.flatnonzero(found.excluded["env"]).tolist() == [5]


@pytest.mark.parametrize(("deed", "message"), [
    ("raise", r"reward 'deeds' raised ZeroDivisionError: division by zero on row d\.jsonl:6 at .*rewards.*\.py:7\n"),
    ("kill", r"reward 'deeds' ended its process \(killed by SIGKILL\) on row d\.jsonl:6\n"),
    ("leak", r"reward 'deeds' ended its process \(exit status 70\) on row d\.jsonl:6\n"),
    ("sleep", r"reward 'deeds' did not answer within 0\.4 s on row d\.jsonl:6\n.*rewards\.deeds\.timeout")])
def test_fail_names_the_row(forked: Make, deed: str, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        scored(rollouts({5: deed, 6: deed}), forked("deeds", on_timeout="fail"))
    if deed == "raise":
        assert "return 1 / 0" in str(caught.value.__cause__) or "in act" in str(caught.value.__cause__)


@pytest.mark.parametrize("deed", ["raise", "kill"])
def test_too_many_failures_stop_with_the_first(forked: Make, deed: str) -> None:
    """3 of 48 rows are more than 5 %, 2 are not."""
    entry = forked("deeds", on_error="zero", on_timeout="zero")
    scored(rollouts({20: deed, 41: deed}), entry, rate=0.05)
    with pytest.raises(RewardError, match=r"on row d\.jsonl:10(.|\n)*3 of 48 rows failed, more than "
                                          r"reward_workers\.max_error_rate \(0\.05\)"):
        scored(rollouts({9: deed, 20: deed, 41: deed}), entry, rate=0.05)


def test_a_reward_that_always_hangs_is_found_out_early(forked: Make) -> None:
    """Not all 48 rows are waited for."""
    start = time.monotonic()
    with pytest.raises(RewardError, match="8 of 48 rows failed"):
        scored(rollouts(dict.fromkeys(range(ROWS), "sleep")), forked("deeds", timeout=0.1), rate=0.05)
    assert time.monotonic() - start < 8


@pytest.mark.parametrize(("function", "message"), [
    ("short", "returned .* numbers for .* completions; return one per completion"),
    ("deeds", r"returned nan, which is not finite.*\(row d\.jsonl:6\)")])
def test_a_wrong_answer_stops_whatever_the_rules_say(forked: Make, function: str, message: str) -> None:
    with pytest.raises(RewardError, match=f"reward '{function}' {message}"):
        scored(rollouts({5: "nan"}), forked(function, on_error="zero", on_timeout="zero"))


def test_an_async_reward_that_hangs(forked: Make) -> None:
    found, metrics = scored(rollouts({5: "sleep"}), forked("later"))
    assert outcomes(found, "later") == [0.0 if e == 5 else e for e in range(ROWS)]
    assert metrics.values_by_name()["later/timeouts"] == 1


def test_a_reward_slow_only_on_many_rows_is_asked_row_by_row(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    found, metrics = scored(rollouts(), make("crowded"), count=2)
    assert outcomes(found, "crowded") == [1.0] * ROWS and not found.excluded["crowded"].any()
    assert metrics.values_by_name()["crowded/timeouts"] == 0
    assert "raise rewards.crowded.timeout" in caplog.text


# Fresh workers ----------------------------------------------------------------------------------------------------


def from_file(folder: Path, function: str, **rules: Any) -> RewardEntry:
    return RewardEntry(function, names[function], origin=Origin(f"{folder / 'rewards.py'}:{function}"),
                       **{"timeout": SECONDS, **rules})


def test_the_number_of_workers_changes_nothing(folder: Path) -> None:
    """Not even for a reward that looks at the other rows of its call, and with failures in between."""
    entries = [from_file(folder, "within"), from_file(folder, "deeds", on_error="zero"), from_file(folder, "later")]
    said = {5: "raise", 17: "kill", 40: "none"}
    given, entries = rollouts(said), [*entries[:2], replace(entries[2], on_error="zero")]
    found = [scored(given, *entries, count=count) for count in (1, 2, 3)]
    for other, metrics in found[1:]:
        for name in ("within", "deeds", "later"):
            assert np.array_equal(other.rewards[name], found[0][0].rewards[name])
            assert np.array_equal(other.excluded[name], found[0][0].excluded[name])
        assert metrics.values_by_name() == found[0][1].values_by_name()


def test_calls_hold_whole_groups(folder: Path) -> None:
    per_call = -(-CALL_ROWS // SIZE) * SIZE
    expected = [float(per_call + e % per_call) for e in range(ROWS)]
    assert outcomes(scored(rollouts(), from_file(folder, "within"), count=2)[0], "within") == expected


def test_work_is_shared_and_processes_stay(folder: Path) -> None:
    entry = from_file(folder, "pid")
    with Pool([entry], count=2) as pool:
        steps = [set(outcomes(score(rollouts(), [entry], pool)[0], "pid")) for _ in range(8)]
        assert len(set.union(*steps)) <= 2 and os.getpid() not in set.union(*steps)
        assert set.union(*steps) <= {p.pid for p in children()}


def test_workers_load_no_framework_and_one_thread(folder: Path) -> None:
    found, _ = scored(rollouts(), from_file(folder, "loaded_frameworks"), from_file(folder, "threads"))
    assert set(outcomes(found, "loaded_frameworks")) == {0.0} and set(outcomes(found, "threads")) == {1.0}


def test_bound_fields_travel(folder: Path) -> None:
    origin = Origin.of(f"{folder / 'rewards.py'}:scaled", names["scaled"], {"by": 3.0})
    found, _ = scored(rollouts(), RewardEntry("scaled", names["scaled"], origin=origin))
    assert outcomes(found, "scaled") == [3.0 * e for e in range(ROWS)]


@dataclass(frozen=True)
class Times:
    """A component whose field is an object from Python: it cannot be made in another process."""

    by: Callable[[str], float]

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return [self.by(text) + os.getpid() * 0 for text in completions]


def test_what_cannot_travel_is_forked() -> None:
    made = Times(lambda text: -float(text))
    found, _ = scored(rollouts(), RewardEntry("times", made, origin=Origin("nowhere:Times", {"by": made.by})))
    assert outcomes(found, "times") == [-float(e) for e in range(ROWS)]


def test_a_reward_that_cannot_be_loaded(folder: Path) -> None:
    (folder / "broken.py").write_text("import json\n\nx = json.loads('{')\n")
    entry = RewardEntry("mine", names["pid"], origin=Origin(f"{folder / 'broken.py'}:pid"))
    with pytest.raises(RewardError, match="reward 'mine' cannot be loaded in a worker: JSONDecodeError") as caught:
        scored(rollouts(), entry)
    assert "broken.py" in str(caught.value.__cause__)


def test_a_worker_that_dies_while_it_loads(folder: Path) -> None:
    (folder / "deadly.py").write_text("import os\nos._exit(3)\n")
    with pytest.raises(RewardError, match=r"a reward worker ended \(exit status 3\) while it loaded mine"):
        scored(rollouts(), RewardEntry("mine", names["pid"], origin=Origin(f"{folder / 'deadly.py'}:pid")))


def test_a_worker_that_dies_between_two_steps_is_replaced(make: Make) -> None:
    entry = make("deeds")
    with Pool([entry], count=1) as pool:
        score(rollouts(), [entry], pool)
        worker, = children()
        worker.kill()
        worker.wait()
        found, metrics = score(rollouts(), [entry], pool)
    assert outcomes(found, "deeds") == list(range(ROWS))
    assert metrics.values_by_name()["deeds/respawned"] == 1 and not found.excluded["deeds"].any()


# Forked workers and the process itself ----------------------------------------------------------------------------


def test_a_function_from_python_is_called_once_a_step_and_remembers() -> None:
    calls = list[int]()

    def counted(completions: list[str], **columns: Any) -> list[float]:
        calls.append(len(completions))
        return [100.0 * len(calls) + len(completions)] * len(completions)

    entry = RewardEntry("counted", counted)
    with Pool([entry]) as pool:
        for step in (1, 2):
            assert set(outcomes(score(rollouts(), [entry], pool)[0], "counted")) == {100.0 * step + ROWS}
    assert calls == [], "in a process of its own"


def test_a_forked_worker_may_use_torch_though_the_run_did() -> None:
    torch = pytest.importorskip("torch")
    x = torch.ones(300, 300)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert float((x @ x).sum()) == 300.0 ** 3, "its threads are running"
    try:
        entry = RewardEntry("torch", lambda completions, **_: [float((x @ x).sum())] * len(completions), timeout=20)
        assert set(outcomes(scored(rollouts(), entry)[0], "torch")) == {300.0 ** 3}
    finally:
        torch.set_num_threads(before)


def test_without_fork_functions_are_called_in_process(caplog: pytest.LogCaptureFixture) -> None:
    entries = [RewardEntry("a", names["pid"]), RewardEntry("b", names["deeds"], on_error="drop_sample")]
    with Pool(entries, fork=False) as pool:
        found, metrics = score(rollouts({5: "raise"}), entries, pool)
        score(rollouts(), entries, pool)
    assert set(outcomes(found, "a")) == {float(os.getpid())}
    assert found.excluded["a"][5] and metrics.values_by_name()["b/errors"] == 1
    assert len([r for r in caplog.records if "need a fork: a, b" in r.getMessage()]) == 1


def test_what_a_reward_prints_is_no_output_of_the_run(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "loud.py").write_text("import os\ndef loud(completions, **_):\n    print('python', flush=True)\n"
                                    "    os.write(1, b'C')\n    return [0] * len(completions)\n")
    scored(rollouts(), RewardEntry("loud", names["pid"], origin=Origin(f"{folder / 'loud.py'}:loud")))
    out, err = capfd.readouterr()
    assert out == "" and "python" in err and "C" in err


# The end of a run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_no_process(forked: Make, error: type[BaseException]) -> None:
    with pytest.raises(error), Pool([forked("deeds")], count=2) as pool:
        score(rollouts(), pool.rewards, pool)  # type: ignore[arg-type]  # they are entries
        assert children()
        raise error
    assert not children()


def test_busy_workers_end_with_the_pool(forked: Make) -> None:
    """Ctrl-C while a reward hangs."""
    entry = forked("deeds", timeout=60)
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt), Pool([entry], count=2) as pool:
            pool._start()
            signal.setitimer(signal.ITIMER_REAL, 0.8)
            score(rollouts({5: "sleep"}), [entry], pool)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, ctrl_c)
        signal.signal(signal.SIGALRM, before)
    assert not children()


ORPHANS = """
import sys, time
from posttrain.config import RewardEntry, load
from posttrain.rewards.calls import Origin
from posttrain.rewards.pool import Job, Pool

def hang(completions):
    while True:
        pass

rewards = [RewardEntry("forked", hang, timeout=60),
           RewardEntry("fresh", hang, timeout=60, origin=Origin(sys.argv[1] + ":hang"))]
pool = Pool(rewards, count=2).__enter__()
pool._start()
print("started", flush=True)
pool.run([Job(i, (0,), {"completions": ["x"]}) for i in (0, 1, 1)])
"""


def test_workers_die_with_the_run_even_while_they_hang(folder: Path) -> None:
    """SIGKILL of the run: nothing of it can clean up."""
    (folder / "hang.py").write_text("def hang(completions):\n    while True:\n        pass\n")
    run = subprocess.Popen([sys.executable, "-c", ORPHANS, str(folder / "hang.py")], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline() == "started\n"
    until = time.monotonic() + 20
    workers = psutil.Process(run.pid).children()
    while sum(w.cpu_times().user > 0.3 for w in workers) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(workers) == 3
    run.kill()
    run.communicate()
    _, alive = psutil.wait_procs(workers, timeout=5)
    for worker in alive:
        worker.kill()
    assert not alive


def test_processes_of_a_reward_end_with_it(folder: Path) -> None:
    """A hanging reward's own children are killed with it."""
    note = folder / "child"
    (folder / "parent.py").write_text(
        "import subprocess, time\ndef parent(completions, **_):\n"
        f"    child = subprocess.Popen(['sleep', '60'])\n    open({str(note)!r}, 'w').write(str(child.pid))\n"
        "    time.sleep(60)\n")
    entry = RewardEntry("parent", names["pid"], origin=Origin(f"{folder / 'parent.py'}:parent"), timeout=0.3)
    found, _ = scored(rollouts().select(np.arange(1)), entry)
    assert found.excluded["parent"].all()
    gone(int(note.read_text()))


# The pool alone ---------------------------------------------------------------------------------------------------


def test_kinds_of_outcomes_in_the_order_of_the_calls(make: Make) -> None:
    deeds = ["1", "raise", "sleep", "kill", "none", "2"]
    with Pool([make("deeds")], count=2) as pool:
        found = pool.run([Job(0, (i,), {"completions": [deed]}) for i, deed in enumerate(deeds)])
    assert [type(x) for x in found] == [Returned, Raised, Overdue, Ended, Returned, Returned]
    assert found[0] == Returned((1.0,)) and found[2:] == [Overdue(SECONDS), Ended(-9), Returned((None,)),
                                                         Returned((2.0,))]


def test_a_pool_starts_when_it_is_needed_and_again_after_its_end(make: Make) -> None:
    pool = Pool([make("deeds")], count=1)
    assert not children()
    for _ in range(2):
        assert pool.run([Job(0, (0,), {"completions": ["3"]})]) == [Returned((3.0,))]
        assert len(children()) == 1
        pool.close()
        assert not children()


@pytest.mark.parametrize(("cores", "threads", "expected"), [(1, 0, 1), (2, 0, 1), (4, 2, 2), (4, 4, 1), (64, 0, 8)])
def test_workers_for_the_cores_at_hand(monkeypatch: pytest.MonkeyPatch, cores: int, threads: int,
                                       expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert pools._workers_at_hand(threads) == expected


@pytest.mark.parametrize("rules", [{"timeout": 0}, {"timeout": math.inf}, {"weight": math.nan}])
def test_rules_that_make_no_sense(rules: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(rules))):
        RewardEntry("a", print, **rules)  # type: ignore[arg-type]  # wrong on purpose


# Mathematics and code ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "text", "expected"), [
    ("1/2", "0.5", 1.0), (r"\frac{1}{2}", "It is $0.5$.", 1.0), (r"\frac{1}{2}", "It is 2", 0.0),
    (12, "The answer is 12.", 1.0), ("12", "The answer is 13.", 0.0), ("12", r"\boxed{12}, not 13", 1.0),
    ("x^2 + 2x + 1", "$(x+1)^2$", 1.0), ("x^2 + 2x + 1", "$(x-1)^2$", 0.0), (["1", "2"], "2", 1.0),
    ("1,000", "1000", 1.0), ("-3", "3", 0.0), ("12", "", 0.0), ("12", r"\frac{", 0.0), (None, "12", None)])
def test_mathematics(answer: Any, text: str, expected: float | None) -> None:
    pytest.importorskip("math_verify")
    from posttrain.rewards.math import Math

    assert Math()(prompts=[""], completions=[text], answer=[answer]) == [expected]


def test_mathematics_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.delitem(sys.modules, "posttrain.rewards.math", raising=False)
    with pytest.raises(PluginError, match=r"needs math_verify, which is not installed: pip install .*math"):
        discover().create("reward", "math")


def test_mathematics_in_a_worker_and_its_unreadable_answer() -> None:
    pytest.importorskip("math_verify")
    from posttrain.rewards.math import Math

    rule = Math()
    given = rollouts()
    def answered(answer: str) -> Rollouts:
        return replace(given, prompts=tuple(replace(p, extra={"answer": answer}) for p in given.prompts))
    entry = RewardEntry("math", rule, origin=Origin.of("posttrain.rewards.math:Math", rule, {}))
    assert outcomes(scored(answered("14/2"), entry)[0], "math") == [float(e == 7) for e in range(ROWS)]
    with pytest.raises(RewardError, match=r"math-verify cannot read the right answer '' .*on row d\.jsonl:1"):
        scored(answered(""), entry)


@pytest.mark.parametrize(("code", "tests", "expected"), [
    ("def f(x): return x + 1", ["assert f(1) == 2", "assert f(1) == 3"], 0.5),
    ("Here:\n```python\ndef f(x):\n    return x + 1\n```\nDone.", "assert f(1) == 2", 1.0),
    ("def f(", ["pass"], 0.0), ("import os; os._exit(0)", ["assert False"], 0.0), ("x = 1", None, None),
    ("import sys; sys.exit(0)", ["assert False"], 0.0), ("while True: pass", ["pass"], 0.0),
    ("import time; time.sleep(60)", ["pass"], 0.0), ("x = 'a' * (1 << 31)", ["pass"], 0.0),
    ("open('big', 'wb').write(bytes(3 << 20))", ["pass"], 0.0), ("print('hello')", ["pass"], 1.0),
    ("import os\nassert 'HOME' not in os.environ", ["import os\nassert os.listdir('.') == []"], 1.0)])
def test_code(code: str, tests: Any, expected: float | None) -> None:
    start = time.monotonic()
    assert Code(seconds=0.7)(prompts=[""], completions=[code], tests=[tests]) == [expected]
    assert time.monotonic() - start < 3


def test_processes_of_code_end_with_it(tmp_path: Path) -> None:
    note = tmp_path / "child"
    code = (f"import os, time\nif os.fork() == 0:\n    open({str(note)!r}, 'w').write(str(os.getpid()))\n"
            "    time.sleep(60)\n")
    Code(seconds=0.7, processes=100_000)(prompts=[""], completions=[code], tests=["pass"])
    gone(int(note.read_text()))


def test_code_whose_process_cannot_start_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.rewards.code.RUNNER", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match=r"did not start .*exit status 3"):
        Code()(prompts=[""], completions=["x = 1"], tests=["pass"])


def test_code_all_or_nothing() -> None:
    tests = ["assert f(1) == 2", "assert f(1) == 3"]
    assert Code(all_or_nothing=True)(prompts=[""], completions=["def f(x): return x + 1"], tests=[tests]) == [0.0]


@dataclass(frozen=True)
class Judge:
    """A reward that is a model: what it loads notes its process and how many rows came together."""

    calls: list[tuple[int, int]]
    loads: list[int]

    def load(self, threads: int) -> Callable[..., list[float | None]]:
        self.loads.append(threads)

        def judged(prompts: list[Any], completions: list[str]) -> list[float | None]:
            self.calls.append((os.getpid(), len(completions)))
            return [act(text) for text in completions]
        act = names["act"]
        return judged


def test_a_model_is_loaded_once_and_called_in_this_process_on_all_rows(make: Make,
                                                                       caplog: pytest.LogCaptureFixture) -> None:
    judge = Judge([], [])
    model = RewardEntry("judge", judge, origin=Origin("nowhere:Judge"))
    entries = (make("deeds"), model)
    with Pool(entries, count=1, training_threads=3) as pool:
        pool.load(0)
        assert judge.loads == []
        pool.load(1)
        for _ in range(2):
            found, _ = score(rollouts({5: "none"}), entries, pool, 1.0)
            assert outcomes(found, "judge") == outcomes(found, "deeds")
            assert np.flatnonzero(found.excluded["judge"]).tolist() == [5]
        assert not pool.shared(1)
    assert judge.loads == [3] and judge.calls == [(os.getpid(), ROWS)] * 2
    assert not caplog.records, "no word of a fork, which a model does not need"


def test_rows_on_which_a_model_raises_are_found_one_by_one_and_fall_under_its_rule() -> None:
    judge = Judge([], [])
    found, metrics = scored(rollouts({5: "raise"}), RewardEntry("judge", judge, on_error="drop_sample"))
    assert judge.loads == [0], "loaded where it is first needed"
    assert outcomes(found, "judge") == [0.0 if e == 5 else e for e in range(ROWS)]
    assert np.flatnonzero(found.excluded["judge"]).tolist() == [5]
    assert metrics.values_by_name()["judge/errors"] == 1
    assert [rows for _, rows in judge.calls] == [ROWS] + [1] * ROWS
    with pytest.raises(RewardError, match=r"reward 'judge' raised ZeroDivisionError.* on row d.jsonl:6(.|\n)*"
                                          r"rewards\.judge\.on_error: drop_sample"):
        scored(rollouts({5: "raise"}), RewardEntry("judge", judge))


@first_party
def test_a_configuration_takes_models_and_refuses_what_is_neither_model_nor_function() -> None:
    judge = Judge([], [])
    given = load({"rewards": {"a": {"use": judge, "weight": 2.0}}}, (), discover())
    assert given.settings.rewards["a"].call is judge and given.settings.rewards["a"].weight == 2.0
    with pytest.raises(ConfigError, match=r"rewards\.a\.timeout: a reward that is a model is called in the training"):
        load({"rewards": {"a": {"use": judge, "timeout": 3.0}}}, (), discover())
    with pytest.raises(ConfigError, match=r"rewards\.a: object can neither be called nor loaded"):
        load({"rewards": {"a": {"use": object()}}}, (), discover())
