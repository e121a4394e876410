"""How far a training-free score can be trusted: repeats over seeds and minibatches, and confidence in a rank.

A score at initialisation is a random variable: its weights are drawn, and its minibatch is. Of 40 WRN-40-2 candidates within one
budget of 400K, scored by Fisher potential on 16 images of CIFAR-10, two draws rank alike to a Spearman correlation of only 0.80;
with the mean of the other draws, one agrees to 0.89, two to 0.94, four to 0.97. What a ranking says beyond that is noise.

Everything here is in float64 on the host, and nothing is drawn without a seed that is given.

Ranks count from 0, which is the best; of equal candidates each has the mean of the ranks that they share. Higher scores are better.

Scores that are no number. NaN and infinities, and zeros where logarithms are taken, say nothing about how good a candidate is.
They are kept and counted, and a candidate with one of them is ranked last, level with all others of that kind, whatever its other
repeats are: averaging what is left would favour networks that fail now and then.
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000
"""How many resamples a bootstrap takes."""

CHUNK = 1 << 22
"""Numbers in memory at a time while resampling."""


@dataclasses.dataclass(frozen=True, eq=False)
class Repeats:
    """Scores of candidates, each repeated with other weights or another minibatch.

    Repeat `r` of all candidates must share what was drawn (seed of the weights, minibatch): then what it adds to all of them alike
    cannot move a rank, and resampling whole repeats accounts for that.

    Attributes:
        scores: `[candidates, repeats]`, higher is better.
        geometric: average logarithms, for scores that are positive and spread over orders of magnitude, as Fisher potential does.
            It also makes repeats of unequal scale count alike.

    Raises:
        ValueError: not two dimensions, no candidate or no repeat, or negative scores to take logarithms of.

    Example:
        >>> repeats = Repeats([[1.0, 100.0], [20.0, 20.0], [float("nan"), 500.0]])
        >>> repeats.score.round(6).tolist()
        [10.0, 20.0, nan]
        >>> repeats.ranks.tolist(), repeats.order.tolist(), repeats.unusable.tolist()
        ([1.0, 0.0, 2.0], [1, 0, 2], [0, 0, 1])
    """

    scores: np.ndarray
    geometric: bool = True

    def __init__(self, scores: ArrayLike, geometric: bool = True) -> None:
        object.__setattr__(self, "scores", two_dimensions(scores, "scores"))
        object.__setattr__(self, "geometric", geometric)
        if geometric and (self.scores < 0).any():
            raise ValueError(
                f"Repeats: {int((self.scores < 0).sum())} scores are negative and have no logarithm; "
                "give geometric=False for scores of either sign"
            )

    @property
    def values(self) -> np.ndarray:
        """What is averaged, `[candidates, repeats]`: logarithms of the scores if `geometric`, else the scores."""
        if not self.geometric:
            return self.scores
        with np.errstate(divide="ignore"):  # the logarithm of zero is -inf, and counted as unusable
            return np.log(self.scores)

    @property
    def unusable(self) -> np.ndarray:
        """How many of a candidate's repeats are no finite number (or zero, if `geometric`): integers `[candidates]`."""
        return np.count_nonzero(~np.isfinite(self.values), axis=1)

    @property
    def mean(self) -> np.ndarray:
        """Mean of the values, `[candidates]`; NaN for candidates with an unusable repeat."""
        return _mean(self._usable())

    @property
    def score(self) -> np.ndarray:
        """The mean as a score, `[candidates]`: the geometric or the arithmetic mean of the repeats."""
        with np.errstate(over="ignore"):
            return np.exp(self.mean) if self.geometric else self.mean

    @property
    def spread(self) -> np.ndarray:
        """Standard deviation of one repeat's value, `[candidates]`, with `repeats - 1` degrees of freedom.

        NaN for a single repeat, of which nothing can be said. If `geometric` it is one of logarithms: 0.1 is about 10%.
        """
        values = self._usable()
        repeats = values.shape[1]
        return values.std(axis=1, ddof=1) if repeats > 1 else np.full(len(values), np.nan)

    @property
    def standard_error(self) -> np.ndarray:
        """Standard deviation of the mean, `[candidates]`: the spread divided by the root of the number of repeats."""
        return self.spread / np.sqrt(self.scores.shape[1])

    @property
    def ranks(self) -> np.ndarray:
        """Rank of each candidate by its mean, `[candidates]`, float64: 0 is the best."""
        return ranks(self.mean)

    @property
    def order(self) -> np.ndarray:
        """Indices of the candidates, the best first, `[candidates]`; of equal ones the first first."""
        return _order(self.mean)

    def _usable(self) -> np.ndarray:
        """The values, all NaN for a candidate that has an unusable one."""
        return np.where((self.unusable > 0)[:, None], np.nan, self.values)


def ranks(values: ArrayLike) -> np.ndarray:
    """Ranks along the first axis, 0 for the highest value; equal ones share the mean of theirs, what is not finite is last.

    Args:
        values: `[candidates, ...]`.

    Returns:
        float64, of the same shape.

    Example:
        >>> ranks([3.0, 7.0, float("inf"), 3.0]).tolist()
        [1.5, 0.0, 3.0, 1.5]
    """
    from scipy.stats import rankdata

    return rankdata(-comparable(values), axis=0) - 1


# --- confidence in a rank ---


@dataclasses.dataclass(frozen=True, eq=False)
class RankConfidence:
    """What the repeats say about each candidate's rank.

    Attributes:
        low: best rank in the interval, `[candidates]`; 0 is the best of all.
        high: worst rank in it, `[candidates]`.
        best: probability of being the best, `[candidates]`; NaN for a single repeat.
        in_top: probability of being among the best `top`, `[candidates]`; NaN for a single repeat.
        top: as given.
        repeats: how many there were.
    """

    low: np.ndarray
    high: np.ndarray
    best: np.ndarray
    in_top: np.ndarray
    top: int
    repeats: int

    @property
    def says_nothing(self) -> bool:
        """Whether there was a single repeat, which shows no spread: intervals are the whole range, probabilities NaN."""
        return self.repeats == 1

    def __str__(self) -> str:
        """One line about the winner."""
        if self.says_nothing:
            return "one repeat says nothing about how sure a rank is; score with more seeds"
        first = int(np.argmax(self.best))
        return (
            f"candidate {first} is the best with probability {self.best[first]:.2f}, "
            f"its rank is {self.low[first]:g} to {self.high[first]:g}, by {self.repeats} repeats"
        )


def rank_confidence(
    repeats: Repeats,
    *,
    seed: int,
    pooled: bool = True,
    top: int = 10,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> RankConfidence:
    """How sure the rank of each candidate is, by the bootstrap over repeats.

    With `v_ir` the value of candidate `i` in repeat `r` of `R`, a resample gives each candidate another mean:

    - `pooled`: `mean_i` plus the mean of `R` residuals, drawn from those of all candidates and repeats. A residual is `v_ir` less
      the means of its candidate and its repeat, times `sqrt(R/(R-1) m/(m-1))` for `m` candidates, which makes up for the degrees
      of freedom that the means took (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 6.3.2). Takes
      all candidates to be equally noisy, and serves from two repeats on.
    - not pooled: the mean of `R - 1` whole repeats, drawn with replacement. Takes nothing for granted, but needs about eight
      repeats. `R - 1` and not `R`, for then the variance of the resampled mean is the unbiased spread^2 / R (Rao and Wu, Journal
      of the American Statistical Association 83, 1988, section 2).

    On the 40 candidates above, for which logarithms of scores are about equally noisy, intervals meant to cover 95% cover 96% with
    two repeats, 96% with four, 94% with eight; not pooled, 58%, 86% and 92%.

    In both, what a repeat adds to all candidates alike cancels. The intervals are for one candidate at a time, and percentile
    intervals of ranks promise nothing exact where candidates are truly level. They speak of a mean over all weights and minibatches
    at the setting of the repeats, not of another setting, and not of accuracy after training.

    Args:
        repeats: scores of candidates.
        seed: of the resampling.
        pooled: see above.
        top: how many are called the top, at most all.
        confidence: probability that an interval is meant to cover.
        resamples: how many.

    Returns:
        Intervals and probabilities. For a single repeat, which shows no spread, intervals are all ranks and probabilities NaN. A
        candidate with an unusable repeat is last in every resample and never the best or in the top.

    Raises:
        ValueError: `top` is not positive, or the confidence is no probability.
    """
    check_confidence(confidence, resamples)
    if top < 1:
        raise ValueError(f"rank_confidence: the best {top} are none; give top=1 or more")
    values = repeats._usable()
    candidates, count = values.shape
    top = min(top, candidates)
    if count == 1:
        worst = np.full(candidates, candidates - 1.0)
        unknown = np.full(candidates, np.nan)
        return RankConfidence(np.zeros(candidates), worst, unknown, unknown.copy(), top, 1)
    from scipy.stats import rankdata

    rng = np.random.default_rng(seed)
    found = np.empty((candidates, resamples), np.float32)
    best, in_top = np.zeros(candidates), np.zeros(candidates)
    per_chunk = max(1, CHUNK // candidates)
    for start in range(0, resamples, per_chunk):
        size = min(per_chunk, resamples - start)
        means = (_pooled_means if pooled else _own_means)(values, size, rng)
        losses = -comparable(means)
        better = rankdata(losses, "min", axis=0) - 1
        level = rankdata(losses, "max", axis=0) - better
        found[:, start : start + size] = better + (level - 1) / 2
        # Candidates that are level at the edge of the top share the places that are left.
        best += np.clip((1 - better) / level, 0, 1).sum(axis=1)
        in_top += np.clip((top - better) / level, 0, 1).sum(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, (tail, 1 - tail), axis=1, method="inverted_cdf")
    usable = repeats.unusable == 0
    return RankConfidence(
        low.astype(np.float64),
        high.astype(np.float64),
        np.where(usable, best / resamples, 0.0),
        np.where(usable, in_top / resamples, 0.0),
        top,
        count,
    )


def _own_means(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `R - 1` whole repeats drawn from `values [candidates, R]`: `[candidates, resamples]`."""
    candidates, repeats = values.shape
    draws = rng.multinomial(repeats - 1, np.full(repeats, 1 / repeats), resamples)
    sums = np.zeros((candidates, resamples))
    # One term after the other, not as a matrix product: equal candidates must come out exactly equal.
    for r in range(repeats):
        sums += values[:, r, None] * draws[None, :, r]
    return sums / (repeats - 1)


def _pooled_means(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `values [candidates, R]`, each with the mean of `R` pooled residuals: `[candidates, resamples]`."""
    candidates, repeats = values.shape
    known = values[np.isfinite(values).all(axis=1)]
    count = len(known)
    means = _mean(values)[:, None]
    if count < 2:  # nothing to be better than
        return np.repeat(means, resamples, axis=1)
    # Less the first value, so that equal repeats give residuals of exactly zero.
    known = known - known[:, :1]
    residuals = known - known.mean(1, keepdims=True) - known.mean(0, keepdims=True) + known.mean()
    residuals *= np.sqrt(repeats / (repeats - 1) * count / (count - 1))
    noise = np.zeros((candidates, resamples))
    for _ in range(repeats):
        noise += rng.choice(residuals.ravel(), (candidates, resamples))
    return means + noise / repeats


# --- arithmetic ---


def two_dimensions(scores: ArrayLike, what: str) -> np.ndarray:
    """A float64 copy, which must be a table.

    Raises:
        ValueError: it is none, or it is empty.
    """
    array = np.array(scores, np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"{what} of shape {array.shape}; give [candidates, repeats], at least one of both"
        )
    return array


def check_confidence(confidence: float, resamples: int) -> None:
    """Refuses what no interval can be made of.

    Raises:
        ValueError: the confidence is no probability, or there are no resamples.
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            f"confidence {confidence}, {resamples} resamples; give a probability between 0 and 1, and at least 1"
        )


def comparable(values: ArrayLike) -> np.ndarray:
    """Float64 with -inf for what is not finite: last, and level with each other."""
    array = np.asarray(values, np.float64)
    return np.where(np.isfinite(array), array, -np.inf)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over repeats."""
    # Sorted, so that rounding does not part candidates that have the same repeats in another order.
    return np.sort(values, axis=1).mean(axis=1)


def _order(values: np.ndarray) -> np.ndarray:
    return np.argsort(-comparable(values), kind="stable")
