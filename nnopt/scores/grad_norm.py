"""Gradient norm: how hard the loss pulls at the weights.

Abdelfattah, Mehrotra, Dudziak, Lane: "Zero-Cost Proxies for Lightweight NAS" (https://arxiv.org/abs/2101.08134), section 3.

Definition. `sum_l || dL/dW_l ||_2` over the kernels of all convolutions and linear layers; no biases, no normalisation. `L` is the
mean over one minibatch, train mode, random initialisation. A site's value is its kernel's norm. Higher is better.

Gradients are proportional to the loss, and grow with depth where nothing normalises: compare networks at one loss and batch size.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from nnopt.scores.forward import LossGradient
from nnopt.scores.network import TracedNetwork
from nnopt.scores.reductions import channel_norms
from nnopt.scores.score import Evidence, Pass, Score, ScoreValue
from nnopt.scores.sources import Kernels

_GRADIENT = LossGradient(Kernels())


@dataclasses.dataclass(frozen=True)
class GradNorm(Score):
    """Sum over kernels of the Euclidean norm of the loss's gradient."""

    @property
    def needs(self) -> tuple[Pass, ...]:
        """See `Score`."""
        return (_GRADIENT,)

    def reduce(self, evidence: Evidence) -> dict[str, jax.Array]:
        """See `Score`."""
        return {path: channel_norms(g) for path, g in evidence[_GRADIENT].items()}

    def value(self, reduced: Mapping[str, np.ndarray], network: TracedNetwork) -> ScoreValue:
        """See `Score`."""
        return sum_of_norms(reduced)


def sum_of_norms(channels: Mapping[str, np.ndarray]) -> ScoreValue:
    """Norms of the channels of each kernel -> the sum of the kernels' norms, in float64."""
    norms = {path: float(np.linalg.norm(n.astype(np.float64))) for path, n in channels.items()}
    return ScoreValue(sum(norms.values()), norms)
