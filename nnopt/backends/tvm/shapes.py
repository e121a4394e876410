"""Primitives that move elements: no arithmetic."""

from typing import Any

import numpy as np

from nnopt.backends.tvm.emit import Emitter, rule
from nnopt.backends.tvm.padding import padded
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


@rule("stack")
def _stack(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    from tvm import topi

    axis, parts = equation.params["axis"], [emitter.full(v) for v in values]
    shape = tuple(equation.outvars[0].aval.shape)

    def expression(*xs: Any) -> Any:
        return topi.stack(list(xs), axis=axis)

    return emitter.te(expression, parts, shape, parts[0].dtype, name="stack")


@rule("unstack")
def _unstack(emitter: Emitter, equation: Any, values: list[Value]) -> list[Value]:
    value, axis = values[0], equation.params["axis"]
    shape = tuple(n for i, n in enumerate(value.shape) if i != axis)
    made = []
    for k in range(value.shape[axis]):
        start, stop = [0] * len(value.shape), list(value.shape)
        start[axis], stop[axis] = k, k + 1
        cut = sliced(emitter, value, start, stop, [1] * len(start))
        made.append(emitter.reshaped(cut, shape))
    return made


@rule("pad")
def _pad(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    """Between elements too, and cut off where the padding is below zero."""
    from tvm import tirx

    value, fill = emitter.full(values[0]), values[1]
    config = equation.params["padding_config"]
    shape = tuple(equation.outvars[0].aval.shape)

    def expression(x: Any, *fills: Any) -> Any:
        def outside() -> Any:
            return fills[0]() if fills else tirx.const(fill.data.item(), value.dtype)

        low, steps = [c[0] for c in config], [1 + c[2] for c in config]
        return padded(x, shape, low, steps, outside)

    operands = [value] if fill.constant else [value, fill]
    return emitter.te(expression, operands, shape, value.dtype, name="pad")


@rule("tile")
@lazy
def _tile(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    value, shape = values[0], tuple(equation.outvars[0].aval.shape)
    if all(
        old == new or held == 1
        for old, new, held in zip(value.shape, shape, value.held, strict=True)
    ):
        return Value(value.data, shape, value.held, value.dtype)
    value = emitter.full(value)
    if value.constant:
        return Value.of(np.tile(value.data, equation.params["reps"]))
    from tvm import tirx

    def index(*at: Any) -> list[Any]:
        return [tirx.indexmod(i, n) for i, n in zip(at, value.shape, strict=True)]

    return emitter.indexed(value, shape, index, name="tile")
