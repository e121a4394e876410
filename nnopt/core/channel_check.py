"""Whether a network with fewer channels is what the network was, without these channels.

Both compute the same operations one by one. The rules of `core.channel_rules` are run over the narrower network with the channels
that the wide one has at each place, so that nothing in it may tie, hold or move other channels; and the numbers written into it
must be the same. This finds code with a number of channels in it: `x * x.shape[-1] ** -0.5`, `jnp.roll(x, 4, -1)`.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from nnopt.core.channel_analysis import Analysis, Program, analyse, program_of
from nnopt.core.channel_rules import Axes, Labels, Ties, flatten_any, of_literal, run
from nnopt.core.dataflow import CONVOLUTIONS
from nnopt.core.flatten import Flat, FlatEquation, Value
from nnopt.core.sites import Sites
from nnopt.typing import Path

_FOLLOW_CHANNELS = frozenset(
    (
        "feature_group_count", "groups", "input", "kernel", "shape", "new_sizes", "sizes", "limit_indices", "slice_sizes",
    )
)  # fmt: skip
"""Parameters of primitives that may be others in a narrower network: what is as long as its arrays are, which are compared too."""
_ONE_FOR_EACH_AXIS = frozenset(
    (
        "window_dimensions", "window_strides", "padding", "padding_config", "base_dilation", "window_dilation", "start_indices",
        "strides", "reps",
    )
)  # fmt: skip
"""Parameters with an entry for each axis of the operand, which may be another where that axis is narrower."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Why a narrower network is another function.

    Attributes:
        path: the site that computes something else.
        why: what it does.
    """

    path: Path
    why: str


def difference(
    before: Sites, after: Sites, kept: Mapping[tuple[Path, int], Sequence[int]]
) -> Difference | None:
    """Compares a network with a narrower one.

    Args:
        before: the network.
        after: the narrower one: the same modules with fewer channels, on the same example.
        kept: variable and axis -> the old indices that it still has, in order.

    Returns:
        The first place that computes something else; None if both are the same function as long as the weights of the channels that
        have gone are zero.
    """
    wide, narrow = analyse(before), program_of(after)
    going = np.zeros(wide.units, bool)
    values = dict(zip(wide.program.leaves, wide.program.variables, strict=True))
    for (leaf, axis), indices in kept.items():
        units = wide.unit[wide.known[values[leaf]].labels[axis]]
        lost = np.delete(units, np.asarray(indices, np.int64))
        if not lost.all():
            return Difference(leaf[1:-1], "loses channels that must stay")
        going[lost] = True
    return _Comparison(wide, narrow, going).first(values)


class _Comparison:
    """Runs the rules over the narrower program, equation by equation beside the wide one."""

    def __init__(self, wide: Analysis, narrow: Program, going: np.ndarray) -> None:
        self._wide, self._narrow, self._going = wide, narrow, going
        self._ties = Ties(wide.units)
        self._known: dict[Value, Axes] = {}

    def first(self, values: Mapping[Path, Value]) -> Difference | None:
        """The first difference."""
        for leaf, value in zip(self._narrow.leaves, self._narrow.variables, strict=True):
            shape, labels = self._narrow.leaves[leaf], self._left(self._wide.known[values[leaf]])
            if tuple(map(_extent, labels, shape)) != shape:
                return Difference(leaf[1:-1], "loses a part of what is one channel")
            self._known[value] = Axes(shape, labels, (True,) * len(shape))
        constants = self._wide.program.flat.constants, self._narrow.flat.constants
        for value in (*self._narrow.arguments, *(v for v, _ in constants[1])):
            self._known[value] = Axes.whole(value.aval.shape)
        for (_, a), (_, b) in itertools.zip_longest(*constants, fillvalue=(None, None)):
            if not _same_number(a, b):
                return Difference((), "uses other constants")
        equations = self._wide.program.flat.equations, self._narrow.flat.equations
        for number, (a, b) in enumerate(itertools.zip_longest(*equations)):
            if a is None or b is None or a.primitive.name != b.primitive.name:
                return Difference((b or a).path, "computes something else")
            if (why := _numbers_differ(a, b) or self._ties_differ(number, a, b)) is not None:
                return Difference(b.path, why)
        if self._mixed():
            return Difference((), "ties other channels to each other in a loop")
        return None

    def _left(self, axes: Axes) -> tuple[Labels, ...]:
        """Of labels of the wide network, the channels that are left."""
        found: list[Labels] = []
        for labels in axes.labels:
            units = None if labels is None else self._wide.unit[labels]
            found.append(None if units is None else units[~self._going[units]])
        return tuple(found)

    def _ties_differ(self, number: int, a: FlatEquation, b: FlatEquation) -> str | None:
        name = b.primitive.name
        before = [self._known[x] if isinstance(x, Value) else of_literal(x) for x in b.inputs]
        # With a single channel left a rule cannot tell it from an axis that is there to be repeated: what it ties is not looked at.
        single = any(
            n == 1 < m
            for p, q in zip((*a.inputs, *a.outputs), (*b.inputs, *b.outputs), strict=True)
            for m, n in zip(_shape(p), _shape(q), strict=True)
        )
        ties = Ties(self._wide.units) if single else self._ties
        joins, kept, counted = len(ties.joins), len(ties.kept_whole), len(ties.counted)
        after = run(ties, b, before)
        if ties.counted[counted:] != list(self._wide.counted[number]):
            return f"runs {name} over as many values as there are channels"
        if single:
            joins, kept = len(ties.joins), len(ties.kept_whole)
            after = [Axes.free(_shape(y)) for y in b.outputs]
        if any(self._two(v, w).any() for v, w in ties.joins[joins:]):
            return f"ties other channels to each other, in {name}"
        for held, note in ties.kept_whole[kept:]:
            if ((held > 0) & (held < self._wide.units)).any():
                return f"{name} {note.why}"
            ties.joins.append((np.zeros_like(held), held))
        for x, y, found in zip(a.outputs, b.outputs, after, strict=True):
            wide, shape = self._wide.known[x], _shape(y)
            labels = self._left(wide)
            if tuple(map(_extent, labels, shape)) != shape:
                return f"has a number of channels in its code, for {name}"
            for v, w in zip(labels, found.labels, strict=True):
                if v is not None and w is not None and self._two(v, w).any():
                    return f"puts other channels in the place of these, in {name}"
            filled = tuple(w if v is None else v for v, w in zip(labels, found.labels, strict=True))
            self._known[y] = Axes(shape, filled, wide.zero)
        return None

    def _two(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Where these are two channels of the wide network; labels of the rules' own are whatever they are joined with."""
        return (first != second) & (np.maximum(first, second) < self._wide.units)

    def _mixed(self) -> bool:
        """Whether labels of the rules' own, as those of a loop, have joined channels of the wide network."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        ties, units = self._ties, self._wide.units
        if ties.labels == units or not ties.joins:
            return False
        pairs = [np.concatenate([p[i] for p in ties.joins]) for i in (0, 1)]
        graph = coo_array((np.ones(len(pairs[0]), bool), tuple(pairs)), shape=(ties.labels,) * 2)
        found = connected_components(graph, directed=False)[1][:units]
        return len(np.unique(found)) < units


def _extent(labels: Labels, extent: int) -> int:
    return extent if labels is None else len(labels)


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _numbers_differ(a: FlatEquation, b: FlatEquation) -> str | None:
    """Numbers written into two equations, and into the programs that they hold."""
    found = _literals_differ(a.inputs, b.inputs) or _params_differ(
        a.params, b.params, _narrower(a, b)
    )
    return f"{found} in {b.primitive.name}" if found else None


def _literals_differ(a: Sequence[Any], b: Sequence[Any]) -> str | None:
    if len(a) != len(b):
        return "computes something else"
    for x, y in zip(a, b, strict=True):
        if isinstance(x, jex.Literal) != isinstance(y, jex.Literal):
            return "computes with other values"
        if isinstance(x, jex.Literal) and not _same_number(x.val, y.val):
            return f"computes with {y.val} in place of {x.val}"
    return None


def _narrower(a: FlatEquation, b: FlatEquation) -> set[int]:
    """Axes of the first operand, or of outputs with as many, that are narrower in `b`."""
    found: set[int] = set()
    if b.primitive.name in CONVOLUTIONS:
        return found  # their strides and padding are of space alone
    rank = len(_shape(a.inputs[0])) if a.inputs else 0
    for x, y in ((a.inputs[:1], b.inputs[:1]), (a.outputs, b.outputs)):
        for p, q in zip(x, y, strict=True):
            if len(_shape(p)) == len(_shape(q)) == rank:
                sides = zip(_shape(p), _shape(q), strict=True)
                found |= {axis for axis, (m, n) in enumerate(sides) if m != n}
    return found


def _params_differ(
    a: Mapping[str, Any], b: Mapping[str, Any], narrower: Collection[int]
) -> str | None:
    for name in sorted(a.keys() & b.keys() - _FOLLOW_CHANNELS):
        x, y = a[name], b[name]
        if dataclasses.is_dataclass(x) and dataclasses.is_dataclass(y):
            inner = _params_differ(vars(x), vars(y), ())  # as the shape of `nnopt.layers.Conv`
            if inner is not None:
                return inner
        many = _numbers(x), _numbers(y)
        if not _agree(*many, narrower if name in _ONE_FOR_EACH_AXIS else ()):
            return f"has {name}={many[1]} in place of {many[0]}"
        if isinstance(x, int | float) and not _same_number(x, y):
            return f"has {name}={y} in place of {x}"
        for p, q in zip(_programs(x), _programs(y), strict=False):
            for d, e in itertools.zip_longest(p.equations, q.equations):
                if d is None or e is None or d.primitive.name != e.primitive.name:
                    return "computes something else"
                if (inner := _numbers_differ(d, e)) is not None:
                    return inner
    return None


def _agree(a: tuple[Any, ...] | None, b: tuple[Any, ...] | None, narrower: Collection[int]) -> bool:
    """Whether numbers are equal, those of axes that are narrower aside."""
    if a is None or b is None or len(a) != len(b):
        return a == b
    return all(axis in narrower or m == n for axis, (m, n) in enumerate(zip(a, b, strict=True)))


def _numbers(value: Any) -> tuple[Any, ...] | None:
    """A parameter that says with several numbers, such as those of axes, what an equation does; None if it does not."""
    if not isinstance(value, tuple):
        return None
    found: list[Any] = []
    for item in value:
        plain = item.item() if isinstance(item, np.number) else item
        inner = _numbers(plain) if isinstance(plain, tuple) else plain
        if (inner is None and plain is not None) or not isinstance(
            inner, tuple | int | float | None
        ):
            return None
        found.append(inner)
    return tuple(found)


def _programs(value: Any) -> Iterator[Flat]:
    for item in value if isinstance(value, tuple | list) else (value,):
        if isinstance(item, jex.ClosedJaxpr | jex.Jaxpr):
            yield flatten_any(item)


def _same_number(a: Any, b: Any) -> bool:
    """Whether two constants are equal; those of unequal shapes are judged by what they are combined with."""
    if a is None or b is None:
        return a is b
    if np.shape(a) != np.shape(b):
        return True
    if jnp.issubdtype(a.dtype if hasattr(a, "dtype") else type(a), jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    first, second = np.asarray(a), np.asarray(b)
    floats = np.issubdtype(first.dtype, np.inexact)
    return bool(np.array_equal(first, second, equal_nan=bool(floats)))
