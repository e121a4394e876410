"""Rank correlation between a score and accuracy, over all networks or within bins of equal cost, with bootstrap intervals."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats
from scipy.special import gammaln

Statistic = Callable[[np.ndarray, np.ndarray], float]


def spearman(scores: np.ndarray, accuracies: np.ndarray) -> float:
    """Signed Spearman correlation of two vectors `[n]`; 0 if either is constant. See `ranks` for values that are not finite."""
    a, b = ranks(scores), ranks(accuracies)
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else 0.0


def kendall(scores: np.ndarray, accuracies: np.ndarray) -> float:
    """Signed Kendall tau-b of two vectors `[n]`; 0 if either is constant. See `ranks` for values that are not finite."""
    tau = stats.kendalltau(ranks(scores), ranks(accuracies)).statistic
    return float(tau) if np.isfinite(tau) else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks `[n]` of `values [n]`, equal values sharing their mean rank.

    An infinite value keeps its place at the end of the order. What is not a number ranks with minus infinity, below everything: a
    search rejects a network of such a score, so leaving it out would flatter the score.
    """
    values = np.asarray(values, np.float64)
    return stats.rankdata(np.where(np.isnan(values), -np.inf, values))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A statistic with its bootstrap interval.

    Attributes:
        value: on the whole sample.
        low: the 2.5 % quantile over resamples.
        high: the 97.5 % quantile.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.2f}, {self.high:+.2f}]"


def estimate(
    statistic: Statistic,
    scores: np.ndarray,
    accuracies: np.ndarray,
    rng: np.random.Generator,
    bins: np.ndarray | None = None,
    resamples: int = 1000,
) -> Estimate:
    """A rank statistic and its interval (percentile bootstrap over networks, Efron 1979).

    Args:
        statistic: such as `spearman`.
        scores: `[n]`.
        accuracies: `[n]`.
        rng: draws the resamples.
        bins: `[n]`, integer; if given, the statistic is the mean of the bins' own, weighted by their sizes, and networks are
            resampled within bins.
        resamples: number of bootstrap resamples.

    Returns:
        The estimate.

    Raises:
        ValueError: vectors of different lengths, or fewer than two networks in a bin.
    """
    scores, accuracies = np.asarray(scores, np.float64), np.asarray(accuracies, np.float64)
    groups = bins if bins is not None else np.zeros(len(scores), np.int64)
    if not len(scores) == len(accuracies) == len(groups):
        raise ValueError(f"{len(scores)} scores, {len(accuracies)} accuracies, {len(groups)} bins")
    members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    if min((len(m) for m in members), default=0) < 2:
        raise ValueError("a rank correlation needs at least two networks in each bin")

    def over(draws: Sequence[np.ndarray]) -> float:
        values = [statistic(scores[d], accuracies[d]) for d in draws]
        return float(np.average(values, weights=[len(d) for d in draws]))

    resampled = [
        over([m[rng.integers(0, len(m), len(m))] for m in members]) for _ in range(resamples)
    ]
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Estimate(over(members), float(low), float(high))


def equal_count_bins(costs: np.ndarray, number: int) -> np.ndarray:
    """Splits networks into `number` bins of neighbouring cost and as equal a count as can be.

    Args:
        costs: `[n]`, such as parameters.
        number: of bins.

    Returns:
        Bin of each network `[n]`, 0 for the cheapest.
    """
    order = np.argsort(costs, kind="stable")
    bins = np.empty(len(order), np.int64)
    bins[order] = np.arange(len(order)) * number // len(order)
    return bins


def best_of(scores: np.ndarray, accuracies: np.ndarray, draws: int) -> float:
    """Expected accuracy of the network that a search of `draws` random networks picks by its score.

    Exact: all subsets of `draws` networks are equally likely, and among equal scores each is as likely to be picked.

    Args:
        scores: `[n]`; see `ranks` for values that are not finite.
        accuracies: `[n]`.
        draws: size of the subsets, at most `n`.

    Returns:
        The expectation.

    Raises:
        ValueError: more draws than networks, or none.
    """
    number = len(scores)
    if not 1 <= draws <= number:
        raise ValueError(f"{draws} of {number} networks cannot be drawn")
    _, group, sizes = np.unique(ranks(scores), return_inverse=True, return_counts=True)
    reached = np.cumsum(sizes)
    # How likely the best of the draws is no better than each group: all draws come from it and those below.
    none_better = np.exp(_log_choose(reached, draws) - _log_choose(np.array([number]), draws))
    picked = np.diff(none_better, prepend=0.0) / sizes
    return float(picked[group] @ accuracies)


def _log_choose(of: np.ndarray, draws: int) -> np.ndarray:
    """Logarithm of the binomial coefficients `of` over `draws`; minus infinity where there are too few."""
    enough = np.maximum(of, draws)
    logarithm = gammaln(enough + 1) - gammaln(draws + 1) - gammaln(enough - draws + 1)
    return np.where(of >= draws, logarithm, -np.inf)
