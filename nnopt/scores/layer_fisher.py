"""Layer Fisher: the score called Fisher in the zero-cost proxy literature. It is not BlockSwap's Fisher potential.

Theis, Korshunova, Tejani, Huszar: "Faster gaze prediction with dense networks and Fisher pruning"
(https://arxiv.org/abs/1801.05787), summed to a score by Abdelfattah, Mehrotra, Dudziak, Lane: "Zero-Cost Proxies for
Lightweight NAS" (https://arxiv.org/abs/2101.08134) and its code.

Definition. Probes are the outputs `a` of *every* convolution and linear layer, after the bias; `g = dL/da`, where `L` is the
mean over one minibatch of `N`, train mode, random initialisation. Each channel counts as often as it has weights (`k^2 in /
groups` for a convolution):

    channel c:  Delta_c = 1/(2N) sum_n ( sum_ij a_nijc g_nijc )^2
    layer l:    sum_c Delta_c * weights_l / channels_l
    network:    sum over layers                        higher is better

So wide layers weigh more than in `Fisher`, which probes each residual block once and counts channels once. The mean in `L` puts
a hidden `1/N^2` into it: compare only at equal batch size. A layer that is called several times adds up its calls.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from nnopt.core.paths import path_text
from nnopt.scores.forward import LossGradient
from nnopt.scores.network import TracedNetwork
from nnopt.scores.reductions import root_sums_of_squares
from nnopt.scores.score import Evidence, Pass, Score, ScoreValue
from nnopt.scores.sources import LayerGates

_GRADIENT = LossGradient(LayerGates())


@dataclasses.dataclass(frozen=True)
class LayerFisher(Score):
    """Fisher information of every layer's channels, each counted once for each of its weights."""

    @property
    def needs(self) -> tuple[Pass, ...]:
        """See `Score`."""
        return (_GRADIENT,)

    def reduce(self, evidence: Evidence) -> dict[str, jax.Array]:
        """See `Score`."""
        return {str(i): root_sums_of_squares(g, (0,)) for i, g in enumerate(evidence[_GRADIENT])}

    def value(self, reduced: Mapping[str, np.ndarray], network: TracedNetwork) -> ScoreValue:
        """See `Score`."""
        sites: dict[str, float] = {}
        for i, use in enumerate(network.uses):
            examples = use.output.aval.shape[use.batch_axis]
            channels = reduced[str(i)].astype(np.float64) ** 2 / (2 * examples)
            path = path_text(use.path)
            sites[path] = sites.get(path, 0.0) + float(channels.sum()) * use.weights_per_feature
        return ScoreValue(sum(sites.values()), sites)
