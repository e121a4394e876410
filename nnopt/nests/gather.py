"""Any nest by its index arrays and one `einsum`: the plainest lowering, for what no convolution computes."""

import jax
import jax.numpy as jnp
import numpy as np

from nnopt.nests.canonical import Form


def gathered(form: Form, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Runs one nest.

    Args:
        form: the nest.
        x: `[batch, *spatial, channels]`.
        kernel: `[*loops that the weights depend on]`.

    Returns:
        `[batch, *loops that write and that x or the weights depend on]`.
    """
    subscripts: list[list[int]] = [[0]]
    axes = sorted({axis for axis, _ in form.view})
    for axis in reversed(axes):
        dims = [d for d, (a, _) in enumerate(form.view) if a == axis]
        bands = [i for i, b in enumerate(form.bands) if any(b.x[d] for d in dims)]
        places, inside = np.zeros((), np.int64), np.ones((), bool)
        for d in dims:
            size = form.view[d][1]
            at = np.asarray(form.x[d])
            for i in bands:
                at = at[..., None] + form.bands[i].x[d] * np.arange(form.bands[i].extent)
            inside = inside & (at >= 0) & (at < size)
            places = places * size + at
        places = np.where(inside, places, x.shape[1 + axis])  # one past the end: zero
        x = jnp.take(x, places, axis=1 + axis, mode="fill", fill_value=0)
        subscripts.append([1 + i for i in bands])
    of_x = [0, *(i for s in reversed(subscripts[1:]) for i in s)]
    of_k = [1 + i for i, b in enumerate(form.bands) if b.weighs]
    of_y = [0, *(1 + i for i, b in enumerate(form.bands) if b.writes and (b.weighs or any(b.x)))]
    result: jax.Array = jnp.einsum(x, of_x, kernel, of_k, of_y)
    return result
