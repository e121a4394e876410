"""Exact uniform sampling of candidates under an additive budget, by dynamic programming.

BlockSwap draws candidates uniformly and rejects those outside of the budget (https://arxiv.org/abs/1906.04113, section 4),
which takes 16,000 draws for one WRN-40-2 candidate at 150K parameters and 1.6 million at 1.6M. Counting how many ways the
later positions have to make up each total gives the same distribution at a fixed price for a draw.
"""

import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from nnopt.errors import BudgetError
from nnopt.search.budget import budget_range
from nnopt.search.space import BlockSpace

_SCALE_BITS = 512


class BudgetSampler:
    """Draws uniformly from the candidates of a space whose totals lie in an open interval around a budget.

    With `d[i][j] >= 0` what choice `j` costs at position `i` above the cheapest there, in units of the greatest common divisor
    of all of these, and `W[i][k]` the number of ways that positions `i, i + 1, ...` have to cost `k` units:

        W[n][k] = 1 if k = 0 else 0,    W[i][k] = sum_j W[i+1][k - d[i][j]]

    A draw takes a total `k` with probability proportional to `W[0][k]` within the interval, then at each position in turn the
    choice `j` with probability `W[i+1][k - d[i][j]] / W[i][k]`. The product of these is the same for all candidates.

    The counts are float64 because they exceed 64-bit integers (23^18 = 3.2e24); should they outgrow floats as well, they are
    scaled by powers of two, which is exact. They are sums of non-negative terms, nothing is ever subtracted, so after `n`
    positions of at most `m` choices their relative error is below `n * m * 2^-53` (5e-14 for WRN-40-2), and counts below
    2^53 are exact.

    Attributes:
        space: what is drawn from.
        low: smallest total that qualifies.
        high: largest total that qualifies.
        count: how many candidates qualify; `inf` above the range of a float.
        acceptance: which share of all candidates qualifies: the acceptance probability of drawing and rejecting.

    Raises:
        BudgetError: no candidate qualifies, or the budget or tolerance is not a positive number.

    Example:
        >>> from nnopt.rewrites import S, choice
        >>> two = (S, choice("G(4)"))
        >>> space = BlockSpace((("a",), ("b",)), (two, two), ((9, 5), (9, 5)), fixed=6)
        >>> sampler = BudgetSampler(space, budget=20, tolerance=0.1)
        >>> sampler.count, sampler.acceptance
        (2.0, 0.5)
        >>> sampler.draw(seed=0, index=0) in [(0, 1), (1, 0)]
        True
    """

    def __init__(self, space: BlockSpace, budget: int, tolerance: float = 0.025) -> None:
        self.space = space
        self.low, self.high = budget_range(budget, tolerance)
        cheapest = [min(costs) for costs in space.costs]
        above = [
            [c - least for c in costs] for costs, least in zip(space.costs, cheapest, strict=True)
        ]
        unit = math.gcd(*(c for costs in above for c in costs)) or 1
        self._units = [np.array([c // unit for c in costs], np.int64) for costs in above]
        # The interval in units above the smallest candidate.
        first = max(-((space.smallest - self.low) // unit), 0)
        last = (min(self.high, space.largest) - space.smallest) // unit
        self._ways, shift = _ways(self._units, last)
        window = self._ways[0][first : last + 1]
        if not window.any():
            raise BudgetError(
                f"no candidate has between {self.low:,} and {self.high:,} parameters (budget {budget:,}, tolerance "
                f"{tolerance:.2%}); those of this space have {space.smallest:,} to {space.largest:,}; "
                "take a budget in between, or a wider tolerance"
            )
        self._first = first
        self._cumulative = np.cumsum(window)
        exact = Fraction(float(self._cumulative[-1])) * 2**shift
        self.count = _float(exact)
        self.acceptance = float(exact / space.size)

    def draw(self, seed: int, index: int) -> tuple[int, ...]:
        """One candidate: the same for the same seed and index, whatever has been drawn before.

        Args:
            seed: of the search, not negative.
            index: which draw of that search, not negative.
        """
        return tuple(self.draws(seed, [index])[0].tolist())

    def draws(self, seed: int, indices: Iterable[int]) -> np.ndarray:
        """Many candidates at once: row `r` is `draw(seed, indices[r])`.

        Args:
            seed: of the search, not negative.
            indices: which draws of that search, not negative.

        Returns:
            `[draws, positions]`, int64.
        """
        uniform = _uniform(seed, indices, 1 + len(self._units))  # [draws, 1 + positions]
        target = uniform[:, 0] * self._cumulative[-1]
        total = self._first + np.searchsorted(self._cumulative, target, side="right")
        picked = np.empty((len(uniform), len(self._units)), np.int64)
        for i, units in enumerate(self._units):
            later = self._ways[i + 1]
            left = total[:, None] - units[None, :]  # [draws, choices]
            possible = (left >= 0) & (left < len(later))
            weights = np.where(possible, later[np.where(possible, left, 0)], 0.0)
            cumulative = np.cumsum(weights, axis=1)
            target = uniform[:, i + 1] * cumulative[:, -1]
            picked[:, i] = np.argmax(cumulative > target[:, None], axis=1)
            total = total - units[picked[:, i]]
        return picked


def _ways(units: list[np.ndarray], last: int) -> tuple[list[np.ndarray], int]:
    """The tables `W[0], ..., W[n]`, up to `last` units, and the power of two that `W[0]` is scaled down by."""
    tables = [np.ones(max(min(last + 1, 1), 0))]
    shift = 0
    for offsets in reversed(units):
        later = tables[-1]
        size = max(min(last + 1, len(later) + int(offsets.max())), 0)
        table = np.zeros(size)
        for offset in offsets.tolist():
            end = min(size, offset + len(later))
            if offset < end:
                table[offset:end] += later[: end - offset]
        if table.max(initial=0) > 2.0**_SCALE_BITS:
            table = np.ldexp(table, -_SCALE_BITS)
            shift += _SCALE_BITS
        tables.append(table)
    return tables[::-1], shift


def _uniform(seed: int, indices: Iterable[int], count: int) -> np.ndarray:
    """`[draws, count]` numbers in [0, 1), a row for each index.

    Raw words of a bit generator are the same in all versions of NumPy; the methods of `Generator` need not be.
    """
    rows = [
        np.random.Philox(np.random.SeedSequence(seed, spawn_key=(index,))).random_raw(count)
        for index in indices
    ]
    words = np.array(rows, np.uint64).reshape(-1, count)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _float(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
