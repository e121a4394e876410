"""The study of a network's convolutions: its parts, and a run of it on little."""

import csv
import json

import jax
import numpy as np
import pytest

from experiments.operations import resnet34, sequences
from experiments.operations.candidates import candidates, layers
from experiments.operations.report import Row, beaten, best, picture, table
from nnopt.core import Example, load_record
from nnopt.costs import macs
from nnopt.nests import Program, canonical
from nnopt.networks import named

ONE = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)


def test_layers_and_candidates():
    found = layers(named("resnet-34", 10), Example(ONE, train=False))
    assert sum(len(layer.paths) for layer in found) == 36  # 33 of 3x3 and 3 shortcuts
    assert len(found) == 11
    assert sum(layer.operator.domain_size * len(layer.paths) for layer in found) == pytest.approx(
        macs(named("resnet-34", 10), Example(ONE, train=False)), rel=1e-3
    )
    (layer,) = [layer for layer in found if layer.name == "64 -> 128, 3x3 /2, 32x32"]
    tried = candidates(layer, 20, np.random.default_rng(0))
    new = [c for c in tried if not c.name]
    assert len(new) == 20
    assert all(c.macs <= 0.6 * layer.operator.domain_size for c in new)
    operators = {canonical(c.program(layer.operator)) for c in tried}
    assert len(operators) == len(tried)
    assert canonical(layer.operator) not in operators


def row(layer, name, ms, fisher, spread=0.05):
    speed = 1.0 / ms
    program = json.dumps(Program().to_json())
    return Row(layer, name, 10, 100, ms, speed, speed - spread, speed + spread, fisher, program)


def test_what_is_reported(tmp_path):
    (first, *_) = layers(named("resnet-18", 10), Example(ONE, train=False))
    name = first.name
    rows = [
        row(name, "conv", 1.0, 1.0), row(name, "G(2)", 0.8, 1.1), row(name, "G(4)", 0.4, 0.9), row(name, "", 0.5, 1.2),
        row(name, "", 0.25, 0.99), row(name, "", 0.2, float("nan")),
    ]  # fmt: skip
    assert best(rows, name, "named").ms == 0.8  # the faster one is not legal
    assert best(rows, name, "generated").ms == 0.5  # nor are these, and one is not tested
    text = beaten([first], rows)
    assert "2.00x, potential 1.200, beats G(2)" in text
    assert "4.00x, potential 0.990, beats G(4)" in text
    assert table([first], rows).row_count == 1
    picture([first], rows).savefig(tmp_path / "layers.png")


def test_a_run_on_little(tmp_path, data_dir, monkeypatch, capsys):
    def few(layer, *args):
        return [c for c in candidates(layer, *args) if c.name in ("", "G(2)", "Seq3(2)")]

    monkeypatch.setattr(resnet34, "network_named", lambda *_: named("wrn-10-1", 10))
    monkeypatch.setattr(resnet34, "layers", lambda *args: layers(*args)[1:2])
    monkeypatch.setattr(resnet34, "candidates", few)
    options = [
        "--count=2",
        "--tests=1",
        "--repeats=2",
        "--fisher-batch=4",
        f"--data-dir={data_dir}",
        f"--out={tmp_path}",
    ]
    resnet34.main(options)
    rows = list(csv.DictReader((tmp_path / "layers.csv").read_text().splitlines()))
    assert {r["name"] for r in rows} >= {"conv", "G(2)", "Seq3(2)", ""}
    net = load_record(tmp_path / "network.json")
    assert macs(net, Example(ONE, train=False)) <= macs(
        named("wrn-10-1", 10), Example(ONE, train=False)
    )
    assert "speed-up" in (tmp_path / "network.txt").read_text()
    assert (tmp_path / "layers.png").stat().st_size > 10_000
    capsys.readouterr()
    times = {f: f.stat().st_mtime_ns for f in tmp_path.glob("layer?.json")}
    resnet34.main(options)  # layers are read, not measured again
    assert {f: f.stat().st_mtime_ns for f in tmp_path.glob("layer?.json")} == times


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count=0"], "--count 0 is below 1"),
        (["--network=nothing"], "nothing"),
        (["--data-dir=/nowhere"], "nowhere"),
    ],
)
def test_bad_input(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        resnet34.main([*options, f"--out={tmp_path}"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_published_sequences_on_a_small_layer(tmp_path, data_dir, monkeypatch, capsys):
    pytest.importorskip("tvm", reason="needs TVM: pip install 'nnopt[tvm]'")
    monkeypatch.setattr(sequences, "LAYERS", {"small": (32, 32, 8, 3)})
    options = ["--repeats=1", "--layers", "small", f"--data-dir={data_dir}", f"--out={tmp_path}"]
    sequences.main(options)
    rows = list(csv.DictReader((tmp_path / "sequences.csv").read_text().splitlines()))
    assert [(r["backend"], r["operator"]) for r in rows[:4]] == [
        ("xla", "conv"), ("tvm", "conv"), ("xla", "Seq1"), ("tvm", "Seq1"),
    ]  # fmt: skip
    assert {int(r["macs"]) for r in rows if r["operator"] == "Seq3"} == {9 * 32 * 32 * 64}
    text = (tmp_path / "sequences.txt").read_text()
    assert "mdev, llvm" in text
    assert "2.51 (5.60)" in text  # as published
    assert (tmp_path / "sequences.png").stat().st_size > 10_000
    with pytest.raises(SystemExit) as stop:
        sequences.main(["--layers", "nothing", f"--out={tmp_path}"])
    assert stop.value.code == 2
    assert "no layer is called 'nothing'" in capsys.readouterr().err
