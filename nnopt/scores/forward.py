"""The forward and backward run that most passes share.

The network runs in train mode (batch statistics), as the published scores do; dropout draws from the given key.
"""

import abc
import dataclasses
import functools
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from nnopt.core.flatten import Value
from nnopt.core.paths import path_text
from nnopt.errors import ScoreError
from nnopt.scores.kernel_uses import KernelUse
from nnopt.scores.minibatch import guarded
from nnopt.scores.network import Edit, TracedNetwork
from nnopt.scores.score import Pass
from nnopt.scores.sources import Batch, BlockGates, Images, LayerGates, Source
from nnopt.typing import Path


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
        return self._pulled(jax.grad(guarded(self.batch.loss))(self.outputs, self.batch.labels))

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
            network.check_uses()
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
