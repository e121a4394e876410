"""Rules of primitives that move, cut, repeat and put together what they read."""

import math
from collections.abc import Sequence

import numpy as np
from jax.extend import core as jex

from nnopt.core.channel_elementwise import keeps_zero
from nnopt.core.channel_ties import (
    Axes,
    Labels,
    Note,
    Ties,
    note_on,
    rule,
    shapes_of,
    unknown,
    unmoved,
)
from nnopt.core.flatten import FlatEquation


@rule("broadcast_in_dim")
def _broadcast(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    (shape,) = shapes_of(equation)
    labels: list[Labels] = [None] * len(shape)
    for axis, to in enumerate(equation.params["broadcast_dimensions"]):
        if inputs[0].shape[axis] == shape[to]:
            labels[to] = inputs[0].labels[axis]
    return [Axes(shape, tuple(labels), keeps_zero(equation, inputs))]


@rule("transpose")
def _transpose(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    labels = tuple(inputs[0].labels[a] for a in equation.params["permutation"])
    (shape,) = shapes_of(equation)
    return [Axes(shape, labels, keeps_zero(equation, inputs))]


@rule("squeeze", "reshape")
def _reshape(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    (array, *_), (shape,) = inputs, shapes_of(equation)
    labels: list[Labels] = []
    for before, after in runs_of(array.shape, shape):
        labels += _regrouped(
            ties,
            array,
            before,
            [shape[a] for a in after],
            note_on(equation, "merges them with other channels"),
        )
    return [Axes(shape, tuple(labels), keeps_zero(equation, inputs[:1]))]


def runs_of(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
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


def _regrouped(
    ties: Ties, array: Axes, before: list[int], after: list[int], note: Note
) -> list[Labels]:
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
        ties.keep(array, axis, note)
    place = before.index(moving[-1])
    shaped = [1] * len(sizes)
    shaped[place] = sizes[place]
    grid = np.broadcast_to(array.fixed(moving[-1]).reshape(shaped), sizes).reshape(after)
    for axis in reversed(range(len(after))):
        rows = np.moveaxis(grid, axis, -1).reshape(-1, after[axis])
        if (rows == rows[0]).all() and after[axis] > 1:
            return [rows[0] if a == axis else unmoved(n) for a, n in enumerate(after)]
    last = max(a for a, n in enumerate(after) if n > 1) if math.prod(after) > 1 else len(after) - 1
    rows = np.moveaxis(grid, last, -1).reshape(-1, after[last])
    return [ties.couple(rows) if a == last else unmoved(n) for a, n in enumerate(after)]


@rule("rev")
def _rev(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    turned = equation.params["dimensions"]
    labels = tuple(
        v[::-1] if v is not None and a in turned else v for a, v in enumerate(inputs[0].labels)
    )
    return [Axes(inputs[0].shape, labels, inputs[0].weights)]


@rule("concatenate")
def _concatenate(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    (shape,), along = shapes_of(equation), equation.params["dimension"]
    labels: list[Labels] = []
    note = note_on(equation, "puts channels beside what has a fixed number of them")
    for axis in range(len(shape)):
        if axis == along:
            labels.append(np.concatenate([a.fixed(axis) for a in inputs]))
            continue
        joined = inputs[0].labels[axis]
        for other in inputs[1:]:
            joined = ties.join(joined, other.labels[axis], note)
        labels.append(joined)
    return [Axes(shape, tuple(labels), all(a.weights for a in inputs))]


@rule("stack")
def _stack(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    (shape,), along = shapes_of(equation), equation.params["axis"]
    note = note_on(equation, "puts channels beside what has a fixed number of them")
    labels = list(ties.join_all(inputs, note))
    labels.insert(along, unmoved(shape[along]))
    return [Axes(shape, tuple(labels), all(a.weights for a in inputs))]


@rule("unstack")
def _unstack(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    (array,), along = inputs, equation.params["axis"]
    ties.keep(array, along, note_on(equation, "takes channels by number"))
    labels = tuple(v for a, v in enumerate(array.labels) if a != along)
    return [Axes(shape, labels, array.weights) for shape in shapes_of(equation)]


@rule("tile")
def _tile(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    (array,), (shape,) = inputs, shapes_of(equation)
    labels: list[Labels] = []
    for axis, times in enumerate(equation.params["reps"]):
        found = array.labels[axis]
        if times == 1 or found is None:
            labels.append(found)
        elif array.shape[axis] == 1 and not array.moves(axis):
            labels.append(None)  # repeated as often as the network wants
        else:
            labels.append(np.tile(found, times))
    return [Axes(shape, tuple(labels), keeps_zero(equation, inputs))]


@rule("split")
def _split(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    array, along = inputs[0], equation.params["axis"]
    sizes, shapes = equation.params["sizes"], shapes_of(equation)
    parts: list[Labels] = [None] * len(sizes)
    if array.moves(along) and len(set(sizes)) == 1:
        coupled = ties.couple(array.fixed(along).reshape(len(sizes), -1))
        parts = [coupled] * len(sizes)
    elif array.labels[along] is not None:
        ties.keep(array, along, note_on(equation, "cuts channels into unequal parts"))
        parts = [unmoved(n) for n in sizes]
    return [
        Axes(
            shape,
            tuple(part if a == along else v for a, v in enumerate(array.labels)),
            array.weights,
        )
        for shape, part in zip(shapes, parts, strict=True)
    ]


@rule("slice")
def _slice(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    (array,), (shape,) = inputs, shapes_of(equation)
    starts, params = equation.params["start_indices"], equation.params
    strides = params["strides"] or (1,) * len(shape)
    labels: list[Labels] = []
    for axis, (start, stride) in enumerate(zip(starts, strides, strict=True)):
        extent, whole = shape[axis], array.shape[axis]
        if extent == whole or not array.moves(axis):
            labels.append(array.labels[axis] if extent == whole else unmoved(extent))
        elif stride == 1 and whole % extent == 0 and start % extent == 0:
            # One of several equal parts: what goes from one must go from all.
            labels.append(ties.couple(array.fixed(axis).reshape(-1, extent)))
        else:
            ties.keep(array, axis, note_on(equation, "takes channels by number"))
            labels.append(unmoved(extent))
    return [Axes(shape, tuple(labels), array.weights)]


@rule("pad")
def _pad(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    array, (shape,) = inputs[0], shapes_of(equation)
    labels: list[Labels] = []
    for axis, (low, high, between) in enumerate(equation.params["padding_config"]):
        if (low, high, between) == (0, 0, 0):
            labels.append(array.labels[axis])
            continue
        if between or low < 0 or high < 0:
            ties.keep(array, axis, note_on(equation, "cuts or spreads channels"))
            labels.append(unmoved(shape[axis]))
            continue
        labels.append(np.pad(array.fixed(axis), (low, high)))
    filled = equation.inputs[1]
    zero = isinstance(filled, jex.Literal) and not np.any(filled.val)
    return [Axes(shape, tuple(labels), array.weights and zero)]


@rule("gather")
def _gather(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    (array, indices), (shape,) = inputs, shapes_of(equation)
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    note = note_on(equation, "takes channels by number")
    if getattr(numbers, "operand_batching_dims", ()):
        return unknown(ties, equation, inputs)
    passed = []
    for axis, extent in enumerate(sizes):
        kept = axis not in numbers.collapsed_slice_dims
        if extent != array.shape[axis] or not kept:
            ties.keep(array, axis, note)
        if kept:
            passed.append(array.labels[axis] if extent == array.shape[axis] else unmoved(extent))
    for axis in range(len(indices.shape)):
        ties.keep(indices, axis, note)
    labels: list[Labels] = [unmoved(n) for n in shape]
    for to, found in zip(numbers.offset_dims, passed, strict=True):
        labels[to] = found
        if array.weights and found is not None:
            ties.made.append(found)
    return [Axes(shape, tuple(labels))]


@rule("dynamic_slice")
def _dynamic_slice(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    array, (shape,) = inputs[0], shapes_of(equation)
    labels: list[Labels] = []
    for axis, extent in enumerate(shape):
        if extent == array.shape[axis]:
            labels.append(array.labels[axis])
            continue
        ties.keep(array, axis, note_on(equation, "takes channels by number"))
        labels.append(unmoved(extent))
    return [Axes(shape, tuple(labels), array.weights)]


@rule("dynamic_update_slice")
def _dynamic_update(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    array, update = inputs[:2]
    labels: list[Labels] = []
    for axis, extent in enumerate(array.shape):
        if extent == update.shape[axis]:
            labels.append(ties.join(array.labels[axis], update.labels[axis]))
            continue
        note = note_on(equation, "writes channels by number")
        ties.keep(array, axis, note)
        ties.keep(update, axis, note)
        labels.append(unmoved(extent))
    return [Axes(array.shape, tuple(labels))]
