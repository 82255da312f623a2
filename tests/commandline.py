"""The command line called in this process."""

from __future__ import annotations

import pytest
from posttrain import cli
from posttrain.registry import Registry


def called(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def use(monkeypatch: pytest.MonkeyPatch, found: Registry) -> None:
    """Let the command line find these plugins."""
    monkeypatch.setattr(cli, "discover", lambda: found)
