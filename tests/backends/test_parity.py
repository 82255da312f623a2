"""The page of architectures: a row for each that the script knows, and the script's own numbers where that is cheap."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
pytest.importorskip("transformers", minversion="5.23")

from posttrain.registry import import_file  # after the check that the library is there

PARITY = import_file(Path(__file__).parents[2] / "tools" / "parity.py")
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PARITY.PAGE.read_text("utf-8").splitlines()
        if line.startswith("| `")]
CHEAP = [case for case in PARITY.CASES if (case.backend, case.name) in {
    ("torch", "llama"), ("torch", "a module of the user's"), ("ssm", "mamba2"), ("hf", "jamba"),
    ("hf", "mamba2, time_step_limit"), ("hf", "glm4_moe"), ("torch", "qwen3_moe, precision: bf16")}]

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]  # the libraries' own


def number(cell: str) -> float | None:
    found = re.search(r"\d\.\de[+-]\d\d", cell)
    return float(found[0]) if found else None


def require_parity(row: list[str]) -> None:
    """Logits to 1e-5, where nothing is rounded; packed to 1e-4 or not at all; drawn to 2e-5, or to what is promised of
    such rounding, or refused."""
    logits, packed, drawn = row[2:]
    rounding = next((kind for kind in PARITY.ROUNDED if row[1].endswith(f": {kind}")), None)
    assert rounding is not None or (number(logits) or 0.0) < 1e-5, row
    assert ("only padded" in packed) == (number(packed) > 1e-4), row
    assert ("refused" in drawn) == (number(drawn) > PARITY.ROUNDED.get(rounding, 2e-5)), row


def test_the_page_has_a_row_for_every_case_in_their_order():
    assert [row[:2] for row in ROWS] == [[f"`{case.backend}`", case.name] for case in PARITY.CASES], \
        "run: python tools/parity.py --write"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:2]))
def test_what_the_page_says_is_within_what_is_promised(row):
    require_parity(row)


@pytest.mark.parametrize("case", CHEAP, ids=lambda case: f"{case.backend} {case.name}")
def test_a_row_is_measured_as_the_page_says(case):
    """The same words, and numbers within what is promised."""
    row = PARITY.row_of(case)
    require_parity(row)
    said = next(r for r in ROWS if r[:2] == row[:2])
    assert [re.sub(r"\d\.\de[+-]\d\d", "#", cell) for cell in row] == [
        re.sub(r"\d\.\de[+-]\d\d", "#", cell) for cell in said]
