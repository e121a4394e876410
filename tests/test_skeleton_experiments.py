"""The comparison of pruning with scaling: families, interpolation, tables, pictures, and a run of it on little."""

import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.skeletons import compare, throughput
from experiments.skeletons.families import SCHEMES, members
from experiments.skeletons.throughput import Point, summary, throughput_at
from nnopt.costs import parameters
from nnopt.data import load
from nnopt.networks import WideResNet

IMAGES = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))


def point(scheme, count, ms, batch=1):
    return Point(scheme, "", count, 10 * count, batch, "cpu", ms, ms, ms)


def test_families():
    net = WideResNet(16, 1.0)
    variables = net.lazy_init(jax.random.key(1), IMAGES)
    labels = jnp.arange(8, dtype=jnp.int32)
    family = list(members(net, variables, IMAGES, labels, points=2, blocks=2))
    assert {m.scheme for m in family} == {"base", *SCHEMES}
    assert family[0].net is net
    sizes = {}
    for member in family:
        sizes.setdefault(member.scheme, []).append(parameters(member.net, IMAGES))
    for scheme, counts in sizes.items():
        assert counts == sorted(counts, reverse=True), scheme
        assert all(c < sizes["base"][0] for c in counts) or scheme in ("base", "Fisher profile")
    assert sizes["depth"] == [parameters(WideResNet(10, 1.0), IMAGES)]


def test_interpolation_is_linear_in_logarithms():
    points = [point("base", 1000, 8.0), point("width", 250, 2.0), point("depth", 500, 1.0)]
    assert throughput_at(points, "width", 1000) == pytest.approx(125)
    assert throughput_at(points, "width", 500) == pytest.approx(250)  # halfway in logarithms
    assert throughput_at(points, "width", 200) is None
    assert throughput_at(points, "bottleneck", 500) is None
    table = summary([*points, point("Fisher", 200, 6.0)], 1)
    assert table.row_count == len(SCHEMES) + 1


def test_pictures(tmp_path):
    points = [
        point(s, n, 8.0 * n / 1e6, b)
        for b in (1, 8)
        for s in ("base", *SCHEMES)
        for n in ((1_000_000,) if s == "base" else (250_000, 500_000))
    ]
    throughput.picture(points, "some-net").savefig(tmp_path / "t.png")
    throughput.write_csv(tmp_path / "t.csv", points)
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert len(rows) == len(points)
    assert float(rows[0]["images_per_second"]) == pytest.approx(125.0)


def test_a_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "QUICK", dataclasses.replace(compare.QUICK, epochs=1))
    some = {k: compare.SCHEMES[k] for k in ("Fisher, tuned", "Fisher profile")}
    monkeypatch.setattr(compare, "SCHEMES", some)
    digits = load("digits").subset(128, 40)
    monkeypatch.setattr(compare, "load", lambda *_: digits)
    options = [
        "--quick",
        "--network=wrn-10-1",
        "--fractions=0.9",
        "--batches=1",
        f"--out={tmp_path}",
    ]
    compare.main(options)
    base = parameters(WideResNet(10, 1.0), jnp.zeros((1, *digits.image_shape)))
    rows = list(csv.DictReader((tmp_path / "compare.csv").read_text().splitlines()))
    assert [r["scheme"] for r in rows] == ["base", *some]
    assert int(rows[0]["parameters"]) == base
    assert all(int(r["parameters"]) <= 0.9 * base + 1 for r in rows[1:])
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
