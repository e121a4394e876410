"""Passes that run the network in a way of their own, and the running of any number of passes together."""

import abc
import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nnopt.errors import ScoreError
from nnopt.scores.forward import Forward, ForwardPass
from nnopt.scores.minibatch import guarded
from nnopt.scores.network import TracedNetwork
from nnopt.scores.score import Pass
from nnopt.scores.sources import Batch, Kernels, PerKernel


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
            remedy = "give two or more parts"
            if self.parts >= 2:
                remedy = f"give a multiple of {self.parts}, {2 * self.parts} or more"
            raise ScoreError(
                f"{self}, which ZiCo reads, cuts the minibatch into two or more equal parts of two or more images, and got "
                f"{network.batch} images; {remedy}"
            )


@dataclasses.dataclass(frozen=True)
class RepeatedPass(Pass):
    """A pass whose program runs several times, with a number that counts the runs.

    A loop inside one program would do, but convolutions in a loop are many times slower on XLA's CPU backend, and a loop
    written out takes as many times as long to compile.
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
    return guarded(batch.loss)(outputs, batch.labels)


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
