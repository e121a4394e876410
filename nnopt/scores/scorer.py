"""One program for any number of scores of one network."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from nnopt.core.example import spec_text
from nnopt.errors import ScoreError
from nnopt.scores.minibatch import check_images, check_labels
from nnopt.scores.network import TracedNetwork, trace, trace_sites
from nnopt.scores.passes import RepeatedPass, run_passes
from nnopt.scores.pieces import InPieces
from nnopt.scores.programs import ProgramCache
from nnopt.scores.score import Score, ScoreValue
from nnopt.scores.sources import Batch, Loss, mean_cross_entropy
from nnopt.typing import Variables


class Scorer:
    """Scores one network by any number of scores, in one compiled program; passes over the network are shared.

    Attributes:
        scores: in the order given.
        network: the network as it was traced.
        not_finite: score -> how many of its values were not finite so far. They are returned as they are, never dropped.
    """

    def __init__(
        self,
        net: nn.Module,
        example: Any,
        scores: Iterable[Score],
        *,
        loss: Loss = mean_cross_entropy,
        compiler_options: dict[str, Any] | None = None,
        programs: ProgramCache | None = None,
    ) -> None:
        """Traces the network and checks that every score is defined for it.

        Args:
            net: any linen network.
            example: an `Example` of the minibatch as the network takes it in training, `Example(images, train=True)`. The images
                are its first argument and its only array.
            scores: what to compute.
            loss: `(outputs, labels) -> scalar`, a mean over the batch.
            compiler_options: passed to `jax.jit`.
            programs: run in small pieces that come from this cache, instead of one program. Whoever scores many networks once each
                gives all their scorers one cache: a network is then traced, but hardly anything of it compiled.

        Raises:
            ScoreError: a score is not defined for this network or batch size.
            SelectionError: Fisher potential finds no residual block.
            UnsupportedNetworkError: the example has other arrays than the images.
        """
        self.scores = tuple(dict.fromkeys(scores))
        if not self.scores:
            raise ScoreError("a Scorer without scores has nothing to do; give at least one")
        self.not_finite: Counter[Score] = Counter()
        self._loss = loss
        self._sites = trace_sites(net, example)
        self._traced: dict[Any, TracedNetwork] = {}
        images = self._sites.example.args[0]
        self.network = self._trace(images.shape[0], (self._sites.variables, images))
        for score in self.scores:
            score.check(self.network)
        passes = tuple(dict.fromkeys(p for score in self.scores for p in score.needs))
        self._passes = passes
        self._needs_images = any(p.needs_images for p in passes)
        self._needs_labels = any(p.needs_labels for p in passes)

        def made_ready(function: Callable[..., Any]) -> Callable[..., Any]:
            if programs is not None:
                return InPieces(function, programs)
            return jax.jit(function, compiler_options=compiler_options)

        self._program = made_ready(self._reduce_all)
        self._repeated = {
            p: made_ready(functools.partial(self._run_once, p))
            for p in passes
            if isinstance(p, RepeatedPass)
        }

    def __call__(
        self,
        variables: Variables,
        images: Any = None,
        labels: Any = None,
        key: jax.Array | None = None,
    ) -> dict[Score, ScoreValue]:
        """Scores one minibatch. Only the first call compiles.

        Args:
            variables: freshly initialised variables of the network.
            images: of the example's shape; may be left out if no score needs them.
            labels: integer classes `[batch]`; may be left out likewise.
            key: PRNG key for dropout and for scores that draw; a fixed one by default.

        Returns:
            The value of each score.

        Raises:
            ScoreError: images or labels are missing, of another shape, or out of range, or the loss is not one number.
        """
        images = self._checked_images(images)
        labels = self._checked_labels(labels)
        key = jax.random.key(0) if key is None else key
        arguments = (variables, images, labels, key)
        # Index arrays of one type: Python numbers would make another program.
        repeated = [
            [run(*arguments, np.int32(i)) for i in range(p.times(self.network))]
            for p, run in self._repeated.items()
        ]
        reduced = jax.device_get(self._program(*arguments, repeated))
        found = {}
        for score, arrays in zip(self.scores, reduced, strict=True):
            value = score.value({k: np.asarray(a) for k, a in arrays.items()}, self.network)
            found[score] = self._in_order(value)
            self.not_finite[score] += not value.finite
        return found

    def _reduce_all(
        self,
        variables: Variables,
        images: jax.Array,
        labels: jax.Array,
        key: jax.Array,
        repeated: list[list[Any]],
    ) -> list[dict[str, jax.Array]]:
        batch = self._batch(variables, images, labels, key)
        evidence = run_passes(self._passes, batch, dict(zip(self._repeated, repeated, strict=True)))
        return [score.reduce(evidence) for score in self.scores]

    def _run_once(
        self,
        repeated: RepeatedPass,
        variables: Variables,
        images: jax.Array,
        labels: jax.Array,
        key: jax.Array,
        index: jax.Array,
    ) -> Any:
        return repeated.run(self._batch(variables, images, labels, key), index)

    def _batch(
        self, variables: Variables, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> Batch:
        def at(batch: int) -> TracedNetwork:
            return self._trace(batch, (variables, images))

        return Batch(at(images.shape[0]), variables, images, labels, key, self._loss, at)

    def _trace(self, batch: int, like: tuple[Any, Any]) -> TracedNetwork:
        """The network traced for a batch size and for the types of some variables and images, once for each."""
        leaves, structure = jax.tree.flatten(like)
        *variables, images = leaves
        types = tuple((leaf.shape, leaf.dtype) for leaf in variables)
        key = (batch, structure, types, images.dtype)
        if key not in self._traced:
            self._traced[key] = trace(self._sites, batch, like)
        return self._traced[key]

    def _checked_images(self, images: Any) -> Any:
        expected = self._sites.example.args[0]
        if images is None:
            if self._needs_images:
                raise ScoreError(
                    f"{self._first('needs_images')} looks at images; give {spec_text(expected)}"
                )
            return np.zeros(expected.shape, expected.dtype)
        check_images(images, expected, "make a Scorer for each shape")
        return images

    def _checked_labels(self, labels: Any) -> Any:
        batch = self.network.batch
        if labels is None:
            if self._needs_labels:
                raise ScoreError(
                    f"{self._first('needs_labels')} looks at labels; give integer classes [{batch}]"
                )
            return np.zeros(batch, np.int32)
        check_labels(labels, batch, self.network.outputs, self._loss)
        return labels

    def _first(self, need: str) -> Score:
        return next(s for s in self.scores if any(getattr(p, need) for p in s.needs))

    def _in_order(self, value: ScoreValue) -> ScoreValue:
        """Sites in the order of the network: compiled programs return dictionaries sorted by name."""
        order = self.network.order
        names = sorted(value.sites, key=lambda name: order.get(name, len(order)))
        return dataclasses.replace(value, sites={name: value.sites[name] for name in names})
