"""The contract kit: one class of tests per kind of component, for authors of plugins and for the packages here alike.

Needs pytest and Hypothesis: `pip install 'posttrain-core[testing]'`.
"""

from posttrain.testing.backends import BackendContract
from posttrain.testing.contract import ComponentContract, failures
from posttrain.testing.engines import EngineContract
from posttrain.testing.estimators import CorrectionContract, EstimatorContract
from posttrain.testing.kernels import KernelContract
from posttrain.testing.kl import KLContract
from posttrain.testing.mixing import CombinerContract, ConstraintContract, GradientCombinerContract
from posttrain.testing.objectives import ObjectiveContract
from posttrain.testing.observing import TrackerContract
from posttrain.testing.planning import BatchingContract, SearcherContract
from posttrain.testing.scorers import ScorerContract
from posttrain.testing.text import Example, RewardContract, TaskContract, TokenizerContract

__all__ = [
    "BackendContract", "BatchingContract", "CombinerContract", "ComponentContract", "ConstraintContract",
    "CorrectionContract", "EngineContract", "EstimatorContract", "Example", "GradientCombinerContract", "KLContract",
    "KernelContract", "ObjectiveContract", "RewardContract", "ScorerContract", "SearcherContract", "TaskContract",
    "TokenizerContract", "TrackerContract", "failures",
]
