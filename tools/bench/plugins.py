"""Seconds of `posttrain plugins` with no and with 50 further plugins installed, to a pipe and to a terminal.

Each plugin is a distribution with a long description, an entry point and four components. CPU seconds of the whole
process, interpreter included, and wall time; medians. Predicted: under 0.3 s of CPU with 50, of which the interpreter
and typer take most; below 1 ms for each plugin.

    python tools/bench/plugins.py [--plugins 50] [--repeats 9]
"""

from __future__ import annotations

import argparse
import os
import pty
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

COMPONENTS = 4
MODULE = '''"""A plugin."""
from posttrain.hookspecs import Component, hookimpl


@hookimpl
def components():
    for i in range({components}):
        yield Component("estimator", f"{name}_{{i}}", "{module}_parts:Part", "stands for a plugin in a measurement",
                        source="none")
'''
PARTS = '''"""Must not be imported by listing."""
raise AssertionError("a component was imported")
'''
DESCRIPTION = "\n".join(["# A plugin\n", *("A line of the text that a package shows on its page." for _ in range(120))])


def install(folder: Path, count: int) -> list[str]:
    """Make `count` distributions in a folder as pip leaves them; returns the modules that listing must not import."""
    for i in range(count):
        module, name = f"dummy_{i}_plugin", f"posttrain-dummy-{i}"
        (folder / f"{module}.py").write_text(MODULE.format(components=COMPONENTS, name=f"dummy_{i}", module=module))
        (folder / f"{module}_parts.py").write_text(PARTS)
        info = folder / f"{name.replace('-', '_')}-1.{i}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.{i}\nSummary: a plugin\n"
                                       f"Requires-Dist: posttrain-core\n\n{DESCRIPTION}\n")
        (info / "entry_points.txt").write_text(f"[posttrain.v1]\ndummy = {module}\n")
    return [f"dummy_{i}_plugin_parts" for i in range(count)]


def piped(command: Sequence[str], environment: Mapping[str, str]) -> None:
    subprocess.run(command, env=environment, check=True, capture_output=True)


def on_terminal(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run with a terminal of its own as output, which is read to its end."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, env={**environment, "TERM": "xterm", "COLUMNS": "120"}, stdout=theirs,
                          stderr=theirs) as process:
        os.close(theirs)
        try:
            while os.read(ours, 65536):
                pass
        except OSError:  # the end of a terminal, on Linux
            pass
    os.close(ours)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")


def measured(call: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Median seconds of CPU and of wall time of child processes; the first call, which writes bytecode, apart."""
    call()
    cpu, wall = [], []
    for _ in range(repeats):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        call()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall.append(time.perf_counter() - start)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(cpu), statistics.median(wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plugins", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    listing = [str(Path(sys.executable).with_name("posttrain")), "plugins"]
    cases: tuple[tuple[str, Callable[..., None], list[str]], ...] = (
        ("python -c pass", piped, [sys.executable, "-c", "pass"]),
        ("discover alone", piped, [sys.executable, "-c", "from posttrain.registry import discover; discover()"]),
        ("posttrain plugins | cat", piped, listing),
        ("posttrain plugins --json", piped, [*listing, "--json"]),
        ("posttrain plugins, on a terminal", on_terminal, listing))
    print(f"{'command':<34}{'more plugins':>12}{'CPU s':>9}{'wall s':>9}")
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder), given.plugins)
        for count, path in ((0, ""), (given.plugins, folder)):
            environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1",
                           "PYTHONPYCACHEPREFIX": str(Path(folder, "bytecode"))}
            environment.pop("PYTHONDONTWRITEBYTECODE", None)  # pip leaves compiled modules, too
            for name, run, command in cases:
                cpu, wall = measured(partial(run, command, environment), given.repeats)
                print(f"{name:<34}{count:>12}{cpu:>9.3f}{wall:>9.3f}")


if __name__ == "__main__":
    main()
