"""Values of a jaxpr on their way to Relax: constants, and arrays of which an axis may still be of size 1.

A constant that is broadcast would fill memory, and reading it would take longer than the sum it is part of. So `broadcast_in_dim`
is not carried out: a value keeps size 1 along each axis along which it repeats, until something needs to see all of it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Value:
    """An array.

    Attributes:
        data: a NumPy array, keys of random numbers as JAX has them, or a Relax variable.
        shape: of the array that it stands for.
        held: shape of `data`: as `shape`, or 1 along axes along which it repeats.
        dtype: of the elements.
    """

    data: Any
    shape: tuple[int, ...]
    held: tuple[int, ...]
    dtype: str

    @property
    def constant(self) -> bool:
        """Whether it is known."""
        return isinstance(self.data, np.ndarray | jax.Array)

    @classmethod
    def of(cls, array: Any) -> "Value":
        """A constant."""
        if not (isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)):
            array = np.asarray(array)
        return cls(array, array.shape, array.shape, str(array.dtype))
