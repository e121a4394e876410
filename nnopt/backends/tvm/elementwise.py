"""Element-wise primitives as tensor expressions."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from nnopt.backends.tvm.emit import Emitter, rule
from nnopt.backends.tvm.values import Value


def _dtype(x: Any) -> str:
    """Type of an expression, or of an element of a tensor."""
    return str(x.dtype if hasattr(x, "dtype") else x.ty)


def _expressions() -> dict[str, Callable[..., Any]]:
    """By primitive: of the operands' elements and the equation's parameters -> element."""
    from tvm import tirx as t

    def log1p(x: Any) -> Any:
        # As `log(1 + x)` loses all digits of a small x, which `1 + x - 1` tells (Kahan).
        one = t.const(1, _dtype(x))
        u = one + x
        return t.Select(u == one, x, t.log(u) * x / (u - one))

    def expm1(x: Any) -> Any:
        one = t.const(1, _dtype(x))
        half = t.tanh(x / t.const(2, _dtype(x)))
        small = t.const(2, _dtype(x)) * half / (one - half)
        return t.Select(t.abs(x) < one, small, t.exp(x) - one)

    def rem(x: Any, y: Any) -> Any:
        return t.fmod(x, y) if "float" in _dtype(x) else t.truncmod(x, y)

    def sign(x: Any) -> Any:
        zero, one = t.const(0, _dtype(x)), t.const(1, _dtype(x))
        return t.Select(x > zero, one, t.Select(x < zero, -one, x))

    def integer_pow(x: Any, y: int) -> Any:
        if y < 0:
            return t.const(1, _dtype(x)) / integer_pow(x, -y)
        result, square = None, x
        while y:
            if y & 1:
                result = square if result is None else result * square
            square, y = square * square, y >> 1
        return t.const(1, _dtype(x)) if result is None else result

    def maximum(x: Any, y: Any) -> Any:
        return t.max(x, y)

    def cast(x: Any, new_dtype: Any) -> Any:
        name = str(np.dtype(new_dtype))
        if name == "bool":
            return x != t.const(0, _dtype(x))
        return t.Cast(name, x)

    def boolean(a: Callable[..., Any], b: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, *y: (a if _dtype(x) == "bool" else b)(x, *y)

    return {
        "add": lambda x, y: x + y,
        "add_any": lambda x, y: x + y,
        "sub": lambda x, y: x - y,
        "mul": lambda x, y: x * y,
        "div": lambda x, y: x / y if "float" in _dtype(x) else t.truncdiv(x, y),
        "rem": rem,
        "max": maximum,
        "min": lambda x, y: t.min(x, y),
        "pow": lambda x, y: t.power(x, t.Cast(_dtype(x), y)),
        "atan2": lambda x, y: t.atan2(x, y),
        "neg": lambda x: -x,
        "abs": lambda x: t.abs(x),
        "sign": sign,
        "exp": lambda x: t.exp(x),
        "exp2": lambda x: t.exp2(x),
        "log": lambda x: t.log(x),
        "log1p": lambda x: log1p(x),
        "expm1": lambda x: expm1(x),
        "tanh": lambda x: t.tanh(x),
        "logistic": lambda x: t.const(1, _dtype(x)) / (t.const(1, _dtype(x)) + t.exp(-x)),
        "sqrt": lambda x: t.sqrt(x),
        "rsqrt": lambda x: t.const(1, _dtype(x)) / t.sqrt(x),
        "square": lambda x: x * x,
        "integer_pow": integer_pow,
        "erf": lambda x: t.erf(x),
        "erfc": lambda x: t.const(1, _dtype(x)) - t.erf(x),
        "sin": lambda x: t.sin(x),
        "cos": lambda x: t.cos(x),
        "floor": lambda x: t.floor(x),
        "ceil": lambda x: t.ceil(x),
        "round": lambda x, rounding_method: (
            t.nearbyint(x) if rounding_method == jax.lax.RoundingMethod.TO_NEAREST_EVEN else t.round(x)
        ),
        "is_finite": lambda x: t.isfinite(x),
        "eq": lambda x, y: x == y,
        "ne": lambda x, y: x != y,
        "lt": lambda x, y: x < y,
        "le": lambda x, y: x <= y,
        "gt": lambda x, y: x > y,
        "ge": lambda x, y: x >= y,
        "and": boolean(t.all, lambda x, y: x & y),
        "or": boolean(t.any, lambda x, y: x | y),
        "xor": boolean(lambda x, y: x != y, lambda x, y: x ^ y),
        "not": boolean(t.Not, lambda x: ~x),
        "select_n": lambda which, *cases: _select(t, which, cases),
        "clamp": lambda low, x, high: t.min(t.max(x, low), high),
        "convert_element_type": cast,
        "copy": lambda x: x,
        "copy_p": lambda x: x,
        "stop_gradient": lambda x: x,
        "reduce_precision": lambda x: x,
    }  # fmt: skip


def _select(t: Any, which: Any, cases: Any) -> Any:
    if _dtype(which) == "bool":
        return t.Select(which, cases[1], cases[0])
    result = cases[-1]
    for number in range(len(cases) - 2, -1, -1):
        result = t.Select(which == t.const(number, _dtype(which)), cases[number], result)
    return result


_PARAMETERS = ("y", "new_dtype", "rounding_method")
NAMES = (
    "add", "add_any", "sub", "mul", "div", "rem", "max", "min", "pow", "atan2", "neg", "abs", "sign", "exp", "exp2", "log", "log1p",
    "expm1", "tanh", "logistic", "sqrt", "rsqrt", "square", "integer_pow", "erf", "erfc", "sin", "cos", "floor", "ceil", "round",
    "is_finite", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "select_n", "clamp", "convert_element_type", "copy",
    "copy_p", "stop_gradient", "reduce_precision",
)  # fmt: skip


def _elementwise(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    """Broadcasts what is held with size 1, or is a scalar."""
    (out,) = equation.outvars
    shape, dtype = tuple(out.aval.shape), str(out.aval.dtype)
    held = tuple(
        max((v.held[axis] for v in values if v.held), default=1) for axis in range(len(shape))
    )
    if all(v.constant for v in values):
        arrays = [np.broadcast_to(v.data, held) if v.held else v.data for v in values]
        with jax.ensure_compile_time_eval():
            result = np.asarray(equation.primitive.bind(*arrays, **equation.params))
        # Operands that are all scalars, or a size 1 that stands for more.
        return Value(np.broadcast_to(result, held), shape, held, dtype)
    from tvm import te, tirx

    function = _expressions()[equation.primitive.name]
    parameters = {k: v for k, v in equation.params.items() if k in _PARAMETERS}
    scalars = {i: v.data.item() for i, v in enumerate(values) if v.constant and v.data.size == 1}
    tensors = [v for i, v in enumerate(values) if i not in scalars]

    def expression(*arrays: Any) -> Any:
        def element(*at: Any) -> Any:
            rest = iter(zip(arrays, tensors, strict=True))
            operands = []
            for i, value in enumerate(values):
                if i in scalars:
                    operands.append(tirx.const(scalars[i], value.dtype))
                    continue
                array, tensor = next(rest)
                operands.append(
                    array[tuple(0 if n == 1 else a for a, n in zip(at, tensor.held, strict=False))]
                )
            result = function(*operands, **parameters)
            return result if _dtype(result) == dtype else tirx.Cast(dtype, result)

        return te.compute(held, element, name=equation.primitive.name)

    return emitter.te(expression, tensors, held, dtype, shape, equation.primitive.name)


_elementwise.lazy = True  # type: ignore[attr-defined]
rule(*NAMES)(_elementwise)


@rule("optimization_barrier")
def _barrier(emitter: Emitter, equation: Any, values: list[Value]) -> list[Value]:
    return values
