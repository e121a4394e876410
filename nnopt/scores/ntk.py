"""Condition number of the neural tangent kernel: how unevenly gradient descent would learn.

Chen, Gong, Wang: "Neural Architecture Search on ImageNet in Four GPU Hours: A Theoretically Inspired Perspective" (TE-NAS,
https://arxiv.org/abs/2102.11535).

Definition. Let `J [N, weights]` hold for each image of one minibatch the gradient of the sum of its outputs in the kernels of
all convolutions and linear layers, in train mode at random initialisation. With the eigenvalues of `J J^T`,

    score = - largest / smallest                           higher is better

No labels, no loss. A kernel matrix that is singular to its precision gives minus infinity, as it must where batch
normalisation, with no ReLU after it, comes last before pooling: then the rows of `J` sum to zero. Costs as many runs forward
and backward as there are images: give a small batch. The score does not split into sites.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from nnopt.scores.network import TracedNetwork
from nnopt.scores.passes import ExampleGradients
from nnopt.scores.score import Evidence, Pass, Score, ScoreValue


@dataclasses.dataclass(frozen=True)
class NtkCondition(Score):
    """Minus the condition number of the neural tangent kernel."""

    smallest_batch = 2

    @property
    def needs(self) -> tuple[Pass, ...]:
        """See `Score`."""
        return (ExampleGradients(),)

    def reduce(self, evidence: Evidence) -> dict[str, jax.Array]:
        """See `Score`."""
        gradients = evidence[ExampleGradients()]
        return {
            name: _products(jnp.stack([g[name].reshape(-1) for g in gradients]))
            for name in gradients[0]
        }

    def value(self, reduced: Mapping[str, np.ndarray], network: TracedNetwork) -> ScoreValue:
        """See `Score`."""
        precision = max(np.finfo(k.dtype).eps for k in reduced.values())
        kernel = np.asarray(sum(k.astype(np.float64) for k in reduced.values()))
        if not np.isfinite(kernel).all():
            return ScoreValue(float("nan"))
        values = np.linalg.eigvalsh(kernel)
        if values[0] <= values[-1] * len(values) * precision:
            return ScoreValue(-float("inf"))
        return ScoreValue(float(-values[-1] / values[0]))


def _products(rows: jax.Array) -> jax.Array:
    """Inner products of the rows of `[batch, weights]`."""
    return jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
