"""A function run in small compiled pieces that it shares with other functions, where compiling it as a whole would not pay.

A score of one network is a program that runs once. Compiled whole, it takes seconds to a minute to compile and a fraction of a
second to run. Its pieces are mostly those of the network scored before: convolutions of known
shapes, and what lies between two of them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from nnopt.core.flatten import Flat, FlatEquation, Value, flatten, run_equations
from nnopt.scores.programs import Program, ProgramCache, equations_key

_ALONE = frozenset(
    (
        "conv_general_dilated", "nnopt_conv", "nnopt_conv_input_gradient", "nnopt_conv_weight_gradient", "dot_general",
        "scan", "while", "cond", "reduce_window_sum", "reduce_window_max", "select_and_scatter_add", "eigh", "eig", "svd",
        "lu", "qr", "cholesky", "triangular_solve", "random_bits",
    )
)  # fmt: skip
"""Primitives that are a piece of their own: costly ones, which XLA fuses with nothing."""


class InPieces:
    """A function that is traced once for each shape of its arguments and then run in pieces.

    Example:
        >>> import jax.numpy as jnp
        >>> cache = ProgramCache()
        >>> f = InPieces(lambda a, b: jnp.sin(a @ b) @ b, cache)
        >>> f(jnp.ones((2, 2)), jnp.eye(2)).shape
        (2, 2)
        >>> cache.statistics.programs  # the product, the sine
        2
    """

    def __init__(self, function: Callable[..., Any], cache: ProgramCache) -> None:
        self._function = function
        self._cache = cache
        self._traced: dict[Any, tuple[_Pieces, Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        """The function's value; arguments are pytrees of arrays."""
        leaves, structure = jax.tree.flatten(arguments)
        specs = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = structure, specs
        if key not in self._traced:
            trees: list[Any] = []

            def run(leaves: Sequence[Any]) -> list[Any]:
                out, tree = jax.tree.flatten(self._function(*jax.tree.unflatten(structure, leaves)))
                trees.append(tree)
                return out

            shapes = [jax.ShapeDtypeStruct(*spec) for spec in specs]
            flat = flatten(jax.make_jaxpr(run)(shapes))
            self._traced[key] = _Pieces(flat.keeping(flat.outputs), self._cache), trees[-1]
        pieces, tree = self._traced[key]
        return jax.tree.unflatten(tree, pieces.run(leaves))


class _Pieces:
    """A flat program cut by level, the number of costly equations on the longest way to a value; see `scores.steps`."""

    def __init__(self, flat: Flat, cache: ProgramCache) -> None:
        self._flat = flat
        self._constants = dict(flat.constants)
        read_by: dict[Value, set[int]] = {}
        asked = {v for v in flat.outputs if isinstance(v, Value)}
        steps = [_Step(equations) for equations in _cut(flat)]
        for number, step in enumerate(steps):
            for value in step.inputs:
                read_by.setdefault(value, set()).add(number)
        self._steps: list[
            tuple[Program, tuple[Value, ...], tuple[Value, ...], tuple[Value, ...]]
        ] = []
        for number, step in enumerate(steps):
            outputs = tuple(v for v in step.made if v in asked or v in read_by)
            last = (v for v in step.inputs if max(read_by[v]) == number and v not in asked)
            program = cache.get(
                ("piece", equations_key(step.equations, step.inputs, outputs)),
                functools.partial(_compute, step.equations, step.inputs, outputs),
                [v.aval for v in step.inputs],
            )
            self._steps.append((program, step.inputs, outputs, tuple(last)))

    def run(self, leaves: Sequence[Any]) -> list[Any]:
        known: dict[Value, Any] = {**self._constants}
        known.update(zip(self._flat.inputs, leaves, strict=True))
        for program, inputs, outputs, last in self._steps:
            found = program.run(*[known[v] for v in inputs])
            known.update(zip(outputs, found, strict=True))
            for value in last:
                del known[value]
        return [
            np.asarray(a.val) if isinstance(a, jex.Literal) else known[a]
            for a in self._flat.outputs
        ]


class _Step:
    """Equations that make one program, in order, with the values they read from others and those they make."""

    def __init__(self, equations: Sequence[FlatEquation]) -> None:
        self.equations = tuple(equations)
        self.made = tuple(v for e in equations for v in e.outputs)
        own = set(self.made)
        read = (a for e in equations for a in e.inputs if isinstance(a, Value))
        self.inputs = tuple(dict.fromkeys(a for a in read if a not in own))


def _compute(
    equations: Sequence[FlatEquation],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    *arrays: jax.Array,
) -> tuple[jax.Array, ...]:
    env = dict(zip(inputs, arrays, strict=True))
    run_equations(equations, env)
    return tuple(env[v] for v in outputs)


def _cut(flat: Flat) -> list[list[FlatEquation]]:
    """Costly equations alone, others in groups of one level that share values, in an order that respects dependence."""
    level: dict[Value, int] = {}
    leader: dict[Value, Value] = {}

    def root(value: Value) -> Value:
        while leader[value] is not value:
            leader[value] = leader[leader[value]]
            value = leader[value]
        return value

    alone: list[tuple[int, int, list[FlatEquation]]] = []
    grouped: list[tuple[int, FlatEquation]] = []
    for equation in flat.equations:
        values = [a for a in equation.inputs if isinstance(a, Value)]
        here = max((level.get(v, 0) for v in values), default=0)
        if equation.primitive.name in _ALONE:
            alone.append((here, 1, [equation]))
            level.update(dict.fromkeys(equation.outputs, here + 1))
            continue
        grouped.append((here, equation))
        first = equation.outputs[0]
        for value in equation.outputs:
            leader[value], level[value] = first, here
        for value in values:
            if value in leader and level[value] == here:
                leader[root(value)] = root(first)
    groups: dict[tuple[int, Value], list[FlatEquation]] = {}
    for here, equation in grouped:
        groups.setdefault((here, root(equation.outputs[0])), []).append(equation)
    ordered = [(here, 0, equations) for (here, _), equations in groups.items()] + alone
    return [equations for *_, equations in sorted(ordered, key=lambda item: item[:2])]
