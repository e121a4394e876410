"""The three products of a convolution as JAX primitives, each lowered as suits the platform.

    y  = C(x, k)     `nnopt_conv`
    x' = T(y', k)    `nnopt_conv_input_gradient`
    k' = W(x, y')    `nnopt_conv_weight_gradient`

Each is linear in each operand, and its transposes are the other two, so that derivatives of any order are made of these three and
every one of them has a fast form: JAX never sees, and so never transposes, what they are lowered to.

Platform and lowering are settled when a program is compiled, and an override is a parameter of the primitive: a function
that is already compiled cannot ignore it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from nnopt.layers.conv_shape import (
    CONV,
    CONV_INPUT_GRADIENT,
    CONV_WEIGHT_GRADIENT,
    ConvShape,
    Direction,
)
from nnopt.layers.lowering import choose
from nnopt.layers.lowerings import Lowering, Native, native

_PRIMITIVES = {
    Direction.FORWARD: Primitive(CONV),
    Direction.INPUT_GRADIENT: Primitive(CONV_INPUT_GRADIENT),
    Direction.WEIGHT_GRADIENT: Primitive(CONV_WEIGHT_GRADIENT),
}


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    shape: ConvShape,
    *,
    lowering: Lowering | None = None,
    precision: tuple[lax.Precision, lax.Precision] | None = None,
) -> jax.Array:
    """A convolution that is lowered by platform and shape.

    Args:
        x: `[batch, height, width, in]`, floating point.
        kernel: `[*window, in / groups, out]`, of the same type.
        shape: of the two.
        lowering: what to lower it to, and the gradients too as far as it applies to them; None for what
            `nnopt.layers.lowering.choose` says.
        precision: of the two operands, on platforms that have several.

    Returns:
        `[batch, out height, out width, out]`.
    """
    return _bind(Direction.FORWARD, x, kernel, shape=shape, lowering=lowering, precision=precision)


def _bind(direction: Direction, first: jax.Array, second: jax.Array, **params: Any) -> jax.Array:
    # Inside `jax.shard_map` operands must vary over the same axes of the mesh; what is equal everywhere is cast.
    first_axes, second_axes = (jax.typeof(a).manual_axis_type.varying for a in (first, second))
    if second_axes - first_axes:
        first = lax.pcast(first, tuple(second_axes - first_axes), to="varying")
    if first_axes - second_axes:
        second = lax.pcast(second, tuple(first_axes - second_axes), to="varying")
    result: jax.Array = _PRIMITIVES[direction].bind(first, second, **params)
    return result


def _result(direction: Direction, first: Any, second: Any, *, shape: ConvShape, **_: Any) -> Any:
    if (first.shape, second.shape) != shape.operands(direction) or not (
        first.dtype == second.dtype == shape.dtype
    ):
        raise TypeError(
            f"{_PRIMITIVES[direction].name} of {first.str_short()} and {second.str_short()} "
            f"is not of shape {shape}"
        )
    return first.update(shape=shape.result(direction), weak_type=False)


def _implementation(direction: Direction, first: Any, second: Any, **params: Any) -> Any:
    """Outside `jax.jit`."""
    with jax.disable_jit(
        False
    ):  # as JAX's own operations are compiled even where functions are not
        return _compiled(direction, tuple(params.items()))(first, second)


@functools.lru_cache(maxsize=1024)
def _compiled(direction: Direction, params: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(functools.partial(_PRIMITIVES[direction].bind, **dict(params)))


def _on_cpu(
    direction: Direction,
    first: jax.Array,
    second: jax.Array,
    *,
    shape: ConvShape,
    lowering: Lowering | None,
    precision: Any,
) -> jax.Array:
    return _lowered("cpu", direction, first, second, shape, lowering, precision)


def _elsewhere(
    direction: Direction,
    first: jax.Array,
    second: jax.Array,
    *,
    shape: ConvShape,
    lowering: Lowering | None,
    precision: Any,
) -> jax.Array:
    return _lowered("", direction, first, second, shape, lowering, precision)


def _lowered(
    platform: str,
    direction: Direction,
    first: jax.Array,
    second: jax.Array,
    shape: ConvShape,
    lowering: Lowering | None,
    precision: Any,
) -> jax.Array:
    if lowering is None or not lowering.applies(shape, direction):
        lowering = choose(shape, direction, platform)
    if isinstance(lowering, Native):
        return native(shape, direction, first, second, precision)
    if precision is None:
        return lowering(shape, direction, first, second)
    with jax.default_matmul_precision(precision[0].name.lower()):
        return lowering(shape, direction, first, second)


def _transpose(
    direction: Direction,
    operands: tuple[str, str],
    cotangent: jax.Array,
    first: Any,
    second: Any,
    **params: Any,
) -> jax.Array:
    values = {"ct": cotangent, "first": first, "second": second}
    a, b = (values[name] for name in operands)
    return _bind(direction, a, b, **params)


# Where the members of a batch of products go. By operands with members (first, second):
_PLACES = {
    Direction.FORWARD: {(1, 0): "images", (0, 1): "outputs", (1, 1): "groups"},
    Direction.INPUT_GRADIENT: {(1, 0): "images", (0, 1): "inputs", (1, 1): "groups"},
    Direction.WEIGHT_GRADIENT: {(1, 0): "inputs", (0, 1): "outputs", (1, 1): "groups"},
}
# By array, before which axis of `x [batch, height, width, groups, in]`, `y [.., groups, out]`, `k [*window, in, groups, out]`,
# in and out being those of one group.
_MEMBER_AXIS = {
    "x": {"images": 0, "inputs": 4, "groups": 3},
    "y": {"images": 0, "outputs": 4, "groups": 3},
    "k": {"inputs": 2, "outputs": 4, "groups": 3},
}
_ARRAYS = {
    Direction.FORWARD: ("x", "k", "y"),
    Direction.INPUT_GRADIENT: ("y", "k", "x"),
    Direction.WEIGHT_GRADIENT: ("x", "y", "k"),
}


def _batch(
    direction: Direction, operands: Sequence[Any], axes: Sequence[Any], **params: Any
) -> tuple[jax.Array, int]:
    """One product for a batch of operands, whose members become images, channels of each group, or groups."""
    shape: ConvShape = params.pop("shape")
    mapped = [axis is not None for axis in axes]
    count = next(a.shape[i] for a, i, on in zip(operands, axes, mapped, strict=True) if on)
    place = _PLACES[direction][int(mapped[0]), int(mapped[1])]
    merged = _merged(shape, place, count)
    *names, result_name = _ARRAYS[direction]
    arrays = []
    for name, array, axis, on, wanted in zip(
        names, operands, axes, mapped, merged.operands(direction), strict=True
    ):
        position = _MEMBER_AXIS[name].get(place)
        if position is None:
            arrays.append(array)
            continue
        members = jnp.moveaxis(array, axis, 0) if on else jnp.repeat(array[None], count, 0)
        view = members.reshape(count, *_view(members.shape[1:], shape.groups))
        arrays.append(jnp.moveaxis(view, 0, position).reshape(wanted))
    result = _bind(direction, arrays[0], arrays[1], shape=merged, **params)
    position = _MEMBER_AXIS[result_name][place]
    split = _view(shape.result(direction), shape.groups)
    view = result.reshape(*split[:position], count, *split[position:])
    members = jnp.moveaxis(view, position, 0)
    return members.reshape(count, *shape.result(direction)), 0


def _merged(shape: ConvShape, place: str, count: int) -> ConvShape:
    images = count if place == "images" else 1
    inputs = count if place == "inputs" else 1
    groups = count if place == "groups" else 1
    outputs = count if place == "outputs" else 1
    batch, height, width, channels = shape.input
    return dataclasses.replace(
        shape,
        input=(batch * images, height, width, channels * inputs * groups),
        kernel=(*shape.kernel[:2], shape.kernel[2] * inputs, shape.kernel[3] * outputs * groups),
        groups=shape.groups * groups,
    )


def _view(shape: Sequence[int], groups: int) -> tuple[int, ...]:
    """The last axis as groups and channels of a group."""
    return (*shape[:3], groups, shape[3] // groups)


# direction of (first operand's transpose, second operand's), and what they are products of
_TRANSPOSES = {
    Direction.FORWARD: (
        (Direction.INPUT_GRADIENT, ("ct", "second")),
        (Direction.WEIGHT_GRADIENT, ("first", "ct")),
    ),
    Direction.INPUT_GRADIENT: (
        (Direction.FORWARD, ("ct", "second")),
        (Direction.WEIGHT_GRADIENT, ("ct", "first")),
    ),
    Direction.WEIGHT_GRADIENT: (
        (Direction.INPUT_GRADIENT, ("second", "ct")),
        (Direction.FORWARD, ("first", "ct")),
    ),
}

for _direction, _primitive in _PRIMITIVES.items():
    _primitive.def_abstract_eval(functools.partial(_result, _direction))
    _primitive.def_impl(functools.partial(_implementation, _direction))
    ad.defbilinear(
        _primitive,
        *(functools.partial(_transpose, *rule) for rule in _TRANSPOSES[_direction]),
    )
    batching.primitive_batchers[_primitive] = functools.partial(_batch, _direction)
    for _platform, _function in ((None, _elsewhere), ("cpu", _on_cpu)):
        mlir.register_lowering(
            _primitive,
            mlir.lower_fun(functools.partial(_function, _direction), multiple_results=False),
            platform=_platform,
        )
