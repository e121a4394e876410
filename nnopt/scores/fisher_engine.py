"""Fisher potential of many networks that share a skeleton, by the engine where it can, as whole networks where it cannot."""

import collections
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from nnopt.core import Example, Selector, sites
from nnopt.core.example import rngs
from nnopt.core.paths import path_text
from nnopt.core.rewrite import rewrite_traced
from nnopt.errors import ScoreError, SelectionError, UnsupportedNetworkError
from nnopt.scores.cut_out import Stand
from nnopt.scores.engine import Candidate, Engine, EngineStatistics
from nnopt.scores.fisher import FisherPotential, FisherScore, mean_cross_entropy
from nnopt.scores.lanes import SideBySide
from nnopt.scores.looks import LookForFisherPotential
from nnopt.scores.minibatch import check_images, check_labels
from nnopt.scores.probes import block_probes
from nnopt.typing import Path

Batch: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
"""Images `[batch, height, width, channels]`, int32 labels `[batch]`, and the PRNG key of the weights."""


class FisherEngine:
    """Fisher potential at initialisation, of a base network with other modules standing at some of its paths.

    Attributes:
        engines: what runs candidates as chains of small programs, one for each device; none if this network cannot be cut.
    """

    def __init__(
        self,
        net: nn.Module,
        example: Any,
        *,
        where: Selector | str | None = None,
        loss: Callable[[jax.Array, jax.Array], jax.Array] = mean_cross_entropy,
        devices: Sequence[Any] = (None,),
    ) -> None:
        """Cuts the network, or warns that every candidate is compiled as a whole.

        Args:
            net: any linen network with residual blocks.
            example: an `Example` of the scored batch as the network takes it in training, `Example(images, train=True)`.
            where: the units that may differ between candidates, each of which is cut out; residual blocks by default. It does not
                say what is scored: that is every residual block, and what has come to stand there.
            loss: `(outputs, labels) -> scalar`, a mean over the batch.
            devices: where to run: `jax.local_devices()`, or a part of it; JAX's default device by default.

        Raises:
            SelectionError: the network has no residual block.
            ScoreError: the loss is not one number.
        """
        self._example = Example.of(example)
        self._loss = loss
        self._sites = sites(net, self._example)
        self._where = where
        self.engines: list[Engine[FisherScore]] = []
        look = LookForFisherPotential()
        try:
            self.engines = [
                Engine(net, self._example, look, loss=loss, where=where, device=device)
                for device in devices
            ]
            self._check_probes()
        except (SelectionError, UnsupportedNetworkError) as e:
            FisherPotential(net, self._example, loss=loss)  # raises if it cannot be scored at all
            self._give_up(e)

    def _check_probes(self) -> None:
        """Refuses units that hide a probe of the base network: those cut out of the middle of a block."""
        seen = set(self.engines[0].candidate().looked_at)
        hidden = [path_text(b) for b in block_probes(self._sites) if path_text(b) not in seen]
        if hidden:
            raise UnsupportedNetworkError(
                f"a unit is cut out of the middle of the block {hidden[0]!r}, whose probe it hides; select whole blocks"
            )

    @property
    def statistics(self) -> EngineStatistics | None:
        """What the engine of the first device has done so far."""
        return self.engines[0].statistics if self.engines else None

    def prepare(
        self,
        candidates: Iterable[Mapping[Path, nn.Module]],
        worker: int = 0,
        workers: int = 1,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Compiles what these candidates need; see `Engine.prepare`."""
        if self.engines:
            try:
                self.engines[0].prepare(candidates, worker, workers, on_progress)
            except UnsupportedNetworkError as e:
                self._give_up(e)

    def __call__(
        self,
        edits: Mapping[Path, nn.Module],
        images: jax.Array,
        labels: jax.Array,
        key: jax.Array,
    ) -> FisherScore:
        """Scores one candidate on one minibatch.

        Args:
            edits: which module stands at which path of the base network.
            images: `[batch, height, width, channels]`, of the example's shape.
            labels: int32 classes `[batch]`.
            key: the weights are those of `net.init(key, ...)`, so the same unit at the same position has the same weights in every
                candidate.

        Raises:
            ScoreError: images or labels are of another shape, or labels out of range.
            SelectionError: the candidate has no residual block.
        """
        batch = self._checked(images, labels, key)
        if self.engines:
            try:
                candidate = self.engines[0].candidate(edits)
                return self.engines[0].score(candidate, *batch)
            except UnsupportedNetworkError as e:
                self._give_up(e)
        return self._whole(edits, *batch)

    def stream(
        self,
        candidates: Iterable[Mapping[Path, nn.Module]],
        batches: Sequence[Batch],
        *,
        lanes: int = 1,
        ahead: int = 0,
        independent: bool = False,
    ) -> Iterator[list[FisherScore]]:
        """Scores candidates one after another, each on all minibatches, and keeps accelerators busy meanwhile.

        Args:
            candidates: edits of each.
            batches: triples of images, labels and key, as for a single candidate.
            lanes: how many candidates run side by side in one row of programs (`scores.lanes`). More compile more programs;
                worth it on a device that one candidate does not fill, not on a CPU.
            ahead: how many such rows are under way, on each device, while the results of the one before are waited for.
            independent: draw weights for each candidate anew: candidate number `i` has those of `fold_in(key, i)`, and not those
                that every other candidate has at the same unit. What it costs is that they are initialised each time, and that
                the luck of the draw does not cancel where candidates are compared.

        Yields:
            The scores of a candidate, one for each minibatch.

        Raises:
            ScoreError: images or labels are of another shape, labels are out of range, or candidates side by side, which share
                their weights, are to have independent ones.
            SelectionError: a candidate has no residual block.
        """
        if independent and lanes != 1:
            raise ScoreError(
                f"{lanes} candidates side by side share their weights; give lanes=1 for independent ones"
            )
        batches = [self._checked(*batch) for batch in batches]
        for engine in self.engines:  # else the weights of each key were gone when its turn came
            engine.kept.most = max(engine.kept.most, len(batches))
        yield from self._stream(enumerate(candidates), batches, lanes, ahead, independent)

    def _stream(
        self,
        candidates: Iterator[tuple[int, Mapping[Path, nn.Module]]],
        batches: Sequence[Batch],
        lanes: int,
        ahead: int,
        independent: bool,
    ) -> Iterator[list[FisherScore]]:
        """See `stream`; candidates come with their numbers."""

        def drawn(batch: Sequence[jax.Array], number: int) -> Batch:
            images, labels, key = batch
            return images, labels, jax.random.fold_in(key, number) if independent else key

        if not self.engines:
            for number, edits in candidates:
                yield [self(edits, *drawn(batch, number)) for batch in batches]
            return
        placed = [
            [tuple(jax.device_put(a, engine.device) for a in batch) for batch in batches]
            for engine in self.engines
        ]
        turns = itertools.cycle(zip(self.engines, placed, strict=True))
        under_way: collections.deque[list[Callable[[], list[FisherScore]]]] = collections.deque()
        while chunk := list(itertools.islice(candidates, lanes)):
            engine, here = next(turns)
            try:
                ready = [engine.candidate(edits) for _, edits in chunk]
            except UnsupportedNetworkError as e:
                self._give_up(e)
                while under_way:
                    yield from _finished(under_way.popleft())
                rest = itertools.chain(chunk, candidates)
                yield from self._stream(rest, batches, lanes, ahead, independent)
                return
            if lanes == 1:
                number = chunk[0][0]
                started = [_begin_one(engine, ready[0], *drawn(b, number)) for b in here]
            else:
                side_by_side = SideBySide(engine, lanes)
                started = [side_by_side.begin(ready, *batch) for batch in here]
            under_way.append(started)
            if len(under_way) > ahead * len(self.engines):
                yield from _finished(under_way.popleft())
        while under_way:
            yield from _finished(under_way.popleft())

    def _checked(self, images: jax.Array, labels: jax.Array, key: jax.Array) -> Batch:
        """The minibatch, its labels as the programs take them."""
        expected = self._example.args[0]
        check_images(images, expected, "make a FisherEngine for each shape", exactly=True)
        outputs = self._sites.outputs
        check_labels(labels, expected.shape[0], outputs, self._loss, classes=True)
        return images, jnp.asarray(labels, jnp.int32), key

    def _whole(
        self, edits: Mapping[Path, nn.Module], images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> FisherScore:
        net = rewrite_traced(self._sites, Stand(tuple(edits.items())))
        # A candidate's program runs once: on a CPU, compiling it well takes longer than running it badly.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        score = FisherPotential(net, self._example, loss=self._loss, compiler_options=options)
        variables = net.lazy_init(rngs(key), *self._example.args, **self._example.kwargs)
        # The key that dropout draws from in the engine.
        return score(variables, images, labels, jax.random.fold_in(key, 2))

    def _give_up(self, reason: Exception) -> None:
        self.engines = []
        warnings.warn(
            f"networks like {type(self._sites.net).__name__} are scored as a whole, which compiles each for seconds where "
            f"the engine takes a fraction of one: {reason}",
            stacklevel=3,
        )


def _begin_one(
    engine: Engine[FisherScore], candidate: Candidate, *batch: jax.Array
) -> Callable[[], list[FisherScore]]:
    observed = engine.run(candidate, *batch)
    return lambda: [engine.result(observed)]


def _finished(started: Sequence[Callable[[], list[FisherScore]]]) -> Iterator[list[FisherScore]]:
    """From the scores of several candidates on each minibatch, those of each candidate on all."""
    for scores in zip(*(wait() for wait in started), strict=True):
        yield list(scores)
