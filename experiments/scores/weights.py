"""Initial weights that the networks of a benchmark share."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from nnopt.core import Example
from nnopt.typing import Variables


class SharedWeights:
    """Weights made once: a parameter of the same path and shape is equal in all networks.

    Networks that differ in one operation then differ in that operation's weights alone, and the weights need not be drawn anew
    for each network.
    """

    def __init__(self, covering: Sequence[nn.Module], example: Example, seed: int) -> None:
        self._example = example
        self._leaves: dict[tuple[Any, ...], jax.Array] = {}
        for net in covering:
            variables = example.init(net, jax.random.key(seed))
            for path, leaf in flatten_dict(variables).items():
                self._leaves.setdefault((*path, leaf.shape), leaf)

    def of(self, net: nn.Module) -> Variables:
        """The variables of a network.

        Raises:
            KeyError: it has a parameter that no covering network has.
        """
        specs = flatten_dict(self._example.abstractly(net.init, jax.random.key(0)))
        return unflatten_dict({p: self._leaves[(*p, s.shape)] for p, s in specs.items()})
