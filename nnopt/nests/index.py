"""Indices into arrays as sums over loops: what strip-mining, fusing and splitting do to them.

An index is `constant + sum(coefficient * (loop // divisor % extent))`. With every divisor 1 and every extent that of the
loop it is affine. Fusing two loops needs divisors, and the form is closed under all transformations of a nest whose sizes divide.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from nnopt.errors import NestError


class Term(NamedTuple):
    """`coefficient * (loop // divisor % extent)`.

    Attributes:
        loop: its name.
        coefficient: in elements of the array's axis.
        divisor: of the loop's value.
        extent: how many values the quotient runs through.
    """

    loop: str
    coefficient: int
    divisor: int
    extent: int

    def value(self, loop: int) -> int:
        """Of the term at a value of its loop."""
        return self.coefficient * (loop // self.divisor % self.extent)


class Index(NamedTuple):
    """A place along one axis of an array.

    Attributes:
        constant: in elements.
        terms: added to it.
    """

    constant: int = 0
    terms: tuple[Term, ...] = ()

    def of(self, name: str) -> tuple[Term, ...]:
        """The terms of one loop."""
        return tuple([t for t in self.terms if t.loop == name])

    def without(self, name: str) -> "Index":
        """The index where a loop is at zero."""
        if not any(t.loop == name for t in self.terms):
            return self
        return Index(self.constant, tuple(t for t in self.terms if t.loop != name))

    def shifted(self, by: int) -> "Index":
        """The index so many elements further."""
        return Index(self.constant + by, self.terms) if by else self

    def plus(self, *terms: Term) -> "Index":
        """The index with terms added."""
        return Index(self.constant, merged((*self.terms, *terms)))

    def mapped(self, name: str, change: Callable[[Term], Iterable[Term]]) -> "Index":
        """The index with each term of a loop replaced."""
        # Plain loops: this is most of what drawing programs does.
        for t in self.terms:
            if t.loop == name:
                break
        else:
            return self
        terms: list[Term] = []
        for t in self.terms:
            if t.loop == name:
                terms.extend(change(t))
            else:
                terms.append(t)
        return Index(self.constant, merged(terms))

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest value."""
        ends = [t.coefficient * (t.extent - 1) for t in self.terms]
        return self.constant + sum(min(e, 0) for e in ends), self.constant + sum(
            max(e, 0) for e in ends
        )


def whole(loop: str, extent: int, coefficient: int = 1) -> Term:
    """`coefficient * loop`."""
    return Term(loop, coefficient, 1, extent)


def merged(terms: Iterable[Term]) -> tuple[Term, ...]:
    """The same sum in the fewest terms, in a fixed order."""
    return _merged(tuple(terms))


@functools.lru_cache(1 << 16)
def _merged(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    # Kept: programs drawn for one convolution have the same few thousand sums.
    sums: dict[tuple[str, int, int], int] = {}
    for t in terms:
        digit = (t.loop, t.divisor, t.extent)
        sums[digit] = sums.get(digit, 0) + t.coefficient
    found = sorted(Term(n, c, d, m) for (n, d, m), c in sums.items() if m > 1 and c)
    i = 0
    while i + 1 < len(found):
        low, high = found[i], found[i + 1]
        if low.loop == high.loop and low.divisor > high.divisor:
            low, high = high, low
        # Digits of one loop that follow each other, weighted as digits are, make one larger digit.
        if low.loop == high.loop and (high.divisor, high.coefficient) == (
            low.divisor * low.extent,
            low.coefficient * low.extent,
        ):
            found[i : i + 2] = [
                Term(low.loop, low.coefficient, low.divisor, low.extent * high.extent)
            ]
            i = max(i - 1, 0)
        else:
            i += 1
    return tuple(found)


def strip_mined(term: Term, outer: str, inner: str, size: int) -> list[Term]:
    """The term once its loop is `size * outer + inner`.

    Raises:
        NestError: the digit of the term begins or ends within the inner loop's range and does not divide it.
    """
    _, coefficient, divisor, count = term
    if divisor % size == 0:
        return [Term(outer, coefficient, divisor // size, count)]
    if size % divisor:
        raise NestError(
            f"{size} does not divide, nor is divided by, the {divisor} of a loop that was fused into {term.loop}"
        )
    within = size // divisor  # values of the digit that the inner loop runs through
    if within % count == 0:
        return [Term(inner, coefficient, divisor, count)]
    if count % within:
        raise NestError(
            f"{size} does not divide the {divisor * count} of a loop that was fused into {term.loop}"
        )
    return [
        Term(inner, coefficient, divisor, within),
        Term(outer, coefficient * within, 1, count // within),
    ]


def fused_outer(term: Term, name: str, inner_extent: int) -> list[Term]:
    """A term of the outer of two loops once both are one."""
    return [Term(name, term.coefficient, term.divisor * inner_extent, term.extent)]


def fused_inner(term: Term, name: str) -> list[Term]:
    """A term of the inner of two loops once both are one."""
    return [Term(name, term.coefficient, term.divisor, term.extent)]


def breaks(extent: int, terms: Sequence[Term]) -> list[int]:
    """Where the digits of a loop begin and end: a chain of divisors from 1 to its extent.

    Raises:
        NestError: two digits overlap without one being within the other.
    """
    points = sorted(
        {1, extent, *(t.divisor for t in terms), *(t.divisor * t.extent for t in terms)}
    )
    for low, high in itertools.pairwise(points):
        if high % low:
            raise NestError(
                f"digits of a loop begin at {low} and at {high}, of which neither divides the other"
            )
    return points
