"""Transformations that change the function: fewer products, or other ones.

Each restricts the iteration domain or an access map, so that a compiler's language covers what architecture search has names for
(Turner et al., Neural Architecture Search as Program Transformation Exploration, ASPLOS 2021). What is legal for the network, a
test of its capacity decides; here is only what is possible: every element of the output is still written, once.
"""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

from nnopt.errors import NestError
from nnopt.nests.index import Index, Term, strip_mined, whole
from nnopt.nests.nest import Dim, Loop, Nest, Operator
from nnopt.nests.step import Step, cut, divided, fresh, halves, unmarked


class Changing(Step):
    """A transformation that changes the function."""

    keeps_function = False


@dataclasses.dataclass(frozen=True)
class Bottleneck(Changing):
    """A loop runs through a part of its range: `for i in E -> for i in E / by`.

    What becomes of the rest depends on the loop. Of a reduction the first part is kept, or the middle one where the loop is a
    window's; of the output every `by`-th element is computed and the ones between are copies of it: `for co in 64: y[co] += ...` ->
    `for co in 32: for co_r in 2: y[2*co + co_r] += ... co at 2*co ...`, so that the shape is kept.

    Attributes:
        loop: its name.
        by: what the extent is divided by.
    """

    loop: str
    by: int

    def change(self, nest: Nest) -> Sequence[Nest]:
        """See `Step`."""
        loop = unmarked(nest, self.loop)
        extent = divided(loop, self.by, "bottleneck")
        if self.by == 1:
            return [nest]
        if nest.is_output(self.loop):
            if not nest.computes(self.loop):
                raise NestError(
                    f"{self.loop} copies what is computed once: there is nothing to save"
                )
            if not nest.writes_apart(self.loop):
                raise NestError(
                    f"{self.loop} was fused from loops of the output and of a reduction, of which one copies and the other leaves "
                    "out; do this before that"
                )
            copy = fresh(nest, f"{self.loop}_r")
            nest = cut(nest, self.loop, self.by, self.loop, copy)
            return [nest.with_index(lambda array, d: d.at if array == "y" else d.at.without(copy))]
        start = (loop.extent - extent) // 2 if is_window(nest, self.loop) else 0
        return Restrict(self.loop, start, start + extent).change(nest)

    def domain_ratio(self, nest: Nest) -> Fraction:
        """See `Step`."""
        (after,) = self.change(nest)
        if self.by == 1 or after.computes(self.loop):
            return Fraction(1, self.by)
        return Fraction(1, nest.loop(self.loop).extent)  # what is left of a fused loop only copies


@dataclasses.dataclass(frozen=True)
class Restrict(Changing):
    """A loop of a reduction runs through a range: `for i in E -> for i in stop - start`, with `i + start` for `i`.

    Attributes:
        loop: its name.
        start: of the range.
        stop: of the range, not within it.
    """

    loop: str
    start: int
    stop: int

    def change(self, nest: Nest) -> Sequence[Nest]:
        """See `Step`."""
        loop = unmarked(nest, self.loop)
        if nest.is_output(self.loop):
            raise NestError(
                f"{self.loop} is a loop of the output, whose elements would be left out; use Bottleneck, which copies"
            )
        if not 0 <= self.start < self.stop <= loop.extent:
            raise NestError(
                f"{self.start}..{self.stop} is no range of the {loop.extent} of {self.loop}"
            )
        extent = self.stop - self.start
        _plain(nest, self.loop)

        def moved(_: str, dim: Dim) -> Index:
            at = sum(t.coefficient for t in dim.at.of(self.loop)) * self.start
            return dim.at.mapped(self.loop, lambda t: [t._replace(extent=extent)]).shifted(at)

        return [_resized(nest.with_index(moved), self.loop, extent)]

    def domain_ratio(self, nest: Nest) -> Fraction:
        """See `Step`."""
        return Fraction(self.stop - self.start, nest.loop(self.loop).extent)


@dataclasses.dataclass(frozen=True)
class Tie(Changing):
    """Two loops of equal extent become one, the diagonal of their domain: `for a: for b: ... -> for a: ... b at a ...`.

    Ties of the outer halves of `co` and `ci` are groups, of `kh` and `kw` a diagonal window.

    Attributes:
        a: a loop, which stays.
        b: a loop of a reduction.
    """

    a: str
    b: str

    def change(self, nest: Nest) -> Sequence[Nest]:
        """See `Step`."""
        a, b = unmarked(nest, self.a), unmarked(nest, self.b)
        if a == b:
            raise NestError(f"{self.a} cannot be tied to itself")
        if nest.is_output(self.b):
            why = (
                "the diagonal of two loops of the output leaves elements unwritten"
                if nest.is_output(self.a)
                else "name it first"
            )
            raise NestError(f"{self.b} is a loop of the output: {why}")
        if a.extent != b.extent:
            raise NestError(
                f"{self.a} has {a.extent} iterations and {self.b} has {b.extent}; tile until they have as many"
            )
        return [nest.with_loops(self.b, (), lambda t: [t._replace(loop=self.a)])]

    def domain_ratio(self, nest: Nest) -> Fraction:
        """See `Step`."""
        if not nest.computes(self.a):
            return Fraction(1)  # what was copied is computed
        return Fraction(1, nest.loop(self.b).extent)


@dataclasses.dataclass(frozen=True)
class Group(Changing):
    """Grouped convolution: tile a loop of output and one of input channels, interchange, keep the diagonal.

    `for co in 64: for ci in 64 -> for g in groups: for co in 64 / groups: for ci in 64 / groups`.

    Attributes:
        output: a loop of output channels.
        input: a loop of input channels.
        groups: as many; it divides both extents.
    """

    output: str
    input: str
    groups: int

    def change(self, nest: Nest) -> Sequence[Nest]:
        """See `Step`."""
        co, ci = unmarked(nest, self.output), unmarked(nest, self.input)
        if nest.uses("x", self.output) or not (
            nest.is_output(self.output) and nest.uses("k", self.output)
        ):
            raise NestError(f"{self.output} is no loop of output channels")
        if not _selects_channels(nest, self.input):
            raise NestError(f"{self.input} is no loop of input channels")
        outputs, inputs = (
            divided(co, self.groups, "group count"),
            divided(ci, self.groups, "group count"),
        )
        if self.groups == 1:
            return [nest]
        tied, other = fresh_group(nest), "ci_g"
        nest = cut(nest, self.output, outputs, tied, self.output)
        nest = cut(nest, self.input, inputs, other, self.input)
        return Tie(tied, other).change(nest)

    def domain_ratio(self, nest: Nest) -> Fraction:
        """See `Step`."""
        return Fraction(1, self.groups)


@dataclasses.dataclass(frozen=True)
class Depthwise(Changing):
    """Grouping to the limit: every input channel is a group, and has as many outputs of its own as there are for each.

    Attributes:
        output: a loop of output channels.
        input: a loop of input channels, whose extent divides the other's.
    """

    output: str
    input: str

    def change(self, nest: Nest) -> Sequence[Nest]:
        """See `Step`."""
        return Group(self.output, self.input, nest.loop(self.input).extent).change(nest)

    def domain_ratio(self, nest: Nest) -> Fraction:
        """See `Step`."""
        return Fraction(1, nest.loop(self.input).extent)


@dataclasses.dataclass(frozen=True)
class Widen(Changing):
    """A window's loop gets a larger range, about the same middle: `for kh in 3 -> for kh in size`. New weights begin at zero.

    Attributes:
        loop: its name.
        size: its new extent, larger by an even number.
    """

    loop: str
    size: int

    def change(self, nest: Nest) -> Sequence[Nest]:
        """See `Step`."""
        loop = unmarked(nest, self.loop)
        more = self.size - loop.extent
        if not is_window(nest, self.loop):
            raise NestError(f"{self.loop} is no loop of a window")
        if more < 0 or more % 2:
            raise NestError(
                f"a window of {loop.extent} cannot become {self.size} about its middle; add an even number"
            )
        _plain(nest, self.loop)
        for dim in nest.k:
            step = max((t.coefficient for t in dim.at.of(self.loop)), default=0)
            around = [t.loop for t in dim.at.terms if step and t.coefficient > step]
            if around and more:
                raise NestError(
                    f"{self.loop} is a part of a window that {around[0]} moves: wider parts would overlap in the kernel; widen "
                    "before cutting the window"
                )

        def grown(_: str, dim: Dim) -> Index:
            at = sum(t.coefficient for t in dim.at.of(self.loop)) * (more // 2)
            index = dim.at.mapped(self.loop, lambda t: [t._replace(extent=self.size)])
            return index.shifted(-at)

        return [_resized(nest.with_index(grown), self.loop, self.size)]

    def domain_ratio(self, nest: Nest) -> Fraction:
        """See `Step`."""
        return Fraction(self.size, nest.loop(self.loop).extent)


@dataclasses.dataclass(frozen=True)
class Dilate(Changing):
    """A window's loop takes larger steps, about the same middle: `x[oh + kh - 1] -> x[oh + by*kh - by]`.

    Attributes:
        loop: its name.
        by: what its steps are multiplied by.
    """

    loop: str
    by: int

    def change(self, nest: Nest) -> Sequence[Nest]:
        """See `Step`."""
        loop = unmarked(nest, self.loop)
        if not is_window(nest, self.loop):
            raise NestError(f"{self.loop} is no loop of a window")
        if self.by < 1:
            raise NestError(f"dilation {self.by} is below 1")
        _plain(nest, self.loop)

        def spread(array: str, dim: Dim) -> Index:
            if array != "x":
                return dim.at
            step = sum(t.coefficient for t in dim.at.of(self.loop))
            index = dim.at.mapped(
                self.loop, lambda t: [t._replace(coefficient=t.coefficient * self.by)]
            )
            return index.shifted(-((self.by - 1) * step * (loop.extent - 1) // 2))

        return [nest.with_index(spread)]


@dataclasses.dataclass(frozen=True)
class Shift(Changing):
    """Channels are read from places beside each other: `x[oh + kh, ..., ci] -> x[oh + kh + by * (ci - middle), ..., ci]`.

    With strip-mined channels and a window of one this is the shift of Wu et al. (CVPR 2018) along one axis.

    Attributes:
        loop: one of channels.
        along: a loop of the output's rows or columns: the axis.
        by: elements from one iteration to the next.
    """

    loop: str
    along: str
    by: int

    def change(self, nest: Nest) -> Sequence[Nest]:
        """See `Step`."""
        loop = unmarked(nest, self.loop)
        axis = spatial_dim(nest, self.along)
        if spatial_dim(nest, self.loop) is not None or is_window(nest, self.loop):
            raise NestError(f"{self.loop} is no loop of channels")
        if axis is None:
            raise NestError(f"{self.along} is no loop of rows or columns of the output")
        _plain(nest, self.loop)
        x = list(nest.x)
        index = (
            x[axis]
            .at.plus(whole(self.loop, loop.extent, self.by))
            .shifted(-self.by * (loop.extent // 2))
        )
        x[axis] = x[axis]._replace(at=index)
        return [dataclasses.replace(nest, x=tuple(x))]

    def domain_ratio(self, nest: Nest) -> Fraction:
        """See `Step`."""
        (after,) = self.change(nest)
        before, now = nest.computes(self.loop), after.computes(self.loop)
        extent = nest.loop(self.loop).extent
        # What was copied is computed, or the other way round where one shift undoes another.
        return Fraction(extent if now else 1, extent if before else 1)


@dataclasses.dataclass(frozen=True)
class Share(Changing):
    """All iterations of a loop use the same weights: `k[..., co] -> k[...]` with `co` at 0.

    Attributes:
        loop: its name.
    """

    loop: str

    def change(self, nest: Nest) -> Sequence[Nest]:
        """See `Step`."""
        unmarked(nest, self.loop)
        if not nest.uses("k", self.loop):
            raise NestError(f"the weights do not depend on {self.loop}")
        if not any(nest.uses("k", loop.name) for loop in nest.loops if loop.name != self.loop):
            raise NestError(f"no weight but one would be left without {self.loop}")
        return [nest.with_index(lambda array, d: d.at.without(self.loop) if array == "k" else d.at)]

    def domain_ratio(self, nest: Nest) -> Fraction:
        """See `Step`."""
        return (
            Fraction(1) if nest.uses("x", self.loop) else Fraction(1, nest.loop(self.loop).extent)
        )


@dataclasses.dataclass(frozen=True)
class Untie(Changing):
    """Every iteration of a loop, or every part, has weights of its own: `k[...] -> k[..., loop]`. All begin with the same values.

    Attributes:
        loop: one of the output's that the weights do not depend on; empty for the parts.
    """

    loop: str = ""

    def __call__(self, operator: Operator) -> Operator:
        """See `Step`."""
        chosen = self.chosen(operator)
        first = (
            1 if len(chosen) < len(operator.nests) else 0
        )  # parts that are left out share copy 0

        def copied(number: int, nest: Nest) -> Nest:
            index = Index()
            if number in chosen:
                index = (
                    Index(first + number - chosen.start)
                    if not self.loop
                    else self._index(nest).shifted(first)
                )
            return dataclasses.replace(nest, k=(*nest.k, Dim(-1, 0, index)))

        return dataclasses.replace(
            operator, nests=tuple(copied(i, nest) for i, nest in enumerate(operator.nests))
        )

    def _index(self, nest: Nest) -> Index:
        loop = unmarked(nest, self.loop)
        if not nest.is_output(self.loop):
            raise NestError(f"{self.loop} is a loop of a reduction; untie one of the output's")
        if nest.uses("k", self.loop):
            raise NestError(f"the weights depend on {self.loop} already")
        return Index().plus(whole(self.loop, loop.extent))

    def domain_ratio(self, nest: Nest) -> Fraction:
        """See `Step`."""
        if not self.loop or nest.uses("x", self.loop):
            return Fraction(1)
        return Fraction(nest.loop(self.loop).extent)  # what was copied is computed


@dataclasses.dataclass(frozen=True)
class Slabs(Changing):
    """The image is cut into slabs along an axis that do not see each other: what a slab reads outside of itself is zero.

    `for oh in 32: x[oh + kh - 1] -> for oh_o in count: for oh_i in 32 / count: x[oh_o][oh_i + kh - 1]`.

    Attributes:
        along: a loop of the output's rows or columns, which is strip-mined.
        count: of slabs; it divides the extents of output and input.
    """

    along: str
    count: int

    def change(self, nest: Nest) -> Sequence[Nest]:
        """See `Step`."""
        loop = unmarked(nest, self.along)
        at = spatial_dim(nest, self.along)
        if at is None:
            raise NestError(f"{self.along} is no loop of rows or columns of the output")
        extent = divided(loop, self.count, "slab count")
        _plain(nest, self.along)
        dim = nest.x[at]
        step = sum(t.coefficient for t in dim.at.of(self.along))
        if step * loop.extent != dim.size:
            raise NestError(
                f"{loop.extent} iterations of {self.along} in steps of {step} are not the {dim.size} of the input"
            )
        outer, inner = halves(self.along)
        size = step * extent

        def digits(term: Term) -> list[Term]:
            return strip_mined(term, outer, inner, extent)

        rest = dim.at.mapped(self.along, digits).without(outer)
        nest = cut(nest, self.along, extent, outer, inner)
        which = Dim(dim.axis, self.count, Index().plus(whole(outer, self.count)))
        x = (*nest.x[:at], which, Dim(dim.axis, size, rest), *nest.x[at + 1 :])
        return [dataclasses.replace(nest, x=x)]


def spatial_dim(nest: Nest, name: str) -> int | None:
    """Number of the dimension of `x` that a loop of the output's rows or columns selects; None if it is no such loop."""
    last = nest.x[-1].axis
    if (
        not nest.is_output(name)
        or nest.uses("k", name)
        or any(t.loop == name for d in nest.y if d.axis == last for t in d.at.terms)
    ):
        return None
    found = [i for i, d in enumerate(nest.x) if d.axis != last and d.at.of(name)]
    return found[-1] if len(found) == 1 else None


def is_window(nest: Nest, name: str) -> bool:
    """Whether a loop runs through a window: a reduction along rows or columns of the input, with a weight for each."""
    last = nest.x[-1].axis
    along = [d.axis for d in nest.x if d.at.of(name)]
    return (
        not nest.is_output(name) and nest.uses("k", name) and len(along) == 1 and along[0] != last
    )


def fresh_group(nest: Nest) -> str:
    """A name for a loop of groups."""
    taken = nest.extents
    return next(n for i in range(len(taken) + 1) if (n := f"g{i + 1}" if i else "g") not in taken)


def _selects_channels(nest: Nest, name: str) -> bool:
    last = nest.x[-1].axis
    reads = [d.axis for d in nest.x if d.at.of(name)]
    return not nest.is_output(name) and nest.uses("k", name) and reads == [last]


def _plain(nest: Nest, name: str) -> None:
    extent = nest.loop(name).extent
    terms = [t for a in "yxk" for d in getattr(nest, a) for t in d.at.of(name)]
    if any(t.divisor > 1 or t.extent < extent for t in terms):
        raise NestError(f"{name} was fused; do this before that")


def _resized(nest: Nest, name: str, extent: int) -> Nest:
    loops = tuple(
        Loop(name, extent, loop.marks) if loop.name == name else loop for loop in nest.loops
    )
    return dataclasses.replace(nest, loops=loops)
