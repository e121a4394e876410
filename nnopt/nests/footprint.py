"""How many places of an array the levels of a loop nest touch: closed forms, and arithmetic on small sets.

Loops are taken apart into digits, each of which moves along every dimension in equal steps. Dimensions that share no digit are
independent: their counts multiply. Of dimensions that do, places are coded as one number, so that a set of places is a set of
numbers; only where reads can fall outside does it matter where the loops around have moved it.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from nnopt.nests.index import breaks
from nnopt.nests.nest import Dim, Loop, Nest


class Counts(NamedTuple):
    """Of the places that a nest touches in an array, for each level from 0 to the number of loops.

    Attributes:
        most: in one iteration of the loops around, the one that touches most.
        total: the sum over all iterations of the loops around.
        kept: the same, where iterations that only move loops that the array's index does not depend on are not counted again.
    """

    most: tuple[int, ...]
    total: tuple[int, ...]
    kept: tuple[int, ...]


def count(nest: Nest, array: str) -> Counts:
    """Counts the places of `x`, `k` or `y` that each level of a nest touches.

    Raises:
        NestError: digits of a loop overlap; no nest made by transformations has such.
    """
    levels = len(nest.loops) + 1
    digits, parts = _taken_apart(nest, array)
    counted = [
        part.count_inside(levels, sizes) if sizes else part.count(levels) for part, sizes in parts
    ]
    moving = {d.level for d in digits if any(d.steps)}
    most: list[int] = []
    total: list[int] = []
    kept: list[int] = []
    for level in range(levels):
        again = math.prod(d.extent for d in digits if d.level < level and not any(d.steps))
        most.append(math.prod(m[level] for m, _ in counted))
        total.append(math.prod(t[level] for _, t in counted) * again)
        kept.append(kept[-1] if level and level - 1 not in moving else total[-1])
    return Counts(tuple(most), tuple(total), tuple(kept))


def places(nest: Nest, array: str, lows: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Distinct places that a nest touches in an array of a shape whose first element is at `lows`, row-major."""
    dims: tuple[Dim, ...] = getattr(nest, array)
    axes = [d.axis for d in dims] if array == "x" else list(range(len(dims)))
    weights = [math.prod(shape[axis + 1 :]) for axis in axes]
    for i in reversed(range(len(dims) - 1)):
        if axes[i] == axes[i + 1]:  # the digit before another of the same axis
            weights[i] = weights[i + 1] * dims[i + 1].size
    flat = np.full(1, -sum(low * math.prod(shape[i + 1 :]) for i, low in enumerate(lows)))
    for part, sizes in _taken_apart(nest, array)[1]:
        codes = np.zeros(1, np.int64)
        for digit in reversed(part.digits):
            codes = _unique(np.add.outer(codes, part.moves(digit)))
        at = part.places(codes) + np.array(part.low)[:, None]
        inside = np.ones(len(codes), bool)
        for along, size in zip(at, sizes, strict=False):
            inside &= (along >= 0) & (along < size)
        flat = np.add.outer(flat, np.array([weights[i] for i in part.dims]) @ at[:, inside]).ravel()
    return flat


class _Digit(NamedTuple):
    """A part of a loop that moves along every dimension in equal steps: all of it, unless it was fused."""

    level: int
    extent: int
    steps: tuple[int, ...]


class _Part:
    """Dimensions of an array that loops couple, and the digits of these loops; places are coded as one number, row-major.

    Attributes:
        dims: their numbers.
        digits: outermost first.
        low: the least place along each dimension.
        spans: how many places there are from there to the largest.
        strides: of the code.
    """

    def __init__(self, dims: Sequence[Dim], numbers: Sequence[int], digits: Sequence[_Digit]):
        self.dims = tuple(numbers)
        self.digits = [
            d._replace(steps=tuple(d.steps[i] for i in numbers))
            for d in digits
            if any(d.steps[i] for i in numbers)
        ]
        columns = [[(d.steps[i], d.extent) for d in self.digits] for i in range(len(numbers))]
        self.low = [
            dims[i].at.constant + sum(min(s, 0) * (n - 1) for s, n in column)
            for i, column in zip(numbers, columns, strict=True)
        ]
        self.spans = [1 + sum(abs(s) * (n - 1) for s, n in column) for column in columns]
        self.strides = [math.prod(self.spans[i + 1 :]) for i in range(len(numbers))]

    def code(self, steps: Iterable[int]) -> int:
        """Of a movement."""
        return sum(s * c for s, c in zip(steps, self.strides, strict=True))

    def moves(self, digit: _Digit) -> np.ndarray:
        """Codes of a digit's movements from its least place, `[extent]`."""
        least = self.code(min(s, 0) * (digit.extent - 1) for s in digit.steps)
        return self.code(digit.steps) * np.arange(digit.extent) - least

    def places(self, codes: np.ndarray) -> np.ndarray:
        """Places of codes `[n]` along each dimension, from `low`; `[dims, n]`."""
        return np.array(np.unravel_index(codes, self.spans))

    def count(self, levels: int) -> tuple[list[int], list[int]]:
        """Distinct places at each level if none is outside: in one iteration of the loops around, and over all of them."""
        most, total = [], []
        for level in range(levels):
            inner = [(abs(self.code(d.steps)), d.extent) for d in self.digits if d.level >= level]
            most.append(_sums(inner))
            around = math.prod(d.extent for d in self.digits if d.level < level)
            total.append(most[-1] * around)
        return most, total

    def count_inside(self, levels: int, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
        """As `count`, of places within the first `len(sizes)` dimensions' sizes.

        What the inner loops touch is laid out as a table over these dimensions, of how many distinct places of the others belong to
        each place. The loops around move it; how much of it is inside then is read off its cumulative sums.
        """
        rank = len(sizes)
        spans, rest = self.spans[:rank], math.prod(self.spans[rank:])
        tables = [_cumulative(np.zeros(1, np.int64), spans, rest)]
        codes = np.zeros(1, np.int64)
        for digit in reversed(self.digits):
            codes = _unique(np.add.outer(codes, self.moves(digit)))
            tables.append(_cumulative(codes, spans, rest))
        found = []
        codes, often = np.zeros(1, np.int64), np.ones(1, np.int64)
        for number, table in enumerate(reversed(tables)):
            at = np.array(np.unravel_index(codes // rest, spans))
            begin = [-low - a for low, a in zip(self.low, at, strict=False)]
            ends = [
                (np.clip(b, 0, n), np.clip(b + size, 0, n))
                for b, n, size in zip(begin, spans, sizes, strict=True)
            ]
            inside = np.zeros(len(codes), np.int64)
            for corner in itertools.product((0, 1), repeat=rank):
                sign = (-1) ** (rank - sum(corner))
                inside += sign * table[tuple(e[c] for e, c in zip(ends, corner, strict=True))]
            found.append((int(inside.max()), int(inside @ often)))
            for digit in self.digits[number : number + 1]:
                # Movement along the other dimensions alone changes nothing but how often it happens.
                moved = np.add.outer(codes, self.moves(digit) // rest * rest).ravel()
                codes, back = np.unique(moved, return_inverse=True)
                counts = np.zeros(len(codes), np.int64)
                np.add.at(counts, back, np.repeat(often, digit.extent))
                often = counts
        around = [sum(d.level < level for d in self.digits) for level in range(levels)]
        return [found[n][0] for n in around], [found[n][1] for n in around]


def _cumulative(codes: np.ndarray, spans: Sequence[int], rest: int) -> np.ndarray:
    """Number of codes below each place of the first dimensions, `[span + 1 for each]`."""
    table = np.zeros([n + 1 for n in spans], np.int64)
    counts = np.bincount(codes // rest, minlength=math.prod(spans)).reshape(spans)
    table[(slice(1, None),) * len(spans)] = counts
    for axis in range(len(spans)):
        table = table.cumsum(axis)
    return table


def _sums(digits: Iterable[tuple[int, int]]) -> int:
    """Number of values of `sum(step * i)` for `i` in `range(extent)`, of steps above 0 and extents.

    Steps `s >= d` of extents `t` and `k` with `d` dividing `s <= d * k` are one run of `s * (t - 1) / d + k` values: the window of
    overlapping windows. What is left is enumerated, as far as values can coincide.
    """
    runs: list[tuple[int, int]] = []
    for step, extent in sorted(digits):
        if runs and step % runs[-1][0] == 0 and step <= runs[-1][0] * runs[-1][1]:
            first, count = runs[-1]
            runs[-1] = (first, count + step // first * (extent - 1))
        else:
            runs.append((step, extent))
    clusters: list[list[tuple[int, int]]] = []
    span = 0
    for i, (step, extent) in enumerate(runs):
        # Sums of what is left differ by more than those of a cluster: it has all its values next to each of them.
        if not clusters or math.gcd(*(s for s, _ in runs[i:])) > span:
            clusters.append([])
            span = 0
        clusters[-1].append((step, extent))
        span += step * (extent - 1)
    return math.prod(_values(c) if len(c) > 1 else c[0][1] for c in clusters)


def _values(digits: Iterable[tuple[int, int]]) -> int:
    values = np.zeros(1, np.int64)
    for step, extent in digits:
        values = _unique(np.add.outer(values, step * np.arange(extent)))
    return len(values)


def _unique(codes: np.ndarray) -> np.ndarray:
    """Each of some numbers from 0 once, ascending."""
    top = int(codes.max()) + 1
    if top > 16 * codes.size:
        return np.unique(codes)
    seen = np.zeros(top, bool)  # where they lie close this is ten times faster than to sort them
    seen[codes] = True
    return np.flatnonzero(seen)


def _digits(level: int, loop: Loop, dims: Sequence[Dim]) -> list[_Digit]:
    terms = [(i, t) for i, d in enumerate(dims) for t in d.at.of(loop.name)]
    points = [p for p in breaks(loop.extent, [t for _, t in terms]) if p <= loop.extent]
    digits = []
    for low, high in reversed(list(itertools.pairwise(points))):
        steps = [0] * len(dims)
        for i, t in terms:
            if t.divisor <= low < t.divisor * t.extent:
                steps[i] += t.coefficient * (low // t.divisor)
        digits.append(_Digit(level, high // low, tuple(steps)))
    return digits


def _taken_apart(nest: Nest, array: str) -> tuple[list[_Digit], list[tuple[_Part, list[int]]]]:
    """Digits of all loops that move through an array, and its parts with the sizes of those dimensions that are left at times."""
    dims: tuple[Dim, ...] = getattr(nest, array)
    digits = [
        digit
        for level, loop in enumerate(nest.loops)
        if array == "y" or nest.computes(loop.name)
        for digit in _digits(level, loop, dims)
    ]
    groups = [{i} for i in range(len(dims))]
    for digit in digits:
        used = {i for i, s in enumerate(digit.steps) if s}
        joined = set().union(*(g for g in groups if g & used))
        groups = [g for g in groups if not g & used] + ([joined] if joined else [])
    left = {
        i
        for i, d in enumerate(dims)
        if array == "x" and (d.at.bounds[0] < 0 or d.at.bounds[1] >= d.size)
    }
    parts = []
    for group in groups:
        numbers = sorted(group, key=lambda i: (i not in left, i))
        parts.append((_Part(dims, numbers, digits), [dims[i].size for i in numbers if i in left]))
    return digits, parts
