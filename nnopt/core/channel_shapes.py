"""Rules of primitives that move, cut, repeat and put together what they read."""

import math
from collections.abc import Sequence

import numpy as np
from jax.extend import core as jex

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
    array = inputs[0]
    labels: list[Labels] = [None] * len(shape)
    zero = [False] * len(shape)
    for axis, to in enumerate(equation.params["broadcast_dimensions"]):
        if array.shape[axis] == shape[to]:
            labels[to], zero[to] = array.labels[axis], array.vanishes(axis)
    return [Axes(shape, tuple(labels), tuple(zero) if array.weights else None)]


@rule("transpose")
def _transpose(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    array, order = inputs[0], equation.params["permutation"]
    (shape,) = shapes_of(equation)
    return [
        Axes(
            shape,
            tuple(array.labels[a] for a in order),
            array.zero and tuple(array.zero[a] for a in order),
        )
    ]


@rule("squeeze", "reshape")
def _reshape(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    (array, *_), (shape,) = inputs, shapes_of(equation)
    labels: list[Labels] = []
    zero: list[bool] = []
    for before, after in runs_of(array.shape, shape):
        # The last axis that may lose indices is the one whose labels go on.
        moving = [a for a in before if array.moves(a)]
        zero += [bool(moving) and array.vanishes(moving[-1])] * len(after)
        labels += _regrouped(
            ties,
            array,
            before,
            [shape[a] for a in after],
            note_on(equation, "merges them with other channels"),
        )
        # One of two parts is a number of groups; of more, as of a product that makes queries, keys and values of several heads,
        # others than the last may be meant to go.
        parts = [shape[a] for a in after if shape[a] > 1]
        if len(parts) > 2 and len(moving) == 1 and array.shape[moving[0]] == math.prod(parts):
            why = f"splits channels into {' x '.join(map(str, parts))}, of which only those of the last may go"
            ties.split.append((array.fixed(moving[0]), note_on(equation, why)))
    return [Axes(shape, tuple(labels), tuple(zero) if array.weights else None)]


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
    if not after:  # the one element of an array that becomes a number
        for axis in moving:
            ties.keep(array, axis, note)
        return []
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
    return [Axes(inputs[0].shape, labels, inputs[0].zero)]


@rule("concatenate")
def _concatenate(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    (shape,), along = shapes_of(equation), equation.params["dimension"]
    labels: list[Labels] = []
    zero: list[bool] = []
    note = note_on(equation, "puts channels beside what has a fixed number of them")
    for axis in range(len(shape)):
        if axis == along:
            labels.append(np.concatenate([a.fixed(axis) for a in inputs]))
            # Of an operand none of which can go nothing needs to be zero.
            zero.append(all(a.vanishes(axis) or not a.moves(axis) for a in inputs))
            continue
        joined = inputs[0].labels[axis]
        for other in inputs[1:]:
            joined = ties.join(joined, other.labels[axis], note)
        labels.append(joined)
        zero.append(all(a.vanishes(axis) for a in inputs))
    weights = all(a.weights for a in inputs)
    return [Axes(shape, tuple(labels), tuple(zero) if weights else None)]


@rule("stack")
def _stack(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    (shape,), along = shapes_of(equation), equation.params["axis"]
    note = note_on(equation, "puts channels beside what has a fixed number of them")
    labels = list(ties.join_all(inputs, note))
    zero = [all(a.vanishes(axis) for a in inputs) for axis in range(len(labels))]
    labels.insert(along, unmoved(shape[along]))
    zero.insert(along, False)
    weights = all(a.weights for a in inputs)
    return [Axes(shape, tuple(labels), tuple(zero) if weights else None)]


@rule("unstack")
def _unstack(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    (array,), along = inputs, equation.params["axis"]
    ties.keep(array, along, note_on(equation, "takes channels by number"))
    left = [a for a in range(len(array.shape)) if a != along]
    labels = tuple(array.labels[a] for a in left)
    zero = array.zero and tuple(array.zero[a] for a in left)
    return [Axes(shape, labels, zero) for shape in shapes_of(equation)]


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
    return [Axes(shape, tuple(labels), array.zero)]


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
            array.zero,
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
    return [Axes(shape, tuple(labels), array.zero)]


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
    zeros = isinstance(filled, jex.Literal) and not np.any(filled.val)
    return [Axes(shape, tuple(labels), array.zero if zeros else None)]


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
    return [Axes(shape, tuple(labels), array.zero)]


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
