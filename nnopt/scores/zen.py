"""Zen-score: how far a network without residual links moves its features when a Gaussian image is moved a little.

Lin et al.: "Zen-NAS: A Zero-Shot NAS for High-Performance Image Recognition" (https://arxiv.org/abs/2102.01063).

Definition. Kernels are drawn from `N(0, 1)`, whatever the variables hold; scales of normalisations are one, biases zero.
Residual links are removed: the sum of a residual addition is its branch. Let `f` be what the network makes of a batch before
global pooling, in train mode, and `x`, `e` from `N(0, 1)`, drawn for each image and pixel. With the variance `v_ic` that batch
normalisation `i` finds in channel `c` of `f(x)`,

    score = log mean_n || f(x_n) - f(x_n + alpha e_n) ||_F  +  sum_i log sqrt( mean_c v_ic )            higher is better

The second part takes back what batch normalisation divides by: with it, the score is that of the network without normalisation,
which would overflow. A network with none has only the first part. No data, no labels; the batch gives the shape and the number
of images. Weights differ from key to key: average over a few.

The value of a site that normalises is its `log sqrt(mean v)`; the first part is that of the network, `.`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from nnopt.core.flatten import Value
from nnopt.core.paths import path_text
from nnopt.scores.forward import require_floating
from nnopt.scores.network import NORMALISATIONS, Edit, TracedNetwork
from nnopt.scores.passes import OwnPass
from nnopt.scores.reductions import root_sums_of_squares
from nnopt.scores.score import Evidence, Pass, Score
from nnopt.scores.sources import Batch
from nnopt.typing import Variables


@dataclasses.dataclass(frozen=True)
class GaussianResponse(OwnPass):
    """Features of Gaussian images before and after a small move, and the batch variances: `(before, after, [(site, [channels])])`.

    Attributes:
        alpha: size of the move.
        residual: whether residual links stay.
    """

    alpha: float = 0.01
    residual: bool = False

    def run(self, batch: Batch) -> tuple[jax.Array, jax.Array, list[tuple[str, jax.Array]]]:
        """See `OwnPass`."""
        network = batch.network
        variables, images, move = gaussian_draws(network, batch.variables, batch.images, batch.key)
        near = images + jnp.asarray(self.alpha, images.dtype) * move
        norms = network.layers((nn.BatchNorm,))
        edits: dict[Value, Edit] = {}
        if not self.residual:
            edits = {total: _instead(branch) for total, branch in network.residuals.items()}
        wanted = {network.features, *(layer.entered for layer in norms)}
        _, before = network.run(variables, images, batch.key, edits, wanted)
        _, after = network.run(variables, near, batch.key, edits, wanted)
        variances = [
            (path_text(n.path), _channel_variance(before[n.entered], network, n.path))
            for n in norms
        ]
        return before[network.features], after[network.features], variances

    def check(self, network: TracedNetwork) -> None:
        """See `Pass`."""
        require_floating(network)
        network.check_kernels()
        network.layers((nn.BatchNorm,))
        _ = network.features


def _instead(other: Value) -> Edit:
    return lambda _, known: known[other]


def _channel_variance(
    entered: jax.Array, network: TracedNetwork, path: tuple[str, ...]
) -> jax.Array:
    """Variance of what enters a batch normalisation, over all axes but its own."""
    axis = network.sites[path].module.axis
    kept = {a % entered.ndim for a in (axis if isinstance(axis, tuple | list) else (axis,))}
    return jnp.var(entered, axis=tuple(a for a in range(entered.ndim) if a not in kept)).reshape(-1)


def gaussian_draws(
    network: TracedNetwork, variables: Variables, images: jax.Array, key: jax.Array
) -> tuple[Variables, jax.Array, jax.Array]:
    """What the score draws.

    Args:
        network: the network.
        variables: of it; their values count only where nothing is drawn (embeddings, running statistics).
        images: their shape and type count.
        key: PRNG key.

    Returns:
        The variables with Gaussian kernels, unit scales and no biases; Gaussian images; a Gaussian move of them.
    """
    weights, drawn, moved = jax.random.split(jax.random.fold_in(key, 1), 3)
    norms = {s.path for s in network.sites if isinstance(s.module, NORMALISATIONS)}
    params = flatten_dict(variables["params"])
    for index, path in enumerate(network.parameters):
        array = params[path]
        if path in network.kernels:
            of_kernel = jax.random.fold_in(weights, index)
            params[path] = jax.random.normal(of_kernel, array.shape, array.dtype)
        elif path[:-1] in norms and path[-1] == "scale":
            params[path] = jnp.ones_like(array)
        elif path[-1] == "bias":
            params[path] = jnp.zeros_like(array)
    shape, dtype = images.shape, images.dtype
    return (
        {**variables, "params": unflatten_dict(params)},
        jax.random.normal(drawn, shape, dtype),
        jax.random.normal(moved, shape, dtype),
    )


@dataclasses.dataclass(frozen=True)
class Zen(Score):
    """Log of how far features move, corrected for batch normalisation.

    Attributes:
        alpha: size of the move of the image.
        residual: whether residual links stay; the paper removes them.
    """

    alpha: float = 0.01
    residual: bool = False

    @property
    def needs(self) -> tuple[Pass, ...]:
        """See `Score`."""
        return (GaussianResponse(self.alpha, self.residual),)

    def reduce(self, evidence: Evidence) -> dict[str, jax.Array]:
        """See `Score`."""
        before, after, variances = evidence[GaussianResponse(self.alpha, self.residual)]
        moved = root_sums_of_squares(before - after, tuple(range(1, before.ndim)))
        found = {".": jnp.log(jnp.mean(moved))}
        for path, variance in variances:
            part = jnp.log(jnp.mean(variance)) / 2
            found[path] = found[path] + part if path in found else part
        return found
