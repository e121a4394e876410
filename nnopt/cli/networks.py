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


def example_for(net: "nn.Module", size: int) -> "Example":
    """One image of `size` x `size` pixels in three channels.

    Raises:
        UnsupportedNetworkError: there is no such image, or the network does not run on it.
    """
    import jax
    import jax.numpy as jnp

    from nnopt.core import Example, sites
    from nnopt.errors import NnoptError, UnsupportedNetworkError

    if size < 1:
        raise UnsupportedNetworkError(
            f"there are no images of {size} pixels; give --size 1 or more"
        )
    example = Example(jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    try:
        sites(net, example)
    except NnoptError:
        raise
    except Exception as e:  # whatever a network's author, Flax or JAX raises
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UnsupportedNetworkError(
            f"the network does not run on images of {size} x {size} pixels ({reason}); give another --size"
        ) from e
    return example
