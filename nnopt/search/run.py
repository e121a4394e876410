"""A BlockSwap search from start to result folder, resumable at every moment.

folder/
  search.json       what determines the search; a folder belongs to one search
  scores.sqlite     one row for each scored candidate
  training/         checkpoint of the winner's training, renewed after each epoch
  winner/           network.json (record), genotype.csv, checkpoint/ (trained weights)
  result.json       everything found, and everything needed to find it again; written last
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import nnopt
from nnopt.core import fingerprint, save_record
from nnopt.core.example import rngs
from nnopt.core.files import write_whole
from nnopt.core.paths import path_text
from nnopt.costs import macs, parameters
from nnopt.errors import ResultFolderError, SearchError
from nnopt.rewrites import save_genotype
from nnopt.scores.pace import Pace
from nnopt.search.blockswap import BlockSwap, Problem, best, not_finite, score_all
from nnopt.search.folders import claim_folder, read_versioned, writing_to
from nnopt.search.latency import Watcher, latency_against_base
from nnopt.search.store import ScoredCandidate, ScoreStore
from nnopt.search.workers import default_workers
from nnopt.training import EpochRow, save_checkpoint, train_in

FORMAT = "nnopt blockswap result"
VERSION = 1
WORTH_PROCESSES = 64
"""Fewer candidates are scored before processes have started."""


class _Nobody:
    """A watcher that does not care."""

    def phase(self, name: str, total: int, done: int = 0) -> None:
        pass

    def advance(self, note: str = "") -> None:
        pass


class _Phase:
    """Tells a watcher of a phase that counts for itself."""

    def __init__(self, watcher: Watcher, name: str, done: int = 0) -> None:
        self._watcher, self._name, self._done = watcher, name, done
        self._begun = False

    def reach(self, done: int, total: int, note: str = "") -> None:
        """So many units are done of so many."""
        if not self._begun:
            self._watcher.phase(self._name, total, self._done)
            self._begun = True
        while self._done < done:
            self._watcher.advance(note)
            self._done += 1


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """A finished search.

    Attributes:
        folder: where everything is.
        summary: the content of `result.json`.
        rows: all scored candidates.
    """

    folder: pathlib.Path
    summary: dict[str, Any]
    rows: list[ScoredCandidate]


def run(
    spec: BlockSwap,
    folder: str | os.PathLike[str],
    *,
    data_dir: str | None = None,
    watcher: Watcher | None = None,
    workers: int | None = None,
) -> SearchResult:
    """Runs a search, or what is left of it.

    Args:
        spec: all that determines it.
        folder: of the result; made if missing. One that holds a killed run of the same search is taken up where it stopped, and one
            that holds a finished run is only read.
        data_dir: where data sets lie that are not embedded.
        watcher: is told of progress.
        workers: processes that score. By default one for each core (or GPU) if there are enough candidates.
            Processes differ in rounding from one that has all cores to itself, but not from one another.

    Raises:
        ResultFolderError: the folder cannot be written, belongs to another search, or holds damaged files.
        CheckpointError: the checkpoint of a training that was killed is damaged.
        SearchError: fewer than one worker, or no candidate has a finite score.
        NnoptError: see `Problem`.
    """
    if workers is None:
        workers = default_workers() if spec.samples >= WORTH_PROCESSES else 1
    if workers < 1:
        raise SearchError(f"a search needs at least 1 worker, got {workers}")
    watcher = watcher or _Nobody()
    # The problem before the folder: a search that cannot start leaves nothing behind.
    problem = Problem(spec, data_dir)
    place = claim_folder(pathlib.Path(folder), "search", spec.to_json())
    store = ScoreStore(place / "scores.sqlite")
    try:
        known = list(store)
        prepared = _Phase(watcher, "compiling programs")
        scored = _Phase(watcher, "scoring candidates", len(known))
        if len(known) >= spec.samples:
            scored.reach(len(known), spec.samples)

        def on_scored(row: ScoredCandidate) -> None:
            store.add(row)
            known.append(row)
            scored.reach(len(known), spec.samples, f"best {best(known).score:.3g}")

        on_prepared = prepared.reach
        rows = score_all(problem, tuple(known), on_scored, workers=workers, on_prepared=on_prepared)
    finally:
        store.close()
    finished = _read_result(place)
    if finished is not None:
        return SearchResult(place, finished, rows)

    if not_finite(rows) == len(rows):
        raise SearchError(
            f"none of the {len(rows)} scores in {place} is finite, so there is no best candidate; search another network, "
            "or another scoring batch or seed, in another folder"
        )
    winner = best(rows)
    net = problem.build(winner.index)
    save = place / "winner"
    with writing_to(place):
        save.mkdir(exist_ok=True)
        save_record(net, save / "network.json")
        save_genotype(problem.choices(winner.index), save / "genotype.csv", winner.score)
    variables, history = _train(problem, net, place / "training", watcher)
    save_checkpoint(save / "checkpoint", net, variables)
    networks = {"base": (problem.base, problem.init(problem.base)), "winner": (net, variables)}
    latency = latency_against_base(networks, problem.example, watcher)
    summary = _summary(problem, net, winner, rows, history, latency)
    with writing_to(place):
        write_whole(place / "result.json", json.dumps(summary, indent=1) + "\n")
    return SearchResult(place, summary, rows)


def load_result(folder: str | os.PathLike[str]) -> SearchResult:
    """Reads a finished search.

    Raises:
        ResultFolderError: the folder holds none, or a damaged one.
    """
    place = pathlib.Path(folder)
    summary = _read_result(place)
    if summary is None:
        raise ResultFolderError(
            f"{place} holds no finished search (no result.json of nnopt); run `nnopt search --out {place}`"
        )
    store = ScoreStore(place / "scores.sqlite")
    try:
        return SearchResult(place, summary, list(store))
    finally:
        store.close()


_PARTS = ("search", "space", "base", "winner", "scoring", "training", "latency")


def _read_result(place: pathlib.Path) -> dict[str, Any] | None:
    """The content of `result.json`, or None where there is no such file.

    Raises:
        ResultFolderError: it is not what `run` wrote.
    """
    path = place / "result.json"
    remedy = "remove it, and the same search writes it again"
    summary = read_versioned(path, FORMAT, VERSION, remedy)
    if summary is None:
        return None
    missing = [part for part in _PARTS if not isinstance(summary.get(part), dict)]
    if missing:
        raise ResultFolderError(f"{path} has no {missing[0]!r}; {remedy}")
    return summary


def _train(
    problem: Problem, net: nn.Module, folder: pathlib.Path, watcher: Watcher
) -> tuple[Any, list[EpochRow]]:
    """Trains the winner from scratch, from its last checkpoint if there is one."""
    variables = net.lazy_init(rngs(problem.key("training")), *problem.example.args)
    return train_in(
        folder,
        net,
        variables,
        problem.dataset,
        problem.spec.recipe,
        problem.key("shuffling"),
        on_start=lambda done, total: watcher.phase("training the winner", total, done),
        on_epoch=lambda row: watcher.advance(f"test accuracy {row.test_accuracy:.1%}"),
    )


def _summary(
    problem: Problem,
    net: nn.Module,
    winner: ScoredCandidate,
    rows: list[ScoredCandidate],
    history: list[EpochRow],
    latency: dict[str, Any],
) -> dict[str, Any]:
    spec, space = problem.spec, problem.space
    drawn = problem.draw(winner.index)
    limit = {}
    if problem.limited is not None:
        (predicted,) = problem.limited.predict(np.array([drawn])).tolist()
        limit = {"fraction_fast_enough": problem.limited.accepted, "winner_predicted_ms": predicted}
    return {
        "format": FORMAT,
        "version": VERSION,
        "search": spec.to_json(),
        "space": {
            "positions": [path_text(p) for p in space.paths],
            "candidates": float(space.size),
            "within_budget": problem.sampler.count,
            "fraction_within_budget": problem.sampler.acceptance,
            **limit,
        },
        "base": {
            "parameters": parameters(problem.base, problem.example),
            "macs": macs(problem.base, problem.example),
            "fingerprint": fingerprint(problem.base),
        },
        "winner": {
            "index": winner.index,
            "blocks": list(winner.names),
            "block_scores": list(winner.blocks),
            "block_parameters": [c[i] for c, i in zip(space.costs, drawn, strict=True)],
            "score": winner.score,
            "parameters": parameters(net, problem.example),
            "macs": macs(net, problem.example),
            "fingerprint": fingerprint(net),
        },
        "scoring": {
            "candidates": len(rows),
            "distinct": len({row.names for row in rows}),
            "not_finite": not_finite(rows),
            "pace": dataclasses.asdict(Pace.on(jax.default_backend())),
            # Of the distinct ones: building, compiling and running one, with others in flight beside it.
            "seconds_each": sum(row.seconds for row in rows) / len({row.names for row in rows}),
        },
        "training": {
            "history": [dataclasses.asdict(row) for row in history],
            "test_accuracy": history[-1].test_accuracy,
            "measured_on": problem.dataset.split_note,
        },
        "latency": latency,
        "environment": _environment(),
    }


def _environment() -> dict[str, Any]:
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")
    return {
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {"nnopt": nnopt.__version__}
        | {name: importlib.metadata.version(name) for name in packages},
        "machine": platform.machine(),
        "system": platform.system(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
    }
