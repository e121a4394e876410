"""Networks as the command line names them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import flax.linen as nn

    from nnopt.core import Example

MOST_ELEMENTS = 2**28
"""Of the images of a call: 1 GiB."""


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


def example_for(net: "nn.Module", size: int, batch: int = 1) -> "Example":
    """Images of `size` x `size` pixels in three channels, `[batch, size, size, 3]`.

    Raises:
        UnsupportedNetworkError: there are no such images, they are too many or too large, or the network does not run on them.
    """
    import jax
    import jax.numpy as jnp

    from nnopt.core import Example, sites
    from nnopt.errors import NnoptError, UnsupportedNetworkError

    if size < 1:
        raise UnsupportedNetworkError(
            f"there are no images of {size} pixels; give --size 1 or more"
        )
    if batch * size * size * 3 > MOST_ELEMENTS:
        less = "--size" if size * size * 3 > MOST_ELEMENTS else "--batch"
        raise UnsupportedNetworkError(
            f"{batch} images of {size} x {size} pixels are more than {MOST_ELEMENTS:,} numbers; give a smaller {less}"
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
    return Example(jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32))
