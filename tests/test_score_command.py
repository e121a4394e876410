"""`nnopt score`: rankings by training-free scores, and what is said about how sure they are."""

import csv
import dataclasses
import io
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rich.console import Console

from nnopt import data
from nnopt.cli.main import main
from nnopt.cli.score import _scores
from nnopt.core import fingerprint, load_record, save_record
from nnopt.errors import SearchError
from nnopt.networks import WideResNet, named
from nnopt.reports.ranking import csv_rows, fidelity_table, ranking_table, write_csv
from nnopt.rewrites import choice
from nnopt.scores import Fisher, Score
from nnopt.scores.agreement import Interval, agreement, fidelity
from nnopt.search import blockswap
from nnopt.search.blockswap import BlockSwap, Problem
from nnopt.search.ranking import Comparison, Scored, Setting, compare, rank
from nnopt.search.scoring import SampleScoring, distinct, draw_minibatch, score_networks
from nnopt.training import QUICK


class Watching:
    """Writes down what it is told."""

    def __init__(self):
        self.phases = []

    def phase(self, name, total, done=0):
        self.phases.append([name, total, done])

    def advance(self, note=""):
        self.phases[-1][2] += 1


def small_digits():
    digits = data.load("digits").subset(96, 50)
    images = {f"{s}_images": getattr(digits, f"{s}_images")[:, ::4, ::4] for s in ("train", "test")}
    return dataclasses.replace(digits, **images)


@pytest.fixture
def small(monkeypatch):
    """Images of 8 x 8 and two choices."""
    digits = small_digits()
    monkeypatch.setattr(data, "load", lambda name, data_dir=None: digits)
    monkeypatch.setattr(blockswap, "load", lambda name, data_dir, validation: digits)
    monkeypatch.setattr(blockswap, "CODE_CHOICES", tuple(map(choice, ("S", "G(4)"))))


def printed(capsys, monkeypatch, *args, columns=80):
    monkeypatch.setenv("COLUMNS", str(columns))
    main(["score", *map(str, args)])
    out, err = capsys.readouterr()
    assert err == ""
    return out


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def by_seed(rows, prefix="seed_"):
    return np.array([[float(v) for k, v in row.items() if k.startswith(prefix)] for row in rows])


# --- settings ---


def test_settings():
    setting = Setting.of(4, 3, first=2)
    assert setting == Setting(4, (2, 3, 4))
    assert (str(setting), str(Setting(8, (5,)))) == ("batch 4 x 3 seeds", "batch 8 x 1 seed")
    for bad in (
        lambda: Setting(1),
        lambda: Setting(4, ()),
        lambda: Setting(4, (0, 0)),
        lambda: Setting(4, (-1,)),
    ):
        with pytest.raises(SearchError):
            bad()
    with pytest.raises(SearchError, match="at least 1 seed, got 0"):
        Setting.of(4, 0)


def test_seeds_are_those_of_a_search():
    """Minibatches and keys to the bit, the first and the later ones."""
    spec = BlockSwap("wrn-10-1", "digits", 40_000, 0.4, seed=7, score_batch=5, score_seeds=3)
    problem = Problem(spec)
    for s in range(3):
        images, labels = draw_minibatch(problem.dataset, 5, 7, s, QUICK.augmentation)
        np.testing.assert_array_equal(images, problem.batches[s][0])
        np.testing.assert_array_equal(labels, problem.batches[s][1])
        assert labels.dtype == jnp.int32
    assert len({images.tobytes() for images in (np.asarray(b[0]) for b in problem.batches)}) == 3


# --- ranking ---

TABLES = arrays(np.float64, st.tuples(st.integers(2, 9), st.integers(2, 4)), elements=st.floats(0.01, 100.0))  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(TABLES, st.sampled_from([0.25, 2.0, 1024.0]), st.booleans())
def test_the_spread_between_seeds(scores, factor, geometric):
    ranking = rank(scores, geometric=geometric, seed=0)
    values = [[math.log(v) if geometric else v for v in row] for row in scores]
    count, seeds = scores.shape
    means = [sum(row[s] for row in values) / count for s in range(seeds)]
    for i, row in enumerate(values):
        left = [row[s] - means[s] for s in range(seeds)]
        centre = sum(left) / seeds
        variance = sum((v - centre) ** 2 for v in left) / (seeds - 1) * count / (count - 1)
        assert ranking.spread[i] == pytest.approx(math.sqrt(variance), rel=1e-9, abs=1e-9)
    # What a seed does to all candidates alike is no spread.
    moved = scores.copy()
    moved[:, 0] = moved[:, 0] * factor if geometric else moved[:, 0] + factor
    again = rank(moved, geometric=geometric, seed=0)
    np.testing.assert_allclose(again.spread, ranking.spread, atol=1e-9)


def test_a_spread_is_an_unbiased_variance():
    rng = np.random.default_rng(0)
    seeds = rng.normal(size=(1, 20_000))
    noise = rng.normal(size=(3, 20_000)) * 0.5
    ranking = rank(seeds + noise, geometric=False, seed=0, top=1)
    np.testing.assert_allclose(ranking.noise, 0.5, rtol=0.02)


def test_unusable_scores_rank_last_and_stay():
    nan, inf = float("nan"), float("inf")
    ranking = rank([[nan, 9.0], [1.0, 2.0], [inf, 9.0], [3.0, 2.0], [0.0, 5.0]], geometric=True, seed=0)  # fmt: skip
    assert ranking.order.tolist() == [3, 1, 0, 2, 4]
    assert np.isnan(ranking.spread).tolist() == [True, False, True, False, True]
    assert ranking.repeats.unusable.tolist() == [1, 0, 1, 0, 1]
    assert ranking.confidence.best[[0, 2, 4]].tolist() == [0, 0, 0]
    assert math.isfinite(ranking.noise)
    assert math.isfinite(ranking.difference)


def test_one_seed_says_nothing():
    ranking = rank([[1.0], [2.0]], geometric=True, seed=0)
    assert ranking.confidence.says_nothing
    assert np.isnan([*ranking.spread, ranking.noise]).all()


def scored(setting, scores, seconds=1.0):
    return Scored(setting, scores, np.full(len(scores), seconds))


@pytest.fixture
def pair():
    """Thirty candidates, a noisy setting of two seeds and a reference of three."""
    rng = np.random.default_rng(3)
    truth = rng.normal(size=(30, 1))
    cheap = np.exp(truth + rng.normal(size=(30, 2)))
    reference = np.exp(truth + 0.6 * rng.normal(size=(30, 3)))
    return scored(Setting(4, (0, 1)), cheap), scored(Setting(128, (2, 3, 4)), reference, 9.0)


def test_comparisons(pair):
    cheap, reference = pair
    everything, others, one, single = compare(cheap, reference, seed=5)
    assert [c.yardstick for c in (everything, others, one, single)] == [3, 2, 2, 2]
    shown = [(c.setting.batch, len(c.setting.seeds), c.seconds) for c in (everything, others, one, single)]  # fmt: skip
    assert shown == [(4, 2, 1.0), (4, 2, 1.0), (4, 1, 0.5), (128, 1, 3.0)]
    logs, truth = np.log(cheap.scores), np.log(reference.scores)

    # Against everything: the library's agreement, resampled alike.
    known = agreement(logs.mean(1), truth.mean(1), seed=5).spearman
    for field in ("value", "low", "high"):
        assert getattr(everything.spearman, field) == pytest.approx(getattr(known, field), abs=1e-12)  # fmt: skip
    best = logs.mean(1).argmax()
    assert everything.best_rank == (truth.mean(1) > truth.mean(1)[best]).sum()

    # One seed of the reference: the library's fidelity of the reference itself.
    left_out = fidelity(reference.scores, reference.scores, top=10)
    assert single.spearman.value == pytest.approx(left_out.spearman.mean(), abs=1e-12)
    assert single.best_rank == pytest.approx(left_out.best_rank.mean())
    assert single.overlap == pytest.approx(left_out.overlap.mean())
    assert single.top == left_out.top == 10

    # The cheap setting against the same yardsticks.
    rest = [np.delete(truth, r, axis=1).mean(1) for r in range(3)]
    expected = [scipy.stats.spearmanr(logs.mean(1), c).statistic for c in rest]
    assert others.spearman.value == pytest.approx(np.mean(expected), abs=1e-12)
    expected = [scipy.stats.spearmanr(logs[:, s], c).statistic for s in range(2) for c in rest]
    assert one.spearman.value == pytest.approx(np.mean(expected), abs=1e-12)
    for c in (others, one, single):
        assert c.spearman.low < c.spearman.value < c.spearman.high


def test_comparisons_that_are_none(pair):
    cheap, reference = pair
    one = dataclasses.replace(reference, setting=Setting(128, (2,)), scores=reference.scores[:, :1])
    with pytest.raises(SearchError, match="--reference-seeds 2"):
        compare(cheap, one, seed=0)
    with pytest.raises(SearchError, match="look alike"):
        compare(cheap, dataclasses.replace(reference, setting=Setting(128, (1, 2, 3))), seed=0)
    few = [dataclasses.replace(s, scores=s.scores[:3], seconds=s.seconds[:3]) for s in pair]
    with pytest.raises(SearchError, match="3 different candidates show no correlation"):
        compare(*few, seed=0)


def test_a_lone_cheap_seed_and_a_failed_candidate(pair):
    cheap, reference = pair
    cheap.scores[0, 0] = np.nan
    lone = dataclasses.replace(cheap, setting=Setting(4, (0,)), scores=cheap.scores[:, :1])
    rows = compare(lone, reference, seed=0)
    assert [len(r.setting.seeds) for r in rows] == [1, 1, 1]
    assert all(math.isfinite(r.spearman.low) for r in rows)


# --- tables ---


def shown(table, width=80):
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue()


def test_tables_fit_a_terminal():
    rng = np.random.default_rng(0)
    scores = np.exp(30 * rng.normal(size=(999, 2)))
    ranking = rank(scores, geometric=True, seed=0)
    title = "999 of wrn-40-2 at 1.6M by Fisher potential, cifar100, batch 128 x 10 seeds"
    names = [str(i) for i in range(999)]
    text = shown(ranking_table(ranking, title, "candidate", names, [11_234_567] * 999, 5))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "994 more are not shown" in text
    low = Interval(-0.123, -0.523, -0.999)
    rows = [Comparison(Setting(128, tuple(range(10))), 10, low, 998.0, 10.0, 10, 100.0)] * 2
    text = shown(fidelity_table(rows, 999, 2))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "no. 999.0" in text
    assert "2 processes side by side" in " ".join(text.split())
    # Long paths are folded, not cut.
    names = ["/results/" + "x" * 90 + f"/{i}/network.json" for i in range(2)]
    ranking = rank([[1.0, 2.0], [3.0, 4.0]], geometric=True, seed=0)
    text = shown(ranking_table(ranking, "", "network", names, [1, 2], 5))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_what_is_not_finite_is_flagged():
    scores = [[1.0, float("nan")], [2.0, 3.0], [4.0, 2.0]]
    text = shown(ranking_table(rank(scores, geometric=True, seed=0), "t", "candidate", "abc", [1, 2, 3], 9))  # fmt: skip
    lines = [line for line in text.splitlines() if line.startswith("│")]
    assert [line.split("│")[2].strip() for line in lines] == ["c", "b", "a"]
    assert "not finite" in lines[-1]
    assert "1 candidate has a score that is no positive finite number" in " ".join(text.split())
    text = shown(ranking_table(rank([[1.0], [2.0]], geometric=False, seed=0), "t", "candidate", "ab", [1, 2], 9))  # fmt: skip
    assert "nothing can be said about how sure this ranking is" in " ".join(text.split())
    assert "%" not in text.replace("95% of ranks", "")


def test_rows(tmp_path):
    scores = np.array([[1.0, float("nan")], [2.0, 3.0], [4.0, 2.0]])
    ranking = rank(scores, geometric=True, seed=0)
    cells = [{"candidate": i} for i in range(3)]
    made = csv_rows("fisher", ranking, scored(Setting(4, (0, 1)), scores), [7, 8, 9], cells)
    write_csv(tmp_path / "r.csv", made)
    rows = read(tmp_path / "r.csv")
    assert [row["candidate"] for row in rows] == ["2", "1", "0"]
    assert [row["parameters"] for row in rows] == ["9", "8", "7"]
    assert [row["rank"] for row in rows] == ["1.0", "2.0", "3.0"]
    assert float(rows[0]["mean"]) == pytest.approx(math.sqrt(8.0))
    assert (rows[2]["mean"], rows[2]["unusable_seeds"]) == ("", "1")
    np.testing.assert_array_equal(by_seed(rows), scores[[2, 1, 0]])
    ranking = rank([[1.0], [2.0]], geometric=True, seed=0)
    one = csv_rows("fisher", ranking, scored(Setting(4, (0,)), np.ones((2, 1))), [7, 8], [{}, {}])
    assert math.isnan(one[0]["rank_low"])
    assert math.isnan(one[0]["probability_best"])


# --- the command ---


def said(capsys, *args):
    """What a command that is refused says: one line on stderr, and elsewhere at most how far it got in reading."""
    with pytest.raises(SystemExit) as caught:
        main(["score", *map(str, args)])
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert all(line.startswith("reading networks") for line in out.split("\n") if line.strip())
    assert err.startswith("nnopt: ")
    assert err.count("\n") == 1
    return err


def test_help_names_all_scores(capsys):
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    out = capsys.readouterr().out.replace("│", " ")
    words = {word.strip(".,()") for word in out.split()}
    assert set(_scores()) <= words
    assert {"--fidelity", "--reference-batch", "--batch", "naswot", "--out"} <= words


def test_scores_that_are_offered():
    scores = _scores()
    assert all(isinstance(score, Score) for score, _ in scores.values())
    assert len({score for score, _ in scores.values()}) == len(scores)
    assert scores["fisher"] == (Fisher(), True)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    save_record(WideResNet(10, 1.0), folder / "ten.json")
    save_record(WideResNet(10, 1.0, num_classes=5), folder / "five.json")
    save_record(named("vgg-16", 10), folder / "vgg.json")
    (folder / "broken.json").write_text("{")
    return folder


SPACE = ["--network", "wrn-10-1", "--budget", "40K", "--tolerance", "0.5"]
HELD = [*SPACE, "--fidelity", "--reference-batch", "4"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give network records, or --network and --budget"),
        (["--network", "wrn-10-1"], "give network records, or --network and --budget"),
        (["ten.json"], "one network has nothing to be ranked against"),
        (["ten.json", "ten.json"], "two or more different records"),
        (["ten.json", "nowhere.json"], "nowhere.json"),
        (["ten.json", "broken.json"], "is not valid JSON"),
        (["ten.json", "five.json", "--scores", "fihser"], "no score is called 'fihser'; the known"),
        (["ten.json", "five.json", "--scores"], "nothing to rank by"),
        (["ten.json", "five.json", "--batch", "1"], "batch normalisation"),
        (["ten.json", "five.json", "--batch", "999"], "a minibatch of 999 images"),
        (["ten.json", "five.json", "--seeds", "0"], "at least 1 seed, got 0"),
        (["ten.json", "five.json", "--seed", "-1"], "the seed is -1"),
        (["ten.json", "five.json", "--top", "0"], "give --top 1"),
        (["ten.json", "five.json", "--data", "cifar100"], "cifar100"),
        (["ten.json", "five.json", "--out", "."], "cannot write .: it is a folder"),
        (["ten.json", "five.json", "--out", "no/r.csv"], "cannot write no/r.csv: no is no folder"),
        (["ten.json", "five.json", "--fidelity"], "--fidelity is for a sample of a block space"),
        (["ten.json", "five.json", "--budget", "40K"], "--budget is for a sample"),
        (["ten.json", "five.json", "--reference-seeds", "3"], "--reference-seeds is for a sample"),
        (["ten.json", "five.json"], "five.json: the network returns float32[4,5], and the labels of digits are 10 classes"),
        (["ten.json", "vgg.json"], "vgg.json: VGG has no module that adds a branch"),
        (["--network", "wrn-10-1", "--budget", "40Q"], "'40Q' is no budget"),
        (["--network", "wrn-10-1", "--budget", "1K"], "no candidate has between"),
        (["--network", "alexnet", "--budget", "40K"], "no network is named 'alexnet'"),
        (["--network", "wrn-10-1", "--budget", "40K", "--scores", "snip"], "by Fisher potential alone"),
        (["--network", "wrn-10-1", "--budget", "40K", "--samples", "1"], "--samples 2 or more"),
        (["--network", "wrn-10-1", "--budget", "40K", "--batch", "1"], "batch normalisation"),
        (["--network", "wrn-10-1", "--budget", "40K", "--tolerance", "2"], "between 0 and 1"),
        ([*SPACE, "--workers", "0"], "at least 1 worker, got 0"),
        ([*HELD, "--reference-seeds", "1"], "give --reference-seeds 2 or more"),
        ([*HELD, "--reference-batch", "999"], "a minibatch of 999 images"),
        ([*HELD, "--samples", "3"], "different candidates show no correlation"),
    ],
)  # fmt: skip
def test_refused(args, words, records, small, capsys, monkeypatch, tmp_path):
    if "cifar100" in args:
        monkeypatch.undo()
        monkeypatch.delenv("NNOPT_DATA", raising=False)
    monkeypatch.chdir(records)
    before = sorted(records.iterdir())
    assert words in said(capsys, *args)
    assert sorted(records.iterdir()) == before


def test_networks_that_do_not_run_on_the_images(records, capsys, monkeypatch, tmp_path):
    from foreign_networks import UNet

    digits = small_digits()
    odd = {f"{s}_images": getattr(digits, f"{s}_images")[:, :5, :5] for s in ("train", "test")}
    digits = dataclasses.replace(digits, **odd)
    monkeypatch.setattr(data, "load", lambda name, data_dir=None: digits)
    save_record(UNet(), tmp_path / "unet.json")
    err = said(capsys, records / "ten.json", tmp_path / "unet.json", "--scores", "l2-norm")
    assert "unet.json: the network does not run on images of 5 x 5 x 3 of digits" in err


SAMPLE = ["--network", "wrn-10-1", "--budget", "40K", "--tolerance", "0.9", "--seed", "3"]


def test_a_sample_and_its_records_rank_alike(small, capsys, monkeypatch, tmp_path):
    """The engine and a whole network, with weights and minibatches of the same seeds, from end to end."""
    out = tmp_path / "r.csv"
    text = printed(
        capsys, monkeypatch, *SAMPLE, "--samples", 9, "--fidelity", "--reference-batch", 6,
        "--reference-seeds", 2, "--top", 3, "--out", out,
    )  # fmt: skip
    rows = read(out)
    spec = BlockSwap("wrn-10-1", "digits", 40_000, 0.9, samples=9, seed=3)
    problem = Problem(spec)
    assert sorted(int(row["candidate"]) for row in rows) == list(distinct(problem))
    assert f"{len(rows)} of wrn-10-1 at 40K by Fisher potential, digits, batch 4 x 2 seeds" in text
    assert f"{len(rows) - 3} more are not shown" in text
    assert f"Everything: {out}" in text
    for row in rows:
        index = int(row["candidate"])
        assert int(row["parameters"]) == problem.space.total(problem.draw(index))
        names = [c.genotype_name for c in problem.choices(index)]
        assert row["convs"] == str(names)
    scores = by_seed(rows)
    means = np.array([float(row["mean"]) for row in rows])
    np.testing.assert_allclose(means, np.exp(np.log(scores).mean(axis=1)), rtol=1e-12)
    assert (np.diff(means) <= 0).all()
    assert all(float(row["rank_low"]) <= float(row["rank"]) <= float(row["rank_high"]) for row in rows)  # fmt: skip
    assert sum(float(row["probability_best"]) for row in rows) == pytest.approx(1.0)
    # The reference is of other seeds, and of another batch.
    assert [k for k in rows[0] if k.startswith("reference")] == ["reference_2", "reference_3"]
    reference = by_seed(rows, "reference_")
    expected = scipy.stats.spearmanr(means, np.log(reference).mean(axis=1)).statistic
    flat = " ".join(text.split())
    assert f"{expected:.3f} [" in flat
    assert "How well settings rank" in flat
    for words in ("4 x 2", "4 x 1", "6 x 1"):
        assert words in flat

    # The same networks as records, each compiled as a whole.
    paths = {}
    for row in rows[:2]:
        paths[str(tmp_path / f"{row['candidate']}.json")] = row
        save_record(problem.build(int(row["candidate"])), [*paths][-1])
    text = printed(
        capsys, monkeypatch, *paths, "--scores", "fisher", "parameters", "--seed", 3, "--out", tmp_path / "n.csv",
    )  # fmt: skip
    again = read(tmp_path / "n.csv")
    assert [row["score"] for row in again] == ["fisher"] * 2 + ["parameters"] * 2
    assert "2 networks by fisher" in text
    assert "2 networks by parameters" in text
    for row in again[:2]:
        known = paths[row["network"]]
        assert row["parameters"] == known["parameters"]
        np.testing.assert_allclose(by_seed([row]), by_seed([known]), rtol=1e-3)
    for row in again[2:]:
        assert set(by_seed([row])[0]) == {float(row["parameters"])}

    # The file is a genotype file of the best.
    best = tmp_path / "best.json"
    main(["rewrite", "--network", "wrn-10-1", "--genotype", str(out), "--size", "8", "--out", str(best)])  # fmt: skip
    assert fingerprint(load_record(best)) == fingerprint(load_record(next(iter(paths))))


def test_scores_of_any_networks(small, monkeypatch):
    """Training modes by other names, networks without any, and scores without images."""
    from foreign_networks import NormDropout

    class Modeless(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(10)(nn.relu(nn.Conv(8, (3, 3))(x)).mean(axis=(1, 2)))

    class Deterministic(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic=True):
            x = nn.BatchNorm(use_running_average=deterministic)(nn.Conv(8, (3, 3))(x))
            return nn.Dense(10)(nn.relu(x).mean(axis=(1, 2)))

    from nnopt.scores import GradNorm, L2Norm
    from nnopt.search.scoring import _in_training

    assert _in_training(Modeless()) == {}
    assert _in_training(Deterministic()) == {"deterministic": False}
    assert _in_training(NormDropout()) == {"train": True}
    watching = Watching()
    digits = small_digits()
    nets = {"a": Modeless(), "b": Deterministic()}
    found, counts = score_networks(
        nets, [GradNorm(), L2Norm()], digits, Setting(4, (2,)), seed=1,
        augmentation=QUICK.augmentation, watcher=watching,
    )  # fmt: skip
    assert watching.phases == [["reading networks", 2, 2], ["scoring networks", 2, 2]]
    assert counts == [3 * 9 * 8 + 8 + 90, 3 * 9 * 8 + 8 + 90 + 16]
    assert {s.scores.shape for s in found.values()} == {(2, 1)}
    # By hand: the gradient's norm for each kernel, of the mean loss in train mode.
    for row, net, mode in ((0, nets["a"], {}), (1, nets["b"], {"deterministic": False})):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 0), 2)
        images, labels = draw_minibatch(digits, 4, 1, 2, QUICK.augmentation)
        variables = net.init(key, images, **mode)

        def loss(params, net=net, variables=variables, images=images, labels=labels, mode=mode):
            rest = {k: v for k, v in variables.items() if k != "params"}
            logits, _ = net.apply(
                {"params": params, **rest}, images, **mode, mutable=["batch_stats"]
            )
            return -jax.nn.log_softmax(logits)[jnp.arange(4), labels].mean()

        gradient = jax.jit(jax.grad(loss))(variables["params"])
        kernels = [layer["kernel"] for layer in gradient.values() if "kernel" in layer]
        expected = sum(float(np.linalg.norm(k)) for k in kernels)
        assert found[GradNorm()].scores[row, 0] == pytest.approx(expected, rel=1e-4)


def test_processes(monkeypatch, tmp_path):
    """Two of them share the candidates, keep their order, and tell how they get on."""
    monkeypatch.setenv("NNOPT_CACHE", str(tmp_path))  # which the two share
    spec = BlockSwap("wrn-10-1", "digits", 40_000, 0.5, samples=5, seed=3)
    # Candidates are handed out by fours, and few programs are needed to score the same one several times.
    job = SampleScoring(spec, None, Setting(2, (1, 0)), (4, 4, 4, 2, 4))
    watching = Watching()
    found = job.run(watching, workers=2)
    assert found.scores.shape == (5, 2)
    assert [phase[0] for phase in watching.phases] == ["compiling, batch 2", "scoring, batch 2"]
    assert watching.phases[1][1:] == [5, 5]
    assert (found.seconds > 0).all()
    np.testing.assert_array_equal(found.scores[[1, 2]], found.scores[[0, 0]])
    np.testing.assert_allclose(found.scores[4], found.scores[0], rtol=1e-3)
    assert (abs(found.scores[3] / found.scores[0] - 1) > 0.01).all()
    assert abs(found.scores[0, 0] / found.scores[0, 1] - 1) > 0.01


def test_what_the_command_hands_on(small, capsys, monkeypatch, tmp_path):
    """Options reach the scoring; one seed and failed candidates are spoken of."""
    asked = []

    def pretended(job, watcher, workers):
        asked.append((job, workers))
        scores = np.linspace(1, 2, len(job.indices))[:, None] * np.ones(len(job.setting.seeds))
        scores[0] = np.nan
        return scored(job.setting, scores)

    monkeypatch.setattr(SampleScoring, "run", pretended)
    out = tmp_path / "r.csv"
    args = ("--samples", 40, "--seeds", 1, "--batch", 6, "--workers", 3, "--out", out)
    text = printed(capsys, monkeypatch, *SAMPLE, *args)
    ((job, workers),) = asked
    assert (job.setting, workers) == (Setting(6, (0,)), 3)
    assert (job.spec.budget, job.spec.tolerance, job.spec.seed) == (40_000, 0.9, 3)
    flat = " ".join(text.split())
    assert "nothing can be said about how sure" in flat
    assert "1 candidate has a score that is no positive finite number" in flat
    rows = read(out)
    assert rows[-1]["candidate"] == "0"
    assert rows[-1]["seed_0"] == "nan"
    assert len(rows) == len(job.indices) < 40
    assert f"{40 - len(rows)} of 40 were drawn before" in flat


def test_files_that_cannot_be_written(tmp_path, capsys):
    from nnopt.errors import ResultFolderError

    with pytest.raises(ResultFolderError, match="No such file"):
        write_csv(tmp_path / "no" / "r.csv", [{"a": 1}])
    assert not list(tmp_path.iterdir())
