"""Data reuse of a loop nest, from the nest alone: how many elements its inner loops touch, and how often they are moved.

Level `l` of a nest is its loops from number `l` inwards: level 0 is the whole nest, level `len(loops)` one iteration. The model is
a cache that holds what a level touches, and nothing else, while the loops around it make it run again and again (Wolf and Lam, A
Data Locality Optimizing Algorithm, PLDI 1991). Every count is exact, borders included.

Reads outside the input touch nothing. A loop that only the output depends on copies results: nothing of `x` and `k` is read for
it. All is for one image.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from nnopt.errors import NestError
from nnopt.nests.footprint import count, places
from nnopt.nests.interpret import kernel_box
from nnopt.nests.nest import Nest, Operator

ARRAYS = ("x", "k", "y")
"""Input, kernel and output."""


@dataclasses.dataclass(frozen=True)
class ArrayReuse:
    """What the levels of a nest touch of one array. The tuples have a place for each level, from 0 to the number of loops.

    Attributes:
        footprints: distinct elements that a level touches; the most over all iterations of the loops around it, since borders
            touch less.
        traffic: elements moved into a cache that holds just what the level touches, if it is filled anew for each iteration of the
            loops around: the sum of all these iterations' footprints. An upper bound: what two neighbours have in common, as
            overlapping windows have, is moved for both.
        stationary: the same where what is held is kept while only loops move that the array's index does not depend on. It needs no
            larger cache, and is still an upper bound.
    """

    footprints: tuple[int, ...]
    traffic: tuple[int, ...]
    stationary: tuple[int, ...]

    @property
    def accesses(self) -> int:
        """Reads within the array's bounds; for the output, additions to its elements."""
        return self.traffic[-1]  # a cache of one element, filled for each iteration

    def reuse(self, level: int) -> float:
        """Accesses to an element each time that it is moved into a cache that holds a level: `accesses / stationary[level]`.

        1 for an array that is never read, as all reads are outside.

        Raises:
            NestError: there is no such level.
        """
        check_level(level, len(self.traffic) - 1)
        return self.accesses / self.stationary[level] if self.accesses else 1.0


@dataclasses.dataclass(frozen=True)
class NestReuse:
    """What the levels of a nest touch.

    Attributes:
        loops: their names, outermost first; level `l` is `loops[l:]`.
        macs: multiply-accumulates, those with padding counted.
        x: of the input.
        k: of the kernel.
        y: of the output.
    """

    loops: tuple[str, ...]
    macs: int
    x: ArrayReuse
    k: ArrayReuse
    y: ArrayReuse

    def footprint(self, level: int) -> int:
        """Elements of the three arrays that a cache holds for a level.

        Raises:
            NestError: there is no such level.
        """
        check_level(level, len(self.loops))
        return sum(getattr(self, a).footprints[level] for a in ARRAYS)


def check_level(level: int, loops: int) -> None:
    """Checks the number of a level.

    Raises:
        NestError: it is not from 0 to the number of loops.
    """
    if not 0 <= level <= loops:
        raise NestError(
            f"there is no level {level} of {loops} loops; they are 0, the whole nest, to {loops}, one iteration"
        )


def data_reuse(nest: Nest) -> NestReuse:
    """Footprints and traffic of all levels of a nest.

    Raises:
        NestError: digits of a loop overlap; no nest made by transformations has such.

    Example:
        >>> from nnopt.nests import convolution
        >>> found = data_reuse(convolution((8,), 4, 6, (3,)).nests[0])
        >>> found.loops
        ('co', 'ci', 'ow', 'kw')
        >>> found.k.footprints
        (72, 12, 3, 3, 1)
        >>> found.x.footprints  # at level 3 a window
        (32, 32, 8, 3, 1)
        >>> found.x.traffic  # 6 * 4 * (8 * 3 - 2) of 6 * 4 * 8 * 3 reads are within the border
        (32, 192, 192, 528, 528)
    """
    arrays = {a: ArrayReuse(*count(nest, a)) for a in ARRAYS}
    return NestReuse(tuple(loop.name for loop in nest.loops), nest.domain_size, **arrays)


def distinct(operator: Operator, array: str) -> int:
    """Number of elements of an array that the nests of an operator touch together, each counted once.

    Raises:
        NestError: there is no such array; or as for `data_reuse`.
    """
    if array not in ARRAYS:
        raise NestError(f"there is no array {array!r}; there are {', '.join(ARRAYS)}")
    counts = [count(nest, array).most[0] for nest in operator.nests]
    if len(counts) == 1 or array == "y":  # nests write disjoint parts
        return sum(counts)
    lows, shape = (0,) * len(operator.input), operator.input
    if array == "k":
        lows, shape = kernel_box(operator)
        if _apart(operator.nests):
            return sum(counts)
    if max(counts) == math.prod(shape):
        return max(counts)
    touched = np.zeros(math.prod(shape), bool)
    for nest in operator.nests:
        touched[places(nest, array, lows, shape)] = True
    return int(touched.sum())


def _apart(nests: Sequence[Nest]) -> bool:
    """Whether the weights of every two nests lie in boxes that do not meet."""
    boxes = [[d.at.bounds for d in nest.k] for nest in nests]
    return all(
        any(p[1] < q[0] or q[1] < p[0] for p, q in zip(a, b, strict=True))
        for a, b in itertools.combinations(boxes, 2)
    )
