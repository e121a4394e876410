"""Arithmetic on TVM's expressions as JAX has it: sums are rounded where they stand, integers wrap around, no division stops."""

from collections.abc import Callable
from typing import Any

import numpy as np


def dtype_of(x: Any) -> str:
    """Type of an expression, or of an element of a tensor."""
    return str(x.dtype if hasattr(x, "dtype") else x.ty)


def constant(x: Any, value: float) -> Any:
    """A number, of the type of an expression."""
    from tvm import tirx

    return tirx.const(value, dtype_of(x))


def lowest(dtype: str) -> Any:
    """What a maximum of nothing is."""
    return -np.inf if dtype.startswith("float") else integer_range(dtype)[0]


def highest(dtype: str) -> Any:
    """What a minimum of nothing is."""
    return np.inf if dtype.startswith("float") else integer_range(dtype)[1]


def integer_range(dtype: str) -> tuple[int, int]:
    """The least and the greatest."""
    if dtype == "bool":
        return 0, 1
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


def library(name: str, *operands: Any) -> Any:
    """A function of the C library."""
    from tvm import tirx

    dtype = dtype_of(operands[0])
    return tirx.call_pure_extern(dtype, name + ("f" if dtype == "float32" else ""), *operands)


def _opaque(x: Any) -> Any:
    """A floating-point number that TVM cannot calculate with, at no cost: it takes `(x + y) - y` for `x` and `x * 0` for 0."""
    from tvm import tirx as t

    dtype = dtype_of(x)
    bits = "int64" if dtype == "float64" else "int32"
    return t.reinterpret(dtype, t.reinterpret(bits, x))


def add(x: Any, y: Any) -> Any:
    """The sum; one of integers wraps around."""
    return _wrapping(x, y, lambda a, b: a + b)


def subtract(x: Any, y: Any) -> Any:
    """The difference, rounded as it stands there; one of integers wraps around."""
    if dtype_of(x).startswith("float"):
        from tvm import tirx

        # Of a constant CUDA has no address, by which it reinterprets.
        return x - _opaque(y) if isinstance(x, tirx.FloatImm) else _opaque(x) - y
    return _wrapping(x, y, lambda a, b: a - b)


def multiply(x: Any, y: Any) -> Any:
    """The product, no number where one is none; one of integers wraps around."""
    if not dtype_of(x).startswith("float"):
        return _wrapping(x, y, lambda a, b: a * b, product=True)
    x, y = _without_zeros(x, y)
    return x * y


def _without_zeros(x: Any, y: Any) -> tuple[Any, Any]:
    """Two numbers, of which a constant zero is made of the other's bits: TVM takes it for a constant result."""
    from tvm import tirx as t

    def zero(of: Any) -> Any:
        dtype = dtype_of(of)
        bits = "int64" if dtype == "float64" else "int32"
        return t.reinterpret(dtype, t.reinterpret(bits, of) & t.const(0, bits))

    def is_zero(v: Any) -> bool:
        return isinstance(v, t.FloatImm) and v.value == 0

    if is_zero(x) and not isinstance(y, t.FloatImm):
        return zero(y), y
    if is_zero(y) and not isinstance(x, t.FloatImm):
        return x, zero(x)
    return x, y


def _wrapping(x: Any, y: Any, function: Callable[[Any, Any], Any], product: bool = False) -> Any:
    """In a type that the result fits in, and cut off: TVM and its machine code assume that nothing overflows.

    For 64 bits there is no wider type, so that sums beyond them are not defined.
    """
    from tvm import tirx as t

    dtype = dtype_of(x)
    size = np.dtype(dtype).itemsize
    if dtype.startswith("float") or size > 4:
        return function(x, y)
    if isinstance(x, t.IntImm) and isinstance(y, t.IntImm):  # TVM refuses to cut off a constant
        with np.errstate(over="ignore"):
            known = function(np.array([x.value], dtype), np.array([y.value], dtype))
        return constant(x, int(known[0]))
    wide = "int32" if size == 1 else "uint64" if product and dtype == "uint32" else "int64"
    return t.Cast(dtype, function(t.Cast(wide, x), t.Cast(wide, y)))


def divide(x: Any, y: Any) -> Any:
    """The quotient; of integers as JAX has it: cut off, all bits set where a number is divided by 0, and no trap."""
    from tvm import tirx as t

    if dtype_of(x).startswith("float"):
        x, y = _without_zeros(x, y)
        return x / y
    by, minus_one = _divisor(y)
    quotient = t.truncdiv(x, by)
    if minus_one is not None:
        quotient = t.Select(minus_one, subtract(constant(x, 0), x), quotient)
    none = -1 if minus_one is not None else highest(dtype_of(x))  # all bits set
    return t.Select(t.EQ(y, constant(y, 0)), constant(x, none), quotient)


def remainder(x: Any, y: Any) -> Any:
    """What division leaves, with the sign of the dividend; of integers the dividend itself where it is divided by 0."""
    from tvm import tirx as t

    if dtype_of(x).startswith("float"):
        return library("fmod", x, y)
    by, minus_one = _divisor(y)
    left = t.truncmod(x, by)
    if minus_one is not None:
        left = t.Select(minus_one, constant(x, 0), left)
    return t.Select(t.EQ(y, constant(y, 0)), x, left)


def _divisor(y: Any) -> tuple[Any, Any]:
    """A divisor that does not stop the process, 1 for 0 and -1, and whether -1 was meant; None if it cannot be."""
    from tvm import tirx as t

    zero, one = constant(y, 0), constant(y, 1)
    if dtype_of(y).startswith("uint"):
        return t.Select(t.EQ(y, zero), one, y), None
    minus_one = t.EQ(y, constant(y, -1))
    return t.Select(t.Or(t.EQ(y, zero), minus_one), one, y), minus_one


def negative(x: Any) -> Any:
    """Of an unsigned integer what wraps around to it."""
    return -x if dtype_of(x).startswith("float") else subtract(constant(x, 0), x)
