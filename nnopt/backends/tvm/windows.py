"""Reductions over axes and over windows."""

from collections.abc import Callable
from typing import Any

from nnopt.backends.tvm.emit import Emitter, rule
from nnopt.backends.tvm.values import Value


def _reducers() -> dict[str, tuple[Callable[..., Any], Callable[[str], Any]]]:
    """By kind: of expression and axes -> reduction, and what an empty one is."""
    from tvm import te, tirx

    def prod(x: Any, axis: Any) -> Any:
        return te.comm_reducer(lambda a, b: a * b, lambda dtype: tirx.const(1, dtype))(x, axis=axis)

    return {
        "sum": (te.sum, lambda dtype: tirx.const(0, dtype)),
        "max": (te.max, tirx.min_value),
        "min": (te.min, tirx.max_value),
        "prod": (prod, lambda dtype: tirx.const(1, dtype)),
    }


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
def _reduce(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    return _over(emitter, values[0], equation.params["axes"], equation.primitive.name[7:])


@rule("reduce_and", "reduce_or")
def _logical(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    from tvm import te, topi

    kind = "min" if equation.primitive.name == "reduce_and" else "max"
    value = emitter.full(values[0])
    number = emitter.te(lambda x: topi.cast(x, "int32"), [value], value.shape, "int32", name="cast")
    made = _over(emitter, number, equation.params["axes"], kind)
    return emitter.te(
        lambda x: te.compute(x.shape, lambda *at: x[at] != 0, name="bool"),
        [made], made.shape, "bool", name="bool",
    )  # fmt: skip


def _over(emitter: Emitter, value: Value, axes: Any, kind: str) -> Value:
    from tvm import te

    value = emitter.full(value)
    left = [i for i in range(len(value.shape)) if i not in axes]
    shape = tuple(value.shape[i] for i in left)
    if not axes:
        return value

    def expression(x: Any) -> Any:
        over = {i: te.reduce_axis((0, value.shape[i]), f"r{i}") for i in axes}
        reducer, _ = _reducers()[kind]

        def element(*at: Any) -> Any:
            places = dict(zip(left, at, strict=False)) | over
            return reducer(
                x[tuple(places[i] for i in range(len(value.shape)))], axis=list(over.values())
            )

        return te.compute(shape, element, name=f"reduce_{kind}")

    return emitter.te(expression, [value], shape, value.dtype, name=f"reduce_{kind}")


@rule("argmax", "argmin")
def _arg(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    """The first of equal ones."""
    from tvm import topi

    value, (axis,) = emitter.full(values[0]), equation.params["axes"]
    function = getattr(topi, equation.primitive.name)
    dtype = str(equation.outvars[0].aval.dtype)
    shape = tuple(equation.outvars[0].aval.shape)
    return emitter.te(
        lambda x: topi.cast(function(x, axis=axis, select_last_index=False), dtype),
        [value], shape, dtype, name=equation.primitive.name,
    )  # fmt: skip


@rule("cumsum", "cumprod")
def _cumulative(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    """As a sum over all elements, those behind counted as none: axes here are short."""
    from tvm import te, tirx

    value = emitter.full(values[0])
    axis, turned = equation.params["axis"], equation.params["reverse"]
    reducer, empty = _reducers()[{"cumsum": "sum", "cumprod": "prod"}[equation.primitive.name]]

    def expression(x: Any) -> Any:
        r = te.reduce_axis((0, value.shape[axis]), "r")

        def element(*at: Any) -> Any:
            where = [*at[:axis], r, *at[axis + 1 :]]
            counts = r >= at[axis] if turned else r <= at[axis]
            return reducer(tirx.if_then_else(counts, x[tuple(where)], empty(value.dtype)), axis=r)

        return te.compute(value.shape, element, name="cumulative")

    return emitter.te(expression, [value], value.shape, value.dtype, name="cumulative")


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _window(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    """Windows of any rank, with strides, padding and dilation of both."""
    from tvm import te, tirx

    value, p = emitter.full(values[0]), equation.params
    kind = equation.primitive.name.rsplit("_", 1)[1]
    shape = tuple(equation.outvars[0].aval.shape)
    rank = len(shape)
    window, strides, padding = p["window_dimensions"], p["window_strides"], p["padding"]
    base, dilation = p["base_dilation"], p["window_dilation"]

    def expression(x: Any) -> Any:
        reducer, empty = _reducers()[kind]
        axes = {a: te.reduce_axis((0, n), f"w{a}") for a, n in enumerate(window) if n > 1}
        source = x
        read = [
            (n - 1) * s + (w - 1) * d + 1
            for n, s, w, d in zip(shape, strides, window, dilation, strict=True)
        ]
        if any(lo or hi for lo, hi in padding) or any(b > 1 for b in base):

            def padded(*at: Any) -> Any:
                where, conditions = [], []
                for i, (lo, _), b, size, whole in zip(
                    at, padding, base, value.shape, read, strict=True
                ):
                    place = i - lo
                    if lo > 0:
                        conditions.append(place >= 0)
                    if whole - lo > (size - 1) * b + 1:
                        conditions.append(place <= (size - 1) * b)
                    if b > 1:
                        conditions.append(tirx.indexmod(place, b) == 0)
                    where.append(place if b == 1 else tirx.indexdiv(place, b))
                if not conditions:
                    return x[tuple(where)]
                inside = conditions[0] if len(conditions) == 1 else tirx.all(*conditions)
                return tirx.if_then_else(inside, x[tuple(where)], empty(value.dtype))

            source = te.compute(tuple(read), padded, name="pad")

        def element(*at: Any) -> Any:
            where = tuple(
                at[a] * strides[a] + (axes[a] * dilation[a] if a in axes else 0)
                for a in range(rank)
            )
            if not axes:
                return source[where]
            return reducer(source[where], axis=list(axes.values()))

        return te.compute(shape, element, name="window")

    return emitter.te(expression, [value], shape, value.dtype, name="window")


@rule("reduce_window")
def _any_window(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    raise emitter.unsupported(equation, " of another operation than sum, max and min")
