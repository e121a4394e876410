"""Fisher potential: how much a network could learn, judged at initialisation on one minibatch.

Turner, Crowley, O'Boyle, Storkey, Gray: "BlockSwap: Fisher-guided Block Substitution for Network Compression on a Budget"
(https://arxiv.org/abs/1906.04113), equations 2 to 4.

Definition. Let `a [N, H, W, C]` be the probe of a block: the output of its last convolution, before the residual addition. Let
`g = dL/da`, where the loss `L` is the *mean* over the minibatch, in train mode (batch statistics), at random initialisation. Then

    channel c:  Delta_c = 1/(2N) sum_n ( sum_ij a_nijc g_nijc )^2
    block b:    Delta_b = sum_c Delta_c
    network:    sum_b Delta_b                       higher is better

The mean in `L` puts a hidden `1/N^2` into every `Delta`: compare scores only at equal batch size. The score called Fisher in the
zero-cost proxy literature probes every layer and weights channels by their kernels; it is another score.

A loss that is not finite makes every potential NaN, whatever its gradient is.

A probe that the network calls several times has one gate for all calls: its sum over positions runs over the calls as well.

Computed with gates: multiply the probe by a gate `m [N, C]` of ones. Then `dL/dm_nc = sum_ij a_nijc g_nijc`, so
`Delta_c = 1/2 mean_n (dL/dm_nc)^2`, and no gradient of a weight, nor of the input, is ever needed.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from nnopt.core import At, Example, Selector, sites
from nnopt.core.paths import path_text
from nnopt.core.rewrite import rewrite_traced
from nnopt.layers import GATES, AddGate
from nnopt.layers.combinators import after_name
from nnopt.scores.aggregations import AS_PUBLISHED, Aggregation
from nnopt.scores.forward import LossGradient
from nnopt.scores.minibatch import check_images, check_labels, guarded
from nnopt.scores.network import TracedNetwork, image_example
from nnopt.scores.probes import block_probes as block_probes
from nnopt.scores.reductions import root_sums_of_squares
from nnopt.scores.score import Evidence, Pass, Score, ScoreValue
from nnopt.scores.sources import BlockGates
from nnopt.scores.sources import mean_cross_entropy as mean_cross_entropy
from nnopt.typing import Path, Variables


@dataclasses.dataclass(frozen=True)
class Fisher(Score):
    """Fisher potential as a `Score`, with the value of `FisherPotential` for the default aggregation.

    Attributes:
        aggregation: how channels and blocks add up.
        where: which modules are the blocks; by default every residual block.
    """

    aggregation: Aggregation = AS_PUBLISHED
    where: Selector | str | None = None

    @property
    def needs(self) -> tuple[Pass, ...]:
        """See `Score`."""
        return (LossGradient(BlockGates(self.where)),)

    def reduce(self, evidence: Evidence) -> dict[str, jax.Array]:
        """See `Score`."""
        (gradient,) = self.needs
        # Roots of sums of squares, because the squares alone may leave the range of float32.
        return {path_text(p): root_sums_of_squares(g, (0,)) for p, g in evidence[gradient].items()}

    def value(self, reduced: Mapping[str, np.ndarray], network: TracedNetwork) -> ScoreValue:
        """See `Score`."""
        sites = {}
        for block, probe in block_probes(network.sites, self.where).items():
            potentials = reduced[path_text(probe)].astype(np.float64) ** 2 / (2 * network.batch)
            name = path_text(block)
            sites[name] = self.aggregation(name, potentials)
        return ScoreValue(sum(sites.values()), sites)


@dataclasses.dataclass(frozen=True)
class FisherScore:
    """Fisher potential of a network.

    Attributes:
        total: sum over blocks; higher is better.
        blocks: path text of each block -> its potential, in the order of the network.
        channels: path text of each block -> potential of each channel of its probe, float64 `[channels]`.
    """

    total: float
    blocks: dict[str, float]
    channels: dict[str, np.ndarray] = dataclasses.field(repr=False, compare=False)


class FisherPotential:
    """Fisher potential of one network, compiled once for one batch shape.

    Attributes:
        probes: path of each block -> path of its probe.
    """

    def __init__(
        self,
        net: nn.Module,
        example: Any,
        *,
        where: Selector | str | None = None,
        loss: Callable[[jax.Array, jax.Array], jax.Array] = mean_cross_entropy,
        compiler_options: dict[str, Any] | None = None,
    ) -> None:
        """Finds the probes and gates them.

        Args:
            net: any linen network with residual blocks.
            example: an `Example` of the scored batch as the network takes it in training, `Example(images, train=True)`. The
                images are its first argument and its only array.
            where: which blocks are scored, and summed; by default every residual block. (`FisherEngine` scores them all, and its
                `where` says what differs between candidates.)
            loss: `(outputs, labels) -> scalar`, a mean over the batch.
            compiler_options: passed to `jax.jit`.

        Raises:
            SelectionError: see `block_probes`.
            UnsupportedNetworkError: the example has other arrays than the images.
        """
        self.example = image_example(example, "Fisher potential")
        found = sites(net, self.example)
        self._outputs = found.outputs
        self.probes = block_probes(found, where)
        at = At(tuple(path_text(p) for p in self.probes.values()))
        self._net = rewrite_traced(found, AddGate(at))
        probes = dict.fromkeys(self.probes.values())  # each once
        self._gates = {  # where the gate of each probe lies in its collection
            probe: (*probe, after_name(found[probe].module), "gate") for probe in probes
        }
        self._shapes = [  # [batch, channels]
            (found[probe].outputs.shape[0], found[probe].outputs.shape[-1]) for probe in probes
        ]
        self._loss = loss
        self._energies = jax.jit(self._energy_of_gates, compiler_options=compiler_options)

    def _energy_of_gates(
        self, variables: Variables, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> dict[Path, tuple[jax.Array, jax.Array]]:
        """For each probe `(s, e)` with `mean_n (d sum_n L_n / d m_nc)^2 = s^2 e_c`, `e` of order one."""
        batch = images.shape[0]

        def summed_loss(gates: list[jax.Array]) -> jax.Array:
            collection = unflatten_dict(dict(zip(self._gates.values(), gates, strict=True)))
            outputs, _ = self._net.apply(
                {**variables, GATES: collection},
                images,
                *self.example.args[1:],
                **self.example.kwargs,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            # The sum instead of the mean keeps gradients of order one; squares of 1e-20 would vanish in float32.
            return guarded(self._loss)(outputs, labels) * batch

        gradients = jax.grad(summed_loss)([jnp.ones(shape) for shape in self._shapes])
        return {p: _scaled_mean_square(g) for p, g in zip(self._gates, gradients, strict=True)}

    def __call__(
        self,
        variables: Variables,
        images: jax.Array,
        labels: jax.Array,
        key: jax.Array | None = None,
    ) -> FisherScore:
        """Scores one minibatch.

        Args:
            variables: freshly initialised variables of the network.
            images: `[batch, height, width, channels]`, of the example's shape.
            labels: integer classes `[batch]`, or what the loss takes, one for each image.
            key: PRNG key for dropout; a fixed one by default.

        Returns:
            The score, summed in float64.

        Raises:
            ScoreError: images or labels are of another shape, labels are out of range, or the loss is not one number.
        """
        expected = self.example.args[0]
        batch = expected.shape[0]
        check_images(images, expected, "make a FisherPotential for each shape")
        check_labels(labels, batch, self._outputs, self._loss)
        key = jax.random.key(0) if key is None else key
        energies = jax.device_get(self._energies(variables, images, labels, key))
        channels = {}
        for block, probe in self.probes.items():
            scale, energy = energies[probe]
            mean_square = np.asarray(energy, np.float64) * float(scale) ** 2
            channels[path_text(block)] = 0.5 * mean_square / batch**2
        blocks = {block: float(values.sum()) for block, values in channels.items()}
        return FisherScore(sum(blocks.values()), blocks, channels)


def fisher_potential(
    net: nn.Module,
    variables: Variables,
    images: jax.Array,
    labels: jax.Array,
    *,
    train: Mapping[str, Any] | None = None,
    where: Selector | str | None = None,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = mean_cross_entropy,
) -> FisherScore:
    """Fisher potential of a network on one minibatch; see the module's docstring for the definition.

    Args:
        net: any linen network with residual blocks.
        variables: its freshly initialised variables.
        images: `[batch, height, width, channels]`.
        labels: integer classes `[batch]`.
        train: keyword arguments that put the network into train mode, `{"train": True}` by default.
        where: which modules are the blocks; by default every residual block.
        loss: `(outputs, labels) -> scalar`, a mean over the batch.

    Returns:
        The score; higher is better.

    Raises:
        SelectionError: see `block_probes`.
        ScoreError: labels are of another shape than the images, or out of range.
    """
    example = Example(images, **({"train": True} if train is None else train))
    return FisherPotential(net, example, where=where, loss=loss)(variables, images, labels)


def _scaled_mean_square(gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[batch, channels]` -> its largest magnitude, and the mean over the batch of squares in units of it, `[channels]`."""
    scale = jnp.max(jnp.abs(gradient))
    safe = jnp.where(scale > 0, scale, 1.0)
    return scale, jnp.mean((gradient / safe) ** 2, axis=0)
