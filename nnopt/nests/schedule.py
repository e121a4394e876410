"""Transformations that keep the function: in which order, in which pieces and on what the iterations run.

All iterations that write one element of the output add to it, and additions may be reordered up to rounding; so every order of the
loops is legal, and only what runs iterations *at the same time* must keep off the loops of a reduction.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar, Literal

from nnopt.errors import NestError
from nnopt.nests.index import Index, Term, fused_inner, fused_outer
from nnopt.nests.nest import Dim, Loop, Nest
from nnopt.nests.step import Step, cut, divided, fresh, halves, unmarked


class Keeping(Step):
    """A transformation that keeps the function."""

    keeps_function = True

    def domain_ratio(self, nest: Nest) -> Fraction:
        """See `Step`.

        It is 1 unless a loop that copies a result is fused with one that computes, or is split: what was copied is then computed.
        """
        return Fraction(sum(n.domain_size for n in self.change(nest)), nest.domain_size)


@dataclasses.dataclass(frozen=True)
class Interchange(Keeping):
    """Two loops change places: `for a: for b: ... -> for b: for a: ...`.

    Attributes:
        a: a loop.
        b: another.
    """

    a: str
    b: str

    def change(self, nest: Nest) -> Sequence[Nest]:
        """See `Step`."""
        a, b = nest.loop(self.a), nest.loop(self.b)
        swap = {a: b, b: a}
        return [dataclasses.replace(nest, loops=tuple(swap.get(loop, loop) for loop in nest.loops))]


@dataclasses.dataclass(frozen=True)
class StripMine(Keeping):
    """A loop becomes two: `for i in E -> for i_o in E / size: for i_i in size`, with `i = size * i_o + i_i`.

    Attributes:
        loop: its name; the two are called `<name>_o` and `<name>_i`.
        size: of the inner loop; it divides the extent.
    """

    loop: str
    size: int

    def change(self, nest: Nest) -> Sequence[Nest]:
        """See `Step`."""
        divided(unmarked(nest, self.loop), self.size, "tile")
        return [cut(nest, self.loop, self.size, *halves(self.loop))]


@dataclasses.dataclass(frozen=True)
class Tile(Keeping):
    """Two loops become blocks: `for a: for b -> for a_o: for b_o: ... for a_i: for b_i`.

    Both are strip-mined, and the inner loop of the first changes places with the outer one of the second.

    Attributes:
        a: a loop.
        b: another, within it.
        size_a: of the inner loop of the first.
        size_b: of the inner loop of the second.
    """

    a: str
    b: str
    size_a: int
    size_b: int

    def change(self, nest: Nest) -> Sequence[Nest]:
        """See `Step`."""
        (nest,) = StripMine(self.a, self.size_a).change(nest)
        (nest,) = StripMine(self.b, self.size_b).change(nest)
        return Interchange(halves(self.a)[1], halves(self.b)[0]).change(nest)


@dataclasses.dataclass(frozen=True)
class Fuse(Keeping):
    """Two loops, one directly within the other, become one: `for a: for b in B -> for ab`, with `a = ab // B`, `b = ab % B`.

    The halves of a strip-mined loop take its name again; others are called `<a>.<b>`.

    Attributes:
        a: the outer loop.
        b: the inner loop.
    """

    a: str
    b: str

    def change(self, nest: Nest) -> Sequence[Nest]:
        """See `Step`."""
        a, b = unmarked(nest, self.a), unmarked(nest, self.b)
        at = nest.loops.index(a)
        if nest.loops[at + 1 : at + 2] != (b,):
            raise NestError(
                f"{self.b} is not directly within {self.a}; interchange loops until it is"
            )
        together = (
            self.a[:-1].rstrip("_")
            if halves(self.a[:-1].rstrip("_")) == (self.a, self.b)
            else f"{self.a}.{self.b}"
        )
        fresh(nest, together)

        def change(_: str, dim: Dim) -> Index:
            outer = dim.at.mapped(self.a, lambda t: fused_outer(t, together, b.extent))
            return outer.mapped(self.b, lambda t: fused_inner(t, together))

        loops = (*nest.loops[:at], Loop(together, a.extent * b.extent), *nest.loops[at + 2 :])
        return [dataclasses.replace(nest.with_index(change), loops=loops)]


@dataclasses.dataclass(frozen=True)
class Split(Keeping):
    """Index-set splitting: a nest becomes one for each range of a loop. `Split("co", (16,))` of 64: `0..16` and `16..64`.

    The parts share the kernel, as far as they share elements of it.

    Attributes:
        loop: one of the output's.
        at: where ranges begin, after the first; ascending.
    """

    loop: str
    at: tuple[int, ...]

    def change(self, nest: Nest) -> Sequence[Nest]:
        """See `Step`."""
        loop = unmarked(nest, self.loop)
        if not nest.is_output(self.loop):
            raise NestError(
                f"{self.loop} is a loop of a reduction: its ranges would write the same elements"
            )
        points = (0, *self.at, loop.extent)
        if any(low >= high for low, high in itertools.pairwise(points)):
            raise NestError(
                f"ranges that begin at {', '.join(map(str, self.at))} do not cut the {loop.extent} of {self.loop} into parts"
            )
        terms = [t for a in "yxk" for d in getattr(nest, a) for t in d.at.of(self.loop)]
        if any(t.divisor > 1 or t.extent < loop.extent for t in terms):
            raise NestError(f"{self.loop} was fused; split before that")
        return [self._range(nest, loop, low, high) for low, high in itertools.pairwise(points)]

    def _range(self, nest: Nest, loop: Loop, low: int, high: int) -> Nest:
        extent = high - low

        def moved(_: str, dim: Dim) -> Index:
            # The loop was not fused: it is one term, which keeps its place among the others.
            for i, (name, step, divisor, _count) in enumerate(dim.at.terms):
                if name == self.loop:
                    term = (Term(name, step, divisor, extent),) if extent > 1 else ()
                    terms = dim.at.terms
                    return Index(dim.at.constant + step * low, terms[:i] + term + terms[i + 1 :])
            return dim.at

        loops = tuple([Loop(loop.name, extent) if n == loop else n for n in nest.loops])
        nest = nest.with_index(moved)
        return Nest(loops, nest.y, nest.x, nest.k)


class _Mark(Keeping):
    """A note on a loop that the function does not depend on."""

    loop: str
    at_once: ClassVar[bool]  # iterations run at the same time

    def mark(self) -> str:
        """What is noted."""
        return type(self).__name__.lower()

    def change(self, nest: Nest) -> Sequence[Nest]:
        """See `Step`."""
        loop = nest.loop(self.loop)
        if self.at_once and not nest.writes_apart(self.loop):
            raise NestError(
                f"{self.loop} is a loop of a reduction: its iterations add to the same elements"
            )
        if self.mark() in loop.marks:
            raise NestError(f"{self.loop} is marked {self.mark()} already")
        return [_marked(nest, loop, self.mark())]


@dataclasses.dataclass(frozen=True)
class Unroll(_Mark):
    """The body of a loop is written out for each iteration, or for `factor` of them after strip-mining.

    Attributes:
        loop: its name.
        factor: of iterations, which divides the extent; 0 for all.
    """

    at_once = False

    loop: str
    factor: int = 0

    def change(self, nest: Nest) -> Sequence[Nest]:
        """See `Step`."""
        if not self.factor:
            return super().change(nest)
        (nest,) = StripMine(self.loop, self.factor).change(nest)
        return [_marked(nest, nest.loop(halves(self.loop)[1]), self.mark())]


@dataclasses.dataclass(frozen=True)
class Vectorize(_Mark):
    """The iterations of the innermost loop run in the lanes of a vector register.

    Attributes:
        loop: its name; it is innermost and the output's.
    """

    at_once = True

    loop: str

    def change(self, nest: Nest) -> Sequence[Nest]:
        """See `Step`."""
        if nest.loops[-1] != nest.loop(self.loop):
            raise NestError(
                f"{self.loop} is not the innermost loop; interchange it with {nest.loops[-1].name}"
            )
        return super().change(nest)


@dataclasses.dataclass(frozen=True)
class Parallel(_Mark):
    """The iterations of a loop run on different cores.

    Attributes:
        loop: its name; it is the output's.
    """

    at_once = True

    loop: str


@dataclasses.dataclass(frozen=True)
class Prefetch(_Mark):
    """What an array has for the next iteration of a loop is fetched during this one.

    Attributes:
        array: `x` or `k`.
        loop: name of the loop.
    """

    at_once = False

    array: Literal["x", "k"]
    loop: str

    def mark(self) -> str:
        """See `_Mark`."""
        return f"prefetch {self.array}"

    def change(self, nest: Nest) -> Sequence[Nest]:
        """See `Step`."""
        nest.loop(self.loop)
        if self.array not in ("x", "k"):
            raise NestError(f"prefetch of {self.array!r}; it is x or k")
        if not nest.uses(self.array, self.loop):
            raise NestError(
                f"the index into {self.array} does not depend on {self.loop}: there is nothing to fetch"
            )
        return super().change(nest)


_THREADS = tuple(
    f"{kind}.{axis}" for kind in ("blockIdx", "threadIdx", "vthread") for axis in "xyz"
)


@dataclasses.dataclass(frozen=True)
class Bind(_Mark):
    """The iterations of a loop run on the blocks or threads of a GPU.

    Attributes:
        loop: its name; it is the output's.
        thread: `blockIdx.x`, `threadIdx.x` or `vthread.x`, or `.y`, `.z`; each for one loop of a nest.
    """

    at_once = True

    loop: str
    thread: str

    def mark(self) -> str:
        """See `_Mark`."""
        return self.thread

    def change(self, nest: Nest) -> Sequence[Nest]:
        """See `Step`."""
        if self.thread not in _THREADS:
            raise NestError(f"there is no {self.thread!r}; there are {', '.join(_THREADS)}")
        taken = [loop.name for loop in nest.loops if self.thread in loop.marks]
        if taken and not self.thread.startswith("vthread"):
            raise NestError(f"{taken[0]} is bound to {self.thread} already")
        return super().change(nest)


def _marked(nest: Nest, loop: Loop, mark: str) -> Nest:
    marked = loop._replace(marks=(*loop.marks, mark))
    return dataclasses.replace(
        nest, loops=tuple(marked if other == loop else other for other in nest.loops)
    )
