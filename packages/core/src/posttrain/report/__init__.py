"""Reports of runs, finished, living or crashed: one offline HTML page, or one picture of the curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from posttrain.errors import InputError, Problem
from posttrain.report.page import write_page
from posttrain.report.picture import plot

FORMATS: Mapping[str, Callable[[Sequence[Path], Path, Sequence[str] | None], None]] = {
    ".html": write_page, ".png": plot, ".svg": plot}
"""How a report is written, by the ending of its file."""


def write(run_directories: Sequence[Path], output: Path, labels: Sequence[str] | None = None) -> None:
    """Write the report of runs in the format that `output` names: `.html`, `.png` or `.svg`.

    `labels` name the runs, by default by their directories. Raises `InputError` where the format is not known, a
    directory holds no metrics or the file cannot be written, and `PluginError` where a picture needs matplotlib.
    """
    if output.suffix not in FORMATS:
        raise InputError([Problem(f"a report ends in {', '.join(FORMATS)}", str(output))])
    FORMATS[output.suffix](run_directories, output, labels)


__all__ = ["FORMATS", "plot", "write", "write_page"]
