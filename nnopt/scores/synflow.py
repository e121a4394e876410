"""SynFlow: how much flows through a network of absolute weights, and how much of it through each weight.

Tanaka, Kunin, Yamins, Ganguli: "Pruning neural networks without any data by iteratively conserving synaptic flow"
(https://arxiv.org/abs/2006.05467); summed to a score by Abdelfattah et al. (https://arxiv.org/abs/2101.08134).

Definition. All parameters are replaced by their absolute values, normalisation and dropout by identities (as the zero-cost
proxy paper does, whose network is a copy without batch normalisation), and the input is one image of ones. With the sum `R` of
the outputs,

    score = sum | W * dR/dW |                              higher is better

over all values of the kernels of convolutions and linear layers, biases not counted (but present). No data and no labels. The
sum over a layer that everything flows through is `R` itself, if there are no biases: flow is conserved.

The numbers reach 1e80 in NAS-Bench-201, so they are carried with an exponent of their own (`nnopt.scores.flow`): float32 is
enough. `log=True` gives the logarithm of the score, which ranks the same and cannot overflow either; the values of its sites
are the logarithms of theirs and do not add up. (It is not the published "log synflow", which sums `log(1 + dR/dW)` terms.)

Without normalisation every unit of a `relu6` network is far above 6, where nothing flows any more and only the head is left to
score. The score is about linear flow, so by default `relu6` is taken for ReLU; `saturate=True` takes it as it is written.
"""

import dataclasses
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nnopt.scores.flow import Scaled, flow
from nnopt.scores.network import NORMALISATIONS, TracedNetwork
from nnopt.scores.passes import OwnPass
from nnopt.scores.reductions import channel_sums
from nnopt.scores.score import Evidence, Pass, Score, ScoreValue
from nnopt.scores.sources import Batch, PerKernel

_EXPONENT = ""  # not the name of any kernel


@dataclasses.dataclass(frozen=True)
class Flow:
    """Synaptic flow of a network, as `mantissa * 2^exponent`.

    Attributes:
        parts: mantissas of `|W| * dR/d|W|` of each kernel.
        exponent: of all of them.
    """

    parts: PerKernel
    exponent: jax.Array


@dataclasses.dataclass(frozen=True)
class SynapticFlow(OwnPass):
    """One image of ones through absolute parameters, without normalisation and dropout: a `Flow`.

    Attributes:
        saturate: whether `relu6` stops at 6.
    """

    needs_images = False

    saturate: bool = False

    def run(self, batch: Batch) -> Flow:
        """See `OwnPass`."""
        network = batch.at(1)
        variables = jax.tree.map(_absolute, batch.variables)
        ones = jnp.ones(network.images.aval.shape, network.images.aval.dtype)
        same = {
            layer.left: layer.entered for layer in network.layers((*NORMALISATIONS, nn.Dropout))
        }
        positive = dataclasses.replace(batch, network=network, variables=variables, images=ones)

        def mantissa(kernels: PerKernel) -> tuple[jax.Array, jax.Array]:
            total: Scaled = flow(
                network, positive.with_kernels(kernels), ones, batch.key, same, self.saturate
            )
            return total.mantissa, total.exponent

        gradients, exponent = jax.grad(mantissa, has_aux=True)(positive.kernels)
        return Flow({name: w * gradients[name] for name, w in positive.kernels.items()}, exponent)

    def check(self, network: TracedNetwork) -> None:
        """See `Pass`."""
        network.check_kernels()
        network.layers((*NORMALISATIONS, nn.Dropout))


def _absolute(array: jax.Array) -> jax.Array:
    return jnp.abs(array) if jnp.issubdtype(array.dtype, jnp.floating) else array


@dataclasses.dataclass(frozen=True)
class SynFlow(Score):
    """Sum over weights of `|weight| * dR/d|weight|`.

    Attributes:
        log: whether the score is the logarithm of that.
        saturate: whether `relu6` stops at 6, as written; by default it goes on like ReLU.
    """

    log: bool = False
    saturate: bool = False

    @property
    def needs(self) -> tuple[Pass, ...]:
        """See `Score`."""
        return (SynapticFlow(self.saturate),)

    def reduce(self, evidence: Evidence) -> dict[str, jax.Array]:
        """See `Score`."""
        found: Flow = evidence[SynapticFlow(self.saturate)]
        sites = {name: channel_sums(jnp.abs(part)) for name, part in found.parts.items()}
        return sites | {_EXPONENT: found.exponent}

    def value(self, reduced: Mapping[str, np.ndarray], network: TracedNetwork) -> ScoreValue:
        """See `Score`."""
        exponent = int(reduced[_EXPONENT])
        parts = {
            name: float(part.astype(np.float64).sum())
            for name, part in reduced.items()
            if name != _EXPONENT
        }

        def size(part: float) -> float:
            if self.log:
                return math.log(part) + exponent * math.log(2) if part > 0 else part - math.inf
            try:
                return math.ldexp(part, exponent)
            except OverflowError:
                return math.inf

        return ScoreValue(size(sum(parts.values())), {name: size(p) for name, p in parts.items()})
