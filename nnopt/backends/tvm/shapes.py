"""Primitives that move elements: no arithmetic."""

from typing import Any

import numpy as np

from nnopt.backends.tvm.emit import Emitter, rule
from nnopt.backends.tvm.values import Value


def lazy(function: Any) -> Any:
    """A rule that also takes constants, and keeps them as small as they are."""
    function.lazy = True
    return function


@rule("broadcast_in_dim")
@lazy
def _broadcast(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    value, places = values[0], equation.params["broadcast_dimensions"]
    shape = tuple(equation.outvars[0].aval.shape)
    held = [1] * len(shape)
    for place, size in zip(places, value.held, strict=True):
        held[place] = size
    return _rearranged(emitter, value, tuple(held), shape, list(places))


@rule("squeeze")
@lazy
def _squeeze(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    value = values[0]
    left = [i for i in range(len(value.shape)) if i not in equation.params["dimensions"]]
    held = tuple(value.held[i] for i in left)
    shape = tuple(value.shape[i] for i in left)
    if value.constant:
        return Value(value.data.reshape(held), shape, held, value.dtype)
    rank = len(value.shape)

    def index(*at: Any) -> list[Any]:
        places: list[Any] = [0] * rank
        for i, a in zip(left, at, strict=False):
            places[i] = a
        return places

    return emitter.indexed(value, held, index, shape, "squeeze")


def _rearranged(
    emitter: Emitter, value: Value, held: tuple[int, ...], shape: tuple[int, ...], places: list[int]
) -> Value:
    """Axes of size 1 put in; the value's axis `i` is at `places[i]`."""
    if held == value.held:
        return Value(value.data, shape, held, value.dtype)
    if value.constant:
        return Value(value.data.reshape(held), shape, held, value.dtype)
    return emitter.indexed(value, held, lambda *at: [at[p] for p in places], shape, "expand")


@rule("reshape")
@lazy
def _reshape(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    value, shape = values[0], tuple(equation.outvars[0].aval.shape)
    if equation.params.get("dimensions") is not None:
        raise emitter.unsupported(equation, " with dimensions")
    kept = [i for i, n in enumerate(value.shape) if n != 1]
    places = [i for i, n in enumerate(shape) if n != 1]
    if [value.shape[i] for i in kept] == [shape[i] for i in places]:  # sizes of 1 come and go
        held = [1] * len(shape)
        for old, new in zip(kept, places, strict=True):
            held[new] = value.held[old]
        if value.constant:
            return Value(value.data.reshape(held), shape, tuple(held), value.dtype)

        def index(*at: Any) -> list[Any]:
            where: list[Any] = [0] * len(value.shape)
            for old, new in zip(kept, places, strict=True):
                where[old] = at[new]
            return where

        return emitter.indexed(value, tuple(held), index, shape, "reshape")
    return emitter.reshaped(value, shape)


@rule("transpose")
@lazy
def _transpose(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    return emitter.transposed(values[0], list(equation.params["permutation"]))


@rule("rev")
def _rev(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    value, turned = emitter.full(values[0]), equation.params["dimensions"]
    shape = value.shape
    return emitter.indexed(
        value,
        shape,
        lambda *at: [n - 1 - i if a in turned else i for a, (i, n) in enumerate(zip(at, shape, strict=True))],
        name="rev",
    )  # fmt: skip


@rule("slice")
def _slice(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    p = equation.params
    strides = p["strides"] or (1,) * len(p["start_indices"])
    return sliced(emitter, values[0], p["start_indices"], p["limit_indices"], strides)


def sliced(emitter: Emitter, value: Value, start: Any, stop: Any, strides: Any) -> Value:
    """As `jax.lax.slice`."""
    value = emitter.full(value)
    if value.constant:
        cut = tuple(slice(*s) for s in zip(start, stop, strides, strict=True))
        return Value.of(np.ascontiguousarray(value.data[cut]))
    shape = tuple(-(-(b - a) // s) for a, b, s in zip(start, stop, strides, strict=True))
    if shape == value.shape:
        return value

    def index(*at: Any) -> list[Any]:
        return [a + i * s for i, a, s in zip(at, start, strides, strict=True)]

    return emitter.indexed(value, shape, index, name="slice")


@rule("split")
def _split(emitter: Emitter, equation: Any, values: list[Value]) -> list[Value]:
    value, axis, at, made = values[0], equation.params["axis"], 0, []
    for size in equation.params["sizes"]:
        start, stop = [0] * len(value.shape), list(value.shape)
        start[axis], stop[axis] = at, at + size
        made.append(sliced(emitter, value, start, stop, [1] * len(start)))
        at += size
    return made


@rule("dynamic_slice")
def _dynamic_slice(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    value, *start = values
    sizes = equation.params["slice_sizes"]
    if not all(s.constant for s in start):
        raise emitter.unsupported(equation, " whose start depends on the input")
    # As JAX has it: what would reach beyond the end is moved back.
    first = [
        min(max(int(s.data), 0), n - size)
        for s, n, size in zip(start, value.shape, sizes, strict=True)
    ]
    last = [a + size for a, size in zip(first, sizes, strict=True)]
    return sliced(emitter, value, first, last, [1] * len(first))


@rule("concatenate")
def _concatenate(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    from tvm import topi

    axis, parts = equation.params["dimension"], [emitter.full(v) for v in values]
    shape = tuple(equation.outvars[0].aval.shape)
    return emitter.te(
        lambda *xs: topi.concatenate(list(xs), axis=axis),
        parts,
        shape,
        parts[0].dtype,
        name="concatenate",
    )


@rule("pad")
def _pad(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    """Between elements too, and cut off where the padding is below zero."""
    from tvm import te, tirx

    value, fill = emitter.full(values[0]), values[1]
    config = equation.params["padding_config"]
    shape = tuple(equation.outvars[0].aval.shape)
    if not fill.constant:
        raise emitter.unsupported(equation, " with a value that depends on the input")

    def expression(x: Any) -> Any:
        def element(*at: Any) -> Any:
            where, conditions = [], []
            for i, (low, _, interior), size, whole in zip(
                at, config, value.shape, shape, strict=True
            ):
                step, place = interior + 1, i - low
                if low > 0:
                    conditions.append(place >= 0)
                if whole - low > (size - 1) * step + 1:
                    conditions.append(place <= (size - 1) * step)
                if step > 1:
                    conditions.append(tirx.indexmod(place, step) == 0)
                where.append(place if step == 1 else tirx.indexdiv(place, step))
            if not conditions:
                return x[tuple(where)]
            inside = conditions[0] if len(conditions) == 1 else tirx.all(*conditions)
            return tirx.if_then_else(
                inside, x[tuple(where)], tirx.const(fill.data.item(), value.dtype)
            )

        return te.compute(shape, element, name="pad")

    return emitter.te(expression, [value], shape, value.dtype, name="pad")


@rule("gather")
def _gather(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    """Elements at places of an integer array. Beyond the ends: the nearest, or what the mode fills in."""
    from jax.lax import GatherScatterMode
    from tvm import te, tirx

    source, places = emitter.full(values[0]), emitter.full(values[1])
    p = equation.params
    numbers, sizes, mode = p["dimension_numbers"], p["slice_sizes"], p["mode"]
    shape = tuple(equation.outvars[0].aval.shape)
    batching = tuple(numbers.operand_batching_dims)
    batch = [i for i in range(len(shape)) if i not in numbers.offset_dims]
    # Axes of the operand that have an axis of their own in the result.
    offset = [
        i
        for i in range(len(source.shape))
        if i not in numbers.collapsed_slice_dims and i not in batching
    ]
    fills = mode == GatherScatterMode.FILL_OR_DROP
    if fills and not places.constant:
        raise emitter.unsupported(equation, " that fills, at places that depend on the input")
    bounds = [n - s for n, s in zip(source.shape, sizes, strict=True)]
    if fills:
        table = np.moveaxis(places.data, -1, 0)
        if any(
            (row < 0).any() or (row > bounds[axis]).any()
            for row, axis in zip(table, numbers.start_index_map, strict=True)
        ):
            raise emitter.unsupported(equation, " at places outside the array")

    def expression(x: Any, where: Any) -> Any:
        def element(*at: Any) -> Any:
            index: list[Any] = [0] * len(source.shape)
            at_batch = [at[i] for i in batch]
            for number, axis in enumerate(numbers.start_index_map):
                start = tirx.Cast("int64", where[(*at_batch, number)])
                index[axis] = tirx.min(
                    tirx.max(start, tirx.const(0, "int64")), tirx.const(bounds[axis], "int64")
                )
            for axis, i in zip(offset, numbers.offset_dims, strict=True):
                index[axis] = index[axis] + at[i]
            for axis, i in zip(batching, numbers.start_indices_batching_dims, strict=True):
                index[axis] = at_batch[i]
            return x[tuple(index)]

        return te.compute(shape, element, name="gather")

    return emitter.te(expression, [source, places], shape, source.dtype, name="gather")
