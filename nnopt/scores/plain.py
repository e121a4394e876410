"""Plain: the first-order estimate of what the loss loses with all weights, sign kept.

Abdelfattah, Mehrotra, Dudziak, Lane: "Zero-Cost Proxies for Lightweight NAS" (https://arxiv.org/abs/2101.08134) and its code.

Definition. `sum W * dL/dW` over all values of the kernels of convolutions and linear layers; no biases, no normalisation. `L`
is the mean over one minibatch, train mode, random initialisation. Higher is better by convention: a baseline for SNIP.

A kernel that batch normalisation follows contributes zero (Euler's theorem for a function of degree zero) up to rounding and the
normalisation's epsilon, so what is left of the sum is the head's, and noise.
"""

import dataclasses

import jax

from nnopt.scores.forward import LossGradient
from nnopt.scores.passes import KernelValues
from nnopt.scores.reductions import channel_sums
from nnopt.scores.score import Evidence, Pass, Score
from nnopt.scores.sources import Kernels

_GRADIENT = LossGradient(Kernels())


@dataclasses.dataclass(frozen=True)
class Plain(Score):
    """Sum over weights of `weight * gradient`."""

    @property
    def needs(self) -> tuple[Pass, ...]:
        """See `Score`."""
        return (_GRADIENT, KernelValues())

    def reduce(self, evidence: Evidence) -> dict[str, jax.Array]:
        """See `Score`."""
        kernels = evidence[KernelValues()]
        return {path: channel_sums(kernels[path] * g) for path, g in evidence[_GRADIENT].items()}
