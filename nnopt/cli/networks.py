"""Networks as the command line names them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import flax.linen as nn

    from nnopt.core import Example


def load_network(name: str, num_classes: int = 10) -> "nn.Module":
    """A reference network by name, or the network of a record by its path.

    Raises:
        UnknownNetworkError: neither is there.
        RecordError: the file is no network record.
    """
    from nnopt.core import load_record
    from nnopt.search.blockswap import network_named

    if name.endswith(".json") or "/" in name:
        return load_record(name)
    return network_named(name, num_classes)


def example_for(size: int) -> "Example":
    """One image of `size` x `size` pixels in three channels."""
    import jax
    import jax.numpy as jnp

    from nnopt.core import Example

    return Example(jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
