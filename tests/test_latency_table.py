"""Latency tables on a backend whose time is made up: a function takes as long as it has weights, on a clock of its own."""

import dataclasses
import functools
import json
import sqlite3

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import printed, said

from nnopt.backends import Compiled, Latency, Setup, describe_device
from nnopt.backends.prediction import Fit, Predictor, fit, pairs
from nnopt.backends.table import LatencyTable, TimedNetwork, TimedPart
from nnopt.core import Example
from nnopt.core.rewrite import rewrite_traced
from nnopt.errors import BudgetError, MeasurementError, SearchError
from nnopt.networks import VGG, WideResNet
from nnopt.reports.latency_table import accuracy_json, accuracy_table, checked, parts_table
from nnopt.rewrites import choice
from nnopt.search import table as module
from nnopt.search.accuracy import accuracy
from nnopt.search.blockswap import BlockSwap
from nnopt.search.latency_limit import LatencyLimit, LimitedSampler
from nnopt.search.parts import SpaceParts, chained, network_parts
from nnopt.search.run import _Nobody
from nnopt.search.table import Builder, Rounds, Space, predict

CALL_MS, WEIGHT_MS = 0.01, 1e-4
CHOICES = tuple(map(choice, ("S", "G(4)", "B(2)")))
EXAMPLE = Example(jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
SETUP = Setup({"platform": "cpu", "cores": 1}, "by hand")


class FakeBackend:
    """Takes 10 us for a call and 0.1 us for a weight; breaks down after so many compilations."""

    name = "fake"

    def __init__(self, *, slow=1.0, lives=10**9, threads=1):
        self.now, self.slow, self.lives, self.threads = 0.0, slow, lives, threads
        self.compiled = 0

    def clock(self):
        return self.now

    def describe(self):
        return describe_device() | {"threads": self.threads}

    def compile(self, function, inputs):
        if self.compiled == self.lives:
            raise KeyboardInterrupt
        self.compiled += 1
        closed = jax.make_jaxpr(function)(*inputs)
        weights = sum(np.size(c) for c in closed.consts)
        seconds = 1e-3 * (CALL_MS + WEIGHT_MS * weights)

        def run(*arrays):
            self.now += seconds * self.slow

        return Compiled(run, tuple(inputs), 0.0, self.describe(), "by hand")


@pytest.fixture(scope="module")
def space():
    return Space(WideResNet(10, 0.25), EXAMPLE, CHOICES)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "t.sqlite"


def builder(space, backend, table, **options):
    return Builder(space, backend, table, rounds=Rounds(2, 2, clock=backend.clock), **options)


@pytest.fixture(scope="module")
def built(space, tmp_path_factory):
    """A table that was built, fitted and checked, and how long it took."""
    path = tmp_path_factory.mktemp("table") / "t.sqlite"
    with LatencyTable(path, create=True) as table:
        made = builder(space, FakeBackend(), table)
        made.parts(_Nobody())
        made.fit(_Nobody(), 4)
        made.check(_Nobody(), 5)
        yield path, made.times


# --- parts ---


def test_parts_of_a_space_are_those_of_its_networks(space):
    for index in range(4):
        drawn = space.draw(3, index)
        assert drawn == space.draw(3, index)
        net = rewrite_traced(space.traced, space.blocks.genotype(drawn))
        expected = [part.workload for part in network_parts(net, EXAMPLE)]
        assert sorted(space.parts.of(drawn)) == sorted(expected)
    base = {part.workload for part in network_parts(space.net, EXAMPLE)}
    assert base <= {part.workload for part in space.parts.distinct}
    assert [part.label for part in space.parts.fixed] == ["Conv stem", "Dense head"]


def test_networks_without_blocks_are_their_layers():
    parts = network_parts(VGG(), Example(jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)))
    assert {part.label.split()[0] for part in parts} == {"Conv", "Dense"}


def test_only_what_returns_what_it_takes_is_chained(space):
    deeper = Space(WideResNet(16, 0.25), EXAMPLE, CHOICES)
    by_label = {part.label: chained(part) for part in deeper.parts.distinct}
    assert by_label["S 1x8x8x4 -> 1x8x8x4"]
    assert not by_label["S 1x8x8x16 -> 1x8x8x4"]
    assert not by_label["Conv stem"]


# --- building ---


def test_building_measures_each_part_once(space, built):
    path, times = built
    parts = times.parts()
    assert list(parts) == [part.workload for part in space.parts.distinct]
    one = next(part for part in space.parts.distinct if part.label == "Dense head")
    assert parts[one.workload].ms == pytest.approx(WEIGHT_MS * (16 * 10 + 10), rel=1e-3)
    assert len(times.networks("fit")) == 4
    with LatencyTable(path) as table:
        again = FakeBackend()
        assert builder(space, again, table).parts(_Nobody()) == 0
        assert again.compiled == 2  # the reference, and what does nothing


def test_predictions_add_up(space, built):
    _, times = built
    # Between the parts are a normalisation and the call, which the fit finds.
    line = Predictor.of(times).fit
    assert line.slope == pytest.approx(1.0, rel=1e-3)
    assert line.intercept_ms == pytest.approx(CALL_MS + WEIGHT_MS * 4 * 16, rel=0.2)
    found = checked(times)
    assert found.candidates == len(times.networks("check"))
    assert found.error.value < 1e-3
    assert found.spearman.value == pytest.approx(1.0)
    predicted, measured = pairs(times, "check")
    np.testing.assert_allclose(predicted, measured, rtol=1e-3)
    drawn = list(dict.fromkeys(space.draw(1, i) for i in range(50)))[:5]
    np.testing.assert_allclose(predict(space, times, drawn), predicted)


def test_a_killed_build_resumes(space, path):
    table = LatencyTable(path, create=True)
    dying = FakeBackend(lives=5)
    with pytest.raises(KeyboardInterrupt):
        builder(space, dying, table).parts(_Nobody())
    # Never closed, as after a kill.
    with LatencyTable(path, create=True) as other:
        second = FakeBackend()
        made = builder(space, second, other)
        before = len(made.times.parts())
        assert before == 3
        assert made.parts(_Nobody()) == len(space.parts.distinct) - before
        assert second.compiled == 2 + len(space.parts.distinct) - before
    table.close()


def test_a_machine_that_slows_down_does_not_matter(space, path):
    with LatencyTable(path, create=True) as table:
        quick = builder(space, FakeBackend(), table)
        quick.parts(_Nobody())
        quick.fit(_Nobody(), 4)
        slow = builder(space, FakeBackend(slow=3.0), table)
        slow.check(_Nobody(), 3)
        predicted, measured = pairs(slow.times, "check")
        np.testing.assert_allclose(measured, predicted, rtol=1e-3)
        (first, *_) = slow.times.networks("check").values()
        assert first.ms == pytest.approx(3 * measured[0])


def test_a_disturbed_stretch_is_measured_again(space, path, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.0)
    seen = []

    def noisy(candidates, **_):
        seen.append(candidates)
        spread = 5.0 if len(seen) < 3 else 1.0
        time = Latency(4.0 - len(seen), 4.0 - len(seen), spread, (1.0,), 1, False)
        return dict.fromkeys(candidates, time)

    with LatencyTable(path, create=True) as table:
        made = builder(space, FakeBackend(), table)
        monkeypatch.setattr(module, "measure", noisy)
        latency, _ = made._time(made._nothing, 3, made._small)
    assert len(seen) == 3
    assert latency.median_ms == 1.0


# --- the fit ---


def test_fits():
    assert fit([], []) == Fit(0.0, 1.0, 0)
    assert fit([2.0, 4.0], [3.0, 6.0]) == Fit(0.0, 1.5, 2)
    assert fit([2.0, 2.0, 2.0], [3.0, 3.0, 9.0]) == Fit(0.0, 1.5, 3)
    falling = fit([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    assert falling == Fit(0.0, 1.0, 3)
    assert Fit(-5.0, 1.0)(2.0) == 0.0


def test_speeds_are_brought_together(path):
    with LatencyTable(path, create=True) as table:
        times = table.of("xla", SETUP)
        times.add_part(TimedPart("a", "A", 2.0, 1.0))
        times.add_part(TimedPart("b", "B", 6.0, 2.0))  # at half the speed
        times.add_part(TimedPart("c", "C", 1.0, 1.0))
        predictor = Predictor.of(times)
        assert predictor(["a", "b", "b"]) == 2.0 + 3.0 + 3.0
        times.add_network("fit", TimedNetwork("n", ("a", "b"), 10.0, 8.0))
        times.add_network("fit", TimedNetwork("m", ("a", "b"), 20.0, 16.0))  # at half the speed
        times.add_network("check", TimedNetwork("k", ("c",), 99.0, 120.0))
        predictor = Predictor.of(times)
        assert predictor.reference_ms == 12.0
        assert predictor(["c"]) == 3.0  # a network takes 15 ms at that speed, and its parts 5
        assert predictor.at_speed(times.networks("check")["k"]) == pytest.approx(9.9)
        with pytest.raises(MeasurementError, match=r"no time of 1 of 2 parts of the network, such as d;"):  # fmt: skip
            predictor(["a", "d"])


def test_accuracy():
    measured = np.arange(1.0, 11.0)
    found = accuracy(1.1 * measured, measured)
    assert found.error.value == pytest.approx(0.1)
    assert (found.spearman.value, found.kendall.value) == (pytest.approx(1.0), pytest.approx(1.0))
    assert found.error.low == pytest.approx(found.error.high)
    assert accuracy(measured[::-1], measured).spearman.value == pytest.approx(-1.0)
    with pytest.raises(MeasurementError, match="check 2 or more"):
        accuracy(measured[:1], measured[:1])


# --- files ---


def test_other_files_are_refused(tmp_path):
    with pytest.raises(MeasurementError, match=r"there is no latency table .*nnopt table build"):
        LatencyTable(tmp_path / "no.sqlite")
    text = tmp_path / "text.sqlite"
    text.write_text("no table" * 200)
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE scores (a INTEGER)")
    newer = tmp_path / "newer.sqlite"
    LatencyTable(newer, create=True).close()
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 9")
    for path, words in (
        (text, "is no latency table, or it is damaged"),
        (foreign, "is no latency table; give"),
        (newer, "of version 9, this nnopt reads 1"),
        (tmp_path, "is no latency table, or it is damaged or cannot be written"),
    ):
        before = path.read_bytes() if path.is_file() else None
        for create in (False, True):
            with pytest.raises(MeasurementError, match=words) as caught:
                LatencyTable(path, create=create)
            assert "\n" not in str(caught.value)
        assert before is None or path.read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE parts SET ms = 'fast'",
        "UPDATE parts SET ms = -1",
        "UPDATE networks SET parts = '['",
        "UPDATE setups SET setup = '{}'",
        "DROP TABLE networks",
    ],
)
def test_damaged_tables(path, damage):
    with LatencyTable(path, create=True) as table:
        times = table.of("xla", SETUP)
        times.add_part(TimedPart("a", "A", 2.0, 1.0))
        times.add_network("fit", TimedNetwork("n", ("a",), 20.0, 2.0))
    with sqlite3.connect(path) as connection:
        connection.execute(damage)
    with LatencyTable(path) as table, pytest.raises(MeasurementError, match=r"is damaged: .*build it again") as caught:  # fmt: skip
        Predictor.of(table.only())
    assert "\n" not in str(caught.value)


def test_setups_are_kept_apart(path):
    two = dataclasses.replace(SETUP, device=SETUP.device | {"cores": 2})
    with LatencyTable(path, create=True) as table:
        with pytest.raises(MeasurementError, match=r"no times of anything, but of no backend"):
            table.only()
        table.of("xla", SETUP).add_part(TimedPart("a", "A", 2.0, 1.0))
        busy = dataclasses.replace(SETUP, load_average=9.0)
        assert list(table.of("xla", busy).parts()) == ["a"]
        assert table.only("xla").setup == SETUP
        assert not table.of("xla", two).parts()
        with pytest.raises(MeasurementError, match=r"of 2 set-ups \(xla; cores is 1 and 2\)"):
            table.only()
        with pytest.raises(MeasurementError, match="no times of tvm, but of xla"):
            table.only("tvm")
        with pytest.raises(MeasurementError, match="no times of xla; build"):
            Predictor.of(table.of("xla", two))


def test_a_foreign_setup_is_refused(space, built):
    path, _ = built
    with LatencyTable(path) as table:
        other = FakeBackend(threads=7)
        with pytest.raises(MeasurementError, match=r"another set-up .threads is 1 and 7.; measure as"):  # fmt: skip
            builder(space, other, table, must_exist=True)
        other.name = "other"
        with pytest.raises(MeasurementError, match="no times of the backend other"):
            builder(space, other, table, must_exist=True)
        assert len(table.setups()) == 1


# --- a limit for searches ---


def draws(indices):
    """Candidates of three positions of two choices each, by the bits of their number."""
    return np.array([[(i >> 32 if i >= 2**32 else i) >> b & 1 for b in range(3)] for i in indices])


@pytest.fixture
def limited(path):
    """Position costs 1 or 3 ms each, 1 ms besides: 4 to 10 ms."""
    with LatencyTable(path, create=True) as table:
        times = table.of("xla", SETUP)
        for workload, ms in (("stem", 1.0), ("fast", 1.0), ("slow", 3.0)):
            times.add_part(TimedPart(workload, workload, ms, 1.0))

    class Part:
        def __init__(self, workload):
            self.workload = workload

    return SpaceParts((((Part("fast"), Part("slow")),) * 3), (Part("stem"),))


def test_candidates_that_are_too_slow_are_not_drawn(limited, path):
    sampler = LimitedSampler(LatencyLimit.read(str(path), 7.0), limited, draws)
    np.testing.assert_array_equal(sampler.predict(draws([0, 1, 3, 7])), [4.0, 6.0, 8.0, 10.0])
    assert sampler.accepted == pytest.approx(0.5)
    assert sampler.draw(1) == (1, 0, 0)  # fast enough, so as without a limit
    assert sum(sampler.draw(3)) <= 1
    assert sampler.draw(3) == sampler.draw(3)
    with pytest.raises(
        BudgetError, match=r"none of 1000 .* at most 2 ms; they take 4 to 10 on xla"
    ):
        LimitedSampler(LatencyLimit.read(str(path), 2.0), limited, draws)
    for ms in (0.0, float("nan"), float("inf")):
        with pytest.raises(BudgetError, match="is no limit"):
            LatencyLimit.read(str(path), ms)


def test_a_table_that_changed_makes_another_search(limited, path):
    limit = LatencyLimit.read(str(path), 7.0)
    spec = BlockSwap("wrn-10-1", "digits", 40_000, latency=limit)
    again = BlockSwap.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert "latency" not in dataclasses.replace(spec, latency=None).to_json()
    with LatencyTable(path) as table:
        table.only().add_part(TimedPart("fast", "fast", 0.5, 1.0))
    with pytest.raises(SearchError, match="has changed since this search was made"):
        LimitedSampler(limit, limited, draws)


# --- the command ---


def test_reports(built, capsys):
    from rich.console import Console

    _, times = built
    console = Console(width=100)
    console.print(parts_table(times, 2))
    console.print(accuracy_table(times, checked(times)))
    out = " ".join(capsys.readouterr().out.split())
    assert " more " in out
    assert "fitted to 4 measured networks" in out
    assert "random candidates, predicted against measured, fake" in out
    written = accuracy_json(times, checked(times))
    assert json.loads(json.dumps(written)) == written


def test_the_command_from_build_to_search(tmp_path, capsys, monkeypatch):
    from nnopt import backends, rewrites

    monkeypatch.setattr(rewrites, "CODE_CHOICES", CHOICES[:2])
    fake = FakeBackend()
    monkeypatch.setattr(backends, "backend", lambda name: fake)
    monkeypatch.setattr(module, "Rounds", functools.partial(Rounds, clock=fake.clock))
    file = tmp_path / "t.sqlite"
    space = ["--network", "wrn-10-0.25", "--size", 8, "--threads", 1]
    out = printed(capsys, "table", "build", *space, "--out", file, "--fit", 3, "--repeats", 2)
    assert "fitted to 3 measured networks" in " ".join(out.split())
    out = printed(capsys, "table", "check", file, *space, "--samples", 3, "--repeats", 2)
    assert "Spearman" in out
    assert "G(4) 1x8x8x16 -> 1x8x8x4" in printed(capsys, "table", "show", file)
    assert " ms\n" in printed(capsys, "table", "predict", "wrn-10-0.25", "--table", file, "--size", 8)  # fmt: skip
    assert "no time of" in said(capsys, "table", "predict", "wrn-10-1", "--table", file)
    fake.threads = 2
    refused = said(capsys, "table", "check", file, *space, "--samples", 3)
    assert "another set-up" in refused


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["build", "--network", "wrn-10-1", "--batch", "1000000000"],
            "numbers; give a smaller --batch",
        ),
        (["show", "no.sqlite"], "there is no latency table no.sqlite; make it with"),
        (["predict", "wrn-10-1", "--table", "no.sqlite"], "there is no latency table"),
        (["check", "no.sqlite"], "there is no latency table"),
        (["check", "no.sqlite", "--samples", "1"], "--samples is 1; give 2 or more"),
        (["build", "--fit", "-1"], "--fit is -1; give 0 or more"),
        (["build", "--batch", "0", "--out", "no.sqlite"], "--batch is 0; give 1 or more"),
        (["build", "--out", "/nowhere/a.sqlite"], "/nowhere is no folder"),
        (["build", "--network", "vgg", "--out", "no.sqlite"], "no network is named 'vgg'"),
    ],
)
def test_the_command_refuses(args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in said(capsys, "table", *args)
    assert not list(tmp_path.iterdir())


def test_a_search_wants_both_options(capsys):
    both = "--latency-table and --max-latency go together"
    assert both in said(capsys, "search", "--budget", "40K", "--max-latency", 3)
    missing = said(capsys, "search", "--budget", "40K", "--max-latency", 3, "--latency-table", "no")
    assert "there is no latency table no" in missing
