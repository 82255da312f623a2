"""Asks cooper for multipliers of its Lagrangian formulation on random violations, and for the optimum that its
augmented Lagrangian finds on a bandit: `pip install -r cooper.txt`, then `python from_cooper.py`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import cooper
import mixing_cases
import numpy as np
import torch
from torch import Tensor

SEED, STEPS = 51, 60
REWARD, COST, LIMIT = (1.0, 0.8, 0.5, 0.2), (1.0, 0.6, 0.2, 0.0), 0.4


class Problem(cooper.ConstrainedMinimizationProblem):
    """min loss subject to one violation <= 0, both of `measured`."""

    def __init__(self, measured: Callable[[], tuple[Tensor, Tensor]], augmented: bool) -> None:
        super().__init__()
        self.measured = measured
        self.multiplier = cooper.multipliers.DenseMultiplier(num_constraints=1, dtype=torch.float64)
        formulation = cooper.formulations.AugmentedLagrangian if augmented else cooper.formulations.Lagrangian
        penalty = cooper.penalty_coefficients.DensePenaltyCoefficient(init=torch.tensor([5.0])) if augmented else None
        self.limit = cooper.Constraint(
            multiplier=self.multiplier, constraint_type=cooper.ConstraintType.INEQUALITY,
            formulation_type=formulation, penalty_coefficient=penalty)

    def compute_cmp_state(self) -> cooper.CMPState:
        loss, violation = self.measured()
        return cooper.CMPState(loss=loss, observed_constraints={
            self.limit: cooper.ConstraintState(violation=violation.reshape(1))})


def rolled(measured: Callable[[], tuple[Tensor, Tensor]], theta: Tensor, lr: float, eta: float, steps: int,
           augmented: bool) -> list[float]:
    """The multiplier after each step."""
    problem = Problem(measured, augmented)
    optimizer = cooper.optim.SimultaneousOptimizer(
        cmp=problem, primal_optimizers=torch.optim.SGD([theta], lr=lr),
        dual_optimizers=torch.optim.SGD(problem.dual_parameters(), lr=eta, maximize=True))
    found = []
    for _ in range(steps):
        optimizer.roll()
        found.append(float(problem.multiplier.weight.detach().reshape(())))
    return found


def lagrangian(violations: np.ndarray, eta: float) -> list[float]:
    theta, upcoming = torch.zeros(1, requires_grad=True), iter(violations)
    return rolled(lambda: (0.0 * theta.sum(), torch.tensor(next(upcoming)) + 0.0 * theta.sum()), theta, 0.1, eta,
                  len(violations), augmented=False)


def bandit_optimum() -> list[float]:
    """J, C and lambda after training a softmax policy."""
    theta = torch.zeros(len(REWARD), requires_grad=True)
    def measured() -> tuple[Tensor, Tensor]:
        p = torch.softmax(theta, 0)
        return -(p @ torch.tensor(REWARD)), p @ torch.tensor(COST) - LIMIT
    multiplier = rolled(measured, theta, 0.5, 0.05, 20_000, augmented=True)[-1]
    p = torch.softmax(theta.detach(), 0)
    return [float(p @ torch.tensor(REWARD)), float(p @ torch.tensor(COST)), multiplier]


def main() -> None:
    torch.set_default_dtype(torch.float64)
    rng, fixture = np.random.default_rng(SEED), mixing_cases.Fixture()
    for eta in (0.01, 0.05, 0.3):
        violations = rng.uniform(-1.0, 1.2, size=STEPS)
        fixture.add("Lagrangian", {"eta": eta}, violations, lagrangian(violations, eta))
    fixture.add("AugmentedLagrangian", {"limit": LIMIT}, [REWARD, COST], bandit_optimum())
    fixture.save("cooper", seed=SEED, cooper=version("cooper-optim"), torch=version("torch"))


if __name__ == "__main__":
    main()
