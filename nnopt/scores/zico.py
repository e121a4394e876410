"""ZiCo: how steady the gradients are from minibatch to minibatch, against their size.

Li, Yang, Bhardwaj, Marculescu: "ZiCo: Zero-shot NAS via Inverse Coefficient of Variation on Gradients"
(https://arxiv.org/abs/2301.11300).

Definition. The minibatch is cut into `parts` equal ones, each with its own loss (mean), batch statistics and gradient `g_p` in
train mode at random initialisation. For the kernel `l` of each convolution and linear layer, with mean and (population)
standard deviation over the parts,

    z_l   = sum_w mean_p |g_pw| / std_p g_pw               over the weights whose gradient is not equal in all parts
    score = sum_l log z_l                                  higher is better

As in the authors' code a layer all of whose gradients are equal (a dead one) is left out of the sum; if all are, the
score is minus infinity. No biases, no normalisation. Multiplying the loss by a constant changes nothing.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from nnopt.scores.network import TracedNetwork
from nnopt.scores.passes import PartGradients
from nnopt.scores.reductions import channel_sums
from nnopt.scores.score import Evidence, Pass, Score, ScoreValue


@dataclasses.dataclass(frozen=True)
class Zico(Score):
    """Sum over kernels of the log of the inverse coefficient of variation of their gradient.

    Attributes:
        parts: into how many the minibatch is cut.
    """

    parts: int = 2

    @property
    def needs(self) -> tuple[Pass, ...]:
        """See `Score`."""
        return (PartGradients(self.parts),)

    def reduce(self, evidence: Evidence) -> dict[str, jax.Array]:
        """See `Score`."""
        return {
            path: _inverse_variation(g) for path, g in evidence[PartGradients(self.parts)].items()
        }

    def value(self, reduced: Mapping[str, np.ndarray], network: TracedNetwork) -> ScoreValue:
        """See `Score`."""
        sums = {path: float(z.astype(np.float64).sum()) for path, z in reduced.items()}
        sites = {path: math.log(z) if z > 0 else z for path, z in sums.items() if z != 0}
        return ScoreValue(sum(sites.values()) if sites else -math.inf, sites)


def _inverse_variation(gradients: jax.Array) -> jax.Array:
    """`[parts, ..., channels]` -> sums of `mean |g| / std g` for each channel."""
    # In units of the largest, so that no square vanishes.
    largest = jnp.max(jnp.abs(gradients))
    gradients = gradients / jnp.where(largest > 0, largest, jnp.ones_like(largest))
    mean, deviation = jnp.mean(jnp.abs(gradients), axis=0), jnp.std(gradients, axis=0)
    varies = deviation != 0
    return channel_sums(jnp.where(varies, mean / jnp.where(varies, deviation, 1), 0))
