"""Where a flat program is cut into small ones.

Each convolution is a program of its own, lowered as `nnopt.layers.lowering` chooses. What lies between convolutions
(normalisation, activation, addition, pooling, concatenation) is cut by *level*, the number of convolutions on the longest way to a
value: equations of one level that share values are one program. Cutting by level keeps the order of dependence,
and gives every batch norm + ReLU of one shape the same program wherever it stands. On a CPU this grain is also the fastest to
run: XLA repeats a convolution written as shifted slices in each consumer that it is fused with.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from nnopt.core.dataflow import CONVOLUTIONS
from nnopt.core.flatten import Flat, FlatEquation, Value
from nnopt.errors import UnsupportedNetworkError
from nnopt.layers.batch_norm import STATISTICS
from nnopt.layers.lowering import ConvShape


def _hole_outputs(*inputs: Any, index: int, outputs: tuple[Any, ...]) -> list[Any]:
    return [jax.core.ShapedArray(shape, dtype) for shape, dtype in outputs]


hole_p = jex.Primitive("nnopt_hole")
hole_p.multiple_results = True
hole_p.def_abstract_eval(_hole_outputs)


@dataclasses.dataclass(eq=False)
class Step:
    """A piece of the program: `inputs` that depend on the chain's inputs, `weights` that do not, `kept` small results."""

    inputs: tuple[Value, ...]
    weights: tuple[Value, ...]
    outputs: tuple[Value, ...]
    kept: tuple[Value, ...] = ()
    equations: tuple[FlatEquation, ...] = ()
    conv: ConvShape | None = None
    hole: int | None = None

    @property
    def is_addition(self) -> bool:
        """Whether it adds two different values of one shape: both get the cotangent as it is."""
        if len(self.equations) != 1 or len(self.inputs) != 2:
            return False
        (equation,) = self.equations
        same = len({v.aval.shape for v in (*self.inputs, *self.outputs)}) == 1
        return same and equation.primitive.name in ("add", "add_any")


class Steps:
    """The pieces of a flat program.

    Attributes:
        dependent: values that depend on the inputs.
        makers: what makes each value that is no input.
        steps: the pieces, in an order that respects dependence.
    """

    def __init__(self, flat: Flat, inputs: Sequence[Value], boundary: Sequence[Value]) -> None:
        """Cuts.

        Args:
            flat: the program.
            inputs: of its inputs, those that are no weights.
            boundary: values that must leave the piece that makes them, because somebody looks at them.

        Raises:
            UnsupportedNetworkError: a hole takes an array that does not depend on the inputs.
        """
        self._flat = flat
        self._inputs = tuple(inputs)
        self._boundary = set(boundary)
        self.dependent = _dependent(flat, inputs)
        self.makers = {v: e for e in flat.equations for v in e.outputs}
        self._readers: dict[Value, list[FlatEquation]] = {}
        for equation in flat.equations:
            for atom in equation.inputs:
                if isinstance(atom, Value):
                    self._readers.setdefault(atom, []).append(equation)
        self._asked = {v for v in flat.outputs if isinstance(v, Value)} | self._boundary
        self._kept = frozenset(flat.named.get(STATISTICS, ()))
        self.steps = self._cut()

    def _cut(self) -> list[Step]:
        boundary = self._boundary
        level = dict.fromkeys(self._inputs, 0)
        groups: dict[tuple[int, Value], list[FlatEquation]] = {}
        alone: list[tuple[int, int, FlatEquation]] = []
        component: dict[Value, Value] = {}

        def root(value: Value) -> Value:
            while component[value] is not value:
                component[value] = component[component[value]]
                value = component[value]
            return value

        clustered: list[tuple[int, FlatEquation]] = []
        for position, equation in enumerate(self._flat.equations):
            values = [a for a in equation.inputs if isinstance(a, Value) and a in self.dependent]
            if not values:
                continue
            here = max(level[v] for v in values)
            if equation.primitive is hole_p or self._conv_shape(equation) is not None:
                alone.append((here, position, equation))
                level.update(dict.fromkeys(equation.outputs, here + 1))
                continue
            clustered.append((here, equation))
            first = equation.outputs[0]
            for value in equation.outputs:
                component[value] = first
                level[value] = here + 1 if value in boundary else here
            for value in values:
                if value in component and level[value] == here:
                    component[root(value)] = root(first)
        for here, equation in clustered:
            groups.setdefault((here, root(equation.outputs[0])), []).append(equation)
        # Python sorts stably: clusters of a level before its convolutions, each in the order of the program.
        ordered = [(here, 0, self._cluster(found)) for (here, _), found in groups.items()]
        ordered += [(here, 1, self._single(equation)) for here, _, equation in alone]
        return [step for *_, step in sorted(ordered, key=lambda item: item[:2])]

    def _conv_shape(self, equation: FlatEquation) -> ConvShape | None:
        if equation.primitive.name not in CONVOLUTIONS:
            return None
        kernel = equation.inputs[1]
        if kernel in self.dependent or isinstance(kernel, jex.Literal):
            return None
        return ConvShape.of_equation(equation)

    def _single(self, equation: FlatEquation) -> Step:
        read = [a for a in equation.inputs if isinstance(a, Value)]
        if equation.primitive is hole_p:
            index = equation.params["index"]
            inputs = tuple(v for v in read if v in self.dependent)
            if len(inputs) != len(equation.inputs):
                raise UnsupportedNetworkError(
                    "a unit takes an array that does not depend on the input"
                )
            return Step(inputs, (), equation.outputs, hole=index)
        x, kernel = read
        return Step((x,), (kernel,), equation.outputs, conv=self._conv_shape(equation))

    def _cluster(self, equations: list[FlatEquation]) -> Step:
        own = {v for e in equations for v in e.outputs}
        needed_weights: dict[Value, None] = {}
        before: dict[FlatEquation, None] = {}
        inputs: dict[Value, None] = {}

        def sink(value: Value) -> None:
            """Takes in the equations that make a value from weights."""
            maker = self.makers.get(value)
            if maker is None:
                needed_weights[value] = None
                return
            if maker not in before:
                for atom in maker.inputs:
                    if isinstance(atom, Value):
                        sink(atom)
                before[maker] = None

        for equation in equations:
            for atom in equation.inputs:
                if isinstance(atom, jex.Literal) or atom in own:
                    continue
                if atom in self.dependent:
                    inputs[atom] = None
                else:
                    sink(atom)
        here = set(equations)

        def leaves(value: Value) -> bool:
            return value in self._asked or any(e not in here for e in self._readers.get(value, ()))

        ordered = [v for e in equations for v in e.outputs]
        kept = tuple(v for v in ordered if v in self._kept)
        return Step(
            tuple(inputs),
            tuple(needed_weights),
            tuple(v for v in ordered if leaves(v) and v not in self._kept),
            kept,
            (*before, *equations),
        )


def _dependent(flat: Flat, inputs: Iterable[Value]) -> set[Value]:
    found = set(inputs)
    for equation in flat.equations:
        if any(a in found for a in equation.inputs if isinstance(a, Value)):
            found.update(equation.outputs)
    return found
