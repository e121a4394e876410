"""Reductions that several scores share: sums that keep channels apart, and norms that neither overflow nor vanish."""

import jax
import jax.numpy as jnp


def channel_sums(values: jax.Array) -> jax.Array:
    """`[..., channels]` -> sums over all axes but the last. The sum over channels is left to float64 on the host."""
    return values.sum(axis=tuple(range(values.ndim - 1)))


def root_sums_of_squares(values: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`sqrt(sum values^2)` over some axes, where the squares themselves would leave the range of their type."""
    largest = jnp.max(jnp.abs(values))
    safe = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    return safe * jnp.sqrt(jnp.sum((values / safe) ** 2, axis=axes))


def channel_norms(values: jax.Array) -> jax.Array:
    """`[..., channels]` -> the Euclidean norm over all axes but the last."""
    return root_sums_of_squares(values, tuple(range(values.ndim - 1)))
