"""Fisher potential of many networks that share a skeleton, by the engine where it can, as whole networks where it cannot."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax

from nnopt.core import Example, Selector, sites
from nnopt.core.example import rngs
from nnopt.core.rewrite import rewrite_traced
from nnopt.errors import SelectionError, UnsupportedNetworkError
from nnopt.scores.engine import Engine, EngineStatistics, Stand
from nnopt.scores.fisher import FisherPotential, FisherScore, mean_cross_entropy
from nnopt.scores.looks import LookForFisherPotential
from nnopt.typing import Path


class FisherEngine:
    """Fisher potential at initialisation, of a base network with other modules standing at some of its paths.

    Attributes:
        engine: what runs candidates as chains of small programs; None if this network cannot be cut.
    """

    def __init__(
        self,
        net: nn.Module,
        example: Any,
        *,
        where: Selector | str | None = None,
        loss: Callable[[jax.Array, jax.Array], jax.Array] = mean_cross_entropy,
        device: Any = None,
    ) -> None:
        """Cuts the network, or warns that every candidate is compiled as a whole.

        Args:
            net: any linen network with residual blocks.
            example: an `Example` of the scored batch as the network takes it in training, `Example(images, train=True)`.
            where: the units that differ between candidates; residual blocks by default.
            loss: `(outputs, labels) -> scalar`, a mean over the batch.
            device: where to run; JAX's default device if None.

        Raises:
            SelectionError: the network has no residual block.
        """
        self._example = Example.of(example)
        self._loss = loss
        self._sites = sites(net, self._example)
        self._where = where
        self.engine: Engine[FisherScore] | None = None
        try:
            self.engine = Engine(
                net,
                self._example,
                LookForFisherPotential(),
                loss=loss,
                where=where,
                device=device,
            )
            self.engine.candidate()
        except (SelectionError, UnsupportedNetworkError) as e:
            FisherPotential(net, self._example, loss=loss)  # raises if it cannot be scored at all
            self._give_up(e)

    @property
    def statistics(self) -> EngineStatistics | None:
        """What the engine has done so far."""
        return self.engine.statistics if self.engine is not None else None

    def prepare(
        self,
        candidates: Iterable[Mapping[Path, nn.Module]],
        worker: int = 0,
        workers: int = 1,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Compiles what these candidates need; see `Engine.prepare`."""
        if self.engine is not None:
            try:
                self.engine.prepare(candidates, worker, workers, on_progress)
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
        """
        if self.engine is not None:
            try:
                candidate = self.engine.candidate(edits)
                return self.engine.score(candidate, images, labels, key)
            except UnsupportedNetworkError as e:
                self._give_up(e)
        net = rewrite_traced(self._sites, Stand(tuple(edits.items())))
        # A candidate's program runs once: on a CPU, compiling it well takes longer than running it badly.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        score = FisherPotential(net, self._example, loss=self._loss, compiler_options=options)
        variables = net.lazy_init(rngs(key), *self._example.args, **self._example.kwargs)
        return score(variables, images, labels)

    def _give_up(self, reason: Exception) -> None:
        self.engine = None
        warnings.warn(
            f"networks like {type(self._sites.net).__name__} are scored as a whole, which compiles each for seconds where "
            f"the engine takes a fraction of one: {reason}",
            stacklevel=3,
        )
