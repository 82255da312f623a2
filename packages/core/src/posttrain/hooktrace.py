"""`POSTTRAIN_TRACE_HOOKS=1`: each call of a hook on stderr, with plugin, arguments, answer and time.

Knows how a hook is called (`Call`), and nothing of what hooks do.
"""

from __future__ import annotations

import reprlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import pluggy

Call = Callable[[pluggy.PluginManager, object, str, Mapping[str, Any]], list[Any]]
"""Calls a hook, by its name, of one plugin alone with arguments; its answers."""

_SHORT = reprlib.Repr()
_SHORT.maxother = _SHORT.maxstring = 60
_SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple = 3, 1, 1


def traced(call: Call) -> Call:
    """`call` that also tells of itself; what the plugin answers or raises goes on unchanged."""
    def tracing(manager: pluggy.PluginManager, plugin: object, hook: str, arguments: Mapping[str, Any]) -> list[Any]:
        if hook not in [caller.name for caller in manager.get_hookcallers(plugin) or ()]:
            return call(manager, plugin, hook, arguments)  # it does not implement this one
        said, start = "raised an interrupt", time.perf_counter()
        try:
            answers = call(manager, plugin, hook, arguments)
            said = " ".join(["->", *map(_short, answers)]) if answers else "-> None"
            return answers
        except (Exception, SystemExit) as error:
            said = f"raised {type(error).__name__}: {error}"
            raise
        finally:
            milliseconds, name = 1e3 * (time.perf_counter() - start), str(manager.get_name(plugin)).rpartition("#")[0]
            given = ", ".join(f"{key}={_short(value)}" for key, value in arguments.items())
            print(f"hook {name}: {hook}({given}) {said} in {milliseconds:.1f} ms", file=sys.stderr)
    return tracing


def _short(value: object) -> str:
    """A value in a few words; a sequence of more than one by its length too."""
    counted = f"{len(value)} of " if isinstance(value, list | tuple) and len(value) > 1 else ""
    return counted + _SHORT.repr(value)
