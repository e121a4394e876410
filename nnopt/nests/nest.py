"""A convolution as a loop nest: named loops around one multiply-accumulate, and an index into each array.

    for co in 64, ci in 64, oh in 32, ow in 32, kh in 3, kw in 3:
        y[oh, ow, co] += x[oh + kh - 1, ow + kw - 1, ci] * k[kh, kw, ci, co]

Reads of `x` outside its shape are zero. An operator is one or more nests over disjoint parts of the output. The batch is the loop
around it all, and no transformation touches it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nnopt.errors import NestError
from nnopt.nests.index import Index, Term, whole

_SPATIAL = {0: "", 1: "w", 2: "hw", 3: "dhw"}


class Loop(NamedTuple):
    """One loop.

    Attributes:
        name: unique in its nest.
        extent: number of iterations, from zero.
        marks: what is to be done with it, such as `vectorize`; the function does not depend on them.
    """

    name: str
    extent: int
    marks: tuple[str, ...] = ()


class Dim(NamedTuple):
    """One dimension of a view of an array.

    Attributes:
        axis: of the array; -1 for a dimension that only tells copies of a kernel apart. Several dimensions of one axis are its
            digits, the largest first.
        size: of the dimension; reads outside are zero. For kernels 0: as large as it takes.
        at: the place in it.
    """

    axis: int
    size: int
    at: Index


@dataclasses.dataclass(frozen=True)
class Nest:
    """Loops around one statement `y[...] += x[...] * k[...]`.

    Attributes:
        loops: outermost first.
        y: dimensions of the output, `[*spatial, channels]`.
        x: dimensions of the input, `[*spatial, channels]`.
        k: dimensions of the kernel, `[*window, in, out]` of the convolution that it all began with, then those of copies.
    """

    loops: tuple[Loop, ...]
    y: tuple[Dim, ...]
    x: tuple[Dim, ...]
    k: tuple[Dim, ...]

    def loop(self, name: str) -> Loop:
        """The loop of this name.

        Raises:
            NestError: there is none.
        """
        for loop in self.loops:
            if loop.name == name:
                return loop
        raise NestError(
            f"there is no loop {name!r}; there are {', '.join(loop.name for loop in self.loops)}"
        )

    def uses(self, array: str, name: str) -> bool:
        """Whether the index into `x`, `y` or `k` depends on a loop."""
        for dim in getattr(self, array):
            for term in dim.at.terms:
                if term.loop == name:
                    return True
        return False

    def computes(self, name: str) -> bool:
        """Whether iterations of a loop multiply different things; where none does, one result is copied."""
        return self.uses("x", name) or self.uses("k", name)

    def is_output(self, name: str) -> bool:
        """Whether different iterations of a loop write different elements."""
        return self.uses("y", name)

    def writes_apart(self, name: str) -> bool:
        """Whether no two iterations of a loop write the same element: false for one that was fused with a reduction's."""
        digits = {t[2:] for dim in self.y for t in dim.at.of(name)}
        return math.prod(extent for _, extent in digits) == self.loop(name).extent

    @property
    def extents(self) -> dict[str, int]:
        """Loop -> number of iterations."""
        return {loop.name: loop.extent for loop in self.loops}

    @property
    def domain_size(self) -> int:
        """Number of multiply-accumulates for one image, reads outside the input counted.

        A loop that neither `x` nor `k` depends on copies a result and multiplies nothing.
        """
        return math.prod(extent for name, extent, _ in self.loops if self.computes(name))

    def with_index(self, change: Callable[[str, Dim], Index]) -> "Nest":
        """Every index replaced; `change` is told the array's name and the dimension."""
        # Plain loops, and nothing made again that stays: this is most of what drawing programs does.
        arrays: list[tuple[Dim, ...]] = []
        for array, dims in (("y", self.y), ("x", self.x), ("k", self.k)):
            new: list[Dim] = []
            changed = False
            for dim in dims:
                place = change(array, dim)
                if place is dim.at:
                    new.append(dim)
                else:
                    new.append(Dim(dim.axis, dim.size, place))
                    changed = True
            arrays.append(tuple(new) if changed else dims)
        return Nest(self.loops, *arrays)

    def with_loops(
        self, old: str, new: Sequence[Loop], change: Callable[[Term], Sequence[Term]]
    ) -> "Nest":
        """A loop replaced by others in its place, and its terms by theirs."""
        nest = self.with_index(lambda _, d: d.at.mapped(old, change))
        loops: list[Loop] = []
        for loop in self.loops:
            loops.extend(new if loop.name == old else (loop,))
        return Nest(tuple(loops), nest.y, nest.x, nest.k)


@dataclasses.dataclass(frozen=True)
class Operator:
    """What stands where a convolution stood: nests over disjoint parts of one output.

    Attributes:
        input: shape of `x`, `[*spatial, channels]`.
        output: shape of `y`, `[*spatial, channels]`.
        kernel: shape of the kernel it all began with, `[*window, in / groups, out]`.
        nests: in order.
    """

    input: tuple[int, ...]
    output: tuple[int, ...]
    kernel: tuple[int, ...]
    nests: tuple[Nest, ...]

    @property
    def domain_size(self) -> int:
        """Number of multiply-accumulates for one image, those with padding counted."""
        return sum(nest.domain_size for nest in self.nests)

    def __str__(self) -> str:
        """As loop code."""
        from nnopt.nests.text import code

        return code(self)


def convolution(
    size: Sequence[int],
    inputs: int,
    outputs: int,
    window: Sequence[int],
    *,
    strides: Sequence[int] | None = None,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    dilation: Sequence[int] | None = None,
    groups: int = 1,
) -> Operator:
    """A convolution in 1 to 3 dimensions, channels last, as one nest.

    Its loops are `co, ci` (and `g` around them if there are groups), `od, oh, ow`, `kd, kh, kw`, as many as it has dimensions.

    Args:
        size: of the image, `[*spatial]`.
        inputs: channels of the image.
        outputs: channels of the result.
        window: `[*spatial]`.
        strides: of the window; 1 by default.
        padding: `SAME`, `VALID`, or zeros before and after for each axis.
        dilation: of the window; 1 by default.
        groups: of channels.

    Raises:
        NestError: the sizes do not fit each other.

    Example:
        >>> print(convolution((8, 8), 4, 6, (3, 3), strides=(2, 2)))
        for co in 6:
          for ci in 4:
            for oh in 4:
              for ow in 4:
                for kh in 3:
                  for kw in 3:
                    y[oh, ow, co] += x[2*oh + kh, 2*ow + kw, ci] * k[kh, kw, ci, co]
    """
    rank = len(size)
    if rank not in (1, 2, 3):
        raise NestError(f"an image of {rank} dimensions; nests are for 1 to 3")
    strides = tuple(strides or (1,) * rank)
    dilation = tuple(dilation or (1,) * rank)
    for name, values in (("window", window), ("strides", strides), ("dilation", dilation)):
        if len(values) != rank:
            raise NestError(f"{name} {tuple(values)} for an image of {rank} dimensions")
    if min(*size, inputs, outputs, *window, *strides, *dilation, groups) < 1:
        raise NestError("sizes, channels, strides, dilation and groups are at least 1")
    if inputs % groups or outputs % groups:
        raise NestError(f"{groups} groups do not divide {inputs} inputs and {outputs} outputs")
    pads = _pads(size, window, strides, dilation, padding)
    out = tuple(
        (n + sum(p) - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(size, pads, dilation, window, strides, strict=True)
    )
    if min(out) < 1:
        raise NestError(
            f"a window of {tuple(window)} is larger than the image of {tuple(size)} with its padding"
        )
    letters = _SPATIAL[rank]
    loops = [Loop("co", outputs // groups), Loop("ci", inputs // groups)]
    loops += [Loop(f"o{a}", n) for a, n in zip(letters, out, strict=True)]
    loops += [Loop(f"k{a}", n) for a, n in zip(letters, window, strict=True)]
    if groups > 1:
        loops.insert(0, Loop("g", groups))
    at = {loop.name: loop.extent for loop in loops}

    def term(loop: str, coefficient: int = 1) -> Index:
        return Index().plus(whole(loop, at[loop], coefficient))

    def channel(loop: str) -> Index:
        return term(loop).plus(whole("g", groups, at[loop])) if groups > 1 else term(loop)

    y = [Dim(i, n, term(f"o{a}")) for i, (a, n) in enumerate(zip(letters, out, strict=True))]
    x = [
        Dim(i, n, term(f"o{a}", s).plus(whole(f"k{a}", k, d)).shifted(-p[0]))
        for i, (a, n, s, k, d, p) in enumerate(
            zip(letters, size, strides, window, dilation, pads, strict=True)
        )
    ]
    k_dims = [Dim(i, 0, term(f"k{a}")) for i, a in enumerate(letters)]
    k_dims += [Dim(rank, 0, term("ci")), Dim(rank + 1, 0, channel("co"))]
    y.append(Dim(rank, outputs, channel("co")))
    x.append(Dim(rank, inputs, channel("ci")))
    nest = Nest(tuple(loops), tuple(y), tuple(x), tuple(k_dims))
    kernel = (*window, inputs // groups, outputs)
    return Operator((*size, inputs), (*out, outputs), tuple(kernel), (nest,))


def dense(inputs: int, outputs: int) -> Operator:
    """A dense layer: `y[co] += x[ci] * k[ci, co]`.

    Raises:
        NestError: a size is below 1.
    """
    if min(inputs, outputs) < 1:
        raise NestError("a dense layer has at least one input and one output")
    co, ci = (Index().plus(whole(n, e)) for n, e in (("co", outputs), ("ci", inputs)))
    nest = Nest(
        (Loop("co", outputs), Loop("ci", inputs)),
        (Dim(0, outputs, co),),
        (Dim(0, inputs, ci),),
        (Dim(0, 0, ci), Dim(1, 0, co)),
    )
    return Operator((inputs,), (outputs,), (inputs, outputs), (nest,))


def _pads(
    size: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
) -> list[tuple[int, int]]:
    if isinstance(padding, str):
        if padding == "VALID":
            return [(0, 0)] * len(size)
        if padding != "SAME":
            raise NestError(f"padding {padding!r}; it is SAME, VALID or pairs of numbers")
        needed = [
            max((math.ceil(n / s) - 1) * s + d * (k - 1) + 1 - n, 0)
            for n, k, s, d in zip(size, window, strides, dilation, strict=True)
        ]
        return [(n // 2, n - n // 2) for n in needed]
    pads = [tuple(p) for p in padding]
    if len(pads) != len(size) or any(len(p) != 2 for p in pads):
        raise NestError(
            f"padding {padding} for an image of {len(size)} dimensions; it is a pair for each"
        )
    return pads  # type: ignore[return-value]
