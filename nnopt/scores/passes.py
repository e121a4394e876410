"""The passes over a network that scores ask for, and the one forward and backward that most of them share.

All run the network in train mode (batch statistics), as the published scores do; dropout draws from the given key.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from nnopt.core import Selector
from nnopt.core.flatten import Value
from nnopt.core.paths import path_text
from nnopt.errors import ScoreError
from nnopt.scores.network import Edit, KernelUse, TracedNetwork
from nnopt.scores.probes import block_probes
from nnopt.scores.score import Pass
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


# --- what the shared forward can be differentiated in, and what can be looked at ---


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


# --- passes on the shared forward ---


class Forward:
    """One forward run, linearised once, and what is pulled back through it; each pull is made once."""

    def __init__(
        self, batch: Batch, sources: Collection[Source], observed: Collection[Value]
    ) -> None:
        self.batch = batch
        self._sources = tuple(sources)
        observed = tuple(observed)

        # Lists, not dictionaries: JAX sorts the keys of those.
        def outputs_of(values: list[Any]) -> tuple[Any, list[jax.Array]]:
            edits: dict[Value, Edit] = {}
            for source, value in zip(self._sources, values, strict=True):
                for at, edit in source.edits(batch.network, value).items():
                    edits[at] = _both(edits[at], edit) if at in edits else edit
            outputs, seen = batch.network.run(
                batch.variables, batch.images, batch.key, edits, frozenset(observed)
            )
            return outputs, [seen[value] for value in observed]

        at = [source.values(batch) for source in self._sources]
        self.outputs, self._pull, seen = jax.vjp(outputs_of, at, has_aux=True)
        self.seen = dict(zip(observed, seen, strict=True))

    @functools.cached_property
    def loss_gradients(self) -> dict[Source, Any]:
        """Of the loss, in each source."""
        return self._pulled(jax.grad(self.batch.loss)(self.outputs, self.batch.labels))

    @functools.cached_property
    def output_gradients(self) -> dict[Source, Any]:
        """Of the sum of all outputs, in each source."""
        return self._pulled(jax.tree.map(jnp.ones_like, self.outputs))

    def example_gradients(self, index: jax.Array) -> dict[Source, Any]:
        """Of the sum of the outputs of one example, in each source."""
        chosen = jnp.arange(self.batch.network.batch) == index

        def cotangent(output: jax.Array) -> jax.Array:
            ones = chosen.astype(output.dtype).reshape(-1, *(1,) * (output.ndim - 1))
            return jnp.broadcast_to(ones, output.shape)

        return self._pulled(jax.tree.map(cotangent, self.outputs))

    def _pulled(self, cotangent: Any) -> dict[Source, Any]:
        (gradients,) = self._pull(cotangent)
        return dict(zip(self._sources, gradients, strict=True))


def _both(first: Edit, second: Edit) -> Edit:
    return lambda value, known: second(first(value, known), known)


@dataclasses.dataclass(frozen=True)
class ForwardPass(Pass):
    """A pass on the shared forward run of the minibatch."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """What it differentiates in."""
        return ()

    def observed(self, network: TracedNetwork) -> Iterable[Value]:
        """The values that it looks at."""
        return ()

    @abc.abstractmethod
    def read(self, forward: Forward) -> Any:
        """What it finds."""


@dataclasses.dataclass(frozen=True)
class LossGradient(ForwardPass):
    """The gradient of the loss in a source: that source's pytree.

    Attributes:
        source: what the loss is differentiated in.
    """

    needs_labels = True

    source: Source

    @property
    def sources(self) -> tuple[Source, ...]:
        """See `ForwardPass`."""
        return (self.source,)

    def read(self, forward: Forward) -> Any:
        """See `ForwardPass`."""
        return forward.loss_gradients[self.source]

    def check(self, network: TracedNetwork) -> None:
        """See `Pass`."""
        network.check_kernels()
        if isinstance(self.source, LayerGates):
            network.check_loops("a score of single layers")
        if isinstance(self.source, BlockGates):
            self.source.probes(network)


@dataclasses.dataclass(frozen=True)
class InputJacobian(ForwardPass):
    """The gradient of the sum of all outputs in the images, `[batch, ...]`.

    Examples are coupled by batch statistics alone, so row `n` is, but for these, the gradient of the outputs of image `n`.
    """

    @property
    def sources(self) -> tuple[Source, ...]:
        """See `ForwardPass`."""
        return (Images(),)

    def read(self, forward: Forward) -> jax.Array:
        """See `ForwardPass`."""
        return forward.output_gradients[Images()]

    def check(self, network: TracedNetwork) -> None:
        """See `Pass`."""
        require_floating(network)


@dataclasses.dataclass(frozen=True)
class ReluInputs(ForwardPass):
    """What enters each ReLU: `[(site, [batch, units])]`."""

    def observed(self, network: TracedNetwork) -> Iterable[Value]:
        """See `ForwardPass`."""
        return [value for _, value in _units(network)]

    def read(self, forward: Forward) -> list[tuple[str, jax.Array]]:
        """See `ForwardPass`."""
        network = forward.batch.network
        return [
            (path_text(path), forward.seen[value].reshape(network.batch, -1))
            for path, value in _units(network)
        ]

    def check(self, network: TracedNetwork) -> None:
        """See `Pass`."""
        network.check_loops("a score of activation codes")
        if not _units(network):
            raise ScoreError(
                f"{type(network.net).__name__} has no ReLU (no maximum of data and zero), so it has no activation codes; "
                "choose a score that needs none"
            )


def _units(network: TracedNetwork) -> list[tuple[Path, Value]]:
    """ReLUs of values that belong to examples. Positions folded into the first axis, `[batch * positions, ...]`, are units too."""
    return [(p, v) for p, v in network.relus if v.aval.shape[0] % network.batch == 0]


@dataclasses.dataclass(frozen=True)
class FeatureMaps(ForwardPass):
    """What each convolution makes of the first image: `[(site, [channels, positions])]`."""

    def observed(self, network: TracedNetwork) -> Iterable[Value]:
        """See `ForwardPass`."""
        return [use.output for use in _convolutions(network)]

    def read(self, forward: Forward) -> list[tuple[str, jax.Array]]:
        """See `ForwardPass`."""
        maps = []
        for use in _convolutions(forward.batch.network):
            value = jnp.moveaxis(
                forward.seen[use.output], (use.batch_axis, *use.feature_axes), (0, 1)
            )
            maps.append((path_text(use.path), value[0].reshape(value.shape[1], -1)))
        return maps

    def check(self, network: TracedNetwork) -> None:
        """See `Pass`."""
        network.check_loops("a score of feature maps")
        if not _convolutions(network):
            raise ScoreError(
                f"{type(network.net).__name__} has no convolution, so it has no feature maps; choose a score that needs none"
            )


def _convolutions(network: TracedNetwork) -> list[KernelUse]:
    return [use for use in network.uses if use.is_convolution]


# --- passes that run the network themselves ---


@dataclasses.dataclass(frozen=True)
class OwnPass(Pass):
    """A pass that runs the network in a way of its own."""

    @abc.abstractmethod
    def run(self, batch: Batch) -> Any:
        """What it finds; traceable."""


@dataclasses.dataclass(frozen=True)
class KernelValues(OwnPass):
    """The kernels: `{kernel: array}`."""

    needs_images = False

    def run(self, batch: Batch) -> PerKernel:
        """See `OwnPass`."""
        return batch.kernels

    def check(self, network: TracedNetwork) -> None:
        """See `Pass`."""
        network.check_kernels()


@dataclasses.dataclass(frozen=True)
class Labels(OwnPass):
    """The labels, `[batch]`."""

    needs_labels = True

    def run(self, batch: Batch) -> jax.Array:
        """See `OwnPass`."""
        return batch.labels


@dataclasses.dataclass(frozen=True)
class HessianGradient(OwnPass):
    """`H g`, the Hessian of the loss in the kernels times its gradient there: `{kernel: array}`.

    Forward over reverse: the derivative of the gradient along the gradient.
    """

    needs_labels = True

    def run(self, batch: Batch) -> PerKernel:
        """See `OwnPass`."""
        gradient = jax.grad(functools.partial(_loss_of_kernels, batch))
        kernels = batch.kernels
        along = gradient(kernels)
        return jax.jvp(gradient, (kernels,), (along,))[1]

    def check(self, network: TracedNetwork) -> None:
        """See `Pass`."""
        network.check_kernels()


@dataclasses.dataclass(frozen=True)
class PartGradients(OwnPass):
    """The gradient of the loss in the kernels for each of several equal parts of the minibatch: `{kernel: [parts, ...]}`.

    Attributes:
        parts: into how many the minibatch is cut, in order. Each has its own batch statistics.
    """

    needs_labels = True

    parts: int = 2

    def run(self, batch: Batch) -> PerKernel:
        """See `OwnPass`."""
        size = batch.network.batch // self.parts
        network = batch.at(size)
        found = []
        for i in range(self.parts):
            here = slice(i * size, (i + 1) * size)
            part = dataclasses.replace(
                batch, network=network, images=batch.images[here], labels=batch.labels[here],
                key=jax.random.fold_in(batch.key, i),
            )  # fmt: skip
            found.append(jax.grad(functools.partial(_loss_of_kernels, part))(part.kernels))
        return jax.tree.map(lambda *gradients: jnp.stack(gradients), *found)

    def check(self, network: TracedNetwork) -> None:
        """See `Pass`."""
        network.check_kernels()
        if self.parts < 2 or network.batch % self.parts or network.batch < 2 * self.parts:
            raise ScoreError(
                f"{self} cuts the minibatch into equal parts of two images or more, and got {network.batch} images; "
                f"give a multiple of {max(self.parts, 2)}"
            )


@dataclasses.dataclass(frozen=True)
class RepeatedPass(Pass):
    """A pass whose program runs several times, with a number that counts the runs.

    A loop inside one program would do, but convolutions in a loop are many times slower on XLA's CPU backend, and a loop written out
    takes as many times as long to compile.
    """

    @abc.abstractmethod
    def times(self, network: TracedNetwork) -> int:
        """How often it runs."""

    @abc.abstractmethod
    def run(self, batch: Batch, index: jax.Array) -> Any:
        """What run number `index` finds; traceable. The evidence is the list of all."""


@dataclasses.dataclass(frozen=True)
class ExampleGradients(RepeatedPass):
    """For each example the gradient of the sum of its outputs in the kernels: `[{kernel: array}]`."""

    def times(self, network: TracedNetwork) -> int:
        """See `RepeatedPass`."""
        return network.batch

    def run(self, batch: Batch, index: jax.Array) -> PerKernel:
        """See `RepeatedPass`."""
        gradients: PerKernel = Forward(batch, (Kernels(),), ()).example_gradients(index)[Kernels()]
        return gradients

    def check(self, network: TracedNetwork) -> None:
        """See `Pass`."""
        network.check_kernels()


def _loss_of_kernels(batch: Batch, kernels: PerKernel) -> jax.Array:
    outputs, _ = batch.network.run(batch.with_kernels(kernels), batch.images, batch.key, {})
    return batch.loss(outputs, batch.labels)


def require_floating(network: TracedNetwork) -> None:
    """Raises unless the network's input is an array of floats.

    Raises:
        ScoreError: it is one of integers.
    """
    dtype = network.images.aval.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ScoreError(
            f"{type(network.net).__name__} takes {dtype} inputs, in which nothing can be differentiated or drawn from a Gaussian; "
            "score what comes after its embedding"
        )


def run_passes(
    passes: Iterable[Pass], batch: Batch, repeated: Mapping[Pass, Any]
) -> dict[Pass, Any]:
    """What each pass finds; passes on the shared forward run get one between them. Traceable.

    Args:
        passes: the passes.
        batch: what they run on.
        repeated: evidence of those that run several times.
    """
    passes = tuple(dict.fromkeys(passes))
    shared = [p for p in passes if isinstance(p, ForwardPass)]
    found: dict[Pass, Any] = dict(repeated)
    if shared:
        sources = dict.fromkeys(s for p in shared for s in p.sources)
        observed = dict.fromkeys(v for p in shared for v in p.observed(batch.network))
        forward = Forward(batch, tuple(sources), tuple(observed))
        found |= {p: p.read(forward) for p in shared}
    return found | {p: p.run(batch) for p in passes if isinstance(p, OwnPass)}
