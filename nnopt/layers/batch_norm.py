"""Batch normalisation with a derivative written by hand.

Reverse-mode differentiation of the textbook formula materialises `x - mean` and other arrays as large as the image. Written
through two sums over the batch it needs the image, its cotangent, and nothing else of that size. The function is the
same, up to rounding.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

STATISTICS = "nnopt batch statistics"
"""Name of the mean and the inverse deviation in a trace: small, costly, and constants to the derivative as it is written here."""


@jax.custom_vjp
def _standardise(x: jax.Array, mean: jax.Array, inverse: jax.Array) -> jax.Array:
    return (x - mean) * inverse


def _forward(x: jax.Array, mean: jax.Array, inverse: jax.Array) -> tuple[jax.Array, tuple]:
    return _standardise(x, mean, inverse), (x, mean, inverse)


def _backward(kept: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    # y = (x - m) s with m, s functions of x: dx = s (g - mean(g)) - (x - m) s^2 * s mean(g (x - m)); the mean of g (x - m)
    # is taken as mean(g x) - m mean(g), which needs no array x - m.
    x, mean, inverse = kept
    axes = tuple(range(x.ndim - 1))
    average = jnp.mean(g, axes, keepdims=True)
    slope = (jnp.mean(g * x, axes, keepdims=True) - mean * average) * inverse
    dx = inverse * (g - average) - (x - mean) * (inverse * inverse * slope)
    return dx, jnp.zeros_like(mean), jnp.zeros_like(inverse)


_standardise.defvjp(_forward, _backward)


def standardise(x: jax.Array, epsilon: float) -> jax.Array:
    """`(x - mean) / sqrt(variance + epsilon)` with mean and variance over all axes but the last.

    Ioffe, Szegedy: "Batch Normalization" (https://arxiv.org/abs/1502.03167), algorithm 1 without scale and shift. The variance is
    `mean(x^2) - mean(x)^2`, as Flax computes it.

    Args:
        x: `[*batch, channels]`.
        epsilon: added to the variance.

    Returns:
        `[*batch, channels]`.
    """
    axes = tuple(range(x.ndim - 1))
    constant = lax.stop_gradient(x)
    mean = jnp.mean(constant, axes, keepdims=True)
    square = jnp.mean(constant * constant, axes, keepdims=True)
    variance = jnp.maximum(square - mean * mean, 0.0)
    inverse = lax.rsqrt(variance + epsilon)
    return _standardise(x, checkpoint_name(mean, STATISTICS), checkpoint_name(inverse, STATISTICS))


def lean_batch_norm(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """The interceptor (for `nn.intercept_methods` around `apply`) that gives each plain `nn.BatchNorm` in training this derivative.

    Running statistics are not updated.
    Batch norms with running statistics, masks, other axes, or statistics shared between devices stay as they are.
    """
    norm = context.module
    if type(norm) is not nn.BatchNorm or context.method_name != "__call__":
        return next_fun(*args, **kwargs)
    running = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
    running = norm.use_running_average if running is None else running
    mask = kwargs.get("mask", args[2] if len(args) > 2 else None)
    x = args[0] if args else kwargs["x"]
    plain = norm.axis in (-1, x.ndim - 1) and norm.axis_name is None and norm.use_fast_variance
    same = norm.dtype in (None, x.dtype) and x.dtype in (jnp.float32, jnp.float64)
    if running or mask is not None or not plain or not same:
        return next_fun(*args, **kwargs)
    y = standardise(x, norm.epsilon)
    shape = (1,) * (x.ndim - 1) + (-1,)
    parameters = norm.variables.get("params", {})
    if norm.use_scale:
        y = y * parameters["scale"].astype(x.dtype).reshape(shape)
    if norm.use_bias:
        y = y + parameters["bias"].astype(x.dtype).reshape(shape)
    return y
