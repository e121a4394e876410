"""The norm of the weights: a baseline that looks at no data.

Abdelfattah, Mehrotra, Dudziak, Lane: "Zero-Cost Proxies for Lightweight NAS" (https://arxiv.org/abs/2101.08134) and its code.

Definition. `sum_l || W_l ||_2` over the kernels of all convolutions and linear layers at random initialisation. No images, no
labels. Higher is better (with He initialisation it counts channels and layers).
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from nnopt.scores.grad_norm import sum_of_norms
from nnopt.scores.network import TracedNetwork
from nnopt.scores.passes import KernelValues
from nnopt.scores.reductions import channel_norms
from nnopt.scores.score import Evidence, Pass, Score, ScoreValue


@dataclasses.dataclass(frozen=True)
class L2Norm(Score):
    """Sum over kernels of their Euclidean norm."""

    @property
    def needs(self) -> tuple[Pass, ...]:
        """See `Score`."""
        return (KernelValues(),)

    def reduce(self, evidence: Evidence) -> dict[str, jax.Array]:
        """See `Score`."""
        return {path: channel_norms(w) for path, w in evidence[KernelValues()].items()}

    def value(self, reduced: Mapping[str, np.ndarray], network: TracedNetwork) -> ScoreValue:
        """See `Score`."""
        return sum_of_norms(reduced)
