"""Fits the template prior's few weights to the training set, leaving out one formula at a time.

Maximised is the likelihood of every training structure's symmetry given the structures of all other
formulas. With k_i = exp(-w . D_i) the kernel between the query and training structure i, whose
elements are matched one to one, e the background and c the novelty, a symmetry that the structures
I realise has

    P = sum_{i in I} (k_i + e) / (c + sum_i (k_i + e))

and one that none of them realises has c / (c + sum_i (k_i + e)).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Array = NDArray[np.float64]

#: Largest weight of a feature, and what the sum of their squares is multiplied by in the loss.
_MAX_WEIGHT = 12.0
_PENALTY = 1e-3


@dataclass(frozen=True)
class Comparison:
    """Some queries against the training structures of their stoichiometry.

    Attributes:
        differences: [Q,M,F], M runs over matchings (training structure and role permutation).
        allowed: [Q,M], false for structures of the query's own formula.
        correct: [Q,M], the matching gives the query's own symmetry.
        weight: how many structures each query stands for.
    """

    differences: NDArray[np.float32]
    allowed: NDArray[np.bool_]
    correct: NDArray[np.bool_]
    weight: float


def fit_weights(comparisons: Sequence[Comparison], start: Array) -> tuple[Array, float]:
    """Weights [F] and then ln e and ln c, fitted from a start, and what is reached.

    That is the mean log-likelihood less the penalty of large weights.
    """
    features = comparisons[0].differences.shape[-1]
    total = sum(len(c.differences) * c.weight for c in comparisons)

    def loss(parameters: Array) -> tuple[float, Array]:
        value, gradient = 0.0, np.zeros_like(parameters)
        for comparison in comparisons:
            part, slope = _log_likelihood(parameters, comparison)
            value += comparison.weight * part
            gradient += comparison.weight * slope
        weights = parameters[:features]
        gradient = -gradient / total
        gradient[:features] += 2 * _PENALTY * weights
        return -value / total + _PENALTY * float(weights @ weights), gradient

    bounds = [(0.0, _MAX_WEIGHT)] * features + [(-16.0, 0.0), (-12.0, 6.0)]
    result = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 60}
    )
    # A few digits only: the last ones depend on the machine's linear algebra.
    return np.round(result.x, 4), -float(result.fun)


def _log_likelihood(parameters: Array, comparison: Comparison) -> tuple[float, Array]:
    """Summed over a comparison's queries, with its gradient."""
    weights, background, novelty = parameters[:-2], np.exp(parameters[-2]), np.exp(parameters[-1])
    differences = comparison.differences
    kernel = np.exp(-(differences @ weights.astype(np.float32))) * comparison.allowed
    correct = comparison.correct & comparison.allowed
    known = correct.any(axis=1)
    floor = background * comparison.allowed.sum(axis=1)
    everything = kernel.sum(axis=1) + floor + novelty
    right = np.where(
        known, (kernel * correct).sum(axis=1) + background * correct.sum(axis=1), novelty
    )
    # d ln(right) - d ln(everything), as one coefficient per matching.
    coefficient = kernel / everything[:, None]
    coefficient -= np.where(known[:, None], kernel * correct / right[:, None], 0.0)
    slope_weights = np.einsum("qm,qmf->f", coefficient, differences)
    slope_floor = np.where(known, background * correct.sum(axis=1) / right, 0) - floor / everything
    slope_novelty = np.where(known, 0.0, 1.0) - novelty / everything
    slope = np.concatenate([slope_weights, [slope_floor.sum()], [slope_novelty.sum()]])
    return float(np.log(right / everything).sum()), slope
