"""One form for all programs that compute the same operator: same shapes, same weights, same function of both.

Loops are taken apart into the digits that indices use, digits that every index weighs alike are put together again, nests that a
split took apart are joined, and what is left is sorted. Order and marks of loops do not matter, nor where in the first kernel a
weight lay: only which products share one.
"""

import dataclasses
import itertools
import math
from collections import Counter
from typing import NamedTuple

import numpy as np

from nnopt.errors import NestError
from nnopt.nests.index import Index, breaks
from nnopt.nests.nest import Dim, Nest, Operator

Vector = tuple[int, ...]


class Band(NamedTuple):
    """A loop of a canonical nest.

    Attributes:
        extent: number of iterations.
        y: how far one iteration moves in each dimension of the output.
        x: and of the input's view.
        weighs: whether the weights depend on it.
        digits: of extent and of movement in the first kernel, outermost first; what a weight was there is no part of the form.
    """

    extent: int
    y: Vector
    x: Vector
    weighs: bool
    digits: tuple[tuple[int, Vector], ...]

    @property
    def key(self) -> tuple[int, Vector, Vector, bool]:
        """What makes it what it is."""
        return self[:4]

    @property
    def writes(self) -> bool:
        """Whether different iterations write different elements."""
        return any(self.y)


class Form(NamedTuple):
    """A nest in canonical form.

    Attributes:
        bands: its loops: those of the reduction, then those of the output; long steps along the first axes first.
        y: where it begins in the output.
        x: where it begins in the input's view.
        view: axis and size of each dimension of the view.
        k: where it begins in the first kernel, copies included.
        shared: None, or steps and beginning in the kernel where other nests use the same weights.
    """

    bands: tuple[Band, ...]
    y: Vector
    x: Vector
    view: tuple[tuple[int, int], ...]
    k: Vector
    shared: tuple[Vector, ...] | None

    @property
    def key(self) -> tuple[object, ...]:
        """What makes it what it is."""
        return (self.y, self.x, self.view, tuple(b.key for b in self.bands), self.shared)


@dataclasses.dataclass(frozen=True)
class Canonical:
    """An operator in canonical form; equal for equal operators.

    Attributes:
        key: all that makes it what it is; hashable.
        forms: of its nests.
    """

    key: tuple[object, ...]
    forms: tuple[Form, ...] = dataclasses.field(compare=False)


def canonical(operator: Operator) -> Canonical:
    """The canonical form of an operator."""
    raws = _joined(sorted(_raw(nest) for nest in operator.nests))
    forms = sorted(_finished(raws), key=lambda f: f.key[:3])
    return Canonical((operator.input, operator.output, *(f.key for f in forms)), tuple(forms))


class _Raw(NamedTuple):
    """A nest with plain indices: where it begins in y, x and k together, and its loops' extents by their steps there."""

    start: Vector
    view: tuple[tuple[int, int], ...]
    steps: tuple[tuple[Vector, int], ...]
    ranks: tuple[int, int]  # number of dimensions of y, and of y and x


def _raw(nest: Nest) -> _Raw:
    x = _view(nest.x)
    dims = (*nest.y, *x, *nest.k)
    width = len(dims)
    per_loop: dict[str, list[tuple[int, int, int, int]]] = {loop.name: [] for loop in nest.loops}
    for place, dim in enumerate(dims):
        for name, coefficient, divisor, count in dim.at.terms:
            per_loop[name].append((place, coefficient, divisor, count))
    steps: list[tuple[Vector, int]] = []
    for loop in nest.loops:
        terms = per_loop[loop.name]
        if all(d == 1 and n == loop.extent for _, _, d, n in terms):
            vector = [0] * width
            for place, coefficient, _, _ in terms:
                vector[place] += coefficient
            steps.append((tuple(vector), loop.extent))
            continue
        points = breaks(loop.extent, [t for d in dims for t in d.at.of(loop.name)])
        for low, high in itertools.pairwise(points):
            vector = [0] * width
            for place, coefficient, divisor, count in terms:
                if divisor <= low < divisor * count:
                    vector[place] += coefficient * (low // divisor)
            steps.append((tuple(vector), high // low))
    start = tuple(d.at.constant for d in dims)
    view = tuple((d.axis, d.size) for d in x)
    return _Raw(
        start, view, tuple(sorted(_put_together(steps))), (len(nest.y), len(nest.y) + len(x))
    )


def _view(dims: tuple[Dim, ...]) -> list[Dim]:
    """Dimensions of a view in the fewest digits: two of an axis are one where the inner is never left."""
    found: list[Dim] = []
    for dim in dims:
        if found and found[-1].axis == dim.axis:
            outer = found[-1]
            low, high = dim.at.bounds
            if outer.size == 1 and outer.at == Index():
                found[-1] = dim
                continue
            if low >= 0 and high < dim.size:
                scaled = Index(
                    outer.at.constant * dim.size,
                    tuple(t._replace(coefficient=t.coefficient * dim.size) for t in outer.at.terms),
                )
                found[-1] = Dim(
                    dim.axis,
                    outer.size * dim.size,
                    scaled.plus(*dim.at.terms).shifted(dim.at.constant),
                )
                continue
        found.append(dim)
    return found


def _put_together(steps: list[tuple[Vector, int]]) -> list[tuple[Vector, int]]:
    """Loops of which one goes on where the other ends, made one."""
    found = [(v, n) for v, n in steps if n > 1]
    again = True
    while again:
        again = False
        places = {v: i for i, (v, _) in enumerate(found)}
        for i, (inner, n) in enumerate(found):
            j = places.get(tuple(n * c for c in inner))
            if j is not None and j != i:
                found[i] = (inner, n * found[j][1])
                del found[j]
                again = True
                break
    return found


def _joined(raws: list[_Raw]) -> list[_Raw]:
    """Nests that are ranges of one loop, made one."""
    i = 0
    while i < len(raws):
        for j in range(i + 1, len(raws)):
            if (one := _one_of(raws[i], raws[j])) is not None:
                rest = [r for k, r in enumerate(raws) if k not in (i, j)]
                raws = sorted((*rest, one))
                i = -1
                break
        i += 1
    return raws


def _one_of(a: _Raw, b: _Raw) -> _Raw | None:
    if a.view != b.view or a.ranks != b.ranks or abs(len(a.steps) - len(b.steps)) > 1:
        return None
    here, there = Counter(a.steps), Counter(b.steps)
    only_a, only_b = list((here - there).elements()), list((there - here).elements())
    if len(only_a) > 1 or len(only_b) > 1:
        return None
    apart = tuple(q - p for p, q in zip(a.start, b.start, strict=True))
    step, first = only_a[0] if only_a else (None, 1)
    other, second = only_b[0] if only_b else (None, 1)
    if step is None and other is None:
        # One iteration each: two elements on a diagonal of the output are no range of a loop.
        if sum(map(bool, apart[: a.ranks[0]])) != 1:
            return None
        step = apart
    step = step or other
    if step is None or (other or step) != step or tuple(first * c for c in step) != apart:
        return None
    steps = [*(here & there).elements(), (step, first + second)]
    return a._replace(steps=tuple(sorted(_put_together(steps))))


def _finished(raws: list[_Raw]) -> list[Form]:
    spans = [_spans(raw) for raw in raws]
    forms = []
    for i, raw in enumerate(raws):
        meets = any(_meet(raw, other, spans[i], spans[j]) for j, other in enumerate(raws) if j != i)
        shared = None
        outputs, inputs = raw.ranks
        bands = [
            Band(n, v[:outputs], v[outputs:inputs], any(v[inputs:]), ((n, v[inputs:]),))
            for v, n in raw.steps
        ]
        ordered = _ordered(bands if meets else _merged(bands))
        if meets:
            shared = (raw.start[inputs:], *(b.digits[0][1] for b in ordered))
        forms.append(
            Form(
                ordered,
                raw.start[:outputs],
                raw.start[outputs:inputs],
                raw.view,
                raw.start[inputs:],
                shared,
            )
        )
    return forms


def _spans(raw: _Raw) -> list[tuple[int, int]]:
    """The range of places in each dimension of the kernel."""
    inputs = raw.ranks[1]
    return [
        (at, at + sum(v[inputs + d] * (n - 1) for v, n in raw.steps))
        for d, at in enumerate(raw.start[inputs:])
    ]


def _meet(a: _Raw, b: _Raw, spans_a: list[tuple[int, int]], spans_b: list[tuple[int, int]]) -> bool:
    """Whether two nests use the same weights: in no dimension of the kernel do they keep apart."""
    if any(
        low > top or bottom > high
        for (low, high), (bottom, top) in zip(spans_a, spans_b, strict=True)
    ):
        return False
    return all(_values(a, d) & _values(b, d) for d in range(len(spans_a)))


def _values(raw: _Raw, dim: int) -> set[int]:
    """All places in a dimension of the kernel."""
    at = raw.ranks[1] + dim
    found = {raw.start[at]}
    for vector, extent in raw.steps:
        if vector[at]:
            found = {p + vector[at] * i for p in found for i in range(extent)}
    return found


def _merged(bands: list[Band]) -> list[Band]:
    """As `_put_together`, where no other nest cares in which order weights lie."""
    again = True
    while again:
        again = False
        places = {(b.y, b.x, b.weighs): i for i, b in enumerate(bands)}
        for i, b in enumerate(bands):
            j = places.get(
                (tuple(b.extent * c for c in b.y), tuple(b.extent * c for c in b.x), b.weighs)
            )
            if j is not None and j != i:
                outer = bands[j]
                bands[i] = b._replace(
                    extent=b.extent * outer.extent, digits=(*outer.digits, *b.digits)
                )
                del bands[j]
                again = True
                break
    return bands


def _ordered(bands: list[Band]) -> tuple[Band, ...]:
    return tuple(
        sorted(bands, key=lambda b: (b.writes, tuple(-c for c in (*b.y, *b.x)), b.extent, b.weighs))
    )


def weights(canon: Canonical) -> int:
    """Number of weights of an operator."""
    alone = sum(
        math.prod(b.extent for b in f.bands if b.weighs) for f in canon.forms if f.shared is None
    )
    together = [places(f).reshape(-1, len(f.k)) for f in canon.forms if f.shared is not None]
    return alone + (len(np.unique(numbered(np.concatenate(together)))) if together else 0)


def places(form: Form) -> np.ndarray:
    """Where in the first kernel the weights of a nest lie: `[*loops that they depend on, dimensions]`."""
    found = np.array(form.k)
    for band in form.bands:
        if band.weighs:
            steps = np.zeros((1, len(form.k)), np.int64)
            for extent, step in band.digits:
                steps = (steps[:, None] + np.arange(extent)[:, None] * np.array(step)).reshape(
                    -1, len(form.k)
                )
            found = found[..., None, :] + steps
    return found


def numbered(rows: np.ndarray) -> np.ndarray:
    """A number for each row, `[rows, dimensions] -> [rows]`, in the order of the rows' values; sorting numbers is quick."""
    low = rows.min(0)
    number: np.ndarray = np.ravel_multi_index(tuple((rows - low).T), tuple(rows.max(0) - low + 1))
    return number


def check_disjoint(operator: Operator) -> None:
    """Checks that every element of the output is written by one nest, once.

    Raises:
        NestError: one is not.
    """
    count = np.zeros(operator.output, np.int64)
    for form in canonical(operator).forms:
        axes = []
        for d, at in enumerate(form.y):
            places = np.full((1,), at)
            for band in form.bands:
                if band.y[d]:
                    places = np.add.outer(places, band.y[d] * np.arange(band.extent)).ravel()
            axes.append(places)
        np.add.at(count, np.ix_(*axes), 1)
    if (count != 1).any():
        place = tuple(int(i) for i in np.argwhere(count != 1)[0])
        raise NestError(f"element {place} of the output is written {count[place]} times")
