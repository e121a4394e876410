"""Synaptic flow without overflow: numbers with an exponent of their own, carried through a network.

In a network of absolute weights without normalisation every layer multiplies: a hundred layers reach 1e80 and more, far outside
float32, though nothing else about the computation is hard. So a value that depends on the input is held as
`mantissa * 2^exponent` with one integer exponent for the whole array. Convolutions and products add exponents, sums bring
both sides to the larger exponent first, and shapes, windows and ReLU, which are linear in a positive factor, leave it
alone. Powers of two make this exact: nothing is lost but what is smaller than `1e-38` of what it is added to.

Derivatives hold exponents constant, so the derivative of `log R` is that of the mantissa over the mantissa.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from nnopt.core.flatten import FlatEquation, Value
from nnopt.scores.kernel_uses import PRODUCTS
from nnopt.scores.network import TracedNetwork
from nnopt.scores.rectifiers import rectifier

_LINEAR = {
    "abs", "broadcast_in_dim", "convert_element_type", "copy", "cumsum", "dynamic_slice", "expand_dims", "gather", "neg",
    "optimization_barrier", "reduce_max", "reduce_min", "reduce_sum", "reduce_window_max", "reduce_window_min",
    "reduce_window_sum", "reshape", "rev", "slice", "squeeze", "stop_gradient", "transpose",
}  # fmt: skip
_ALIGNED = {
    "add", "add_any", "sub", "concatenate", "max", "select_n", "pad", "dynamic_update_slice",
    "eq", "ne", "lt", "le", "gt", "ge",
}  # fmt: skip
_NOWHERE = -(2**20)  # the exponent of an array of zeros: below any other


@dataclasses.dataclass(frozen=True)
class Scaled:
    """`mantissa * 2^exponent`.

    Attributes:
        mantissa: `[...]`.
        exponent: an integer scalar.
    """

    mantissa: jax.Array
    exponent: jax.Array

    @classmethod
    def of(cls, array: jax.Array, exponent: Any = 0) -> "Scaled":
        """`array * 2^exponent` with a largest mantissa between a half and one."""
        if not array.size:
            return cls(array, jnp.asarray(_NOWHERE, jnp.int32))
        size = lax.stop_gradient(jnp.max(jnp.abs(array)))
        _, own = jnp.frexp(size.astype(_wide(size.dtype)))
        most = _most(array.dtype)
        own = jnp.clip(own, -most, most).astype(jnp.int32)
        whole = jnp.where(size == 0, _NOWHERE, exponent + own).astype(jnp.int32)
        return cls(array * _power_of_two(-own, array.dtype), whole)

    def at(self, exponent: jax.Array) -> jax.Array:
        """The mantissas for another exponent, or for one as near to it as their type can hold."""
        return self.mantissa * _power_of_two(self.exponent - exponent, self.mantissa.dtype)


def _power_of_two(exponent: jax.Array, dtype: Any) -> jax.Array:
    """`2^exponent`, exact, and at most a value that leaves room for products."""
    most = _most(dtype)
    exponent = jnp.clip(exponent, -4 * most, most).astype(jnp.int32)
    return jnp.ldexp(jnp.ones((), _wide(dtype)), exponent).astype(dtype)


def _wide(dtype: Any) -> Any:
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def _most(dtype: Any) -> int:
    """The largest exponent that leaves room for a product of two."""
    return 3 * int(jnp.finfo(dtype).maxexp) // 4


def flow(
    network: TracedNetwork,
    variables: Any,
    images: jax.Array,
    key: jax.Array,
    same: Mapping[Value, Value],
    saturate: bool,
) -> Scaled:
    """The sum of a network's outputs.

    Args:
        network: the network.
        variables: of the network.
        images: its input.
        key: PRNG key.
        same: value -> the earlier value that stands in its place.
        saturate: whether rectifiers with an upper end (`relu6`) stop there, or go on as ReLU does.

    Returns:
        A scalar.
    """
    known: dict[Value, Any] = dict(network.flat.constants)
    known |= zip(network.flat.inputs, jax.tree.leaves((variables, images, key)), strict=True)
    known[network.images] = Scaled.of(images) if _floats(images) else images
    for equation in network.flat.equations:
        inputs = [a.val if isinstance(a, jex.Literal) else known[a] for a in equation.inputs]
        known.update(zip(equation.outputs, _run(equation, inputs, saturate), strict=True))
        for value in equation.outputs:
            if value in same:
                known[value] = _like(known[same[value]], value.aval.dtype)
    count = len(jax.tree.leaves(network.outputs))
    total: Scaled | None = None
    for atom in network.flat.outputs[:count]:
        array = atom.val if isinstance(atom, jex.Literal) else known[atom]
        scaled = array if isinstance(array, Scaled) else Scaled.of(array)
        part = Scaled.of(jnp.sum(scaled.mantissa), scaled.exponent)
        if total is not None:
            larger = jnp.maximum(total.exponent, part.exponent)
            part = Scaled.of(total.at(larger) + part.at(larger), larger)
        total = part
    assert total is not None
    return total


def _run(equation: FlatEquation, inputs: Sequence[Any], saturate: bool) -> Sequence[Any]:
    name = equation.primitive.name
    cap = rectifier(equation)
    scaled = [x for x in inputs if isinstance(x, Scaled)]
    if name in PRODUCTS:
        # Also of plain values: a product is where size comes from.
        (y,) = equation.run([_mantissa(i) for i in inputs])
        return [Scaled.of(y, sum(x.exponent for x in scaled))]
    if not scaled:
        return equation.run(inputs)
    first = scaled[0]
    if cap is not None and not saturate:
        return [Scaled(jax.nn.relu(first.mantissa), first.exponent)]
    if (name in _LINEAR and len(scaled) == 1) or cap == math.inf:
        outputs = equation.run([_mantissa(i) for i in inputs])
        return [Scaled(y, first.exponent) if _floats(y) else y for y in outputs]
    if cap is not None:
        return [_saturated(first, cap)]
    if name in _ALIGNED or name == "min":
        return _aligned(equation, inputs, jnp.minimum if name == "min" else jnp.maximum)
    if name == "mul":
        (y,) = equation.run([_mantissa(i) for i in inputs])
        return [Scaled.of(y, sum(x.exponent for x in scaled))]
    if name == "div":
        over, under = (i.exponent if isinstance(i, Scaled) else 0 for i in inputs)
        (y,) = equation.run([_mantissa(i) for i in inputs])
        return [Scaled.of(y, over - under)]
    power = 2 if name == "square" else equation.params["y"] if name == "integer_pow" else None
    if power is not None:
        (y,) = equation.run([first.mantissa])
        return [Scaled.of(y, power * first.exponent)]
    # Not linear in a factor: the true value, which may overflow and is then not finite.
    zero = jnp.zeros((), jnp.int32)
    plain = [i.at(zero) if isinstance(i, Scaled) else i for i in inputs]
    return [Scaled.of(y) if _floats(y) else y for y in equation.run(plain)]


def _is_operand(name: str, position: int) -> bool:
    """Whether an input holds values, and not a condition or an index."""
    if name == "select_n":
        return position > 0
    return name != "dynamic_update_slice" or position < 2


def _aligned(
    equation: FlatEquation, inputs: Sequence[Any], choose: Callable[[Any, Any], jax.Array]
) -> Sequence[Any]:
    name = equation.primitive.name
    operands = [
        Scaled.of(jnp.asarray(i)) if _is_operand(name, k) and not isinstance(i, Scaled) else i
        for k, i in enumerate(inputs)
    ]
    exponent = functools.reduce(choose, [x.exponent for x in operands if isinstance(x, Scaled)])
    outputs = equation.run([x.at(exponent) if isinstance(x, Scaled) else x for x in operands])
    return [Scaled(y, exponent) if _floats(y) else y for y in outputs]


def _saturated(x: Scaled, cap: float) -> Scaled:
    """`min(max(x, 0), cap)`."""
    exponent = jnp.minimum(x.exponent, 0)
    limit = cap * _power_of_two(-exponent, x.mantissa.dtype)
    return Scaled(jnp.minimum(jax.nn.relu(x.at(exponent)), limit), exponent)


def _mantissa(value: Any) -> Any:
    return value.mantissa if isinstance(value, Scaled) else value


def _floats(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)


def _like(value: Any, dtype: Any) -> Any:
    if isinstance(value, Scaled):
        return Scaled(value.mantissa.astype(dtype), value.exponent)
    return value.astype(dtype)
