"""Formats beside Hugging Face's folders in which models are written: what `posttrain export RUN --format NAME` asks of
a backend (`posttrain.protocols.Exporting`).

This is the light part; what writes is imported when it is asked.
"""

from __future__ import annotations

from pathlib import Path

from posttrain.errors import ConfigError
from posttrain.protocols import Backend, Exported

from posttrain_backends.installed import require_onnx

FORMATS = ("onnx",)
"""Those of a model of a native family, whichever backend trained it."""


def write(form: str, saved: Path, folder: Path, reader: Backend) -> Exported:
    """Write the model that a learner saved to `saved` into the empty `folder`, and compare it with what `reader` loads
    from `saved`. Raises `ConfigError` where it has no graph or differs, `PluginError` without ONNX."""
    require_onnx(f"posttrain export --format {form}")
    from posttrain_backends._onnx.export import write as write_graph

    return write_graph(saved, folder, reader)


def refuse(what: str, instead: str) -> ConfigError:
    """What there is to say of a policy that no format holds.

    >>> print(refuse("policy.file is code of its own", "leave --format out"))
    policy.file is code of its own, and --format writes models of the native families alone: leave --format out
    """
    return ConfigError([f"{what}, and --format writes models of the native families alone: {instead}"])
