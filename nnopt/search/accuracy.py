"""How well latencies are predicted: errors and rank correlations with bootstrap intervals."""

import dataclasses

import numpy as np

from nnopt.errors import MeasurementError
from nnopt.scores.agreement import Interval, agreement

_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Predicted against measured latencies of a sample of candidates.

    Attributes:
        candidates: how many there are.
        error: median of `|predicted / measured - 1|`.
        worst: largest of these.
        spearman: correlation of the ranks.
        kendall: tau-b.
    """

    candidates: int
    error: Interval
    worst: float
    spearman: Interval
    kendall: Interval


def accuracy(predicted_ms: np.ndarray, measured_ms: np.ndarray, *, seed: int = 0) -> Accuracy:
    """Compares predicted and measured latencies `[candidates]`; intervals are of 95 %, by drawing candidates with replacement.

    Raises:
        MeasurementError: there are fewer than two.
    """
    if len(predicted_ms) < 2:
        raise MeasurementError(
            f"{len(predicted_ms)} measured candidates tell nothing about predictions; check 2 or more"
        )
    errors = np.abs(predicted_ms / measured_ms - 1)
    picks = np.random.default_rng(seed).integers(len(errors), size=(_RESAMPLES, len(errors)))
    low, high = np.quantile(np.median(errors[picks], axis=1), (0.025, 0.975))
    ranked = agreement(predicted_ms, measured_ms, seed=seed, resamples=_RESAMPLES)
    return Accuracy(
        len(errors),
        Interval(float(np.median(errors)), float(low), float(high)),
        float(errors.max()),
        ranked.spearman,
        ranked.kendall,
    )
