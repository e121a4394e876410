"""What the rules of `core.channel_rules` work on: labels of axes, and what ties them.

Every index of every axis of every array has a label, an integer. Indices with equal labels stay or go together; a rule says which
labels an output has, and joins those that must be one. Label 0 is what always stays. An axis without labels (`None`) was
made by broadcasting: it is as long as the network wants it to be.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend import core as jex

from nnopt.core.dataflow import CONVOLUTIONS
from nnopt.core.flatten import Flat, FlatEquation, Value, flatten
from nnopt.core.paths import path_text
from nnopt.typing import Path

Labels = np.ndarray | None
"""`[extent]` integers, or None for an axis that was made by broadcasting."""


@dataclasses.dataclass(frozen=True, eq=False)
class Axes:
    """What is known of an array.

    Attributes:
        shape: its shape.
        labels: for each axis.
        zero: for each axis, whether the array is zero at an index as soon as the variables of its channel are; None unless it is
            made of the network's variables and of numbers alone.
    """

    shape: tuple[int, ...]
    labels: tuple[Labels, ...]
    zero: tuple[bool, ...] | None = None

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Axes":
        """An array no index of which can go."""
        return cls(tuple(shape), tuple(np.zeros(n, np.int64) for n in shape))

    @classmethod
    def free(cls, shape: Sequence[int]) -> "Axes":
        """An array as long as the network wants it."""
        return cls(tuple(shape), (None,) * len(shape))

    @property
    def weights(self) -> bool:
        """Whether it is made of the network's variables and of numbers alone."""
        return self.zero is not None

    def vanishes(self, axis: int) -> bool:
        """Whether the array is zero along an axis where variables are; never so where it was repeated along it."""
        return self.zero is not None and self.zero[axis] and self.labels[axis] is not None

    def fixed(self, axis: int) -> np.ndarray:
        """Labels of an axis, zeros if it has none."""
        found = self.labels[axis]
        return np.zeros(self.shape[axis], np.int64) if found is None else found

    def moves(self, axis: int) -> bool:
        """Whether an index of an axis may go."""
        found = self.labels[axis]
        return found is not None and bool(found.any())


@dataclasses.dataclass(frozen=True)
class Note:
    """An operation to report.

    Attributes:
        primitive: its name.
        path: the site that it belongs to.
        why: what it does to the axes.
    """

    primitive: str
    path: Path
    why: str

    def __str__(self) -> str:
        return f"{self.primitive} in {path_text(self.path)!r} {self.why}"


class Ties:
    """What the rules find.

    Attributes:
        labels: how many there are.
        joins: pairs of arrays of labels that are one.
        made: labels of axes along which weights make channels.
        inexact: labels, and why the others change when one of them goes.
        kept_whole: labels that an operation keeps, and why; they are one with 0 as if they were in `joins`.
        split: labels, and what splits them so that they can only go many at a time.
        drawn: where random numbers are drawn.
        counted: extents, in order, of axes without labels that are summed over or otherwise run over: a number of channels that a
            network takes of an array of ones becomes a value there.
        read_inside: labels of what weights read in a program inside of an equation (a loop, a conditional), and where.
    """

    def __init__(self, labels: int = 1) -> None:
        self.labels = labels
        self.made: list[np.ndarray] = []
        self.joins: list[tuple[np.ndarray, np.ndarray]] = []
        self.inexact: list[tuple[np.ndarray, Note]] = []
        self.kept_whole: list[tuple[np.ndarray, Note]] = []
        self.split: list[tuple[np.ndarray, Note]] = []
        self.drawn: list[Note] = []
        self.counted: list[int] = []
        self.read_inside: list[tuple[np.ndarray, Note]] = []

    def fresh(self, count: int) -> np.ndarray:
        """Labels that nothing else has."""
        made = np.arange(self.labels, self.labels + count)
        self.labels += count
        return made

    def join(self, first: Labels, second: Labels, note: Note | None = None) -> Labels:
        """Makes two axes one; the labels of the result.

        Args:
            first: labels `[extent]`.
            second: likewise.
            note: reported where an index of one of the axes must stay, so that that of the other must too.
        """
        if first is None or second is None:
            return second if first is None else first
        if first is not second:
            stays = (first == 0) != (second == 0)
            if note is not None and stays.any():
                self.kept_whole.append((np.maximum(first, second)[stays], note))
                differ = (first != second) & ~stays
            else:
                differ = first != second
            if differ.any():
                self.joins.append((first[differ], second[differ]))
        return first

    def join_all(self, arrays: Sequence[Axes], note: Note | None = None) -> tuple[Labels, ...]:
        """Joins arrays of one shape axis by axis; see `join`."""
        joined = arrays[0].labels
        for other in arrays[1:]:
            joined = tuple(self.join(a, b, note) for a, b in zip(joined, other.labels, strict=True))
        return joined

    def couple(self, grid: np.ndarray) -> np.ndarray:
        """Makes the rows of `[rows, columns]` one; labels `[columns]`."""
        first: np.ndarray = grid[0]
        for row in grid[1:]:
            self.join(first, row)
        return first

    def keep(self, array: Axes, axis: int, note: Note | None = None) -> None:
        """No index of an axis may go."""
        found = array.labels[axis]
        if found is None or not found.any():
            return
        if note is not None:
            self.kept_whole.append((found, note))
        else:
            self.join(np.zeros_like(found), found)

    def count(self, *axes: tuple[Axes, int]) -> None:
        """An equation runs over an axis that each of these arrays has, each with the number that it has there."""
        array, axis = axes[-1]
        if array.shape[axis] > 1 and all(a.labels[i] is None for a, i in axes):
            self.counted.append(array.shape[axis])

    def mark(self, array: Axes, axis: int, note: Note) -> None:
        """An index that goes changes the values of those that stay."""
        found = array.labels[axis]
        if found is not None and found.any():
            self.inexact.append((found, note))


Rule = Callable[[Ties, FlatEquation, Sequence[Axes]], Sequence[Axes]]
RULES: dict[str, Rule] = {}
"""Primitive -> its rule. Those of other packages may be added."""


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Registers the rule of some primitives."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, function))
        return function

    return register


def note_on(equation: FlatEquation, why: str) -> Note:
    """What an equation does to channels."""
    return Note(equation.primitive.name, equation.path, why)


def shapes_of(equation: FlatEquation) -> list[tuple[int, ...]]:
    """Shapes of its outputs."""
    return [tuple(v.aval.shape) for v in equation.outputs]


def unmoved(extent: int) -> np.ndarray:
    """Labels of an axis that always stays."""
    return np.zeros(extent, np.int64)


def unknown(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    """A primitive without a rule: what it reads stays whole, and it is reported."""
    note = note_on(equation, "has no rule, so the axes it reads stay as they are")
    for array in inputs:
        for axis in range(len(array.shape)):
            ties.keep(array, axis, note)
    return [Axes.whole(shape) for shape in shapes_of(equation)]


def run(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    """Labels of an equation's outputs, by the rule of its primitive."""
    return RULES.get(equation.primitive.name, unknown)(ties, equation, inputs)


def run_jaxpr(ties: Ties, closed: Any, inputs: Sequence[Axes], path: Path) -> list[Axes]:
    """Labels of the outputs of a program that an equation holds.

    Args:
        ties: gets what is found.
        closed: a jaxpr, closed or without constants.
        inputs: one for each of its inputs.
        path: the site that the equation belongs to.
    """
    flat = flatten_any(closed)
    known: dict[Value, Axes] = dict(zip(flat.inputs, inputs, strict=True))
    known |= {v: Axes.whole(v.aval.shape) for v, _ in flat.constants}

    def look_up(atom: Any) -> Axes:
        return known[atom] if isinstance(atom, Value) else of_literal(atom)

    for equation in flat.equations:
        equation = dataclasses.replace(equation, path=equation.path or path)
        before = [look_up(a) for a in equation.inputs]
        note = note_on(
            equation,
            "reads them inside of a loop, a conditional or a function with its own derivative",
        )
        ties.read_inside += [
            (found, note)
            for operand, axis in consumed(equation, before)
            if (found := before[operand].labels[axis]) is not None
        ]
        known.update(zip(equation.outputs, run(ties, equation, before), strict=True))
    return [look_up(a) for a in flat.outputs]


def flatten_any(program: Any) -> Flat:
    """`flatten` of a jaxpr that may not be closed."""
    return flatten(program if hasattr(program, "jaxpr") else jex.ClosedJaxpr(program, ()))


def convolution_axes(equation: FlatEquation, rank: int) -> tuple[Any, Any, Any, int, int]:
    """How a convolution reads its operands.

    Args:
        equation: of JAX's own primitive or of `nnopt.layers.Conv`.
        rank: number of axes of the image.

    Returns:
        Axes (batch, channels, *space) of the image, (outputs, inputs, *space) of the kernel, (batch, channels, *space) of the
        result; the number of groups, and of groups of images.
    """
    params = equation.params
    if equation.primitive.name == "nnopt_conv":
        image = (0, rank - 1, *range(1, rank - 1))
        return image, (rank - 1, rank - 2, *range(rank - 2)), image, params["shape"].groups, 1
    numbers = params["dimension_numbers"]
    groups = params["feature_group_count"], params["batch_group_count"]
    return numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec, *groups


def consumed(equation: FlatEquation, inputs: Sequence[Axes]) -> list[tuple[int, int]]:
    """`(operand, axis)` over which an equation sums activations that it multiplies by weights.

    A depthwise convolution sums over no channels: each comes out again, so it is read further on.
    """
    name = equation.primitive.name
    if name == "dot_general" and any(a.weights for a in inputs):
        contracted, _ = equation.params["dimension_numbers"]
        return [(i, axis) for i in (0, 1) if not inputs[i].weights for axis in contracted[i]]
    if name in CONVOLUTIONS and inputs[1].weights and not inputs[0].weights:
        image, kernel, _, groups, _ = convolution_axes(equation, len(inputs[0].shape))
        return [] if groups > 1 and inputs[1].shape[kernel[1]] == 1 else [(0, image[1])]
    return []


def of_literal(literal: Any) -> Axes:
    """A number written into the program."""
    shape = np.shape(literal.val)
    return dataclasses.replace(Axes.whole(shape), zero=(False,) * len(shape))
