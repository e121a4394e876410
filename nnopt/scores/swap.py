"""SWAP: how many different patterns the units of a network show over a minibatch.

Peng, Song, Fayek, Ciesielski, Chang: "SWAP-NAS: Sample-Wise Activation Patterns for Ultra-fast NAS"
(https://arxiv.org/abs/2403.04161).

Definition. Every ReLU unit is on (`input > 0`) or off for each of `N` images of one minibatch, in train mode at random
initialisation: `N` bits for each unit. The score is the number of different ones among all units of the network; higher is
better. No labels, no gradients.

It is at most `2^N` and at most the number of units. With `center` and `spread` (parameters, not values), it is multiplied by
`exp(-(parameters - center)^2 / spread)`: the regularised score, which prefers networks of about one size.

The value of a site is the number of patterns among its own units; sites share patterns, so these do not add up to the total.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from nnopt.core.sites import count_leaves
from nnopt.scores.forward import ReluInputs
from nnopt.scores.network import TracedNetwork
from nnopt.scores.score import Evidence, Pass, Score, ScoreValue

_WORD = 32
_INVALID = ""  # not the text of any path


@dataclasses.dataclass(frozen=True)
class Swap(Score):
    """Number of different sample-wise activation patterns.

    Attributes:
        center: number of parameters that the regularised score prefers; None for the plain score.
        spread: squared parameters over which it falls off.
    """

    smallest_batch = 2

    center: float | None = None
    spread: float = math.inf

    @property
    def needs(self) -> tuple[Pass, ...]:
        """See `Score`."""
        return (ReluInputs(),)

    def reduce(self, evidence: Evidence) -> dict[str, jax.Array]:
        """See `Score`."""
        units = evidence[ReluInputs()]
        found = {_INVALID: jnp.any(jnp.stack([jnp.isnan(inputs).any() for _, inputs in units]))}
        for path, inputs in units:
            patterns = _patterns(inputs)
            # A site may call several ReLUs.
            found[path] = jnp.concatenate([found[path], patterns]) if path in found else patterns
        return found

    def value(self, reduced: Mapping[str, np.ndarray], network: TracedNetwork) -> ScoreValue:
        """See `Score`."""
        if reduced[_INVALID]:
            return ScoreValue(float("nan"))
        patterns = {path: words for path, words in reduced.items() if path != _INVALID}
        sites = {path: float(_distinct(words)) for path, words in patterns.items()}
        total = float(_distinct(np.concatenate(list(patterns.values()))))
        if self.center is not None:
            size = count_leaves(network.sites.variables["params"])
            total *= math.exp(-((size - self.center) ** 2) / self.spread)
        return ScoreValue(total, sites)


def _patterns(inputs: jax.Array) -> jax.Array:
    """`[batch, units]` -> the bits of each unit over the batch, packed: `uint32 [units, batch / 32]`."""
    bits = jnp.pad((inputs > 0).astype(jnp.uint32), ((0, -inputs.shape[0] % _WORD), (0, 0)))
    words = bits.reshape(-1, _WORD, inputs.shape[1])
    shifts = jnp.arange(_WORD, dtype=jnp.uint32).reshape(1, -1, 1)
    return (words << shifts).sum(axis=1, dtype=jnp.uint32).T


def _distinct(patterns: np.ndarray) -> int:
    """Number of different rows."""
    order = np.lexsort(patterns.T)
    steps = np.any(np.diff(patterns[order], axis=0) != 0, axis=1)
    return int(steps.sum()) + 1
