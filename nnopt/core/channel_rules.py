"""How each JAX primitive ties the axes of its operands together: one rule for each.

Every index of every axis of every array has a label, an integer. Indices with equal labels stay or go together; a rule says which
labels an output has, and joins those that must be one. Label 0 is what always stays. An axis without labels (`None`) was
made by broadcasting: it is as long as the network wants it to be.

An operation that runs over labelled axes in a way that is not known keeps them whole (joins them with 0) and is reported.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend import core as jex

from nnopt.core.flatten import FlatEquation
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
        weights: it is made of the network's variables alone, so that it is zero where those are.
    """

    shape: tuple[int, ...]
    labels: tuple[Labels, ...]
    weights: bool = False

    @classmethod
    def whole(cls, shape: Sequence[int], *, weights: bool = False) -> "Axes":
        """An array no index of which can go."""
        return cls(tuple(shape), tuple(np.zeros(n, np.int64) for n in shape), weights)

    @classmethod
    def free(cls, shape: Sequence[int], *, weights: bool = False) -> "Axes":
        """An array as long as the network wants it."""
        return cls(tuple(shape), (None,) * len(shape), weights)

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
        kept_whole: labels that an operation keeps, and why.
    """

    def __init__(self) -> None:
        self.labels = 1
        self.made: list[np.ndarray] = []
        self.joins: list[tuple[np.ndarray, np.ndarray]] = []
        self.inexact: list[tuple[np.ndarray, Note]] = []
        self.kept_whole: list[tuple[np.ndarray, Note]] = []

    def fresh(self, count: int) -> np.ndarray:
        """Labels that nothing else has."""
        made = np.arange(self.labels, self.labels + count)
        self.labels += count
        return made

    def join(self, first: Labels, second: Labels) -> Labels:
        """Makes two axes one; the labels of the result."""
        if first is None or second is None:
            return second if first is None else first
        if first is not second:
            differ = first != second
            if differ.any():
                self.joins.append((first[differ], second[differ]))
        return first

    def join_all(self, arrays: Sequence[Axes]) -> tuple[Labels, ...]:
        """Joins arrays of one shape axis by axis."""
        joined = arrays[0].labels
        for other in arrays[1:]:
            joined = tuple(self.join(a, b) for a, b in zip(joined, other.labels, strict=True))
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
        self.join(np.zeros_like(found), found)
        if note is not None:
            self.kept_whole.append((found, note))

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


def _note(equation: FlatEquation, why: str) -> Note:
    return Note(equation.primitive.name, equation.path, why)


def _shapes(equation: FlatEquation) -> list[tuple[int, ...]]:
    return [tuple(v.aval.shape) for v in equation.outputs]


def unknown(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    """A primitive without a rule: what it reads stays whole, and it is reported."""
    note = _note(equation, "has no rule, so the axes it reads stay as they are")
    for array in inputs:
        for axis in range(len(array.shape)):
            ties.keep(array, axis, note)
    return [Axes.whole(shape) for shape in _shapes(equation)]


_ELEMENTWISE = (
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e", "bessel_i1e",
    "cbrt", "ceil", "clamp", "clz", "conj", "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma", "div", "eq",
    "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma", "igammac", "imag", "integer_pow",
    "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not",
    "optimization_barrier", "or", "platform_index", "population_count", "pow", "random_gamma", "real", "reduce_precision", "rem",
    "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt",
    "square", "stop_gradient", "sub", "tan", "tanh", "xor", "name", "pvary", "sharding_constraint", "device_put",
)  # fmt: skip
_KEEPS_ZERO = frozenset(
    (
        "abs", "add", "add_any", "convert_element_type", "copy", "copy_p", "mul", "neg", "reduce_precision", "sign", "sin", "sqrt",
        "square", "stop_gradient", "sub", "tan", "tanh", "transpose", "reshape", "broadcast_in_dim", "squeeze", "expand_dims",
        "rev", "integer_pow",
    )
)  # fmt: skip
"""Operations that make zeros of zeros."""


def _weights(equation: FlatEquation, inputs: Sequence[Axes]) -> bool:
    name = equation.primitive.name
    if name == "div":
        return inputs[0].weights and not inputs[1].shape
    shifted = name in ("add", "sub", "add_any") and not all(a.shape for a in inputs)
    return name in _KEEPS_ZERO and not shifted and all(a.weights for a in inputs if a.shape)


@rule(*_ELEMENTWISE)
def _elementwise(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    weights = _weights(equation, inputs)
    if equation.primitive.name == "optimization_barrier":
        return inputs
    found = []
    for shape in _shapes(equation):
        labels: list[Labels] = [None] * len(shape)
        for array in inputs:  # an axis of one element is repeated
            for axis, extent in enumerate(array.shape):
                if extent == shape[axis]:
                    labels[axis] = ties.join(labels[axis], array.labels[axis])
        found.append(Axes(shape, tuple(labels), weights))
    return found


@rule("broadcast_in_dim")
def _broadcast(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    (shape,) = _shapes(equation)
    labels: list[Labels] = [None] * len(shape)
    for axis, to in enumerate(equation.params["broadcast_dimensions"]):
        if inputs[0].shape[axis] == shape[to]:
            labels[to] = inputs[0].labels[axis]
    return [Axes(shape, tuple(labels), _weights(equation, inputs))]


@rule("transpose")
def _transpose(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    labels = tuple(inputs[0].labels[a] for a in equation.params["permutation"])
    (shape,) = _shapes(equation)
    return [Axes(shape, labels, _weights(equation, inputs))]


@rule("squeeze", "expand_dims", "reshape")
def _reshape(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    (array, *_), (shape,) = inputs, _shapes(equation)
    labels: list[Labels] = []
    for before, after in _blocks(array.shape, shape):
        labels += _regrouped(ties, array, before, [shape[a] for a in after])
    return [Axes(shape, tuple(labels), _weights(equation, inputs[:1]))]


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes, the shortest ones, of equal number of elements in both shapes."""
    blocks = []
    i = j = 0
    while i < len(before) or j < len(after):
        here: tuple[list[int], list[int]] = ([], [])
        left = right = 1
        # Axes of one element belong to no run of their own.
        while True:
            if left == right and left > 1:
                break
            if i < len(before) and (left <= right or j >= len(after)):
                here[0].append(i)
                left *= before[i]
                i += 1
            elif j < len(after):
                here[1].append(j)
                right *= after[j]
                j += 1
            else:
                break
        while i < len(before) and before[i] == 1:
            here[0].append(i)
            i += 1
        while j < len(after) and after[j] == 1:
            here[1].append(j)
            j += 1
        blocks.append(here)
    return blocks


def _regrouped(ties: Ties, array: Axes, before: list[int], after: list[int]) -> list[Labels]:
    """Labels of the axes that a run of axes becomes.

    Of several that may lose indices the last one keeps that freedom. What is split loses them in each part alike: the last part
    carries the labels, as `x.reshape(..., groups, -1)` would have it.
    """
    moving = [a for a in before if array.moves(a)]
    sizes = [array.shape[a] for a in before]
    if not moving:
        # What was repeated as often as the network wanted is as long as it wants.
        free = len(after) == 1 and any(
            array.labels[a] is None and array.shape[a] > 1 for a in before
        )
        return [None if free or n == 1 else np.zeros(n, np.int64) for n in after]
    for axis in moving[:-1]:
        ties.keep(array, axis, None)
    place = before.index(moving[-1])
    shaped = [1] * len(sizes)
    shaped[place] = sizes[place]
    grid = np.broadcast_to(array.fixed(moving[-1]).reshape(shaped), sizes).reshape(after)
    for axis in reversed(range(len(after))):
        rows = np.moveaxis(grid, axis, -1).reshape(-1, after[axis])
        if (rows == rows[0]).all() and after[axis] > 1:
            return [rows[0] if a == axis else _unmoved(n) for a, n in enumerate(after)]
    last = max(a for a, n in enumerate(after) if n > 1) if math.prod(after) > 1 else len(after) - 1
    rows = np.moveaxis(grid, last, -1).reshape(-1, after[last])
    return [ties.couple(rows) if a == last else _unmoved(n) for a, n in enumerate(after)]


def _unmoved(extent: int) -> np.ndarray:
    return np.zeros(extent, np.int64)


@rule("rev")
def _rev(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    turned = equation.params["dimensions"]
    labels = tuple(
        v[::-1] if v is not None and a in turned else v for a, v in enumerate(inputs[0].labels)
    )
    return [Axes(inputs[0].shape, labels, inputs[0].weights)]


@rule(
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin"
)  # fmt: skip
def _reduce(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    note = _note(equation, "runs over channels, so what stays changes when one goes")
    axes = equation.params["axes"]
    for axis in axes:
        ties.mark(inputs[0], axis, note)
    labels = tuple(v for a, v in enumerate(inputs[0].labels) if a not in axes)
    return [Axes(shape, labels) for shape in _shapes(equation)]


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    note = _note(equation, "runs over channels, so what stays changes when one goes")
    ties.mark(inputs[0], equation.params["axis"], note)
    return [Axes(inputs[0].shape, inputs[0].labels)]


@rule("sort", "top_k")
def _sort(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    axis = equation.params.get("dimension", len(inputs[0].shape) - 1)
    for array in inputs:
        ties.keep(array, axis, _note(equation, "mixes the channels it sorts"))
    joined = ties.join_all(inputs)
    return [
        Axes(shape, tuple(_unmoved(n) if a == axis else joined[a] for a, n in enumerate(shape)))
        for shape in _shapes(equation)
    ]


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window")
def _reduce_window(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    note = _note(equation, "slides over channels, so what stays changes when one goes")
    (shape,) = _shapes(equation)[:1]
    array, labels = inputs[0], []
    for axis, extent in enumerate(equation.params["window_dimensions"]):
        if extent == 1 and shape[axis] == array.shape[axis]:
            labels.append(array.labels[axis])
        elif shape[axis] == array.shape[axis] and array.moves(axis):
            ties.mark(array, axis, note)
            labels.append(array.labels[axis])
        else:
            ties.keep(array, axis, note)
            labels.append(_unmoved(shape[axis]))
    return [Axes(shape, tuple(labels))]


@rule("concatenate")
def _concatenate(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    (shape,), along = _shapes(equation), equation.params["dimension"]
    labels: list[Labels] = []
    for axis in range(len(shape)):
        if axis == along:
            labels.append(np.concatenate([a.fixed(axis) for a in inputs]))
            continue
        joined = inputs[0].labels[axis]
        for other in inputs[1:]:
            joined = ties.join(joined, other.labels[axis])
        labels.append(joined)
    return [Axes(shape, tuple(labels), all(a.weights for a in inputs))]


@rule("split")
def _split(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    array, along = inputs[0], equation.params["axis"]
    sizes, shapes = equation.params["sizes"], _shapes(equation)
    parts: list[Labels] = [None] * len(sizes)
    if array.moves(along) and len(set(sizes)) == 1:
        coupled = ties.couple(array.fixed(along).reshape(len(sizes), -1))
        parts = [coupled] * len(sizes)
    elif array.labels[along] is not None:
        ties.keep(array, along, _note(equation, "cuts channels into unequal parts"))
        parts = [_unmoved(n) for n in sizes]
    return [
        Axes(shape, tuple(part if a == along else v for a, v in enumerate(array.labels)))
        for shape, part in zip(shapes, parts, strict=True)
    ]


@rule("slice")
def _slice(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    (array,), (shape,) = inputs, _shapes(equation)
    starts, params = equation.params["start_indices"], equation.params
    strides = params["strides"] or (1,) * len(shape)
    labels: list[Labels] = []
    for axis, (start, stride) in enumerate(zip(starts, strides, strict=True)):
        extent, whole = shape[axis], array.shape[axis]
        if extent == whole or not array.moves(axis):
            labels.append(array.labels[axis] if extent == whole else _unmoved(extent))
        elif stride == 1 and whole % extent == 0 and start % extent == 0:
            # One of several equal parts: what goes from one must go from all.
            labels.append(ties.couple(array.fixed(axis).reshape(-1, extent)))
        else:
            ties.keep(array, axis, _note(equation, "takes channels by number"))
            labels.append(_unmoved(extent))
    return [Axes(shape, tuple(labels), array.weights)]


@rule("pad")
def _pad(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    array, (shape,) = inputs[0], _shapes(equation)
    labels: list[Labels] = []
    for axis, (low, high, between) in enumerate(equation.params["padding_config"]):
        if (low, high, between) == (0, 0, 0):
            labels.append(array.labels[axis])
            continue
        if between or low < 0 or high < 0:
            ties.keep(array, axis, _note(equation, "cuts or spreads channels"))
            labels.append(_unmoved(shape[axis]))
            continue
        labels.append(np.pad(array.fixed(axis), (low, high)))
    return [Axes(shape, tuple(labels))]


@rule(
    "iota", "random_bits", "random_wrap", "random_unwrap", "random_seed", "random_fold_in", "random_split", "threefry2x32",
    "random_clone",
)  # fmt: skip
def _made(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    if equation.primitive.name in ("random_bits", "threefry2x32"):
        return [Axes.free(shape) for shape in _shapes(equation)]
    return [Axes.whole(shape) for shape in _shapes(equation)]


@rule("conv_general_dilated", "nnopt_conv")
def _convolution(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    x, kernel = inputs[:2]
    (shape,), params = _shapes(equation), equation.params
    if equation.primitive.name == "nnopt_conv":
        rank = len(x.shape)
        lhs = out = (0, rank - 1, *range(1, rank - 1))
        rhs = (rank - 1, rank - 2, *range(rank - 2))
        groups, batch_groups = params["shape"].groups, 1
    else:
        numbers = params["dimension_numbers"]
        lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
        groups, batch_groups = params["feature_group_count"], params["batch_group_count"]
    if batch_groups > 1:
        return unknown(ties, equation, inputs)
    note = _note(equation, "slides over channels")
    for axis in (*lhs[2:], lhs[0]):
        ties.keep(x, axis, note)
    for axis in rhs[2:]:
        ties.keep(kernel, axis)
    if not kernel.weights:
        ties.mark(x, lhs[1], _note(equation, "has a kernel that is no weight"))
    made, taken = kernel.labels[rhs[0]], kernel.labels[rhs[1]]
    if made is not None and kernel.weights:
        ties.made.append(made)
    if groups == 1:
        ties.join(x.labels[lhs[1]], taken)
    elif kernel.shape[rhs[1]] == 1:
        # A channel and its filters go together, and with them the group.
        ties.keep(kernel, rhs[1])
        if made is not None:
            filters = made.reshape(groups, -1)
            for column in filters.T:
                ties.join(x.labels[lhs[1]], column)
    else:
        # Each group loses the same channels, so that all stay alike.
        if x.labels[lhs[1]] is not None:
            ties.join(ties.couple(x.fixed(lhs[1]).reshape(groups, -1)), taken)
        if made is not None:
            ties.couple(made.reshape(groups, -1))
    labels: list[Labels] = [_unmoved(n) for n in shape]
    labels[out[0]] = x.labels[lhs[0]]
    labels[out[1]] = made
    return [Axes(shape, tuple(labels))]


@rule("dot_general")
def _dot_general(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    a, b = inputs
    (contract_a, contract_b), (batch_a, batch_b) = equation.params["dimension_numbers"]
    note = _note(equation, "multiplies two activations over channels")
    for i, j in zip(contract_a, contract_b, strict=True):
        joined = ties.join(a.labels[i], b.labels[j])
        if not (a.weights or b.weights) and joined is not None:
            ties.mark(Axes((len(joined),), (joined,)), 0, note)
    labels = [ties.join(a.labels[i], b.labels[j]) for i, j in zip(batch_a, batch_b, strict=True)]
    for array, used in ((a, {*contract_a, *batch_a}), (b, {*contract_b, *batch_b})):
        rest = [v for axis, v in enumerate(array.labels) if axis not in used]
        labels += rest
        if array.weights:
            ties.made += [v for v in rest if v is not None]
    (shape,) = _shapes(equation)
    return [Axes(shape, tuple(labels), a.weights and b.weights)]


@rule("gather")
def _gather(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    (array, indices), (shape,) = inputs, _shapes(equation)
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    note = _note(equation, "takes channels by number")
    if getattr(numbers, "operand_batching_dims", ()):
        return unknown(ties, equation, inputs)
    passed = []
    for axis, extent in enumerate(sizes):
        kept = axis not in numbers.collapsed_slice_dims
        if extent != array.shape[axis] or not kept:
            ties.keep(array, axis, note)
        if kept:
            passed.append(array.labels[axis] if extent == array.shape[axis] else _unmoved(extent))
    for axis in range(len(indices.shape)):
        ties.keep(indices, axis, note)
    labels: list[Labels] = [_unmoved(n) for n in shape]
    for to, found in zip(numbers.offset_dims, passed, strict=True):
        labels[to] = found
        if array.weights and found is not None:
            ties.made.append(found)
    return [Axes(shape, tuple(labels))]


@rule("dynamic_slice")
def _dynamic_slice(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    array, (shape,) = inputs[0], _shapes(equation)
    labels: list[Labels] = []
    for axis, extent in enumerate(shape):
        if extent == array.shape[axis]:
            labels.append(array.labels[axis])
            continue
        ties.keep(array, axis, _note(equation, "takes channels by number"))
        labels.append(_unmoved(extent))
    return [Axes(shape, tuple(labels), array.weights)]


@rule("dynamic_update_slice")
def _dynamic_update(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    array, update = inputs[:2]
    labels: list[Labels] = []
    for axis, extent in enumerate(array.shape):
        if extent == update.shape[axis]:
            labels.append(ties.join(array.labels[axis], update.labels[axis]))
            continue
        note = _note(equation, "writes channels by number")
        ties.keep(array, axis, note)
        ties.keep(update, axis, note)
        labels.append(_unmoved(extent))
    return [Axes(array.shape, tuple(labels))]


def run(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    """Labels of an equation's outputs; equations that hold a program of their own are run through."""
    name, params = equation.primitive.name, equation.params
    if name in RULES:
        return RULES[name](ties, equation, inputs)
    if name in ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "run_state"):
        body = params.get("call_jaxpr") or params.get("fun_jaxpr")
        if body is not None:
            return run_jaxpr(ties, body, inputs, equation.path)
    if name == "cond":
        found = [run_jaxpr(ties, b, inputs[1:], equation.path) for b in params["branches"]]
        return [Axes(many[0].shape, ties.join_all(many)) for many in zip(*found, strict=True)]
    if name == "scan":
        return _scan(ties, equation, inputs)
    return unknown(ties, equation, inputs)


def _scan(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    consts, carried = equation.params["num_consts"], equation.params["num_carry"]
    note = _note(equation, "loops over channels")
    start = consts + carried
    for array in inputs[start:]:
        ties.keep(array, 0, note)
    slices = [Axes(a.shape[1:], a.labels[1:], a.weights) for a in inputs[start:]]
    # What is carried may be as long as the loop wants only if it is so throughout.
    before = [
        Axes(a.shape, tuple(ties.fresh(n) if v is None else v for n, v in zip(a.shape, a.labels, strict=True)))
        for a in inputs[consts:start]
    ]  # fmt: skip
    found = run_jaxpr(
        ties, equation.params["jaxpr"], [*inputs[:consts], *before, *slices], equation.path
    )
    after = [
        Axes(a.shape, ties.join_all([a, b])) for a, b in zip(before, found[:carried], strict=True)
    ]
    stacked = [
        Axes(
            (equation.params["length"], *a.shape), (_unmoved(equation.params["length"]), *a.labels)
        )
        for a in found[carried:]
    ]
    return [*after, *stacked]


def run_jaxpr(ties: Ties, closed: Any, inputs: Sequence[Axes], path: Path) -> list[Axes]:
    """Labels of a program's outputs.

    Args:
        ties: gets what is found.
        closed: a jaxpr, closed or without constants.
        inputs: one for each of its inputs.
        path: the site that it belongs to.
    """
    jaxpr = getattr(closed, "jaxpr", closed)
    known: dict[Any, Axes] = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= {v: Axes.whole(v.aval.shape) for v in jaxpr.constvars}

    def look_up(atom: Any) -> Axes:
        return of_literal(atom) if isinstance(atom, jex.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        before = [look_up(v) for v in eqn.invars]
        inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
        if eqn.primitive.name in (
            "jit",
            "pjit",
            "closed_call",
            "core_call",
            "checkpoint",
            "remat2",
        ):
            after: Sequence[Axes] = run_jaxpr(ties, inner, before, path)
        else:
            outputs = tuple(eqn.outvars)
            after = run(ties, FlatEquation(eqn.primitive, eqn.params, (), outputs, path), before)
        known.update(zip(eqn.outvars, after, strict=True))
    return [look_up(v) for v in jaxpr.outvars]


def of_literal(literal: Any) -> Axes:
    """A number written into the program."""
    return Axes.whole(np.shape(literal.val), weights=True)
