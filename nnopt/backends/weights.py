"""Variables to measure with, where there are none that were trained."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nnopt.core import Example
from nnopt.typing import Variables


def stand_in_variables(net: nn.Module, example: Any, seed: int = 0) -> Variables:
    """Random variables of a network, none of which a compiler can do without.

    Initial values are no good for measuring: a batch normalisation whose mean is zero everywhere and whose scale is one is
    simplified away. Kernels are drawn as He et al. do, so that activations stay in range; variances and scales lie around one.
    Nothing is compiled, which initialisation does.

    Args:
        net: any linen network.
        example: an array of its input shape, or an `Example`.
        seed: of the draw.
    """
    example = Example.of(example)
    specs = jax.eval_shape(lambda: example.init(net, jax.random.key(0)))
    random = np.random.default_rng(seed)

    def value(path: Any, spec: Any) -> jax.Array:
        if not jnp.issubdtype(spec.dtype, jnp.inexact):
            return jnp.zeros(spec.shape, spec.dtype)
        drawn = random.standard_normal(spec.shape)
        if len(spec.shape) > 1:
            drawn *= np.sqrt(2 / max(1, int(np.prod(spec.shape[:-1]))))
        elif str(getattr(path[-1], "key", "")) in ("scale", "var"):
            drawn = 1 + 0.2 * np.tanh(drawn)
        else:
            drawn *= 0.1
        return jnp.asarray(drawn.astype(spec.dtype))

    made: Variables = jax.tree_util.tree_map_with_path(value, specs)
    return made
