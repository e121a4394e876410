"""Scores without compiling a network: it runs as a row of small programs, which equal pieces of all networks share.

A `Scorer` compiles one program for each network: a minute of a core for ninety convolutions and twenty scores. The networks of a
benchmark, however, are the same handful of operations in another order. Here a network is cut into pieces, runs of neighbouring
equations of one operation, each compiled once for each shape and kept. JAX differentiates through them piece by piece, and keeps
the programs of derivatives likewise. After the first networks next to nothing is compiled any more. The scores are those of
`Scorer` up to rounding.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.extend import core as jex

from nnopt.core.flatten import FlatEquation, Value
from nnopt.scores import Score, Scorer
from nnopt.scores.network import Edit, TracedNetwork
from nnopt.scores.programs import equations_key
from nnopt.typing import Path, Variables


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """Neighbouring equations as one program.

    Attributes:
        inputs: values that it reads and does not make.
        outputs: values that it makes and others read.
        run: `(*arrays) -> list of arrays`, compiled on first use.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    run: Callable[..., Sequence[Any]]


_programs: dict[Hashable, Callable[..., Sequence[Any]]] = {}


def program(
    equations: Sequence[FlatEquation], inputs: Sequence[Value], outputs: Sequence[Value]
) -> Callable[..., Sequence[Any]]:
    """The compiled program of some equations; one object for all equal ones, by which JAX finds its derivatives again."""
    key = equations_key(equations, inputs, outputs)
    if key not in _programs:

        def run(*arrays: Any) -> list[Any]:
            known = dict(zip(inputs, arrays, strict=True))
            for equation in equations:
                read = [a.val if isinstance(a, jex.Literal) else known[a] for a in equation.inputs]
                known.update(zip(equation.outputs, equation.run(read), strict=True))
            return [known[value] for value in outputs]

        _programs[key] = jax.jit(run)
    return _programs[key]


def cut(
    equations: Iterable[FlatEquation], depth: int, ends: Collection[Value], kept: Collection[Value]
) -> list[Piece]:
    """Cuts equations into pieces.

    Args:
        equations: in order of execution.
        depth: neighbouring equations belong together if the first `depth` names of their sites agree.
        ends: a piece ends with the equation that makes one of these.
        kept: values that are read from outside.
    """
    groups: list[list[FlatEquation]] = []
    site: Path | None = None
    for equation in equations:
        if site is None or equation.path[:depth] != site:
            groups.append([])
        groups[-1].append(equation)
        site = equation.path[:depth]
        if any(value in ends for value in equation.outputs):
            site = None
    # Backwards, so that what later pieces read is known.
    needed = set(kept)
    pieces = []
    for group in reversed(groups):
        made = {value for equation in group for value in equation.outputs}
        outputs = tuple(v for e in group for v in e.outputs if v in needed)
        if not outputs:
            continue
        useful = _needed(group, outputs)
        read = dict.fromkeys(
            a for e in useful for a in e.inputs if isinstance(a, Value) and a not in made
        )
        needed.update(read)
        pieces.append(Piece(tuple(read), outputs, program(useful, tuple(read), outputs)))
    return pieces[::-1]


def _needed(equations: Sequence[FlatEquation], outputs: Iterable[Value]) -> list[FlatEquation]:
    """Those that some values need."""
    needed = set(outputs)
    kept = []
    for equation in reversed(equations):
        if needed.intersection(equation.outputs):
            kept.append(equation)
            needed.update(a for a in equation.inputs if isinstance(a, Value))
    return kept[::-1]


class PiecewiseNetwork(TracedNetwork):
    """A traced network that runs piece by piece."""

    depth = 2

    def run(
        self,
        variables: Variables,
        images: jax.Array,
        key: jax.Array,
        edits: Mapping[Value, Edit],
        observed: Collection[Value] = (),
    ) -> tuple[Any, dict[Value, jax.Array]]:
        """See `TracedNetwork`."""
        known: dict[Value, Any] = dict(self.flat.constants)
        seen = {}

        def learn(value: Value, array: Any) -> None:
            if value in observed:
                seen[value] = array
            known[value] = edits[value](array, known) if value in edits else array

        leaves = jax.tree.leaves((variables, images, key))
        for value, array in zip(self.flat.inputs, leaves, strict=True):
            learn(value, array)
        for piece in self._pieces(frozenset(edits), frozenset(observed)):
            arrays = piece.run(*(known[value] for value in piece.inputs))
            for value, array in zip(piece.outputs, arrays, strict=True):
                learn(value, array)
        count = jax.tree.structure(self.outputs).num_leaves
        outputs = [
            a.val if isinstance(a, jex.Literal) else known[a] for a in self.flat.outputs[:count]
        ]
        return jax.tree.unflatten(jax.tree.structure(self.outputs), outputs), seen

    def _pieces(self, edited: frozenset[Value], observed: frozenset[Value]) -> list[Piece]:
        cache = self.__dict__.setdefault("_cut", {})
        if (edited, observed) not in cache:
            count = jax.tree.structure(self.outputs).num_leaves
            outputs = [a for a in self.flat.outputs[:count] if isinstance(a, Value)]
            # An edit may look at the branch of the residual addition that it replaces.
            branches = [v for total, v in self.residuals.items() if total in edited]
            kept = {*outputs, *observed, *edited, *branches}
            cache[edited, observed] = cut(self.flat.equations, self.depth, edited, kept)
        return cache[edited, observed]


class PiecewiseScorer(Scorer):
    """A `Scorer` that compiles pieces instead of the network."""

    def __init__(self, net: nn.Module, example: Any, scores: Iterable[Score]) -> None:
        """See `Scorer`."""
        super().__init__(net, example, scores)
        self._program = self._reduce_all  # type: ignore[assignment]
        self._repeated = {p: functools.partial(self._run_once, p) for p in self._repeated}  # type: ignore[misc]

    def _trace(self, batch: int, like: tuple[Any, Any]) -> TracedNetwork:
        network = super()._trace(batch, like)
        network.__class__ = PiecewiseNetwork
        return network
