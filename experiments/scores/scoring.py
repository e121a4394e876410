"""Scores many networks in parallel processes, one row of a CSV file for each; a killed run takes up where it stopped."""

import csv
import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

import nnopt
from experiments.scores.weights import SharedWeights
from nnopt.core import All, Example, rewrite
from nnopt.core.files import write_whole
from nnopt.data import load, minibatch
from nnopt.errors import ResultFolderError, ScoreError, SelectionError
from nnopt.rewrites import LowerGroupedConvs
from nnopt.scores import Parameters, Score, Scorer
from nnopt.scores.network import TracedNetwork
from nnopt.scores.programs import ProgramCache
from nnopt.search.workers import OnProgress, map_in_processes


@dataclasses.dataclass(frozen=True)
class Job:
    """What determines the rows of a result file.

    Attributes:
        benchmark: its name, for messages and the settings file.
        network: class of its networks; called with what tells one from another, a `Cell` or `Layers`.
        covering: such choices that together have every parameter that a network of the benchmark can have.
        scores: name of the column -> score.
        data_dir: folder of CIFAR-10 (`cifar-10-batches-py/`); the environment's `NNOPT_DATA` if None.
        batch: images in the minibatch; scores compare only at equal batch.
        seed: of the minibatch and of the weights.
        grouped: whether the networks have grouped convolutions, whose gradients take seconds each on a CPU as XLA has them; they
            are rewritten to what `nnopt.layers.Conv` makes of them.
    """

    benchmark: str
    network: Callable[[Any], nn.Module]
    covering: Sequence[Any]
    scores: Mapping[str, Score]
    data_dir: str | None
    batch: int
    seed: int
    grouped: bool = False

    def settings(self) -> dict[str, Any]:
        """What a result file must agree with to be continued."""
        return {
            "benchmark": self.benchmark,
            "scores": {name: str(score) for name, score in self.scores.items()},
            "batch": self.batch,
            "seed": self.seed,
            "nnopt": nnopt.__version__,
            "jax": jax.__version__,
        }


@dataclasses.dataclass(frozen=True)
class ScoredNetwork:
    """One row.

    Attributes:
        index: of the network in the benchmark.
        seconds: it took to score it.
        scores: column -> total; NaN where the score is not defined for the network.
    """

    index: int
    seconds: float
    scores: dict[str, float]


class ResultFile:
    """`<benchmark>.csv`, to which rows are added one by one, and `<benchmark>.json`, which says what they belong to."""

    def __init__(self, folder: pathlib.Path, job: Job) -> None:
        """Opens or begins the file.

        Raises:
            ResultFolderError: the folder cannot be written, or holds results of other settings.
        """
        self.path = folder / f"{job.benchmark}.csv"
        self._columns = ["index", "seconds", *job.scores]
        settings = folder / f"{job.benchmark}.json"
        wanted = job.settings()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.path.exists() or settings.exists():
                found = json.loads(settings.read_text())
                if found != wanted:
                    differing = sorted(k for k in wanted if found.get(k) != wanted[k])
                    raise ResultFolderError(
                        f"{folder} holds scores of other settings ({', '.join(differing)}); name another folder with --out"
                    )
            else:
                write_whole(settings, json.dumps(wanted, indent=1) + "\n")
            if not self.path.exists():
                write_whole(self.path, ",".join(self._columns) + "\n")
        except (OSError, ValueError) as error:
            raise ResultFolderError(f"{folder}: {error}; name another folder with --out") from None

    def rows(self) -> dict[int, ScoredNetwork]:
        """The rows so far by index. A last line that a killed run left unfinished is cut off."""
        content = self.path.read_text()
        whole = content[: content.rfind("\n") + 1]
        if whole != content:
            write_whole(self.path, whole)
        found = {}
        for cells in csv.DictReader(whole.splitlines()):
            scores = {name: float(cells[name]) for name in self._columns[2:]}
            row = ScoredNetwork(int(cells["index"]), float(cells["seconds"]), scores)
            found[row.index] = row
        return found

    def add(self, row: ScoredNetwork) -> None:
        """Appends one row."""
        values = [repr(row.scores[name]) for name in self._columns[2:]]
        with self.path.open("a") as stream:
            stream.write(",".join([str(row.index), f"{row.seconds:.2f}", *values]) + "\n")


def score_all(
    job: Job,
    choices: Mapping[int, Any],
    workers: int,
    on_row: Callable[[ScoredNetwork], None],
) -> None:
    """Scores networks in `workers` processes, each on its own core.

    Args:
        job: what to compute.
        choices: index -> what `job.network` is called with.
        workers: number of processes.
        on_row: is called in this process for each network, in order.

    Raises:
        DataError: CIFAR-10 is not there.
        ResultFolderError: see `ResultFile`.
        SearchError: a worker died.
    """
    _images(job)  # fails here rather than in every worker
    stream = _Stream(job, tuple(choices), tuple(choices.values()))
    for row in map_in_processes(stream, range(len(choices)), workers):
        on_row(row)


@dataclasses.dataclass(frozen=True)
class _Stream:
    """What workers do: a `nnopt.search.workers.Job`."""

    job: Job
    indices: tuple[int, ...]
    choices: tuple[Any, ...]

    def start(self, worker: int, workers: int, on_progress: OnProgress) -> Callable[[int], Any]:
        ready = _Worker(self.job)
        on_progress(1, 1)
        return lambda number: ready.score(self.indices[number], self.choices[number])


_MOST_PROGRAMS = 1_500
"""In one process: code of each lies in mappings of its own, of which Linux allows a process 65,530."""


class _Worker:
    """What a worker process keeps between networks."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.images, self.labels = _images(job)
        self.example = Example(self.images, train=True)
        # Networks of a benchmark are the same few operations in another order: after the first ones little is compiled.
        self.programs = ProgramCache()
        covering = [job.network(choice) for choice in job.covering]
        self.weights = SharedWeights(covering, Example(self.images[:1], train=True), job.seed)

    def score(self, index: int, choice: Any) -> ScoredNetwork:
        start = time.perf_counter()
        if self.programs.statistics.programs > _MOST_PROGRAMS:
            self.programs = ProgramCache()
            jax.clear_caches()
        net = self.job.network(choice)
        variables = self.weights.of(net)
        if self.job.grouped:
            net = rewrite(net, LowerGroupedConvs(All()), example=self.example)
        scorer = self._scorer(net)
        key = jax.random.key(self.job.seed)
        values = scorer(variables, self.images, self.labels, key)
        totals = {
            name: values[score].total if score in values else math.nan
            for name, score in self.job.scores.items()
        }
        return ScoredNetwork(index, time.perf_counter() - start, totals)

    def _scorer(self, net: nn.Module) -> Scorer:
        """A scorer of those scores that are defined for the network."""
        make = functools.partial(Scorer, net, self.example, programs=self.programs)
        try:
            return make(self.job.scores.values())
        except (ScoreError, SelectionError):
            network = make((Parameters(),)).network
            return make([s for s in self.job.scores.values() if _is_defined(s, network)])


def _is_defined(score: Score, network: TracedNetwork) -> bool:
    try:
        score.check(network)
    except (ScoreError, SelectionError):
        return False
    return True


def _images(job: Job) -> tuple[jax.Array, jax.Array]:
    return minibatch(load("cifar10", job.data_dir), job.batch, jax.random.key(job.seed))
