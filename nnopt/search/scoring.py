"""Scoring many networks, with several draws of weights and minibatch each: a sample of a block space, or any networks.

Seed `s` of a scoring has the weights and the minibatch of seed `s` of a search (`nnopt.search.blockswap`): equal weights for the
same unit at the same position in whatever network it stands, and the same images for all.
"""

import contextlib
import dataclasses
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nnopt.core import Example
from nnopt.core.example import rngs, spec_text
from nnopt.core.rewrite import base_of
from nnopt.costs.counts import parameters
from nnopt.data import Augmentation, Dataset, minibatch
from nnopt.errors import NnoptError, ScoreError, SearchError, UnsupportedNetworkError
from nnopt.scores import Score, Scorer
from nnopt.scores.pace import Pace
from nnopt.search.blockswap import BlockSwap, Problem
from nnopt.search.ranking import Scored, Setting
from nnopt.search.workers import OnProgress, map_in_processes

if TYPE_CHECKING:
    from nnopt.search.latency import Watcher

_STREAMS = ("weights", "minibatch", "augmentation")  # numbered as those of a search
_TRAINING_WORDS = ("train", "training", "is_training")
_INFERENCE_WORDS = ("deterministic", "use_running_average", "eval", "inference")


@dataclasses.dataclass(frozen=True)
class SampleScoring:
    """The job of workers: score a sample of a block space by Fisher potential, with each seed.

    Attributes:
        spec: the space, the data, and the seed of all draws.
        data_dir: see `Problem`.
        setting: batch and seeds; those of `spec` do not count.
        indices: which candidates.
    """

    spec: BlockSwap
    data_dir: str | None
    setting: Setting
    indices: tuple[int, ...]

    def problem(self) -> Problem:
        """The search, made ready for this setting."""
        changes = {"score_batch": self.setting.batch, "score_seeds": max(self.setting.seeds) + 1}
        return Problem(dataclasses.replace(self.spec, **changes), self.data_dir)  # type: ignore[arg-type]

    def start(
        self, worker: int, workers: int, on_progress: OnProgress
    ) -> Callable[[int], tuple[list[float], float]]:
        """See `workers.Job`; the result of a candidate are its scores by seed, and seconds."""
        problem = self._ready(worker, workers, on_progress)
        return lambda index: next(self._each(problem, [index]))

    def _ready(self, worker: int, workers: int, on_progress: OnProgress) -> Problem:
        problem = self.problem()
        problem.scorer.prepare(map(problem.edits, self.indices), worker, workers, on_progress)
        return problem

    def _each(
        self, problem: Problem, indices: Sequence[int]
    ) -> Iterator[tuple[list[float], float]]:
        start = time.perf_counter()
        batches = [problem.batches[seed] for seed in self.setting.seeds]
        pace = Pace.on(jax.default_backend())
        candidates = map(problem.edits, indices)
        for found in problem.scorer.stream(candidates, batches, lanes=pace.lanes, ahead=pace.ahead):
            yield [score.total for score in found], time.perf_counter() - start
            start = time.perf_counter()

    def run(self, watcher: "Watcher", workers: int = 1) -> Scored:
        """Scores all candidates.

        Args:
            watcher: is told of progress.
            workers: processes that score side by side; 1 for this process alone.

        Raises:
            SearchError: fewer than one worker, or one that died.
            NnoptError: see `Problem`.
        """
        if workers < 1:
            raise SearchError(f"scoring needs at least 1 worker, got {workers}")
        compiled = 0

        def on_progress(done: int, total: int) -> None:
            nonlocal compiled
            if not compiled:
                watcher.phase(f"compiling, batch {self.setting.batch}", total)
            for _ in range(done - compiled):
                watcher.advance()
            compiled = max(compiled, done)

        results = (
            self._here(on_progress)
            if workers == 1
            else map_in_processes(self, self.indices, workers, on_progress)
        )
        rows: list[tuple[list[float], float]] = []
        for row in results:
            if not rows:
                watcher.phase(f"scoring, batch {self.setting.batch}", len(self.indices))
            rows.append(row)
            watcher.advance()
        scores, seconds = zip(*rows, strict=True)
        return Scored(self.setting, np.array(scores, np.float64), np.array(seconds))

    def _here(self, on_progress: OnProgress) -> Iterator[tuple[list[float], float]]:
        yield from self._each(self._ready(0, 1, on_progress), self.indices)


def distinct(problem: Problem) -> tuple[int, ...]:
    """Numbers of the candidates of a search, each that was drawn more than once by its first."""
    first: dict[tuple[int, ...], int] = {}
    for index in range(problem.spec.samples):
        first.setdefault(problem.draw(index), index)
    return tuple(first.values())


def score_networks(
    nets: Mapping[str, nn.Module],
    scores: Iterable[Score],
    dataset: Dataset,
    setting: Setting,
    *,
    seed: int,
    augmentation: Augmentation,
    watcher: "Watcher",
) -> tuple[dict[Score, Scored], list[int]]:
    """Scores any networks by any scores, each compiled as a whole, all on the same minibatches.

    Args:
        nets: name (of a file, for messages) -> network.
        scores: what to compute.
        dataset: where minibatches are drawn.
        setting: batch and seeds.
        seed: of all draws.
        augmentation: of the minibatches; without flips where the data set has none.
        watcher: is told of progress.

    Returns:
        For each score what was found, seconds being those of all scores together, compilation included; and the parameters of each
        network.

    Raises:
        ScoreError: a score is not defined for a network, or a network has fewer classes than the data set.
        UnsupportedNetworkError: a network does not run on these images.
        SelectionError: Fisher potential finds no residual block.
        DataError: there are not as many images.
    """
    scores = tuple(dict.fromkeys(scores))
    drawn = [draw_minibatch(dataset, setting.batch, seed, s, augmentation) for s in setting.seeds]
    images = drawn[0][0]
    scorers: list[Scorer] = []
    counts: list[int] = []
    watcher.phase("reading networks", len(nets))
    for name, net in nets.items():  # all of them first: what is refused is refused before the work
        scorer = _scorer(name, net, images, scores, dataset)
        scorers.append(scorer)
        counts.append(parameters(net, scorer.network.example))
        watcher.advance()
    found: dict[Score, list[list[float]]] = {score: [] for score in scores}
    seconds = []
    watcher.phase("scoring networks", len(nets))
    for name, scorer in zip(nets, scorers, strict=True):
        start = time.perf_counter()
        with _naming(name):
            values = [
                _score_once(scorer, *batch, _key(seed, "weights", s))
                for s, batch in zip(setting.seeds, drawn, strict=True)
            ]
        for score in scores:
            found[score].append([value[score] for value in values])
        seconds.append(time.perf_counter() - start)
        watcher.advance()
    times = np.array(seconds)
    return {s: Scored(setting, np.array(v, np.float64), times) for s, v in found.items()}, counts


def draw_minibatch(
    dataset: Dataset, batch: int, seed: int, number: int, augmentation: Augmentation
) -> tuple[jax.Array, jax.Array]:
    """The minibatch that a search of this seed scores with as its number `number`.

    Returns:
        Images `[batch, height, width, channels]`, and labels, int32 `[batch]`.

    Raises:
        DataError: there are not as many images.
    """
    if not dataset.flip_ok:
        augmentation = dataclasses.replace(augmentation, flip=False)
    images, labels = minibatch(dataset, batch, _key(seed, "minibatch", number))
    images = augmentation(_key(seed, "augmentation", number), images)
    return images, labels.astype(jnp.int32)


def _key(seed: int, stream: str, number: int) -> jax.Array:
    """See `Problem.key`."""
    key = jax.random.fold_in(jax.random.key(seed), _STREAMS.index(stream))
    return key if number == 0 else jax.random.fold_in(key, number)


def _scorer(
    name: str, net: nn.Module, images: jax.Array, scores: tuple[Score, ...], dataset: Dataset
) -> Scorer:
    example = Example(images, **_in_training(net))
    # A program runs as often as there are seeds: on a CPU, compiling it well takes longer than running it badly.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    with _naming(name):
        try:
            scorer = Scorer(net, example, scores, compiler_options=options)
        except NnoptError:
            raise
        except Exception as e:  # whatever a network's author, Flax or JAX raises
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
            height, width, channels = images.shape[1:]
            raise UnsupportedNetworkError(
                f"the network does not run on images of {height} x {width} x {channels} of {dataset.name} ({reason}); "
                "give another --data"
            ) from e
        if any(p.needs_labels for score in scores for p in score.needs):
            outputs = scorer.network.outputs
            shape: tuple[int, ...] = getattr(outputs, "shape", ())
            classes = len(dataset.classes)
            if len(shape) != 2 or shape[0] != len(images) or shape[1] < classes:
                raise ScoreError(
                    f"the network returns {spec_text(outputs)}, and the labels of {dataset.name} are {classes} classes; "
                    "give another --data"
                )
    return scorer


def _score_once(
    scorer: Scorer, images: jax.Array, labels: jax.Array, key: jax.Array
) -> dict[Score, float]:
    example = scorer.network.example
    variables = scorer.network.net.lazy_init(rngs(key), *example.args, **example.kwargs)
    found = scorer(variables, images, labels, jax.random.fold_in(key, 2))
    return {score: value.total for score, value in found.items()}


def _in_training(net: nn.Module) -> dict[str, bool]:
    """The argument that puts a network into train mode, known by its name; none for a network without modes."""
    taken = inspect.signature(type(base_of(net)).__call__).parameters
    words = [*((w, True) for w in _TRAINING_WORDS), *((w, False) for w in _INFERENCE_WORDS)]
    return next(({word: value} for word, value in words if word in taken), {})


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts the name of what is at work before the message of an error."""
    try:
        yield
    except NnoptError as e:
        raise type(e)(f"{name}: {e}") from e
