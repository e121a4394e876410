"""What is scored, and what it is differentiated in: kernels, images, gates on layers or on the probes of blocks."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from nnopt.core import Selector
from nnopt.core.flatten import Value
from nnopt.scores.kernel_uses import KernelUse
from nnopt.scores.network import Edit, TracedNetwork
from nnopt.scores.probes import block_probes
from nnopt.typing import Path, Variables

PerKernel: TypeAlias = dict[str, jax.Array]
"""An array for each kernel, by the name that the network gives it: the path text of its site."""

Loss: TypeAlias = Callable[[Any, jax.Array], jax.Array]
"""`(outputs, labels) -> scalar`, a mean over the batch."""


def mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """`-mean_n log softmax(logits_n)[labels_n]`.

    Args:
        logits: `[batch, classes]`.
        labels: integer classes `[batch]`.

    Returns:
        A scalar.
    """
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1))


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """What a network is scored on.

    Attributes:
        network: the network.
        variables: its variables.
        images: `[batch, ...]`.
        labels: `[batch]`.
        key: PRNG key.
        loss: of outputs and labels.
        at: the network traced for another number of images.
    """

    network: TracedNetwork
    variables: Variables
    images: jax.Array
    labels: jax.Array
    key: jax.Array
    loss: Loss
    at: Callable[[int], TracedNetwork]

    @property
    def kernels(self) -> PerKernel:
        """The kernels, by the names that the network gives them."""
        params = flatten_dict(self.variables["params"])
        return {name: params[path] for name, path in self.network.named_kernels.items()}

    def with_kernels(self, kernels: PerKernel) -> Variables:
        """The variables with other kernels."""
        params = flatten_dict(self.variables["params"])
        params |= {self.network.named_kernels[name]: kernel for name, kernel in kernels.items()}
        return {**self.variables, "params": unflatten_dict(params)}


class Source(abc.ABC):
    """Something that the loss or the outputs are differentiated in: a frozen dataclass."""

    @abc.abstractmethod
    def values(self, batch: Batch) -> Any:
        """A pytree of arrays: where the derivative is taken."""

    def edits(self, network: TracedNetwork, values: Any) -> dict[Value, Edit]:
        """How they enter the network."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Kernels(Source):
    """Kernels of convolutions and matrix products: `{kernel: array}`. No bias, no normalisation, no embedding."""

    def values(self, batch: Batch) -> PerKernel:
        """See `Source`."""
        return batch.kernels

    def edits(self, network: TracedNetwork, values: Any) -> dict[Value, Edit]:
        """See `Source`."""
        named = network.named_kernels
        return {network.parameters[named[name]]: _put(array) for name, array in values.items()}


@dataclasses.dataclass(frozen=True)
class Images(Source):
    """The images."""

    def values(self, batch: Batch) -> jax.Array:
        """See `Source`."""
        return batch.images

    def edits(self, network: TracedNetwork, values: Any) -> dict[Value, Edit]:
        """See `Source`."""
        return {network.images: _put(values)}


@dataclasses.dataclass(frozen=True)
class LayerGates(Source):
    """A gate of ones on what every kernel puts out, after its bias: `[gate [batch, *channels]]`, in the order of `network.uses`."""

    def values(self, batch: Batch) -> list[jax.Array]:
        """See `Source`."""
        gates = []
        for use in batch.network.uses:
            shape, dtype = use.output.aval.shape, use.output.aval.dtype
            gates.append(jnp.ones([shape[i] for i in (use.batch_axis, *use.feature_axes)], dtype))
        return gates

    def edits(self, network: TracedNetwork, values: Any) -> dict[Value, Edit]:
        """See `Source`."""
        gates = {u.output: _spread(g, u) for u, g in zip(network.uses, values, strict=True)}
        return {value: _gate(gate) for value, gate in gates.items()}


@dataclasses.dataclass(frozen=True)
class BlockGates(Source):
    """A gate of ones `[batch, channels]` on the probe of each residual block: `{probe: array}`.

    Attributes:
        where: which modules are the blocks; by default every residual block.
    """

    where: Selector | str | None = None

    def probes(self, network: TracedNetwork) -> dict[Path, Path]:
        """Path of each block -> path of its probe."""
        return block_probes(network.sites, self.where)

    def values(self, batch: Batch) -> dict[Path, jax.Array]:
        """See `Source`."""
        gates = {}
        for probe in self.probes(batch.network).values():
            aval = batch.network.flat.left[probe][0].aval
            gates[probe] = jnp.ones((aval.shape[0], aval.shape[-1]), aval.dtype)
        return gates

    def edits(self, network: TracedNetwork, values: Any) -> dict[Value, Edit]:
        """See `Source`."""
        return {
            value: _gate(g.reshape(len(g), *(1,) * (value.aval.ndim - 2), -1))
            for probe, g in values.items()
            for value in network.flat.left[probe]
        }


def _put(array: jax.Array) -> Edit:
    return lambda _, __: array


def _gate(gate: jax.Array) -> Edit:
    return lambda value, _: value * gate


def _spread(gate: jax.Array, use: KernelUse) -> jax.Array:
    """`[batch, *channels]` -> the axes of the output, of size one where it has positions."""
    kept = (use.batch_axis, *use.feature_axes)
    in_order = gate.transpose(sorted(range(len(kept)), key=lambda i: kept[i]))
    return in_order.reshape([n if i in kept else 1 for i, n in enumerate(use.output.aval.shape)])
