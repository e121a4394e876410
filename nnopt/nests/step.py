"""What a transformation of a loop nest is: a frozen value that makes of one operator another, or says why it cannot."""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar

from nnopt.errors import NestError
from nnopt.nests.index import Term, strip_mined
from nnopt.nests.nest import Loop, Nest, Operator


@dataclasses.dataclass(frozen=True)
class Step:
    """A transformation of an operator's nests.

    Attributes:
        part: number of the nest that is changed; all of them if None.
    """

    keeps_function: ClassVar[bool]

    part: int | None = dataclasses.field(default=None, kw_only=True)

    def change(self, nest: Nest) -> Sequence[Nest]:
        """What becomes of one nest.

        Raises:
            NestError: the step is not possible on it; the message says why.
        """
        raise NotImplementedError

    def domain_ratio(self, nest: Nest) -> Fraction:
        """Domain size of a nest after the step over that before."""
        return Fraction(1)

    def __call__(self, operator: Operator) -> Operator:
        """The operator transformed.

        Raises:
            NestError: the step is not possible on it; the message says why.
        """
        chosen = self.chosen(operator)
        nests: list[Nest] = []
        for i, nest in enumerate(operator.nests):
            nests.extend(self.change(nest) if i in chosen else (nest,))
        return dataclasses.replace(operator, nests=tuple(nests))

    def chosen(self, operator: Operator) -> range:
        """Numbers of the nests that the step changes.

        Raises:
            NestError: there is no such part.
        """
        count = len(operator.nests)
        if self.part is None:
            return range(count)
        if not 0 <= self.part < count:
            raise NestError(f"there is no part {self.part}; there are {count}, numbered from 0")
        return range(self.part, self.part + 1)

    def __str__(self) -> str:
        """As a call, without what is left at its default."""
        given = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        given.sort(key=lambda f: bool(f.kw_only))
        texts = [
            f"{f.name}={getattr(self, f.name)!r}" if f.kw_only else repr(getattr(self, f.name))
            for f in given
        ]
        return f"{type(self).__name__}({', '.join(texts)})"


def divided(loop: Loop, number: int, what: str) -> int:
    """The extent of a loop over a number.

    Raises:
        NestError: it does not divide, or is below 1.
    """
    if number < 1:
        raise NestError(f"{what} {number} is below 1")
    if loop.extent % number:
        raise NestError(f"{what} {number} does not divide the {loop.extent} of {loop.name}")
    return loop.extent // number


def unmarked(nest: Nest, name: str) -> Loop:
    """A loop that may be reshaped.

    Raises:
        NestError: there is no such loop, or it is marked.
    """
    loop = nest.loop(name)
    if loop.marks:
        raise NestError(
            f"{name} is marked {', '.join(loop.marks)}; mark loops once they have their shape"
        )
    return loop


def cut(nest: Nest, name: str, size: int, outer: str, inner: str) -> Nest:
    """A loop strip-mined by a size that divides it: `name = size * outer + inner`.

    Raises:
        NestError: see `nnopt.nests.index.strip_mined`.
    """
    extent = nest.loop(name).extent
    fresh(nest, outer, but=name)
    fresh(nest, inner, but=name)

    def digits(term: Term) -> list[Term]:
        return strip_mined(term, outer, inner, size)

    return nest.with_loops(name, (Loop(outer, extent // size), Loop(inner, size)), digits)


def fresh(nest: Nest, name: str, but: str = "") -> str:
    """The name, if no loop but one has it.

    Raises:
        NestError: one has.
    """
    if name != but and name in nest.extents:
        raise NestError(f"there is a loop {name!r} already; fuse or rename it first")
    return name


def halves(name: str) -> tuple[str, str]:
    """Names of the outer and the inner loop that a strip-mined one becomes: `co -> co_o, co_i`, `co_i -> co_io, co_ii`."""
    stem = name if "_" in name else f"{name}_"
    return f"{stem}o", f"{stem}i"
