"""Size as a score: the baselines that every training-free score has to beat.

Ning et al.: "Evaluating Efficient Performance Estimators of Neural Architectures" (https://arxiv.org/abs/2008.03064) show how
much of many a score is size alone. Nothing is run; higher is better, as larger networks mostly are. They rank nothing among
networks of one budget.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from nnopt.core import Example
from nnopt.core.paths import path_text
from nnopt.core.sites import count_leaves
from nnopt.costs import macs_by_site
from nnopt.scores.network import TracedNetwork
from nnopt.scores.score import Evidence, Pass, Score, ScoreValue


@dataclasses.dataclass(frozen=True)
class Counted(Score):
    """A score of shapes alone."""

    @property
    def needs(self) -> tuple[Pass, ...]:
        """See `Score`."""
        return ()

    def reduce(self, evidence: Evidence) -> dict[str, jax.Array]:
        """See `Score`."""
        return {}


@dataclasses.dataclass(frozen=True)
class Parameters(Counted):
    """Number of trainable values, those of the `params` collection; a site's value is its own parameters."""

    def value(self, reduced: Mapping[str, np.ndarray], network: TracedNetwork) -> ScoreValue:
        """See `Score`."""
        sites = {path_text(s.path): float(s.parameters) for s in network.sites if s.parameters}
        return ScoreValue(float(count_leaves(network.sites.variables.get("params", {}))), sites)


@dataclasses.dataclass(frozen=True)
class Macs(Counted):
    """Multiply-accumulates of convolutions and matrix products for one image."""

    def value(self, reduced: Mapping[str, np.ndarray], network: TracedNetwork) -> ScoreValue:
        """See `Score`."""
        images = network.example.args[0]
        one = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
        example = Example(one, *network.example.args[1:], **network.example.kwargs)
        sites = {path_text(p): float(n) for p, n in macs_by_site(network.net, example).items()}
        return ScoreValue(sum(sites.values()), sites)
