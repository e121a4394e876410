"""Primitives that read or write elements at places that are numbers themselves."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import GatherScatterMode

from nnopt.backends.tvm.arithmetic import highest, lowest
from nnopt.backends.tvm.emit import Emitter, rule
from nnopt.backends.tvm.shapes import sliced
from nnopt.backends.tvm.values import Value


@rule("gather")
def _gather(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    """Elements at places of an integer array. Beyond the ends: the nearest, or what the mode fills in."""
    from tvm import te, tirx

    source, places = emitter.full(values[0]), emitter.full(values[1])
    p = equation.params
    numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
    shape = tuple(equation.outvars[0].aval.shape)
    batching = tuple(numbers.operand_batching_dims)
    batch = [i for i in range(len(shape)) if i not in numbers.offset_dims]
    # Axes of the operand that have an axis of their own in the result.
    offset = [
        i
        for i in range(len(source.shape))
        if i not in numbers.collapsed_slice_dims and i not in batching
    ]
    bounds = [n - s for n, s in zip(source.shape, sizes, strict=True)]
    fills = p["mode"] == GatherScatterMode.FILL_OR_DROP and not _all_inside(places, bounds, numbers)

    def expression(x: Any, where: Any) -> Any:
        def element(*at: Any) -> Any:
            index: list[Any] = [0] * len(source.shape)
            at_batch = [at[i] for i in batch]
            inside = []
            for number, axis in enumerate(numbers.start_index_map):
                start = tirx.Cast("int64", where[(*at_batch, number)])
                index[axis] = _within(start, bounds[axis])
                inside.append(tirx.EQ(start, index[axis]))
            for axis, i in zip(offset, numbers.offset_dims, strict=True):
                index[axis] = index[axis] + at[i]
            for axis, i in zip(batching, numbers.start_indices_batching_dims, strict=True):
                index[axis] = at_batch[i]
            found = x[tuple(index)]
            if not fills or not inside:
                return found
            return tirx.Select(
                _all(inside), found, tirx.const(_fill(p, source.dtype), source.dtype)
            )

        return te.compute(shape, element, name="gather")

    return emitter.te(expression, [source, places], shape, source.dtype, name="gather")


def _all_inside(places: Value, bounds: Sequence[int], numbers: Any) -> bool:
    if not places.constant:
        return False
    table = np.moveaxis(places.data, -1, 0)
    return all(
        (row >= 0).all() and (row <= bounds[axis]).all()
        for row, axis in zip(table, numbers.start_index_map, strict=True)
    )


def _fill(params: dict[str, Any], dtype: str) -> Any:
    """What JAX fills in: see `jax.lax.gather`."""
    if params["fill_value"] is not None:
        return params["fill_value"]
    if dtype.startswith("float"):
        return np.nan
    return lowest(dtype) if dtype.startswith("int") else highest(dtype)


def _within(start: Any, last: int) -> Any:
    from tvm import tirx

    return tirx.min(tirx.max(start, tirx.const(0, "int64")), tirx.const(last, "int64"))


def _all(conditions: Sequence[Any]) -> Any:
    from tvm import tirx

    return conditions[0] if len(conditions) == 1 else tirx.all(*conditions)


def _starts(
    start: list[Value], shape: Sequence[int], sizes: Sequence[int], arrays: Sequence[Any]
) -> list[Any]:
    """Numbers, or expressions of the arrays, one for each start that is not known. What reaches beyond the end is moved back."""
    from tvm import tirx

    rest = iter(arrays)
    return [
        min(max(int(s.data), 0), n - size)
        if s.constant
        else _within(tirx.Cast("int64", next(rest)()), n - size)
        for s, n, size in zip(start, shape, sizes, strict=True)
    ]


@rule("dynamic_slice")
def _dynamic_slice(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    value, *start = values
    sizes = tuple(equation.params["slice_sizes"])
    unknown = [s for s in start if not s.constant]
    if not unknown:
        first = _starts(start, value.shape, sizes, ())
        last = [a + size for a, size in zip(first, sizes, strict=True)]
        return sliced(emitter, value, first, last, [1] * len(first))
    from tvm import te

    value = emitter.full(value)

    def expression(x: Any, *arrays: Any) -> Any:
        def element(*at: Any) -> Any:
            first = _starts(start, value.shape, sizes, arrays)
            return x[tuple(a + i for a, i in zip(first, at, strict=True))]

        return te.compute(sizes, element, name="slice")

    return emitter.te(expression, [value, *unknown], sizes, value.dtype, name="dynamic_slice")


@rule("dynamic_update_slice")
def _dynamic_update_slice(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    from tvm import te, tirx

    value, update, *start = (emitter.full(v) for v in values)
    unknown = [s for s in start if not s.constant]

    def expression(x: Any, u: Any, *arrays: Any) -> Any:
        def element(*at: Any) -> Any:
            first = _starts(start, value.shape, update.shape, arrays)
            where = [i - a for a, i in zip(first, at, strict=True)]
            inside = [
                c
                for i, n, whole in zip(where, update.shape, value.shape, strict=True)
                if n < whole
                for c in (i >= 0, i < n)
            ]
            if not inside:
                return u[tuple(where)]
            return tirx.if_then_else(_all(inside), u[tuple(where)], x[tuple(at)])

        return te.compute(value.shape, element, name="update")

    operands = [value, update, *unknown]
    return emitter.te(expression, operands, value.shape, value.dtype, name="dynamic_update_slice")


@rule("scatter", "scatter-add")
def _scatter(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    """At places that are known, each at most once: so that it is known where each element of the result comes from."""
    from tvm import te, tirx

    value, places, update = values
    adds, p = equation.primitive.name == "scatter-add", equation.params
    if not places.constant:
        raise emitter.unsupported(equation, " at places that depend on the input")
    value, update = emitter.full(value), emitter.full(update)
    numbers, mode = p["dimension_numbers"], p["mode"]
    with jax.ensure_compile_time_eval():
        nothing = jnp.zeros(value.shape, jnp.int32)
        count = jnp.ones(update.shape, jnp.int32)
        flat = jnp.arange(math.prod(update.shape), dtype=jnp.int32).reshape(update.shape)
        at = jnp.asarray(places.data)
        times = np.asarray(jax.lax.scatter_add(nothing, at, count, numbers, mode=mode))
        origin = np.asarray(jax.lax.scatter_add(nothing, at, flat, numbers, mode=mode))
    if times.max(initial=0) > 1:
        raise emitter.unsupported(equation, " at the same place twice")
    origin = np.where(times > 0, origin, -1).astype(np.int32)
    shape = value.shape

    def expression(x: Any, u: Any, origin: Any) -> Any:
        def element(*at: Any) -> Any:
            number = tirx.Cast("int64", origin[at])
            new = u[tuple(_unraveled(number, update.shape))]
            old = x[at]
            return tirx.if_then_else(number >= 0, old + new if adds else new, old)

        return te.compute(shape, element, name="scatter")

    return emitter.te(
        expression, [value, update, Value.of(origin)], shape, value.dtype, name="scatter"
    )


def _unraveled(number: Any, shape: Sequence[int]) -> list[Any]:
    from tvm import tirx

    index: list[Any] = []
    for size in reversed(shape):
        index.insert(0, tirx.indexmod(number, size))
        number = tirx.indexdiv(number, size)
    return index
