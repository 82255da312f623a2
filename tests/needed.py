"""Marks of tests that need more than the package they belong to; the rest run where core and that package are."""

from __future__ import annotations

import pytest

first_party = pytest.mark.needs("posttrain_estimators", "posttrain_objectives", "posttrain_backends")
"""Configurations of the recipes: their parts are looked up, no framework is imported."""
