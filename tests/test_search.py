import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import pickle
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnopt import data
from nnopt.core import load_record
from nnopt.errors import (
    BudgetError,
    CheckpointError,
    ChoiceError,
    NnoptError,
    RecipeError,
    ResultFolderError,
    SearchError,
    SelectionError,
    UnknownNetworkError,
)
from nnopt.rewrites import choice, load_genotype
from nnopt.scores.fisher_engine import FisherEngine
from nnopt.search import blockswap, latency
from nnopt.search import run as run_module
from nnopt.search.blockswap import BlockSwap, Problem, best, geometric_mean, not_finite, score_all
from nnopt.search.run import load_result, run
from nnopt.search.store import ScoredCandidate, ScoreStore
from nnopt.training import QUICK, Recipe, Trainer, load_checkpoint

RECIPE = Recipe(epochs=2, batch=32, augmentation=data.Augmentation(pad=1, pad_mode="constant"))
SPEC = BlockSwap("wrn-10-1", "digits", 40_000, 0.4, samples=4, seed=3, score_batch=4, recipe=RECIPE)
MANY = BlockSwap("wrn-10-1", "digits", 40_000, 0.2, samples=1000, seed=5)


def quick_init(net, rngs, image):
    """Weights that the key decides, without JAX's initialisation, which compiles for seconds."""
    specs = jax.eval_shape(net.init, rngs, image)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(rngs["params"])))

    def fill(path, spec):
        size = 0.1 if path[-1].key in ("kernel", "bias") else 0.0
        return jnp.asarray(rng.normal(size == 0.0, size, spec.shape), spec.dtype)

    return jax.tree_util.tree_map_with_path(fill, specs)


def shrink(setattr_):
    """Small images and few choices, so that a whole search takes seconds; the rest is as ever."""
    digits = data.load("digits").subset(96, 50)
    small = {f"{s}_images": getattr(digits, f"{s}_images")[:, ::4, ::4] for s in ("train", "test")}
    digits = dataclasses.replace(digits, **small)
    setattr_(blockswap, "load", lambda name, data_dir, validation: digits)
    setattr_(blockswap, "CODE_CHOICES", tuple(map(choice, ("S", "G(4)", "B(2)", "G(N)"))))
    setattr_(nn.Module, "lazy_init", quick_init)
    setattr_(latency, "BATCHES", (1,))
    setattr_(latency, "measure", functools.partial(latency.measure, repeats=3))


@pytest.fixture
def small(monkeypatch):
    shrink(monkeypatch.setattr)


def child(code, *args, **popen):
    """A process with this module imported."""
    begin = f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r}); import test_search as t; "
    return subprocess.Popen([sys.executable, "-c", begin + code, *map(str, args)], **popen)


# --- what determines a search ---


def test_a_search_survives_json():
    search = dataclasses.replace(SPEC, choices="paper", tolerance=0.1)
    again = BlockSwap.from_json(json.loads(json.dumps(search.to_json())))
    assert again == search
    assert hash(again) == hash(search)
    assert BlockSwap.from_json(json.loads(json.dumps(MANY.to_json()))) == MANY


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"samples": 0}, SearchError, "at least 1 sample"),
        ({"score_batch": 1}, SearchError, "scoring batch of 2"),
        ({"tolerance": 0.0}, BudgetError, "between 0 and 1, got 0.0"),
        ({"tolerance": 1.0}, BudgetError, "between 0 and 1, got 1.0"),
        ({"tolerance": math.nan}, BudgetError, "between 0 and 1, got nan"),
        ({"seed": -1}, SearchError, "the seed is -1"),
        ({"seed": 2**32}, SearchError, "0 to 4294967295"),
        ({"choices": "all"}, ChoiceError, "'code' or 'paper', not 'all'"),
    ],
)
def test_searches_that_make_no_sense(fields, error, said):
    with pytest.raises(error, match=said):
        dataclasses.replace(SPEC, **fields)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"network": "wrn-11-1"}, UnknownNetworkError, "6n [+] 4"),
        (
            {"network": "vgg-16"},
            SelectionError,
            "vgg-16 has no module that adds a branch .* give a residual",
        ),
        ({"budget": 1000}, BudgetError, "take a budget in between"),
        ({"score_batch": 97}, NnoptError, "96 training images"),
    ],
)
def test_problems_that_cannot_be(small, tmp_path, fields, error, said):
    with pytest.raises(error, match=said):
        run(dataclasses.replace(SPEC, **fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()  # what cannot start leaves nothing behind


@pytest.mark.parametrize("workers", [0, -1])
def test_no_workers(workers, tmp_path):
    with pytest.raises(SearchError, match="at least 1 worker"):
        run(SPEC, tmp_path / "out", workers=workers)


# --- a thousand candidates ---


@pytest.fixture(scope="module")
def many():
    return Problem(MANY)


def hashed(problem, calls=None):
    """A score that costs nothing: the hash of the names."""

    def score(index):
        drawn = problem.draw(index)
        names = problem.space.names(drawn)
        if calls is not None:
            calls.append(names)
        digest = hashlib.sha256(repr(names).encode()).digest()
        values = tuple(int.from_bytes(digest[i : i + 8]) / 2**61 for i in (0, 8, 16))
        return ScoredCandidate(index, names, problem.space.total(drawn), sum(values), values, 0.25)

    return score


def plain(rows):
    """Rows without the seconds, floats as their bits."""
    return [
        (r.index, r.names, r.parameters, r.score.hex(), [b.hex() for b in r.blocks]) for r in rows
    ]


@pytest.fixture(scope="module")
def thousand(many):
    return score_all(many, [], lambda row: None, score=hashed(many))


def test_candidates_lie_in_the_budget(many, thousand):
    assert [r.index for r in thousand] == list(range(1000))
    assert all(32_000 < r.parameters < 48_000 for r in thousand)
    assert len({r.names for r in thousand}) > 100
    other = Problem(dataclasses.replace(MANY, seed=6))
    mine = [r.names for r in thousand[:50]]
    assert [other.space.names(other.draw(i)) for i in range(50)] != mine
    assert [many.space.names(many.draw(i)) for i in range(50)] == mine


def test_what_was_drawn_before_is_not_scored_again(many, thousand):
    calls, told = [], []
    rows = score_all(many, [], told.append, score=hashed(many, calls))
    assert plain(rows) == plain(thousand)
    assert told == rows  # in order, whoever was ready first
    assert len(calls) == len(set(calls)) == len({r.names for r in rows}) < 1000
    repeats = [r for r in rows if r.seconds == 0.0]
    assert len(repeats) == 1000 - len(calls)

    calls.clear()
    known = rows[200:400]
    assert plain(score_all(many, known, told.append, score=hashed(many, calls))) == plain(thousand)
    assert not set(calls) & {r.names for r in known}
    assert len(calls) == len(set(calls))


def keep_scoring():
    """What a process does that is about to be killed; prints each row's number once it is stored."""
    folder = pathlib.Path(sys.argv[1])
    problem = object.__new__(Problem)
    problem.spec, problem.space, problem.sampler = pickle.loads((folder / "problem").read_bytes())
    store = ScoreStore(folder / "scores.sqlite")

    def on_scored(row):
        store.add(row)
        print(row.index, flush=True)

    score_all(problem, list(store), on_scored, score=hashed(problem))
    store.close()


def test_killed_again_and_again(many, thousand, tmp_path):
    (tmp_path / "problem").write_bytes(pickle.dumps((many.spec, many.space, many.sampler)))
    moments = random.Random(0)
    done = 0
    for _ in range(4):
        process = child("t.keep_scoring()", tmp_path, stdout=subprocess.PIPE, text=True)
        for _ in range(moments.randint(20, 220)):
            last = int(process.stdout.readline())
        threading.Event().wait(moments.uniform(0, 0.01))  # wherever it is then
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        store = ScoreStore(tmp_path / "scores.sqlite")
        rows = list(store)
        store.close()
        assert max(done, last + 1) <= len(rows) < 1000  # nothing that was stored is lost
        assert plain(rows) == plain(thousand[: len(rows)])
        done = len(rows)
    process = child("t.keep_scoring()", tmp_path, stdout=subprocess.PIPE, text=True)
    printed, _ = process.communicate()
    assert process.returncode == 0
    assert len(printed.splitlines()) == 1000 - done
    store = ScoreStore(tmp_path / "scores.sqlite")
    assert plain(store) == plain(thousand)
    store.close()


def test_a_failing_score_ends_the_search(many):
    told = []

    def failing(index):
        if index == 7:
            raise RuntimeError("no memory")
        return hashed(many)(index)

    with pytest.raises(RuntimeError, match="no memory"):
        score_all(many, [], told.append, score=failing)
    assert [r.index for r in told] == list(range(7))


# --- the best ---


def row(index, score):
    return ScoredCandidate(index, ("S",), 10, score, (score,), 1.0)


def test_the_best():
    assert best([row(0, 1.0), row(1, 3.0), row(2, 2.0)]).index == 1
    assert best([row(2, 3.0), row(1, 3.0), row(0, 1.0)]).index == 1  # of equal ones the first
    unfit = [row(0, math.nan), row(1, math.inf), row(2, -math.inf), row(4, -5.0)]
    assert best(unfit).index == best(unfit[::-1]).index == 4
    assert best([row(3, math.nan), row(2, math.inf)]).index == 2
    assert not_finite(unfit) == 3


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ([2.0, 8.0], 4.0),
        ([0.0, 8.0], 0.0),
        ([math.inf, 8.0], math.inf),
        ([math.inf, 0.0], math.nan),
        ([0.0, math.nan], math.nan),
        ([-1.0, 4.0], math.nan),
        ([1e308, 1e308], 1e308),
    ],
)
def test_geometric_means(values, mean):
    found = [geometric_mean(v) for v in (values, values[::-1])]
    assert found == pytest.approx([mean, mean], rel=1e-12, nan_ok=True)


def test_no_finite_score(small, tmp_path, monkeypatch):
    """Found before anything is trained, and again by whoever resumes."""

    def unfit(problem, indices):
        return (dataclasses.replace(row(i, math.nan), names=(str(i),) * 3) for i in indices)

    monkeypatch.setattr(Problem, "score_each", unfit)
    monkeypatch.setattr(FisherEngine, "prepare", lambda *_, **__: None)
    monkeypatch.setattr(run_module, "_train", lambda *_: pytest.fail("trained"))
    for _ in range(2):
        with pytest.raises(SearchError, match=f"none of the {SPEC.samples} scores in .* finite"):
            run(SPEC, tmp_path / "out")


# --- scores on disk ---


def test_rows_come_back(tmp_path):
    store = ScoreStore(tmp_path / "scores")
    rows = [row(3, 0.1 + 0.2), row(0, 5e-324), row(1, math.inf), row(2, -1e-300)]
    for r in rows:
        store.add(r)
    store.add(row(3, 7.0))  # written again, replaced
    store.close()
    store = ScoreStore(tmp_path / "scores")
    assert plain(store) == plain(sorted([*rows[1:], row(3, 7.0)], key=lambda r: r.index))
    store.close()


def test_scores_that_are_no_number_come_back(tmp_path):
    store = ScoreStore(tmp_path / "scores")
    store.add(row(0, math.nan))
    (found,) = store
    store.close()
    assert math.isnan(found.score)
    assert math.isnan(found.blocks[0])


@pytest.mark.parametrize("damage", ["not sqlite", "other table", "not json", "page"])
def test_damaged_scores(tmp_path, damage):
    path = tmp_path / "scores"
    if damage == "not sqlite":
        path.write_text("these are no scores " * 100)
    elif damage == "other table":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE scores (candidate INTEGER)")
        connection.close()
    else:
        store = ScoreStore(path)
        for i in range(300):
            store.add(row(i, 1.0))
        if damage == "not json":
            store._connection.execute("UPDATE scores SET names = 'S, S' WHERE candidate = 9")
            store._connection.commit()
        store.close()
        if damage == "page":
            content = bytearray(path.read_bytes())
            content[4096:8192] = b"\x99" * 4096
            path.write_bytes(content)

    def read():
        store = ScoreStore(path)
        try:
            list(store)
        finally:
            store.close()

    with pytest.raises(ResultFolderError, match="remove the file") as caught:
        read()
    assert "\n" not in str(caught.value)


def test_scores_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultFolderError, match="give a folder that can be written"):
        ScoreStore(tmp_path / "file" / "scores")
    store = ScoreStore(tmp_path / "scores")
    store.close()
    with pytest.raises(ResultFolderError, match="cannot write a score"):
        store.add(row(0, 1.0))


# --- a whole search, killed ---


class Watching:
    """Notes what it is told."""

    def __init__(self):
        self.phases, self.units = [], []

    def phase(self, name, total, done=0):
        self.phases.append((name, total, done))
        self.units.append(0)

    def advance(self, note=""):
        self.units[-1] += 1


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_scoring():
    shrink(setattr)
    score_each = Problem.score_each

    def dying(self, indices):
        for row in score_each(self, indices):
            if row.index == 2:
                die()
            yield row

    Problem.score_each = dying
    run(SPEC, sys.argv[1])


def killed_in_training():
    """In its second epoch, before the checkpoint."""
    shrink(setattr)
    run_epoch = Trainer.run_epoch

    def dying(self, state):
        made = run_epoch(self, state)
        if made[1].epoch == 2:
            die()
        return made

    Trainer.run_epoch = dying
    run(SPEC, sys.argv[1])


@pytest.fixture(scope="module")
def searches(tmp_path_factory):
    """Folders: a search that ran through, the same one killed twice, and the latter as it was after each kill."""
    base = tmp_path_factory.mktemp("searches")
    killed = base / "killed"
    with (
        pytest.MonkeyPatch.context() as patch,
        child("t.killed_in_scoring()", killed) as first,
    ):
        shrink(patch.setattr)
        watching = Watching()
        through = run(SPEC, base / "through", watcher=watching)
        assert first.wait() == -signal.SIGKILL
        shutil.copytree(killed, base / "scoring")
        assert child("t.killed_in_training()", killed).wait() == -signal.SIGKILL
        shutil.copytree(killed, base / "training")
        resuming = Watching()
        resumed = run(SPEC, killed, watcher=resuming)
    return through, resumed, watching, resuming, base


def test_killed_and_resumed(searches):
    through, resumed, watching, resuming, base = searches
    store = ScoreStore(base / "scoring" / "scores.sqlite")
    assert [r.index for r in store] == [0, 1]
    store.close()
    assert not (base / "training" / "result.json").exists()
    (compiling, programs, done), *phases = watching.phases
    assert (compiling, done) == ("compiling programs", 0)
    assert phases[:2] == [("scoring candidates", 4, 0), ("training the winner", 2, 0)]
    assert watching.units == [programs, 4, 2, 1]
    assert resuming.phases[:2] == [("scoring candidates", 4, 4), ("training the winner", 2, 1)]
    assert resuming.units == [0, 1, 1]

    # Scores were computed in three processes.
    assert plain(resumed.rows) == plain(through.rows)
    for key in ("search", "space", "base", "winner"):
        assert resumed.summary[key] == through.summary[key]

    def without_seconds(history):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in history]

    histories = [without_seconds(r.summary["training"]["history"]) for r in (through, resumed)]
    assert histories[0] == histories[1]
    assert [row["epoch"] for row in histories[0]] == [1, 2]


def weights(result):
    net = load_record(result.folder / "winner" / "network.json")
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32)))
    return load_checkpoint(result.folder / "winner" / "checkpoint", net, shapes)


def test_trained_weights_are_the_same(searches):
    through, resumed = searches[:2]
    assert jax.tree.leaves(weights(through))
    chex.assert_trees_all_equal(weights(through), weights(resumed))


def test_the_summary(searches, small):
    result = searches[0]
    s, rows = result.summary, result.rows
    winner = best(rows)
    assert s["winner"]["score"] == winner.score == max(r.score for r in rows) > 0
    assert (s["winner"]["index"], tuple(s["winner"]["blocks"])) == (winner.index, winner.names)
    # Geometric means over seeds, of the total and of each block.
    assert sum(s["winner"]["block_scores"]) == pytest.approx(winner.score, rel=0.2)
    assert s["winner"]["parameters"] == winner.parameters < s["base"]["parameters"] == 77_850
    assert s["space"]["candidates"] == 4**3
    assert s["scoring"]["candidates"] == SPEC.samples
    assert s["scoring"]["not_finite"] == 0
    assert s["scoring"]["pace"] == {"lanes": 1, "ahead": 0}
    assert BlockSwap.from_json(s["search"]) == SPEC
    assert s["training"]["test_accuracy"] == s["training"]["history"][-1]["test_accuracy"]
    assert set(s["latency"]) == {"1"}
    genotype = load_genotype(result.folder / "winner" / "genotype.csv")
    assert tuple(c.name for c in genotype.choices) == winner.names
    read = load_result(result.folder)
    assert (read.summary, read.rows) == (json.loads(json.dumps(s)), rows)


def contents(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_a_finished_search_is_only_read(searches, small, monkeypatch):
    through = searches[0]
    before = contents(through.folder)
    monkeypatch.setattr(Problem, "score_each", lambda *_: pytest.fail("scored again"))
    monkeypatch.setattr(run_module, "_train", lambda *_: pytest.fail("trained again"))
    again = run(SPEC, through.folder)
    assert again.rows == through.rows
    assert again.summary == json.loads(json.dumps(through.summary))
    assert contents(through.folder) == before


# --- folders that are refused ---


@pytest.fixture
def copied(searches, tmp_path, small):
    """A finished search to be damaged."""
    return pathlib.Path(shutil.copytree(searches[0].folder, tmp_path / "copy"))


def refused(spec, folder, said, error=ResultFolderError):
    with pytest.raises(error, match=said) as caught:
        run(spec, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seed": 4}, r"differs in seed\)"),
        ({"samples": 5, "budget": 41_000}, r"differs in budget, samples\)"),
        ({"recipe": dataclasses.replace(RECIPE, epochs=3)}, r"differs in recipe\)"),
    ],
)
def test_a_folder_of_another_search(copied, fields, said):
    before = contents(copied)
    refused(dataclasses.replace(SPEC, **fields), copied, f"belongs to another search .*{said}")
    assert contents(copied) == before


def test_a_folder_of_something_else(small, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    refused(SPEC, tmp_path, "is not empty and holds no search")
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_a_file_in_place_of_a_folder(small, tmp_path):
    (tmp_path / "file").write_text("")
    refused(SPEC, tmp_path / "file", "cannot write to the result folder .* give another")
    refused(SPEC, tmp_path / "file" / "below", "cannot write .*Not a directory")


def test_killed_before_anything_was_known(small, tmp_path, monkeypatch):
    """Half of search.json, under the name it has until it is whole."""
    (tmp_path / ".search.json.123.partial").write_text('{"network"')
    monkeypatch.setattr(Problem, "score_each", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # it got as far as scoring
        run(SPEC, tmp_path)
    assert json.loads((tmp_path / "search.json").read_text()) == json.loads(
        json.dumps(SPEC.to_json())
    )


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("search.json", '{"network": ', r"cannot read .*search.json: .* remove the folder"),
        ("search.json", "[]", "belongs to another search"),
        ("result.json", '{"format": ', r"cannot read .*result.json: .* remove it"),
        ("result.json", "[1, 2]", 'does not have "format"'),
        ("result.json", "{}", 'does not have "format"'),
        ("result.json", '{"format": "nnopt blockswap result", "version": 9}', "of version 9"),
        ("result.json", '{"format": "nnopt blockswap result", "version": 1}', "has no 'search'"),
        ("scores.sqlite", "no scores" * 999, "remove the file"),
    ],
)
def test_damaged_files(copied, name, text, said):
    (copied / name).write_text(text)
    refused(SPEC, copied, said)
    if name == "result.json":
        with pytest.raises(ResultFolderError, match=said):
            load_result(copied)


def test_bytes_that_are_no_text(copied):
    (copied / "result.json").write_bytes(b"\xff\xfe{")
    refused(SPEC, copied, "cannot read .*result.json")


@pytest.mark.parametrize("damage", ["arrays", "history"])
def test_a_damaged_checkpoint(searches, small, tmp_path, damage):
    folder = shutil.copytree(searches[-1] / "training", tmp_path / "copy")
    if damage == "arrays":
        largest = max((folder / "training").rglob("d/*"), key=lambda p: p.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-20])
        said = r"cannot go on from .*training: .*damaged.*; remove that folder"
    else:
        record = json.loads((folder / "training" / "nnopt.json").read_text())
        record["extra"] = {}
        (folder / "training" / "nnopt.json").write_text(json.dumps(record))
        said = r"cannot go on from .*training: .*history.*; remove that folder"
    refused(SPEC, folder, said, CheckpointError)


def test_no_result_yet(searches, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere", searches[-1] / "training"):
        with pytest.raises(ResultFolderError, match="holds no finished search"):
            load_result(folder)


def test_recipes_are_checked():
    values = {**SPEC.to_json(), "recipe": {**QUICK.to_json(), "epochs": 0}}
    with pytest.raises(RecipeError, match="epochs"):
        BlockSwap.from_json(values)
