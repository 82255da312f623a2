"""Trackers of core under the contract of their kind, on stores that need no server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from posttrain.testing import TrackerContract
from posttrain.trackers.console import Console
from posttrain.trackers.jsonl import Jsonl

METRIC = "reward/mean"


class TestConsole(TrackerContract):
    components = (Console(), Console(every=10))
    outputs = ("plain", "json", "live", "quiet")

    def recorded(self, component: Console, directory: Path) -> None:
        """It prints."""


class TestJsonl(TrackerContract):
    components = (Jsonl(), Jsonl(path="mirror/metrics.jsonl"))

    def recorded(self, component: Jsonl, directory: Path) -> Sequence[tuple[int, float]] | None:
        if not component.path:
            return None
        lines = [json.loads(line) for line in Path(component.path).read_text("utf-8").splitlines()]
        return [(line["step"], line[METRIC]) for line in lines]


if find_spec("tensorboard") is not None:
    from posttrain.trackers.tensorboard import TensorBoard, events

    class TestTensorBoard(TrackerContract):
        components = (TensorBoard(finish_timeout=5.0), TensorBoard(path="logs", finish_timeout=5.0))

        def recorded(self, component: TensorBoard, directory: Path) -> Sequence[tuple[int, float]]:
            folder = Path(component.path, directory.name) if component.path else Path(
                directory, "tensorboard", directory.name)
            return [(event.step, value) for event in events(folder) for value in values(event)]

    def values(event: object) -> Iterator[float]:
        for value in event.summary.value:  # type: ignore[attr-defined]  # a protocol buffer, which has no stub
            if value.tag == METRIC:
                yield value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value
