"""Rankings by training-free scores: how sure one is, and how well a cheap setting ranks against an expensive one.

A score at initialisation is drawn: from the weights, and from the minibatch. So every candidate is scored with several *seeds*,
each of which draws both anew, the same for all candidates.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from nnopt.errors import SearchError
from nnopt.scores.agreement import Interval
from nnopt.scores.statistics import RESAMPLES, RankConfidence, Repeats, rank_confidence, ranks


@dataclasses.dataclass(frozen=True)
class Setting:
    """What determines a scoring, beside the candidates and the data: how many images, and which draws.

    Attributes:
        batch: images in a minibatch. Scores compare only at equal batch.
        seeds: numbers of the draws, each of fresh weights and a fresh minibatch.
    """

    batch: int = 4
    seeds: tuple[int, ...] = (0, 1)

    def __post_init__(self) -> None:
        """Checks.

        Raises:
            SearchError: a batch of one, no seeds, or the same seed twice.
        """
        if self.batch < 2:
            raise SearchError(
                f"a scoring batch of {self.batch} leaves batch normalisation nothing to normalise by; give --batch 2 or more"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise SearchError(
                f"the scoring seeds are {self.seeds}; give one or more, all different and none negative"
            )

    @classmethod
    def of(cls, batch: int, seeds: int, first: int = 0) -> "Setting":
        """A number of seeds in a row.

        Raises:
            SearchError: fewer than one seed, or a batch of one.
        """
        if seeds < 1:
            raise SearchError(f"scoring needs at least 1 seed, got {seeds}")
        return cls(batch, tuple(range(first, first + seeds)))

    def __str__(self) -> str:
        count = len(self.seeds)
        return f"batch {self.batch} x {count} seed{'s' if count > 1 else ''}"


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """Candidates, scored with each seed of a setting.

    Attributes:
        setting: the setting.
        scores: `[candidates, seeds]`, float64, higher is better; never repaired.
        seconds: wall time of each candidate over all seeds, `[candidates]`.
    """

    setting: Setting
    scores: np.ndarray
    seconds: np.ndarray

    @property
    def seconds_each(self) -> float:
        """Median seconds a candidate: the first ones also make weights that the later ones use again."""
        return float(np.median(self.seconds))


@dataclasses.dataclass(frozen=True, eq=False)
class Ranking:
    """Candidates in order, and how sure of it one can be.

    Attributes:
        repeats: the scores, a column for each seed.
        confidence: intervals of ranks and probabilities, from the spread between seeds.
        spread: standard deviation of a score between seeds, `[candidates]`, without what a seed adds to all candidates alike, which
            moves no rank; of logarithms if `repeats.geometric`. NaN for a single seed, or fewer than two usable candidates.
    """

    repeats: Repeats
    confidence: RankConfidence
    spread: np.ndarray

    @property
    def order(self) -> np.ndarray:
        """Numbers of the candidates, the best first, `[candidates]`; those with an unusable score last."""
        return self.repeats.order

    @property
    def noise(self) -> float:
        """The spread of all candidates together (root of the mean square)."""
        known = self.spread[np.isfinite(self.spread)]
        return float(np.sqrt(np.mean(known**2))) if len(known) else float("nan")

    @property
    def difference(self) -> float:
        """Standard deviation of the candidates' means, to be held against the noise; NaN for fewer than two that are usable."""
        known = self.repeats.mean[np.isfinite(self.repeats.mean)]
        return float(known.std(ddof=1)) if len(known) > 1 else float("nan")


def rank(scores: ArrayLike, *, geometric: bool, seed: int, top: int = 10) -> Ranking:
    """Ranks candidates by the mean of their scores.

    Args:
        scores: `[candidates, seeds]`, higher is better.
        geometric: average logarithms, for positive scores that differ by factors.
        seed: of the resampling that intervals come from.
        top: how many are called the top.
    """
    repeats = Repeats(scores, geometric)
    confidence = rank_confidence(repeats, seed=seed, top=top)
    return Ranking(repeats, confidence, _spread_between_seeds(repeats))


def _spread_between_seeds(repeats: Repeats) -> np.ndarray:
    values, usable = repeats.values, repeats.unusable == 0
    count, seeds = int(usable.sum()), values.shape[1]
    spread = np.full(len(values), np.nan)
    if count > 1 and seeds > 1:
        known = values[usable]
        residuals = known - known.mean(axis=0, keepdims=True)
        # The mean over candidates took a share of each one's own noise with it.
        spread[usable] = residuals.std(axis=1, ddof=1) * np.sqrt(count / (count - 1))
    return spread


# --- how well a cheap setting ranks ---


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How well a setting ranks, against the consensus (mean logarithm) of seeds of an expensive one that it shares nothing with.

    Attributes:
        setting: the setting; of one seed, where figures are means over several choices of it.
        yardstick: how many seeds of the reference the consensus is made of.
        spearman: correlation of ranks, with a 95% percentile interval from resampling candidates.
        best_rank: rank in the consensus of the candidate that the setting thinks best; 0 is the best.
        overlap: how many of the setting's best `top` are among the consensus' best `top`.
        top: how many were compared.
        seconds: median seconds a candidate.
    """

    setting: Setting
    yardstick: int
    spearman: Interval
    best_rank: float
    overlap: float
    top: int
    seconds: float


def compare(cheap: Scored, reference: Scored, *, seed: int) -> list[Comparison]:
    """How well a cheap setting ranks by a positive score such as Fisher potential, and how well one seed of an expensive one does.

    The cheap setting is held against the consensus of all reference seeds. One reference seed can only be held against the *other*
    ones, so the cheap setting is, too: a consensus of fewer seeds is noisier, which costs both alike. Where there are several
    choices of seeds, figures are means over all.

    Args:
        cheap: scores of candidates.
        reference: scores of the same candidates with other seeds, two or more.
        seed: of the resampling.

    Raises:
        SearchError: fewer than two reference seeds, a seed of both, or fewer than four candidates.
    """
    seeds, known = len(cheap.setting.seeds), len(reference.setting.seeds)
    count = len(cheap.scores)
    check_comparison(cheap.setting, reference.setting, count)

    def means(scored: Scored, columns: Iterable[int]) -> np.ndarray:
        return Repeats(scored.scores[:, list(columns)]).mean

    consensus = means(reference, range(known))
    others = [means(reference, (s for s in range(known) if s != r)) for r in range(known)]
    whole = means(cheap, range(seeds))
    one = [means(cheap, [s]) for s in range(seeds)]
    single = [means(reference, [r]) for r in range(known)]
    rows = [
        (cheap.setting, known, [(whole, consensus)], cheap.seconds_each),
        (cheap.setting, known - 1, [(whole, c) for c in others], cheap.seconds_each),
    ]
    if seeds > 1:
        pairs = [(a, c) for a in one for c in others]
        rows.append(
            (Setting(cheap.setting.batch, (0,)), known - 1, pairs, cheap.seconds_each / seeds)
        )
    pairs = list(zip(single, others, strict=True))
    rows.append(
        (Setting(reference.setting.batch, (0,)), known - 1, pairs, reference.seconds_each / known)
    )
    top = max(1, min(10, count // 2))
    picks = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    return [
        Comparison(
            setting,
            yardstick,
            _mean_spearman(pairs, picks),
            float(np.mean([ranks(c)[_best(a, 1)[0]] for a, c in pairs])),
            float(np.mean([len(np.intersect1d(_best(a, top), _best(c, top))) for a, c in pairs])),
            top,
            seconds,
        )
        for setting, yardstick, pairs, seconds in rows
    ]


def check_comparison(cheap: Setting, reference: Setting, candidates: int) -> None:
    """Refuses what `compare` cannot compare.

    Raises:
        SearchError: fewer than two reference seeds, a seed of both, or fewer than four candidates.
    """
    known = len(reference.seeds)
    if known < 2:
        raise SearchError(
            f"{known} reference seed has no others to be held against; give --reference-seeds 2 or more"
        )
    if set(cheap.seeds) & set(reference.seeds):
        raise SearchError(
            "a seed that both settings have makes them look alike; give the reference seeds of its own"
        )
    if candidates < 4:
        raise SearchError(
            f"{candidates} different candidates show no correlation; give more --samples, 4 at least"
        )


def _best(values: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(ranks(values), kind="stable")[:count]


def _mean_spearman(pairs: Sequence[tuple[np.ndarray, np.ndarray]], picks: np.ndarray) -> Interval:
    """Mean of Spearman's correlation over pairs of scores `[candidates]`, and its percentile interval over resamples of candidates.

    Percentile intervals: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.
    """
    everything = np.arange(picks.shape[1])[None]
    value = np.mean([_spearman(a, b, everything) for a, b in pairs])
    resampled = np.mean([_spearman(a, b, picks) for a, b in pairs], axis=0)
    known = resampled[np.isfinite(resampled)]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high))


def _spearman(a: np.ndarray, b: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """Of `a[picks]` and `b[picks]` for `picks [resamples, candidates]`: `[resamples]`; NaN where one of them knows no order."""
    first, second = (ranks(v[picks].T) for v in (a, b))
    first, second = (r - r.mean(axis=0, keepdims=True) for r in (first, second))
    norms = np.sqrt((first**2).sum(axis=0) * (second**2).sum(axis=0))
    product = (first * second).sum(axis=0)
    return np.where(norms > 0, product / np.where(norms > 0, norms, 1.0), np.nan)
