"""Convolutions and contractions."""

import math
from typing import Any

from nnopt.backends.tvm.conv import ConvWorkload
from nnopt.backends.tvm.emit import Emitter, rule
from nnopt.backends.tvm.values import Value


@rule("conv_general_dilated")
def _conv(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    """Any layout becomes channels last."""
    x, kernel = (_as(emitter, v, str(equation.outvars[0].aval.dtype)) for v in values)
    p = equation.params
    if p["batch_group_count"] != 1:
        raise emitter.unsupported(equation, " with batch_group_count")
    numbers = p["dimension_numbers"]
    batch, channels, *spatial = numbers.lhs_spec
    x = emitter.transposed(x, [batch, *spatial, channels])
    outputs, inputs, *window = numbers.rhs_spec
    kernel = emitter.transposed(kernel, [*window, inputs, outputs])
    low, high = zip(*p["padding"], strict=True) if p["padding"] else ((), ())
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
    (left_axes, right_axes), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = (_as(emitter, v, str(equation.outvars[0].aval.dtype)) for v in values)
    shape = tuple(equation.outvars[0].aval.shape)
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
