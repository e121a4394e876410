"""Element-wise primitives as functions of TVM's expressions, as exact as JAX's, and like JAX where a number is no number."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from nnopt.backends.tvm.arithmetic import (
    add,
    constant,
    divide,
    dtype_of,
    integer_range,
    library,
    multiply,
    negative,
    remainder,
    subtract,
)

_LIBRARY = (
    "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "cbrt", "erfc", "log1p",
)  # fmt: skip
"""Functions of the C library, which has them to the last digit or so; TVM has none, or poor ones."""
_TANH_NUMERATOR = (
    -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08, 1.48572235717979e-05,
    6.37261928875436e-04, 4.89352455891786e-03,
)  # fmt: skip
_TANH_DENOMINATOR = (
    1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03,
)  # fmt: skip
_TANH_END = 9.0
"""Where the quotient of these two is 1. They are Eigen's, which XLA uses, too: the relative error is below 3e-7."""


def greater(x: Any, y: Any) -> Any:
    """The greater one; NaN if one of them is, which TVM's own maximum forgets."""
    from tvm import tirx

    if dtype_of(x) == "bool":
        return tirx.Or(x, y)
    return _extreme(x, y, lambda a, b: a > b)


def lesser(x: Any, y: Any) -> Any:
    """The lesser one; NaN if one of them is."""
    from tvm import tirx

    if dtype_of(x) == "bool":
        return tirx.And(x, y)
    return _extreme(x, y, lambda a, b: a < b)


def _extreme(x: Any, y: Any, beats: Callable[[Any, Any], Any]) -> Any:
    from tvm import tirx as t

    # A comparison with NaN is false, so that the second of the select's arms is what may be NaN. One instruction of x86.
    if isinstance(y, t.FloatImm):
        return t.Select(beats(y, x), y, x)
    if isinstance(x, t.FloatImm) or not dtype_of(x).startswith("float"):
        return t.Select(beats(x, y), x, y)
    return t.Select(t.Or(beats(x, y), is_nan(x)), x, y)


def once(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function, with a name for its operand: what is inlined where it is read ten times would be compiled ten times."""

    def bound(x: Any) -> Any:
        from tvm import tirx as t

        x = t.convert(x) if not hasattr(x, "ty") and not hasattr(x, "dtype") else x
        name = t.Var("operand", dtype_of(x))
        return t.Let(name, x, function(name))

    return bound


@once
def tanh(x: Any) -> Any:
    """As TVM's own has no digits left at small numbers."""
    from tvm import tirx as t

    if dtype_of(x) != "float32":
        return library("tanh", x)
    end = constant(x, _TANH_END)
    inside = t.Select(x > end, end, t.Select(x < -end, -end, x))
    square = inside * inside

    def polynomial(coefficients: tuple[float, ...]) -> Any:
        first, *rest = (constant(x, c) for c in coefficients)
        return functools.reduce(lambda value, c: value * square + c, rest, first)

    quotient = inside * polynomial(_TANH_NUMERATOR) / polynomial(_TANH_DENOMINATOR)
    return t.Select(t.abs(x) < constant(x, 0.0004), x, quotient)


@once
def expm1(x: Any) -> Any:
    """`tanh(x / 2) = (e^x - 1) / (e^x + 1)`: no digits are lost at small numbers."""
    from tvm import tirx as t

    one, half = constant(x, 1), constant(x, 0.5)
    return t.Select(t.abs(x) > half, t.exp(x) - one, tanh(x * half) * (t.exp(x) + one))


def is_nan(x: Any) -> Any:
    """Whether a number is none. `x != x` does not tell: TVM's machine code says no for NaN, and so it does for `not (x == x)`."""
    from tvm import tirx

    return tirx.isnan(x) if dtype_of(x).startswith("float") else tirx.const(False, "bool")


def unequal(x: Any, y: Any) -> Any:
    """As JAX has it: NaN is unequal to everything."""
    from tvm import tirx as t

    if dtype_of(x) == "bool":
        return t.Or(t.And(x, t.Not(y)), t.And(y, t.Not(x)))
    if not dtype_of(x).startswith("float"):
        return t.NE(x, y)
    return t.Or(t.NE(x, y), t.Or(is_nan(x), is_nan(y)))


def equal(x: Any, y: Any) -> Any:
    """NaN is equal to nothing."""
    from tvm import tirx as t

    if dtype_of(x) == "bool":
        return t.Or(t.And(x, y), t.And(t.Not(x), t.Not(y)))
    return t.EQ(x, y)


def less(x: Any, y: Any) -> Any:
    """Whether it is; false is less than true, which TVM cannot compare."""
    from tvm import tirx as t

    return t.And(t.Not(x), y) if dtype_of(x) == "bool" else x < y


def less_or_equal(x: Any, y: Any) -> Any:
    """As `less`, and true of what is equal."""
    from tvm import tirx as t

    return t.Or(t.Not(x), y) if dtype_of(x) == "bool" else x <= y


def cast(x: Any, new_dtype: Any) -> Any:
    """To an integer as JAX does: cut off, the nearest where there is none, 0 for NaN."""
    from tvm import tirx as t

    old, new = dtype_of(x), str(np.dtype(new_dtype))
    if new == "bool":
        return unequal(x, constant(x, 0))
    if not old.startswith("float") or new.startswith("float"):
        return t.Cast(new, x)
    low, high = integer_range(new)
    # `float(high)` may be one beyond: from there on it is `high`.
    cut = t.Select(x <= constant(x, float(low)), t.const(low, new), t.Cast(new, x))
    cut = t.Select(x >= constant(x, float(high)), t.const(high, new), cut)
    return t.Select(is_nan(x), t.const(0, new), cut)


def _sign(x: Any) -> Any:
    from tvm import tirx as t

    zero, one = constant(x, 0), constant(x, 1)
    if dtype_of(x).startswith("uint"):
        return t.Select(x > zero, one, zero)
    return t.Select(x > zero, one, t.Select(x < zero, -one, x))


def _integer_pow(x: Any, y: int) -> Any:
    if y < 0:
        return constant(x, 1) / _integer_pow(x, -y)
    result, square = None, x
    while y:
        if y & 1:
            result = square if result is None else multiply(result, square)
        square, y = multiply(square, square), y >> 1
    return constant(x, 1) if result is None else result


def _round(x: Any, rounding_method: Any) -> Any:
    from tvm import tirx as t

    if rounding_method == jax.lax.RoundingMethod.TO_NEAREST_EVEN:
        return t.nearbyint(x)
    down = t.floor(t.abs(x))
    away = t.Select(t.abs(x) - down >= constant(x, 0.5), down + constant(x, 1), down)
    return t.Select(x < constant(x, 0), -away, away)


def _select(which: Any, *cases: Any) -> Any:
    from tvm import tirx as t

    if dtype_of(which) == "bool":
        return t.Select(which, cases[1], cases[0])
    result = cases[-1]
    for number in range(len(cases) - 2, -1, -1):
        result = t.Select(t.EQ(which, constant(which, number)), cases[number], result)
    return result


def _shifted(shift: Callable[[Any, Any], Any], far: Callable[[Any], Any]) -> Callable[..., Any]:
    """Shifts by the width or more are undefined in machine code; JAX has them give what is left."""
    from tvm import tirx as t

    def function(x: Any, by: Any) -> Any:
        width = np.dtype(dtype_of(x)).itemsize * 8
        inside = t.And(by >= constant(by, 0), by < constant(by, width))
        return t.Select(inside, shift(x, t.Select(inside, by, constant(by, 0))), far(x))

    return function


def _right(x: Any, by: Any, unsigned: bool) -> Any:
    """TVM looks at the type to tell which shift is meant; JAX has both for both."""
    from tvm import tirx as t

    dtype = dtype_of(x)
    wanted = ("u" if unsigned else "") + dtype.removeprefix("u")
    if wanted == dtype:
        return x >> by
    return t.reinterpret(dtype, t.reinterpret(wanted, x) >> t.reinterpret(wanted, by))


def _sign_bits(x: Any) -> Any:
    return _right(x, constant(x, np.dtype(dtype_of(x)).itemsize * 8 - 1), unsigned=False)


@functools.cache
def expressions() -> dict[str, Callable[..., Any]]:
    """By primitive: of the operands' elements and the equation's parameters -> element."""
    from tvm import tirx as t

    def boolean(a: Callable[..., Any], b: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, *y: (a if dtype_of(x) == "bool" else b)(x, *y)

    def zero(x: Any) -> Any:
        return constant(x, 0)

    return {name: functools.partial(library, name) for name in _LIBRARY} | {
        "add": add,
        "add_any": add,
        "sub": subtract,
        "mul": multiply,
        "div": divide,
        "rem": remainder,
        "max": greater,
        "min": lesser,
        "clamp": lambda low, x, high: _clamped(low, x, high),
        "pow": lambda x, y: t.power(x, t.Cast(dtype_of(x), y)),
        "atan2": lambda x, y: t.atan2(x, y),
        "neg": negative,
        "abs": lambda x: x if dtype_of(x).startswith("uint") else t.abs(x),
        "sign": _sign,
        "exp": lambda x: t.exp(x),
        "exp2": lambda x: t.exp2(x),
        "log": lambda x: t.log(x),
        "expm1": expm1,
        "tanh": tanh,
        "logistic": lambda x: constant(x, 1) / (constant(x, 1) + t.exp(-x)),
        "sqrt": lambda x: t.sqrt(x),
        "rsqrt": lambda x: constant(x, 1) / t.sqrt(x),
        "square": lambda x: multiply(x, x),
        "integer_pow": _integer_pow,
        "erf": lambda x: t.erf(x),
        "sin": lambda x: t.sin(x),
        "cos": lambda x: t.cos(x),
        "floor": lambda x: t.floor(x),
        "ceil": lambda x: t.ceil(x),
        "round": _round,
        "is_finite": lambda x: t.isfinite(x),
        "eq": equal,
        "ne": unequal,
        "lt": less,
        "le": less_or_equal,
        "gt": lambda x, y: less(y, x),
        "ge": lambda x, y: less_or_equal(y, x),
        "and": boolean(t.And, lambda x, y: x & y),
        "or": boolean(t.Or, lambda x, y: x | y),
        "xor": boolean(unequal, lambda x, y: x ^ y),
        "not": boolean(t.Not, lambda x: ~x),
        "shift_left": _shifted(lambda x, by: x << by, zero),
        "shift_right_arithmetic": _shifted(functools.partial(_right, unsigned=False), _sign_bits),
        "shift_right_logical": _shifted(functools.partial(_right, unsigned=True), zero),
        "select_n": _select,
        "convert_element_type": cast,
        "copy": lambda x: x,
        "copy_p": lambda x: x,
        "stop_gradient": lambda x: x,
    }  # fmt: skip


def _clamped(low: Any, x: Any, high: Any) -> Any:
    from tvm import tirx as t

    x = t.Select(less(x, low), low, x)  # a comparison with NaN is false, so that it stays NaN
    return t.Select(less(high, x), high, x)


NAMES = (
    *_LIBRARY, "add", "add_any", "sub", "mul", "div", "rem", "max", "min", "clamp", "pow", "atan2", "neg", "abs", "sign", "exp",
    "exp2", "log", "expm1", "tanh", "logistic", "sqrt", "rsqrt", "square", "integer_pow", "erf", "sin", "cos", "floor", "ceil",
    "round", "is_finite", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "select_n", "convert_element_type", "copy", "copy_p", "stop_gradient",
)  # fmt: skip
"""Keys of `expressions`, which need no TVM."""
