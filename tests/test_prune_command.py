"""`nnopt prune`: every scheme ends within its budget; killed runs resume; bad input is one line."""

import dataclasses
import json
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from nnopt.cli.main import main
from nnopt.core import Example, channel_groups, load_record, save_record, sites
from nnopt.costs import macs, parameters
from nnopt.data import load
from nnopt.errors import BudgetError, PruneError, ResultFolderError
from nnopt.networks import PreActBlock, ResNet
from nnopt.rewrites import (
    Bottleneck,
    ScaleWidth,
    inner_groups,
    largest_within,
    parameters_without,
    prune,
    rewrite,
    weakest,
)
from nnopt.rewrites.family import parameters_resized
from nnopt.search import latency, pruning
from nnopt.search.folders import claimed
from nnopt.search.pruning import PruneJob
from nnopt.training import PruneRecipe, Recipe, evaluate_test, load_checkpoint, save_checkpoint

NET = ResNet((2,), PreActBlock, widths=(8,), stem_features=4)
INNER = (8, 8)
IMAGE = Example(jnp.zeros((1, 16, 16, 3)), train=False)
QUICK = {
    "tune": ("--steps", "1", "--at-once", "3"),
    "scratch": ("--epochs", "1", "--steps", "1", "--at-once", "3"),
}


def small(images):
    return np.ascontiguousarray(images[:, ::2, ::2])


few = load("digits").subset(128, 50)
DIGITS = dataclasses.replace(few, train_images=small(few.train_images), test_images=small(few.test_images))  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Commands of one network: most of what they take is compiling the same programs again."""
    wanted = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    for settings in (wanted, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if settings is wanted:
            yield


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    monkeypatch.setattr("nnopt.data.load", lambda *_, **__: DIGITS)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A record of the base network, and a checkpoint of its variables."""
    folder = tmp_path_factory.mktemp("base")
    save_record(NET, folder / "network.json")
    variables = NET.lazy_init(jax.random.key(5), *IMAGE.args, **IMAGE.kwargs)
    save_checkpoint(folder / "checkpoint", NET, variables)
    return folder


def run(home, folder, *options):
    network = str(home / "network.json")
    scheme = options[options.index("--scheme") + 1] if "--scheme" in options else "tune"
    quick = QUICK.get(scheme, ("--epochs", "1"))
    main(
        ["prune", "--budget", "1.4K", "--network", network, "--out", str(folder), *quick, *options]
    )
    return json.loads((folder / "result.json").read_text())


def refused(capsys, call, *arguments):
    """The one line with which a command is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("tune", ()),
        ("scratch", ("--criterion", "l1")),
        ("width", ("--keep", "stem")),
        ("depth", ()),
        ("bottleneck", ()),
        ("profile", ("--profile", "8", "5")),
    ],
)
def test_schemes(tmp_path, capsys, home, scheme, options):
    if scheme in ("tune", "scratch"):
        options = (*options, "--checkpoint", str(home / "checkpoint"))
    options = ("--scheme", scheme, *options)
    # A mistake at first: it does not spoil the folder for the corrected command.
    wrong = (*options, "--budget", "900K")
    assert "give a smaller budget" in refused(capsys, run, home, tmp_path, *wrong)
    assert not list(tmp_path.iterdir())
    summary = run(home, tmp_path, *options)
    net = load_record(tmp_path / "network.json")
    assert summary["parameters"] == parameters(net, IMAGE) <= 1_400
    assert summary["base_parameters"] == parameters(NET, IMAGE)
    like = net.lazy_init(jax.random.key(0), *IMAGE.args, **IMAGE.kwargs)
    variables = load_checkpoint(tmp_path / "checkpoint", net, like)
    assert evaluate_test(net, variables, DIGITS) == summary["test_accuracy"]
    assert set(summary["latency"]) == {"1", "32"}
    if scheme in ("scratch", "tune"):
        assert sum(summary["inner_widths"]) == sum(INNER) - summary["rounds"][-1]["removed"]
    out = capsys.readouterr().out
    assert "test accuracy" in out
    assert f"{summary['parameters']:,}" in out


def test_a_finished_folder_is_only_read(tmp_path, capsys, home, monkeypatch):
    options = ("--scheme", "depth")
    summary = run(home, tmp_path, *options)

    def never(*_, **__):
        raise AssertionError("it is done again")

    monkeypatch.setattr(pruning, "train_in", never)
    assert run(home, tmp_path, *options) == summary
    error = refused(capsys, run, home, tmp_path, *options, "--seed", "1")
    assert "belongs to another prune (it differs in seed)" in error
    result = tmp_path / "result.json"
    head = {"format": pruning.FORMAT, "version": pruning.VERSION}
    for damaged, what in (
        ({}, "format"),
        ([], "format"),
        (3, "format"),
        (None, "holds null"),
        ({"split_note": "a"}, "format"),
        ({**summary, "version": 2}, "is of version 2"),
        (head, "no valid 'parameters'"),
        ({**summary, "inner_widths": 3}, "no valid 'inner_widths'"),
        ({**summary, "test_accuracy": None}, "no valid 'test_accuracy'"),
        ({**summary, "base_test_accuracy": "good"}, "no valid 'base_test_accuracy'"),
        ({**summary, "latency": {"1": {}}}, "no valid 'latency'"),
        ({**summary, "latency": {"1": 3}}, "no valid 'latency'"),
    ):
        result.write_text(json.dumps(damaged))
        error = refused(capsys, run, home, tmp_path, *options)
        assert what in error
        assert "result.json" in error
        assert "remove it, and the same command writes it again" in error
        assert (tmp_path / "prune.json").exists()


def test_a_killed_pruning_resumes(tmp_path, monkeypatch, home):
    options = ("--checkpoint", str(home / "checkpoint"), "--at-once", "1")
    whole = run(home, tmp_path / "whole", *options)
    monkeypatch.setattr(pruning, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    original, calls = pruning.Pruner.round, []

    def killed(self, state):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        return original(self, state)

    monkeypatch.setattr(pruning.Pruner, "round", killed)
    with pytest.raises(SystemExit) as stop:
        run(home, tmp_path / "killed", *options)
    assert stop.value.code == 130
    monkeypatch.setattr(pruning.Pruner, "round", original)
    resumed = run(home, tmp_path / "killed", *options)
    for row in (*whole["rounds"], *resumed["rounds"]):
        row.pop("seconds")
    assert len(whole["rounds"]) > 5
    assert resumed["rounds"] == whole["rounds"]
    assert resumed["inner_widths"] == whole["inner_widths"]
    assert resumed["test_accuracy"] == whole["test_accuracy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "900K"), "the budget is 900,000 parameters, and the network has 2,"),
        (("--budget", "400", "--scheme", "bottleneck"), "no member of this family has 400"),
        (("--budget", "400", "--scheme", "depth"), "the shallowest network has"),
        (("--budget", "400"), "without all channels that can go the network has"),
        (("--scheme", "profile"), "give it with --profile"),
        (("--scheme", "profile", "--profile", "3", "4", "5"), "the profile has 3 widths"),
        (("--scheme", "profile", "--profile", "4", "0"), "width 1 of the profile is 0"),
        (("--scheme", "tune", "--profile", "8", "8"), "scheme tune takes no inner widths"),
        (("--scheme", "width", "--keep", "nowhere"), "no module at 'nowhere'"),
        (("--scheme", "bottleneck", "--keep", "stem"), "only scheme width keeps a module"),
        (("--network", "nothing"), "no network is named 'nothing'"),
        (("--checkpoint", "nowhere"), "no checkpoint at nowhere"),
        (("--steps", "0"), "give at least one of both"),
        (("--epochs", "0"), "--epochs is 0; give 1 or more"),
        (("--epochs", "-2"), "--epochs is -2; give 1 or more"),
        (("--learning-rate", "0"), "--learning-rate is 0.0; give a number above 0"),
        (("--learning-rate", "nan"), "--learning-rate is nan; give a number above 0"),
        (("--seed", "-1"), "the seed is -1"),
        (
            (
                "--scheme",
                "width",
                "--checkpoint",
                "nowhere",
                "--criterion",
                "l1",
                "--steps",
                "7",
                "--only",
                "all",
            ),
            "scheme width removes no channels of a trained network; leave out --criterion, --steps, --only, --checkpoint, or",
        ),
        (
            ("--scheme", "depth", "--at-once", "9"),
            "scheme depth removes no channels of a trained network; leave out --at-once,",
        ),
        (
            ("--scheme", "profile", "--profile", "8", "8", "--learning-rate", "3"),
            "scheme profile removes no channels of a trained network; leave out --learning-rate, or",
        ),
        (
            ("--checkpoint", "there", "--epochs", "3"),
            "--epochs is of training from scratch, and scheme tune only tunes",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input(tmp_path, capsys, home, options, message):
    assert message in refused(capsys, run, home, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_jobs_say_how_channels_are_removed_if_they_are():
    how = PruneRecipe(Recipe(epochs=1))
    with pytest.raises(PruneError, match="scheme tune removes channels; say how"):
        PruneJob("tune", 100, Recipe(epochs=1))
    with pytest.raises(PruneError, match="scheme depth removes no channels; leave pruning out"):
        PruneJob("depth", 100, Recipe(epochs=1), how)
    with pytest.raises(PruneError, match="scheme depth starts from random weights; leave out"):
        pruning.prune_network(PruneJob("depth", 100, Recipe(epochs=1)), NET, DIGITS, None, None, checkpoint="there")  # fmt: skip


@pytest.mark.parametrize(
    "net",
    [
        nn.Embed(5, 10),
        # Containers take any keyword. (Groups that do not divide the channels are none of their doing.)
        nn.Sequential([nn.Conv(8, (3, 3), feature_group_count=2)]),
    ],
    ids=["embedding", "container"],
)
def test_a_network_that_does_not_run_on_the_images(tmp_path, capsys, home, net):
    save_record(net, tmp_path / "network.json")
    network = ("--network", str(tmp_path / "network.json"))
    error = refused(capsys, run, home, tmp_path / "out", "--scheme", "width", *network)
    assert f"{type(net).__name__} does not run on images of 16 x 16 x 3" in error
    assert not (tmp_path / "out").exists()


def test_a_claim_is_given_up_only_if_nothing_else_is_there(tmp_path):
    settings = {"seed": 0}

    def fail(*made):
        with claimed(tmp_path / "a", "prune", settings) as place:
            assert json.loads((place / "prune.json").read_text()) == settings
            for name in made:
                (place / name).mkdir()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not (tmp_path / "a").exists()
    with pytest.raises(RuntimeError):
        fail("training")
    assert (tmp_path / "a" / "prune.json").exists()
    # A claim that was there before is another run's.
    (tmp_path / "a" / "training").rmdir()
    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "a" / "prune.json").exists()
    # Somebody else's files are left alone.
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes").write_text("mine")
    with (
        pytest.raises(ResultFolderError, match="is not empty"),
        claimed(tmp_path / "b", "prune", settings),
    ):
        pass
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["notes"]


def test_the_largest_member_within_a_budget():
    found = sites(NET, IMAGE)

    def count(rule):
        return parameters(rewrite(found.net, rule, example=IMAGE), IMAGE)

    for family in (Bottleneck, lambda f: ScaleWidth(f, 1, "stem")):
        exact = count(family(0.75))
        for budget in (exact, exact - 1):
            rule = largest_within(found, family, budget)
            factor = rule.z if isinstance(rule, Bottleneck) else rule.factor
            # A factor that is one step of the search larger is too large.
            assert count(rule) <= budget < count(family(factor + 2**-14))
        assert count(largest_within(found, family, exact)) == exact
    assert largest_within(found, Bottleneck, 10**9) == Bottleneck(1.0)
    with pytest.raises(BudgetError, match="the smallest found has"):
        largest_within(found, Bottleneck, 100)


def test_parameters_are_counted_without_a_trace():
    groups = channel_groups(NET, IMAGE)
    removed = {n: range(1 + i) for i, n in enumerate(groups)}
    rule = prune(groups, removed)
    whole = sites(NET, IMAGE)
    made = parameters(rewrite(NET, rule, example=IMAGE), IMAGE)
    assert parameters_resized(whole, rule) == parameters_without(groups, removed) == made
    wider = ScaleWidth(1.5, 1)
    made = parameters(rewrite(NET, wider, example=IMAGE), IMAGE)
    assert parameters_resized(whole, wider.written_out(whole)) == made


def test_a_budget_of_measured_latency(monkeypatch):
    """Channels go until the table says that the network takes what it should."""
    real = latency.SiteLatencies(repeats=1)
    assert real(nn.Dense(4), jnp.zeros((2, 8))) > 0
    assert len(real.table) == 1
    # A clock that knows what it measures, for a machine's own is noisy: 10 us a layer and 1 us for 1000 multiply-accumulates.
    measured = []

    def measure(compiled, repeats):
        measured.append(compiled["it"])
        return {"it": SimpleNamespace(median_ms=0.01 + compiled["it"] * 1e-6)}

    monkeypatch.setattr(latency, "compile_network", lambda net, _, example: macs(net, example))
    monkeypatch.setattr(latency, "measure", measure)
    monkeypatch.setattr(nn.Module, "lazy_init", lambda *_: {})  # slow, and not needed by this clock
    groups = channel_groups(NET, IMAGE)
    inner = {n: np.arange(groups[n].size) for n in inner_groups(groups)}
    table = latency.SiteLatencies(grid=2, repeats=3)

    def cost(removed):
        return table(rewrite(NET, prune(groups, removed), example=IMAGE), IMAGE)

    whole = table(NET, IMAGE)
    # All widths are on the grid but that of the images, whose three channels are rounded up to four.
    rounded_up = 16 * 16 * 9 * 4
    assert whole == pytest.approx(0.01 * 7 + 1e-6 * (macs(NET, IMAGE) + rounded_up))
    least = cost({n: range(groups[n].size - 1) for n in inner})
    budget = (whole + least) / 2
    removed = weakest(groups, inner, budget=budget, cost=cost)
    assert least < cost(removed) <= budget < whole
    assert len(measured) == len(table.table) < 30  # each shape once
