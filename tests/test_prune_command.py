"""`nnopt prune`: every scheme ends within its budget; killed runs resume; bad input is one line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnopt.cli.main import main
from nnopt.core import Example, channel_groups, load_record, sites
from nnopt.costs import parameters
from nnopt.data import load
from nnopt.errors import BudgetError
from nnopt.networks import WideResNet, named
from nnopt.rewrites import (
    Bottleneck,
    ScaleWidth,
    inner_groups,
    largest_within,
    magnitude,
    prune,
    rewrite,
    weakest,
)
from nnopt.search import latency, pruning
from nnopt.training import evaluate_test, load_checkpoint, save_checkpoint

NET = WideResNet(16, 1.0)
IMAGE = Example(jnp.zeros((1, 32, 32, 3)), train=False)
QUICK = ("--epochs", "1", "--steps", "1", "--at-once", "30")


DIGITS = load("digits").subset(256, 100)


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    monkeypatch.setattr("nnopt.data.load", lambda *_, **__: DIGITS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of the base network."""
    folder = tmp_path_factory.mktemp("base") / "checkpoint"
    save_checkpoint(folder, NET, NET.lazy_init(jax.random.key(5), *IMAGE.args, **IMAGE.kwargs))
    return folder


def run(folder, *options):
    main(["prune", "--budget", "100K", "--out", str(folder), *QUICK, *options])
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("tune", ()),
        ("scratch", ("--criterion", "l1")),
        ("width", ("--keep", "stem")),
        ("depth", ()),
        ("bottleneck", ()),
        ("profile", ("--profile", "16", "10", "32", "20", "64", "40")),
    ],
)
def test_schemes(tmp_path, capsys, base, scheme, options):
    if scheme in ("tune", "scratch"):
        options = (*options, "--checkpoint", str(base))
    summary = run(tmp_path, "--scheme", scheme, *options)
    net = load_record(tmp_path / "network.json")
    assert summary["parameters"] == parameters(net, IMAGE) <= 100_000
    assert summary["base_parameters"] == 175_066
    like = net.lazy_init(jax.random.key(0), *IMAGE.args, **IMAGE.kwargs)
    variables = load_checkpoint(tmp_path / "checkpoint", net, like)
    assert evaluate_test(net, variables, DIGITS) == summary["test_accuracy"]
    assert set(summary["latency"]) == {"1", "32"}
    if scheme in ("scratch", "tune"):
        assert sum(summary["inner_widths"]) == 224 - summary["rounds"][-1]["removed"]
    out = capsys.readouterr().out
    assert "test accuracy" in out
    assert f"{summary['parameters']:,}" in out
    if scheme == "bottleneck":
        again = run(tmp_path, "--scheme", scheme, *options)  # finished: nothing is done again
        assert again == summary


def test_a_killed_pruning_resumes(tmp_path, monkeypatch, base):
    options = ("--checkpoint", str(base), "--at-once", "5")
    whole = run(tmp_path / "whole", *options)
    monkeypatch.setattr(pruning, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    original, calls = pruning.Pruner.round, []

    def killed(self, state):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        return original(self, state)

    monkeypatch.setattr(pruning.Pruner, "round", killed)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "killed", *options)
    assert stop.value.code == 130
    monkeypatch.setattr(pruning.Pruner, "round", original)
    resumed = run(tmp_path / "killed", *options)
    for row in (*whole["rounds"], *resumed["rounds"]):
        row.pop("seconds")
    assert resumed["rounds"] == whole["rounds"]
    assert resumed["inner_widths"] == whole["inner_widths"]
    assert resumed["test_accuracy"] == whole["test_accuracy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "900K"), "the budget is 900,000 parameters, and the network has 175,066"),
        (("--budget", "1000", "--scheme", "bottleneck"), "no member of this family has 1,000"),
        (("--budget", "1000", "--scheme", "depth"), "the shallowest network has"),
        (("--scheme", "profile"), "give it with --profile"),
        (("--scheme", "profile", "--profile", "3", "4"), "the profile has 2 widths"),
        (("--scheme", "width", "--keep", "nowhere"), "no module at 'nowhere'"),
        (("--network", "nothing"), "no network is named 'nothing'"),
        (("--checkpoint", "nowhere"), "no checkpoint at nowhere"),
        (("--steps", "0"), "give at least one of both"),
        (("--seed", "-1"), "the seed is -1"),
    ],
)
def test_bad_input(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        main(["prune", "--budget", "100K", "--out", str(tmp_path / "out"), *QUICK, *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_a_budget_below_what_pruning_leaves(tmp_path, capsys, base):
    with pytest.raises(SystemExit):
        run(tmp_path, "--budget", "2000", "--checkpoint", str(base))
    assert "without all channels that can go the network has" in capsys.readouterr().err


def test_the_largest_member_within_a_budget():
    found = sites(named("wrn-16-2", 10), IMAGE)
    for family in (Bottleneck, lambda f: ScaleWidth(f, 1, "stem")):
        rule = largest_within(found, family, 300_000)
        factor = getattr(rule, "z", None) or rule.factor
        count = parameters(rewrite(found.net, rule, example=IMAGE), IMAGE)
        more = parameters(rewrite(found.net, family(factor * 1.01), example=IMAGE), IMAGE)
        assert count <= 300_000
        assert count == more or more > 300_000
    assert largest_within(found, Bottleneck, 10**9) == Bottleneck(1.0)
    with pytest.raises(BudgetError, match="the smallest found has"):
        largest_within(found, Bottleneck, 10_000)
    assert np.isfinite(factor)


def test_a_budget_of_measured_latency():
    """Channels go until the table says that the network takes two thirds of the time."""
    groups = channel_groups(NET, IMAGE)
    scores = magnitude(groups, NET.lazy_init(jax.random.key(0), *IMAGE.args, **IMAGE.kwargs))
    inner = {n: scores[n] for n in inner_groups(groups)}
    table = latency.SiteLatencies(grid=8, repeats=3)

    def cost(removed):
        return table(rewrite(NET, prune(groups, removed), example=IMAGE), IMAGE)

    whole = table(NET, IMAGE)
    least = cost({n: range(groups[n].size - 1) for n in inner})
    budget = (whole + least) / 2
    removed = weakest(groups, inner, budget=budget, cost=cost)
    known = len(table.table)
    assert least < cost(removed) <= budget < whole
    assert len(table.table) == known  # a second look measures nothing
    assert 10 < known < 60
