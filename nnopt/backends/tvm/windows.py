"""Reductions over axes and over windows."""

from collections.abc import Callable
from typing import Any

from jax.extend import core as jex

from nnopt.backends.tvm.arithmetic import highest, lowest
from nnopt.backends.tvm.emit import Emitter, rule
from nnopt.backends.tvm.padding import padded
from nnopt.backends.tvm.scalars import equal, greater, is_nan, lesser
from nnopt.backends.tvm.values import Value


def _reducers() -> dict[str, tuple[Callable[..., Any], Callable[[str], Any]]]:
    """By kind: of expression and axes -> reduction, and of a type -> what an empty one is."""
    from tvm import te, tirx

    def made(
        function: Callable[[Any, Any], Any], empty: Callable[[str], float]
    ) -> tuple[Callable[..., Any], Any]:
        def identity(dtype: str) -> Any:
            return tirx.const(empty(dtype), dtype)

        return te.comm_reducer(function, identity), identity

    return {
        "sum": (te.sum, lambda dtype: tirx.const(0, dtype)),
        "max": made(greater, lowest),
        "min": made(lesser, highest),
        "prod": made(lambda a, b: a * b, lambda dtype: 1),
    }


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
def _reduce(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    return _over(emitter, values[0], equation.params["axes"], equation.primitive.name[7:])


@rule("reduce_and", "reduce_or")
def _logical(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    if values[0].dtype != "bool":
        raise emitter.unsupported(equation, " of the bits of integers")
    kind = "min" if equation.primitive.name == "reduce_and" else "max"
    return _over(emitter, values[0], equation.params["axes"], kind)


def _with_numbers(emitter: Emitter, value: Value, function: Callable[[Value], Value]) -> Value:
    """What a function makes of booleans as 0 and 1: TVM reduces no booleans."""
    from tvm import te, topi

    value = emitter.full(value)
    if value.dtype != "bool":
        return function(value)
    number = emitter.te(lambda x: topi.cast(x, "int32"), [value], value.shape, "int32", name="cast")
    made = function(number)
    return emitter.te(
        lambda x: te.compute(x.shape, lambda *at: x[at] != 0, name="bool"),
        [made], made.shape, "bool", name="bool",
    )  # fmt: skip


def _over(emitter: Emitter, value: Value, axes: Any, kind: str) -> Value:
    return _with_numbers(emitter, value, lambda v: _over_numbers(emitter, v, axes, kind))


def _over_numbers(emitter: Emitter, value: Value, axes: Any, kind: str) -> Value:
    from tvm import te

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
    """The first of equal ones, or the first that is no number."""
    from tvm import te, tirx

    value, (axis,) = emitter.full(values[0]), equation.params["axes"]
    dtype = str(equation.outvars[0].aval.dtype)
    kind = {"argmax": "max", "argmin": "min"}[equation.primitive.name]
    best = _over(emitter, value, (axis,), kind)

    # The least place that holds it. Not one reduction of pairs, which TVM does wrong in vectors.
    def expression(x: Any, b: Any) -> Any:
        reducer, none = _reducers()["min"]
        r = te.reduce_axis((0, value.shape[axis]), "r")

        def element(*at: Any) -> Any:
            at = at if best.shape else ()
            one, other = x[(*at[:axis], r, *at[axis:])], b[at]
            found = tirx.Or(equal(one, other), tirx.And(is_nan(one), is_nan(other)))
            return reducer(tirx.Select(found, tirx.Cast(dtype, r), none(dtype)), axis=r)

        return te.compute(best.shape, element, name="arg")

    return emitter.te(expression, [value, best], best.shape, dtype, name=equation.primitive.name)


@rule("cumsum", "cumprod", "cummax", "cummin")
def _cumulative(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    """As a sum over all elements, those behind counted as none: axes here are short."""
    from tvm import te, tirx

    value = emitter.full(values[0])
    axis, turned = equation.params["axis"], equation.params["reverse"]
    reducer, empty = _reducers()[equation.primitive.name[3:]]

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
    return _windows(emitter, equation, values[0], equation.primitive.name.rsplit("_", 1)[1], None)


_KINDS = {"add": "sum", "max": "max", "min": "min", "mul": "prod"}


@rule("reduce_window")
def _any_window(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    """Of one of these operations, beginning with any number, which is also what stands around the array."""
    combine = equation.params["jaxpr"]
    equations = combine.eqns
    # Of the two operands and of nothing else, each once: `lambda a, b: a + a` is one equation too.
    plain = (
        len(equations) == 1
        and not any(isinstance(v, jex.Literal) for v in equations[0].invars)
        and {*equations[0].invars} == {*combine.invars}
        and equations[0].outvars == combine.outvars
    )
    kind = _KINDS.get(equations[0].primitive.name) if plain else None
    if kind is None or len(values) != 2 or not values[1].constant:
        raise emitter.unsupported(equation, " of another operation than sum, max, min and product")
    start = values[1].data.item()
    if start != {"sum": 0, "prod": 1}.get(kind, start):  # how often it counts is not said
        raise emitter.unsupported(equation, f" of {kind} beginning with {start}")
    return _windows(emitter, equation, values[0], kind, start)


def _windows(
    emitter: Emitter, equation: Any, value: Value, kind: str, start: float | None
) -> Value:
    """Windows of any rank, with strides, padding and dilation of both."""
    return _with_numbers(
        emitter, value, lambda v: _windows_of_numbers(emitter, equation, v, kind, start)
    )


def _windows_of_numbers(
    emitter: Emitter, equation: Any, value: Value, kind: str, start: float | None
) -> Value:
    from tvm import te, tirx

    p = equation.params
    shape = tuple(equation.outvars[0].aval.shape)
    rank = len(shape)
    window, strides, padding = p["window_dimensions"], p["window_strides"], p["padding"]
    base, dilation = p["base_dilation"], p["window_dilation"]

    def expression(x: Any) -> Any:
        reducer, empty = _reducers()[kind]
        outside = empty(value.dtype) if start is None else tirx.const(start, value.dtype)
        axes = {a: te.reduce_axis((0, n), f"w{a}") for a, n in enumerate(window) if n > 1}
        source = x
        read = [
            (n - 1) * s + (w - 1) * d + 1
            for n, s, w, d in zip(shape, strides, window, dilation, strict=True)
        ]
        if any(lo or hi for lo, hi in padding) or any(b > 1 for b in base):
            source = padded(x, read, [lo for lo, _ in padding], base, lambda: outside)

        def element(*at: Any) -> Any:
            where = tuple(
                at[a] * strides[a] + (axes[a] * dilation[a] if a in axes else 0)
                for a in range(rank)
            )
            if not axes:
                return source[where]
            return reducer(source[where], axis=list(axes.values()))

        made = te.compute(shape, element, name="window")
        if start is None:
            return made
        join = {
            "sum": lambda a, b: a + b,
            "prod": lambda a, b: a * b,
            "max": greater,
            "min": lesser,
        }[kind]
        return te.compute(shape, lambda *at: join(made[at], outside), name="start")

    return emitter.te(expression, [value], shape, value.dtype, name="window")
