"""How alike two scores rank the same candidates, and what a cheap setting of a score is worth.

What is not finite counts as last, see `nnopt.scores.statistics`.
"""

import dataclasses
import itertools

import numpy as np
from numpy.typing import ArrayLike

from nnopt.scores.statistics import (
    CHUNK,
    RESAMPLES,
    Repeats,
    check_confidence,
    comparable,
    ranks,
    two_dimensions,
)


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval.

    Attributes:
        value: the estimate.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How alike two scores rank the same candidates.

    Attributes:
        spearman: correlation of the ranks; NaN if all candidates are level in one of the two.
        kendall: tau-b, which is the share of pairs in the same order minus that in the opposite one, corrected for equals.
        candidates: how many there are.
        unusable: how many of them are no finite number in one of the two; they count as last there.
    """

    spearman: Interval
    kendall: Interval
    candidates: int
    unusable: int


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation of two scores; what is not finite is last, and NaN comes out if one of them knows no order.

    Args:
        a: `[candidates]`.
        b: `[candidates]`.
    """
    return float(_spearman(comparable(a)[:, None], comparable(b)[:, None])[0])


def agreement(
    a: ArrayLike,
    b: ArrayLike,
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Agreement:
    """How alike two scores rank the same candidates, with bootstrap confidence intervals.

    Candidates are drawn with replacement, which takes them for a sample of a space: the intervals are for the correlation over that
    space, the two scorers being as they are. Percentile intervals (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    section 13.3).

    Args:
        a: `[candidates]`.
        b: `[candidates]`, of the same candidates.
        seed: of the resampling.
        confidence: probability that an interval is meant to cover.
        resamples: how many.

    Raises:
        ValueError: not two rows of one length, fewer than two candidates, or a confidence that is no probability.
    """
    check_confidence(confidence, resamples)
    first, second = comparable(a), comparable(b)
    if first.ndim != 1 or first.shape != second.shape or len(first) < 2:
        raise ValueError(
            f"agreement: scores of shapes {first.shape} and {second.shape}; give two of one length, at least 2"
        )
    count = len(first)
    picks = np.random.default_rng(seed).integers(count, size=(resamples, count))
    per_chunk = max(1, CHUNK // count)
    rho = np.concatenate(
        [
            _spearman(first[picks[i : i + per_chunk]].T, second[picks[i : i + per_chunk]].T)
            for i in range(0, resamples, per_chunk)
        ]
    )
    tau = np.array([_kendall(first[pick], second[pick]) for pick in picks])
    return Agreement(
        _interval(spearman(a, b), rho, confidence),
        _interval(_kendall(first, second), tau, confidence),
        count,
        int(np.count_nonzero(~(np.isfinite(first) & np.isfinite(second)))),
    )


# --- what a cheap setting is worth ---


@dataclasses.dataclass(frozen=True, eq=False)
class Fidelity:
    """How well a cheap setting ranks, one entry for each group of seeds that it was given.

    The consensus of a group is the mean of the reference over all *other* seeds, so no luck of the draw is shared.

    Attributes:
        seeds: the groups, `[groups, seeds together]`.
        spearman: of the cheap setting and the consensus, `[groups]`.
        same_seeds: of the cheap setting and the reference with the same seeds, `[groups]`: what is lost by the setting alone.
        best_rank: rank in the consensus of the candidate that the cheap setting thinks best, `[groups]`; 0 is the best.
        overlap: how many of the cheap setting's best `top` are among the consensus' best `top`, `[groups]`.
        top: as given.
    """

    seeds: np.ndarray
    spearman: np.ndarray
    same_seeds: np.ndarray
    best_rank: np.ndarray
    overlap: np.ndarray
    top: int

    def __str__(self) -> str:
        """One line of means over groups."""
        return (
            f"Spearman {self.spearman.mean():.3f} to the consensus, {self.same_seeds.mean():.3f} with the same seeds; its best is "
            f"number {self.best_rank.mean():.1f} of the consensus, {self.overlap.mean():.1f} of its best {self.top} are there "
            f"(means of {len(self.seeds)})"
        )


def fidelity(
    cheap: ArrayLike,
    reference: ArrayLike,
    *,
    seeds_together: int = 1,
    top: int = 10,
    geometric: bool = True,
) -> Fidelity:
    """How well a cheap setting of a score (a small minibatch, say) ranks, against a consensus at an expensive one.

    Args:
        cheap: `[candidates, seeds]`, a column for each seed of the weights.
        reference: `[candidates, at least as many seeds]`; its column `s` has the same seed as that of `cheap`.
        seeds_together: how many seeds of the cheap setting are averaged; all groups of that size are tried.
        top: how many of the best to compare, at most.
        geometric: average logarithms, see `Repeats`.

    Returns:
        An entry for each group of seeds.

    Raises:
        ValueError: shapes that do not fit, or no seed is left for the consensus.
    """
    cheap, reference = two_dimensions(cheap, "cheap"), two_dimensions(reference, "reference")
    (count, tried), (others, known) = cheap.shape, reference.shape
    if count != others or count < 2 or not 1 <= seeds_together <= tried <= known:
        raise ValueError(
            f"fidelity: cheap {cheap.shape}, reference {reference.shape}, {seeds_together} seeds together; both need the same "
            "candidates (2 or more), and the reference at least the seeds of the cheap one"
        )
    if seeds_together == known:
        raise ValueError(
            f"fidelity: all {known} seeds together leave none for the consensus; score the reference with more seeds"
        )
    if top < 1:
        raise ValueError(f"fidelity: the best {top} are none; give top=1 or more")
    top = min(top, count)
    groups = list(itertools.combinations(range(tried), seeds_together))
    found = []
    for group in groups:
        rest = [s for s in range(known) if s not in group]
        consensus = Repeats(reference[:, rest], geometric)
        own = Repeats(cheap[:, list(group)], geometric)
        found.append(
            (
                spearman(own.mean, consensus.mean),
                spearman(own.mean, Repeats(reference[:, list(group)], geometric).mean),
                consensus.ranks[own.order[0]],
                len(np.intersect1d(own.order[:top], consensus.order[:top])),
            )
        )
    rho, same, best, overlap = np.array(found, np.float64).T
    return Fidelity(np.array(groups), rho, same, best, overlap, top)


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of comparable values `[candidates, columns]`, column by column."""
    centred = [r - r.mean(axis=0, keepdims=True) for r in (ranks(a), ranks(b))]
    norms = [np.sqrt((r * r).sum(axis=0)) for r in centred]
    defined = (norms[0] > 0) & (norms[1] > 0)
    product = (centred[0] * centred[1]).sum(axis=0)
    return np.where(defined, product / np.where(defined, norms[0] * norms[1], 1), np.nan)


def _kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Tau-b of comparable values `[candidates]`."""
    from scipy.stats import kendalltau

    if (a == a[0]).all() or (b == b[0]).all():
        return float("nan")
    return float(
        kendalltau(ranks(a), ranks(b)).statistic
    )  # ranks: differences of infinities are NaN


def _interval(value: float, resampled: np.ndarray, confidence: float) -> Interval:
    """A percentile interval; resamples that drew level candidates alone have no correlation and are left out."""
    known = resampled[np.isfinite(resampled)]
    if not len(known):
        return Interval(value, float("nan"), float("nan"))
    tail = (1 - confidence) / 2
    low, high = np.quantile(known, (tail, 1 - tail))
    return Interval(value, float(low), float(high))
