"""SNIP: how much the loss depends on each connection being there.

Lee, Ajanthan, Torr: "SNIP: Single-shot Network Pruning based on Connection Sensitivity" (https://arxiv.org/abs/1810.02340),
equations 4 and 5, without its normalisation over the network; summed to a score by Abdelfattah et al.
(https://arxiv.org/abs/2101.08134), section 3.

Definition. `sum |W * dL/dW|` over all values of the kernels of convolutions and linear layers: the derivative of the loss in a mask
of ones on the weights. No biases, no normalisation. `L` is the mean over one minibatch, train mode, random initialisation.
Higher is better.

Where batch normalisation follows, the loss does not change with the size of a kernel, and `sum W * dL/dW` is zero: it is the
absolute value that makes this a score.
"""

import dataclasses

import jax
import jax.numpy as jnp

from nnopt.scores.forward import LossGradient
from nnopt.scores.passes import KernelValues
from nnopt.scores.reductions import channel_sums
from nnopt.scores.score import Evidence, Pass, Score
from nnopt.scores.sources import Kernels

_GRADIENT = LossGradient(Kernels())


@dataclasses.dataclass(frozen=True)
class Snip(Score):
    """Sum over weights of `|weight * gradient|`."""

    @property
    def needs(self) -> tuple[Pass, ...]:
        """See `Score`."""
        return (_GRADIENT, KernelValues())

    def reduce(self, evidence: Evidence) -> dict[str, jax.Array]:
        """See `Score`."""
        kernels = evidence[KernelValues()]
        return {
            path: channel_sums(jnp.abs(kernels[path] * g))
            for path, g in evidence[_GRADIENT].items()
        }
