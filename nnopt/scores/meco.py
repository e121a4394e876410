"""MeCo: the smallest eigenvalue of the correlations between the channels of feature maps.

Jiang, Wang, Bie: "MeCo: Zero-Shot NAS with One Data and Single Forward Pass via Minimum Eigenvalue of Correlation" (NeurIPS 2023,
https://proceedings.neurips.cc/paper_files/paper/2023/hash/bfa815ac6f08f4ada34fe22be054f2b9-Abstract-Conference.html).

Definition. For each convolution let `f [channels, positions]` be what it makes of one image (the first of the minibatch, in
train mode at random initialisation), and `P` the Pearson correlations of the channels over the positions. The score is the sum
over convolutions of the smallest eigenvalue of `P`; higher is better. No labels, no gradients.

A constant channel has no correlation with anything; as in the authors' code its row of `P` is zero. Where there are at least as
many channels as positions the rank of `P` is smaller than its size, and the eigenvalue is zero exactly. The authors' code adds
up all modules, containers included, and so counts many maps more than once; normalisation after a convolution changes no
correlation.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from nnopt.scores.forward import FeatureMaps
from nnopt.scores.jacob_cov import correlations
from nnopt.scores.network import TracedNetwork
from nnopt.scores.score import Evidence, Pass, Score, ScoreValue


@dataclasses.dataclass(frozen=True)
class MeCo(Score):
    """Sum over convolutions of the smallest eigenvalue of the correlations of their channels."""

    @property
    def needs(self) -> tuple[Pass, ...]:
        """See `Score`."""
        return (FeatureMaps(),)

    def reduce(self, evidence: Evidence) -> dict[str, jax.Array]:
        """See `Score`."""
        found: dict[str, jax.Array] = {}
        for path, feature_map in evidence[FeatureMaps()]:
            calls = sum(name.split("#")[0] == path for name in found)
            found[f"{path}#{calls}" if calls else path] = feature_map
        return found

    def value(self, reduced: Mapping[str, np.ndarray], network: TracedNetwork) -> ScoreValue:
        """See `Score`."""
        sites: dict[str, float] = {}
        for name, feature_map in reduced.items():
            path = name.split("#")[0]
            sites[path] = sites.get(path, 0.0) + smallest_eigenvalue(feature_map)
        return ScoreValue(sum(sites.values()), sites)


def smallest_eigenvalue(feature_map: np.ndarray) -> float:
    """Of the correlations of the rows of `[channels, positions]`, in float64."""
    if not np.isfinite(feature_map).all():
        return float("nan")
    channels, positions = feature_map.shape
    if channels >= positions > 1 or positions == 1:
        return 0.0
    # NaN here means a constant channel.
    return float(np.linalg.eigvalsh(np.nan_to_num(correlations(feature_map)))[0])
