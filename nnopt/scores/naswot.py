"""NASWOT: whether images fall into different linear regions of the network.

Mellor, Turner, Storkey, Crowley: "Neural Architecture Search without Training" (https://arxiv.org/abs/2006.04647).

Definition. Every ReLU unit is on (`input > 0`) or off for each of `N` images of one minibatch, in train mode at random
initialisation: a binary code `c_n` of `N_A` bits for image `n`. With the Hamming distance `d_H`,

    K_ij  = N_A - d_H(c_i, c_j)
    score = log |det K|                                    higher is better

`K` is summed over the ReLUs, `x x^T + (1 - x)(1 - x)^T` for the codes `x [N, units]` of one. No labels, no gradients, and no
dependence on the order of the images. `nn.relu`, `nn.relu6` and any maximum with zero count, called as functions too. Two
images with one code make `K` singular: the score is minus infinity. The score does not split into sites.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from nnopt.scores.forward import ReluInputs
from nnopt.scores.network import TracedNetwork
from nnopt.scores.score import Evidence, Pass, Score, ScoreValue


@dataclasses.dataclass(frozen=True)
class Naswot(Score):
    """Log determinant of how many ReLU units each pair of images agrees on."""

    smallest_batch = 2

    @property
    def needs(self) -> tuple[Pass, ...]:
        """See `Score`."""
        return (ReluInputs(),)

    def reduce(self, evidence: Evidence) -> dict[str, jax.Array]:
        """See `Score`."""
        return {str(i): _agreements(x) for i, (_, x) in enumerate(evidence[ReluInputs()])}

    def value(self, reduced: Mapping[str, np.ndarray], network: TracedNetwork) -> ScoreValue:
        """See `Score`."""
        # Whole numbers up to 2^24 are exact in float32, and their sums in float64.
        kernel = sum(k.astype(np.float64) for k in reduced.values())
        return ScoreValue(log_determinant(np.asarray(kernel)))


def _agreements(inputs: jax.Array) -> jax.Array:
    """`[batch, units]` -> how many units each pair of images agrees on, `[batch, batch]`; NaN where an input is."""
    # Of signs, one product does for both: n agreements and m disagreements make n - m = 2 n - units.
    signs = jnp.where(inputs > 0, 1.0, -1.0).astype(jnp.float32)
    known = jnp.where(jnp.isnan(inputs), jnp.nan, signs).astype(jnp.float32)
    return (known @ known.T + inputs.shape[1]) / 2


def log_determinant(kernel: np.ndarray) -> float:
    """`log det` of a positive semidefinite matrix, minus infinity where it is singular to working precision."""
    if not np.isfinite(kernel).all():
        return float("nan")
    values = np.linalg.eigvalsh(kernel)
    smallest = values[-1] * len(values) * np.finfo(values.dtype).eps
    return float(np.log(values).sum()) if values[0] > smallest else -float("inf")
