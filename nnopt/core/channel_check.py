"""Whether a network with fewer channels is what the network was, without these channels.

Both compute the same operations one by one. The rules of `core.channel_rules` are run over the narrower network with the channels
that the wide one has at each place, so that nothing in it may tie, hold or move other channels; and the numbers written into it
must be the same. This finds code with a number of channels in it: `x * x.shape[-1] ** -0.5`, `jnp.roll(x, 4, -1)`.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from nnopt.core.channel_analysis import Analysis, Program, analyse, program_of
from nnopt.core.channel_rules import Axes, Labels, Ties, flatten_any, of_literal, run
from nnopt.core.flatten import Flat, FlatEquation, Value
from nnopt.core.sites import Sites
from nnopt.typing import Path

_FOLLOW_CHANNELS = ("feature_group_count",)
"""Parameters of primitives that may be others in a narrower network."""


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
            self._known[value] = Axes(shape, labels, weights=True)
        constants = self._wide.program.flat.constants, self._narrow.flat.constants
        for value in (*self._narrow.arguments, *(v for v, _ in constants[1])):
            self._known[value] = Axes.whole(value.aval.shape)
        for (_, a), (_, b) in itertools.zip_longest(*constants, fillvalue=(None, None)):
            if not _same_number(a, b):
                return Difference((), "uses other constants")
        for a, b in itertools.zip_longest(
            self._wide.program.flat.equations, self._narrow.flat.equations
        ):
            if a is None or b is None or a.primitive.name != b.primitive.name:
                return Difference((b or a).path, "computes something else")
            if (why := _numbers_differ(a, b) or self._ties_differ(a, b)) is not None:
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

    def _ties_differ(self, a: FlatEquation, b: FlatEquation) -> str | None:
        ties, name = self._ties, b.primitive.name
        before = [self._known[x] if isinstance(x, Value) else of_literal(x) for x in b.inputs]
        # With a single channel left a rule cannot tell it from an axis that is there to be repeated.
        single = any(
            n == 1 < m
            for p, q in zip((*a.inputs, *a.outputs), (*b.inputs, *b.outputs), strict=True)
            for m, n in zip(_shape(p), _shape(q), strict=True)
        )
        if name.startswith("reduce_") and not single:
            for old, new in zip(a.inputs, before, strict=True):
                if any(
                    v is None and _shape(old)[i] != new.shape[i] for i, v in enumerate(new.labels)
                ):
                    return f"runs {name} over as many values as there are channels"
        joins, kept = len(ties.joins), len(ties.kept_whole)
        after = None if single else run(ties, b, before)
        if any(self._two(v, w).any() for v, w in ties.joins[joins:]):
            return f"ties other channels to each other, in {name}"
        for held, note in ties.kept_whole[kept:]:
            if ((held > 0) & (held < self._wide.units)).any():
                return f"{name} {note.why}"
            ties.joins.append((np.zeros_like(held), held))
        for i, (x, y) in enumerate(zip(a.outputs, b.outputs, strict=True)):
            wide, shape = self._wide.known[x], _shape(y)
            labels = self._left(wide)
            if tuple(map(_extent, labels, shape)) != shape:
                return f"has a number of channels in its code, for {name}"
            found = after[i] if after is not None else Axes.free(shape)
            for v, w in zip(labels, found.labels, strict=True):
                if v is not None and w is not None and self._two(v, w).any():
                    return f"puts other channels in the place of these, in {name}"
            filled = tuple(w if v is None else v for v, w in zip(labels, found.labels, strict=True))
            self._known[y] = Axes(shape, filled, wide.weights)
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
    found = _literals_differ(a.inputs, b.inputs) or _params_differ(a.params, b.params)
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


def _params_differ(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    for name in a.keys() & b.keys() - set(_FOLLOW_CHANNELS):
        x, y = a[name], b[name]
        if isinstance(x, int | float) and not _same_number(x, y):
            return f"has {name}={y} in place of {x}"
        for p, q in zip(_programs(x), _programs(y), strict=False):
            for d, e in itertools.zip_longest(p.equations, q.equations):
                if d is None or e is None or d.primitive.name != e.primitive.name:
                    return "computes something else"
                if (inner := _numbers_differ(d, e)) is not None:
                    return inner
    return None


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
