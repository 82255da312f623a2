"""Planners and searchers under their contracts: core's own, and one as an author would write it."""

from __future__ import annotations

from contracts import toys_planning
from contracts.toys_planning import RandomWalk
from posttrain.batching import FirstFit
from posttrain.testing import BatchingContract, SearcherContract


class TestFirstFit(BatchingContract):
    components = (FirstFit(), FirstFit(tokens=1))


class TestRandomWalk(SearcherContract):
    components = (RandomWalk(), RandomWalk(seed=3))
    plugins = (toys_planning,)
