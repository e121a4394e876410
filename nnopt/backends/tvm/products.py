"""Convolutions and contractions."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nnopt.backends.tvm.conv import ConvWorkload
from nnopt.backends.tvm.emit import Emitter, rule
from nnopt.backends.tvm.values import Value


@rule("conv_general_dilated")
def _conv(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    """Any layout becomes channels last."""
    out = equation.outvars[0].aval
    if 0 in (*out.shape, *values[0].shape, *values[1].shape):
        return zeros(emitter, out.shape, str(out.dtype))
    x, kernel = (_as(emitter, v, str(out.dtype)) for v in values)
    p = equation.params
    if p["batch_group_count"] != 1:
        raise emitter.unsupported(equation, " with batch_group_count")
    numbers = p["dimension_numbers"]
    batch, channels, *spatial = numbers.lhs_spec
    x = emitter.transposed(x, [batch, *spatial, channels])
    outputs, inputs, *window = numbers.rhs_spec
    kernel = emitter.transposed(kernel, [*window, inputs, outputs])
    if not spatial:  # a dense layer, of one element along an axis
        x = emitter.reshaped(x, (x.shape[0], 1, x.shape[-1]))
        kernel = emitter.reshaped(kernel, (1, *kernel.shape))
        one = (1,)
        work = ConvWorkload(
            x.shape[0], one, x.shape[-1], kernel.shape[-1], one, one, (0,), (0,), one, one, p["feature_group_count"], x.dtype
        )  # fmt: skip
        made = emitter.reshaped(emitter.conv(x, kernel, work), (work.batch, work.outputs))
        return emitter.transposed(made, numbers.out_spec)
    low, high = zip(*p["padding"], strict=True)
    work = ConvWorkload(
        x.shape[0], x.shape[1:-1], x.shape[-1], kernel.shape[-1], kernel.shape[:-2],
        tuple(p["window_strides"]), tuple(low), tuple(high), tuple(p["rhs_dilation"]), tuple(p["lhs_dilation"]),
        p["feature_group_count"], x.dtype,
    )  # fmt: skip
    made = emitter.conv(x, kernel, work)
    # The result's axes, in the order `[batch, *spatial, channels]`, go where `out_spec` wants them.
    batch, channels, *spatial = numbers.out_spec
    order = [batch, *spatial, channels]
    return emitter.transposed(made, [order.index(i) for i in range(len(order))])


@rule("nnopt_conv")
def _nnopt_conv(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    """That of `nnopt.layers.Conv`; lowerings are XLA's matter."""
    x, kernel = values
    out = equation.outvars[0].aval
    if 0 in (*out.shape, *x.shape, *kernel.shape):
        return zeros(emitter, out.shape, str(out.dtype))
    shape = equation.params["shape"]
    low, high = zip(*shape.padding, strict=True)
    work = ConvWorkload(
        x.shape[0], x.shape[1:-1], x.shape[-1], kernel.shape[-1], kernel.shape[:-2],
        tuple(shape.strides), tuple(low), tuple(high), tuple(shape.dilation), (1, 1), shape.groups, x.dtype,
    )  # fmt: skip
    return emitter.conv(x, kernel, work)


@rule("dot_general")
def _dot_general(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    """A contraction with a constant is a convolution of window 1; of two arrays, a product for each member of the batch."""
    from tvm import te

    dtype = str(equation.outvars[0].aval.dtype)
    if dtype != "bool":
        return _contracted(emitter, equation, values, dtype)
    counts = _contracted(emitter, equation, values, "int32")  # of pairs that are both true
    return emitter.te(
        lambda x: te.compute(x.shape, lambda *at: x[at] != 0, name="bool"),
        [counts], counts.shape, "bool", name="bool",
    )  # fmt: skip


def _contracted(emitter: Emitter, equation: Any, values: list[Value], dtype: str) -> Value:
    (left_axes, right_axes), (left_batch, right_batch) = equation.params["dimension_numbers"]
    shape = tuple(equation.outvars[0].aval.shape)
    if 0 in (*shape, *values[0].shape, *values[1].shape):
        return zeros(emitter, shape, dtype)
    left, right = (_as(emitter, v, dtype) for v in values)
    left_free = _free(left, left_axes, left_batch)
    right_free = _free(right, right_axes, right_batch)
    k = math.prod(left.shape[i] for i in left_axes)
    m = math.prod(left.shape[i] for i in left_free)
    n = math.prod(right.shape[i] for i in right_free)
    if not left_batch and left.constant and not right.constant:
        # The constant is packed, so it has to be on the right.
        swapped = _dense(emitter, right, right_free, right_axes, left, left_free, left_axes, n, k, m)  # fmt: skip
        result = emitter.reshaped(swapped, [right.shape[i] for i in right_free] + [left.shape[i] for i in left_free])  # fmt: skip
        moved = [*range(len(right_free), len(shape)), *range(len(right_free))]
        return emitter.transposed(result, moved)
    if not left_batch and right.constant:
        made = _dense(emitter, left, left_free, left_axes, right, right_free, right_axes, m, k, n)
        return emitter.reshaped(made, shape)
    b = math.prod(left.shape[i] for i in left_batch)
    left = emitter.reshaped(
        emitter.transposed(left, [*left_batch, *left_free, *left_axes]), (b, m, k)
    )
    right = emitter.reshaped(
        emitter.transposed(right, [*right_batch, *right_axes, *right_free]), (b, k, n)
    )
    return emitter.reshaped(_batched(emitter, left, right), shape)


def zeros(emitter: Emitter, shape: Sequence[int], dtype: str) -> Value:
    """Sums of nothing, or an array without elements, of which TVM can store no constant."""
    from tvm import te, tirx

    held = tuple(min(n, 1) for n in shape)
    if 0 not in held:
        return Value(np.zeros(held, dtype), tuple(shape), held, dtype)
    return emitter.te(
        lambda: te.compute(tuple(shape), lambda *_: tirx.const(0, dtype), name="empty"), [], shape, dtype, name="empty"
    )  # fmt: skip


def _as(emitter: Emitter, value: Value, dtype: str) -> Value:
    """In the type that sums are made in."""
    from tvm import topi

    if value.dtype == dtype:
        return value
    if value.constant:
        return Value(value.data.astype(dtype), value.shape, value.held, dtype)
    return emitter.te(
        lambda x: topi.cast(x, dtype), [value], value.held, dtype, value.shape, "cast"
    )


def _free(value: Value, *used: Any) -> list[int]:
    return [i for i in range(len(value.shape)) if not any(i in u for u in used)]


def _dense(
    emitter: Emitter,
    x: Value, x_free: list[int], x_axes: Any, kernel: Value, free: list[int], axes: Any, m: int, k: int, n: int,
) -> Value:  # fmt: skip
    x = emitter.reshaped(emitter.transposed(x, [*x_free, *x_axes]), (1, m, k))
    kernel = emitter.reshaped(emitter.transposed(kernel, [*axes, *free]), (1, k, n))
    one = (1,)
    work = ConvWorkload(1, (m,), k, n, one, one, (0,), (0,), one, one, 1, x.dtype)
    return emitter.conv(x, kernel, work)


def _batched(emitter: Emitter, left: Value, right: Value) -> Value:
    from tvm import te

    (b, m, k), n = left.shape, right.shape[-1]

    def expression(x: Any, y: Any) -> Any:
        r = te.reduce_axis((0, k), "k")
        return te.compute(
            (b, m, n),
            lambda g, i, j: te.sum(x[g, i, r] * y[g, r, j], axis=r),
            name="matmul",
        )

    return emitter.te(expression, [left, right], (b, m, n), left.dtype, name="matmul")
