"""The comparison of pruning with scaling: families, interpolation, tables, pictures, and a run of it on little."""

import csv
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.skeletons import compare, throughput
from experiments.skeletons.families import SCHEMES, blocks_in_a_stage, members
from experiments.skeletons.pictures import COLOURS
from experiments.skeletons.throughput import Point, summary, throughput_at
from nnopt.backends import XlaBackend
from nnopt.core import rewrite
from nnopt.costs import parameters
from nnopt.data import load
from nnopt.networks import PreActBlock, ResNet, named
from nnopt.rewrites import ScaleDepth

NET = ResNet((2,), PreActBlock, widths=(16,), stem_features=8)
IMAGES = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))


def point(scheme, count, ms, batch=1, backend="xla"):
    return Point(scheme, "", count, 10 * count, batch, "cpu", backend, ms, ms, ms)


@dataclasses.dataclass(frozen=True)
class Other(XlaBackend):
    """Another backend."""

    @property
    def name(self):
        return "other"


def test_families():
    net = NET
    variables = net.lazy_init(jax.random.key(1), IMAGES)
    labels = jnp.arange(8, dtype=jnp.int32)
    family = list(members(net, variables, IMAGES, labels, points=2))
    assert {m.scheme for m in family} == {"base", *SCHEMES}
    assert family[0].net is net
    sizes = {}
    for member in family:
        sizes.setdefault(member.scheme, []).append(parameters(member.net, IMAGES))
    for scheme, counts in sizes.items():
        assert counts == sorted(counts, reverse=True), scheme
        assert all(c < sizes["base"][0] for c in counts) or scheme in ("base", "Fisher profile")
    shallow = rewrite(net, ScaleDepth(drop=("stage1_block1",)), example=IMAGES)
    assert sizes["depth"] == [parameters(shallow, IMAGES)]


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("wrn-40-2", 6), ("wrn-16-1", 2), ("preact-resnet-18", 2), ("resnet-34", 6)],
)
def test_blocks_in_a_stage(name, blocks):
    assert blocks_in_a_stage(named(name, 10), (32, 32, 3)) == blocks


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        (throughput.main, ["--network=nothing"], "no network is named 'nothing'"),
        (throughput.main, ["--network=vgg-16"], "has no module that adds a branch"),
        (throughput.main, ["--batches=0"], "--batches is 0; give whole numbers from 1"),
        (throughput.main, ["--batches", "1", "-2"], "--batches is 1 -2; "),
        (throughput.main, ["--points=0"], "--points is 0; "),
        (throughput.main, ["--repeats=0"], "--repeats is 0; "),
        (throughput.main, ["--backends=gcc"], "no backend is called 'gcc'; there are xla, tvm"),
        (compare.main, ["--backends=gcc"], "no backend is called 'gcc'; there are xla, tvm"),
        (compare.main, ["--quick", "--network=nothing"], "no network is named 'nothing'"),
        (compare.main, ["--quick", "--network=vgg-16"], "has no module that adds a branch"),
        (compare.main, ["--batches=0"], "--batches is 0; "),
        (
            compare.main,
            ["--fractions", "0.5", "1.5"],
            "--fractions is 0.5 1.5; give numbers between",
        ),
        (compare.main, ["--fractions=nan"], "--fractions is nan; "),
        (compare.main, ["--seed=-1"], "the seed is -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(tmp_path, monkeypatch, capsys, run, options, message):
    monkeypatch.setattr(nn.Module, "lazy_init", lambda self, *_, **__: {})  # slow, and not needed
    with pytest.raises(SystemExit) as stop:
        run([*options, f"--out={tmp_path / 'out'}"])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_interpolation_is_linear_in_logarithms():
    points = [point("base", 1000, 8.0), point("width", 250, 2.0), point("depth", 500, 1.0)]
    assert throughput_at(points, "width", 1000) == pytest.approx(125)
    assert throughput_at(points, "width", 500) == pytest.approx(250)  # halfway in logarithms
    assert throughput_at(points, "width", 200) is None
    assert throughput_at(points, "bottleneck", 500) is None
    table = summary([*points, point("Fisher", 200, 6.0)], 1)
    assert table.row_count == len(SCHEMES) + 1


def test_pictures(tmp_path):
    assert set(COLOURS) == {*SCHEMES, *compare.SCHEMES}
    for schemes in (SCHEMES, compare.SCHEMES):
        assert len({COLOURS[s] for s in schemes}) == len(schemes)
    points = [
        point(s, n, 8.0 * n / 1e6, b, backend)
        for backend in ("xla", "tvm")
        for b in (1, 8)
        for s in ("base", *SCHEMES)
        for n in ((1_000_000,) if s == "base" else (250_000, 500_000))
    ]
    drawn = throughput.picture(points, "some-net")
    titles = [f"some-net, batch {b}, cpu, {n}" for n in ("xla", "tvm") for b in (1, 8)]
    assert [axes.get_title() for axes in drawn.axes] == titles
    drawn.savefig(tmp_path / "t.png")
    throughput.write_csv(tmp_path / "t.csv", points)
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert len(rows) == len(points)
    assert [r["backend"] for r in rows] == [p.backend for p in points]
    assert float(rows[0]["images_per_second"]) == pytest.approx(125.0)


def test_a_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "QUICK", dataclasses.replace(compare.QUICK, epochs=1))
    some = {k: compare.SCHEMES[k] for k in ("Fisher, tuned", "Fisher profile")}
    monkeypatch.setattr(compare, "SCHEMES", some)
    digits = load("digits").subset(128, 40)
    train, test = (np.ascontiguousarray(i[:, ::2, ::2]) for i in (digits.train_images, digits.test_images))  # fmt: skip
    digits = dataclasses.replace(digits, train_images=train, test_images=test)
    monkeypatch.setattr(compare, "load", lambda *_: digits)
    monkeypatch.setattr(compare, "network_named", lambda *_: NET)
    monkeypatch.setattr(compare, "chosen_backends", lambda _: [XlaBackend(), Other()])
    options = [
        "--quick",
        "--network=some-net",
        "--fractions=0.9",
        "--batches=1",
        f"--out={tmp_path}",
    ]
    compare.main(options)
    base = parameters(NET, jnp.zeros((1, *digits.image_shape)))
    rows = list(csv.DictReader((tmp_path / "compare.csv").read_text().splitlines()))
    wanted = [(name, scheme) for name in ("xla", "other") for scheme in ("base", *some)]
    assert [(r["backend"], r["scheme"]) for r in rows] == wanted
    assert int(rows[0]["parameters"]) == base
    assert all(int(r["parameters"]) <= 0.9 * base + 1 for r in rows if r["scheme"] != "base")
    assert all(0 <= float(r["test_error"]) <= 1 for r in rows)
    assert np.isfinite([float(r["macs"]) for r in rows]).all()
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    assert "Fisher profile" in capsys.readouterr().out
    made = written(tmp_path)
    compare.main(options)  # all is there: nothing is trained again
    assert written(tmp_path) == made


def written(folder):
    """When each file of the schemes was written."""
    return {
        f: f.stat().st_mtime_ns
        for f in folder.rglob("*")
        if f.is_file() and f.parent != folder and "base" not in f.parts
    }
