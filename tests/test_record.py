"""Fingerprints, records, and how networks are shown."""

import copy
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from foreign_networks import CASES, IMAGE, VECTOR, Ensemble, OwnedField, Scanned, Setup, UNet

from nnopt.core import (
    Example,
    diff,
    fingerprint,
    from_record,
    history,
    load_record,
    replay,
    rewrite,
    save_record,
    show,
    to_record,
)
from nnopt.core.encode import decode, encode
from nnopt.core.files import write_whole
from nnopt.errors import RecordError, RewriteError
from nnopt.networks import named
from nnopt.rewrites import AddGate, Configure, ReplaceBlock, choice

NET = OwnedField(nn.Dense(4))


def rewritten():
    return rewrite(NET, AddGate("backbone"), Configure.of("head", use_bias=False), example=VECTOR)


def test_fingerprints_are_equal_across_processes():
    code = (
        "from flax import linen as nn; from nnopt.core import fingerprint; import jax\n"
        "from foreign_networks import *; from nnopt.networks import named\n"
        "from nnopt.core import rewrite; from nnopt.rewrites import *\n"
        "net = rewrite(OwnedField(nn.Dense(4)), AddGate('backbone'),"
        " Configure.of('head', use_bias=False), example=VECTOR)\n"
        "print(fingerprint(net), fingerprint(named('resnext-29')), fingerprint(Scanned(5)))"
    )
    paths = os.pathsep.join([os.path.dirname(__file__), os.getcwd()])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "77"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    here = [fingerprint(net) for net in (rewritten(), named("resnext-29"), Scanned(5))]
    assert out.stdout.split() == here


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("features", 5),
        ("kernel_size", (3, 1)),
        ("strides", 2),
        ("padding", "VALID"),
        ("padding", ((1, 1), (1, 0))),
        ("input_dilation", 2),
        ("kernel_dilation", 2),
        ("feature_group_count", 2),
        ("use_bias", False),
        ("mask", jnp.ones((3, 3, 1, 4))),
        ("dtype", jnp.bfloat16),
        ("param_dtype", jnp.bfloat16),
        ("precision", jax.lax.Precision.HIGHEST),
        ("kernel_init", nn.initializers.zeros_init()),
        ("kernel_init", nn.initializers.normal(0.5)),
        ("bias_init", nn.initializers.ones_init()),
        ("conv_general_dilated", jax.lax.conv_general_dilated_local),
    ],
)
def test_fingerprint_is_sensitive_to_every_field(field, value):
    base = nn.Conv(4, (3, 3))
    other = base.clone(**{field: value})
    assert fingerprint(other) != fingerprint(base)
    assert fingerprint(other) == fingerprint(base.clone(**{field: copy.copy(value)}))
    assert fingerprint(base.clone(name="other")) == fingerprint(base)


def test_fingerprint_tells_values_apart():
    values = [
        nn.Dense(4),
        nn.DenseGeneral(4),
        nn.Sequential([nn.Dense(4)]),
        nn.Sequential([nn.Dense(4), nn.relu]),
        nn.Sequential([nn.Dense(4), nn.gelu]),
        nn.Sequential((nn.Dense(4), nn.relu)),
        nn.Sequential([nn.Dense(4), functools.partial(nn.leaky_relu, negative_slope=0.1)]),
        nn.Sequential([nn.Dense(4), functools.partial(nn.leaky_relu, negative_slope=0.2)]),
        nn.Sequential([nn.Dense(4), lambda x: x + 1]),
        nn.Sequential([nn.Dense(4), lambda x: x + 2]),
        Setup(),
        Setup(2),
        rewritten(),
    ]
    assert len({fingerprint(v) for v in values}) == len(values)
    layer = nn.Dense(6)
    shared, twice = nn.Sequential([layer, layer]), nn.Sequential([nn.Dense(6), nn.Dense(6)])
    assert fingerprint(shared) != fingerprint(twice)


@pytest.mark.parametrize(
    "value",
    [
        1.5,
        float("inf"),
        (1, "a", None, True),
        [1, [2]],
        {"a": (1,), 3: None},
        frozenset({"x", "y"}),
        jnp.dtype("bfloat16"),
        jax.ShapeDtypeStruct((2, 3), jnp.int32),
        jax.lax.Precision.HIGH,
        nn.relu,
        functools.partial(nn.leaky_relu, negative_slope=0.1),
        choice("BG(2,M/8)"),
        nn.Dense,
        UNet(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_survive_json(value):
    again = decode(json.loads(json.dumps(encode(value, strict=True))))
    assert encode(again, strict=True) == encode(value, strict=True)
    assert type(again) is type(value)
    if not isinstance(value, functools.partial):
        assert again == value


def test_records_are_saved_and_loaded(tmp_path):
    path = tmp_path / "network.json"
    net = rewritten()
    save_record(net, path)
    again = load_record(path)
    assert again == net
    assert [type(s.rule).__name__ for s in history(again)] == ["AddGate", "Configure"]
    assert os.listdir(tmp_path) == ["network.json"]


def broken(**changes):
    record = to_record(rewritten())
    record.update(changes)
    return record


DENSE = {"module": "flax.linen.linear:Dense", "fields": {"features": 4}}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "not a network record"),
        ({}, "not a network record"),
        (broken(version=2), "of version 2, this nnopt reads 1"),
        (broken(extra=1), "must have exactly the keys"),
        (broken(steps=None), "the steps of a network record must be a list"),
        (broken(steps=[{}]), "step 0 of the network record must have exactly the keys"),
        (broken(steps=[]), "fingerprint"),
        (broken(fingerprint="0" * 64), "the network has fingerprint"),
        (broken(base=3), "must be a linen module, got int"),
        (broken(base={"what": 1}), "none of the known forms"),
        (broken(base={**DENSE, "more": 1}), "must have exactly the keys"),
        (broken(base={"module": "os:system", "fields": {}}), "not a linen module class"),
        (broken(base={"module": "jax:Array", "fields": {}}), "not a linen module class"),
        (broken(base={"module": "no.such:Thing", "fields": {}}), "not there to import"),
        (broken(base={"module": "flax.linen:Thing", "fields": {}}), "not there to import"),
        (broken(base={"module": 3, "fields": {}}), "malformed"),
        (broken(base={"module": "flax.linen:Dense", "fields": {"nope": 1}}), "malformed"),
        (broken(base={"module": "flax.linen:Dense", "fields": 3}), "malformed"),
        (broken(base={"call": "os:system", "kwargs": {"command": "false"}}), "may only call"),
        (broken(base={"call": "subprocess:run", "kwargs": {}}), "may only call"),
        (broken(base={"dataclass": "os:system", "fields": {}}), "is not a dataclass"),
        (broken(base={"class": "os:system"}), "is not a class"),
        (broken(base={"shared": 4}), "malformed"),
        (broken(base={"array": "!", "shape": [1], "dtype": "float32"}), "malformed"),
        (broken(base={"dtype": "float33"}), "malformed"),
    ],
)
def test_records_are_read_strictly(record, message):
    with pytest.raises(RecordError, match=message):
        from_record(record)


@pytest.mark.parametrize(
    "call",
    [
        "jax.nn.initializers:__builtins__.exec",
        "flax.linen.initializers:jnp.save",
        "jax.nn.initializers:__loader__.get_data",
    ],
)
def test_no_call_reaches_past_the_initializers(call):
    record = broken(base={"call": call, "kwargs": {}})
    with pytest.raises(RecordError, match="may only call initializers"):
        from_record(record)


def test_wrong_types_in_a_step():
    record = to_record(rewritten())
    for key, value in (
        ("rule", 3),
        ("rule", DENSE),
        ("rule", {"function": "os:system"}),
        ("example", {"args": 3, "kwargs": {}}),
        ("example", {"args": [], "kwargs": {}}),
        ("example", None),
    ):
        changed = copy.deepcopy(record)
        changed["steps"][0][key] = value
        with pytest.raises(RecordError):
            from_record(changed)


@pytest.mark.parametrize("keep", [0, 1, 40, 400])
def test_cut_off_files(tmp_path, keep):
    path = tmp_path / "network.json"
    save_record(rewritten(), path)
    path.write_text(path.read_text()[:keep])
    with pytest.raises(RecordError, match=r"is not valid JSON .*it may have been cut off"):
        load_record(path)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(RecordError, match="cannot read network record"):
        load_record(tmp_path / "nothing.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match="cannot read network record"):
        load_record(tmp_path / "binary")


def test_lambdas_and_local_classes_are_refused():
    class Local(nn.Module):
        def __call__(self, x):
            return x

    with pytest.raises(RecordError, match=r"cannot be recorded.*named function"):
        to_record(nn.Sequential([nn.Dense(3), lambda x: x]))
    with pytest.raises(RecordError, match="not importable under that name; define it at the top"):
        to_record(nn.Sequential([Local()]))
    with pytest.raises(RecordError, match="inside another network"):
        to_record(nn.Sequential([rewritten()]))


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "text"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["text"]
    with pytest.raises(OSError, match="No such file"):
        write_whole(tmp_path / "no" / "text", "new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_whole(tmp_path / "folder", "new")
    assert sorted(os.listdir(tmp_path)) == ["folder", "text"]


def test_replaying_on_another_base_is_noticed():
    with pytest.raises(RewriteError, match="gives another network than it did"):
        replay(OwnedField(nn.Dense(5)), history(rewritten()))


def test_show():
    assert show(Ensemble(3), VECTOR).splitlines() == [
        "Ensemble               float32[2,6] -> float32[2,3]   507 parameters",
        "├── members     Mlp    float32[2,6] -> float32[2,6]   486 parameters, under vmap",
        "│   ├── hidden  Dense  float32[2,6] -> float32[2,12]  252 parameters, under vmap",
        "│   └── out     Dense  float32[2,12] -> float32[2,6]  234 parameters, under vmap",
        "└── head        Dense  float32[2,6] -> float32[2,3]   21 parameters",
    ]
    stack = show(CASES["scanned_remat"].net, VECTOR, depth=1).splitlines()
    assert len(stack) == 3
    assert stack[1].endswith("486 parameters, under scan remat")
    assert show(CASES["shared_twice"].net, VECTOR).endswith("42 parameters, called 2 times")


def test_diff():
    net, example = CASES["residual_positional"].net, Example(IMAGE, train=False)
    new = rewrite(
        net,
        ReplaceBlock("block0", choice("B(2)")),
        Configure.of("block1/branch/conv", kernel_size=(1, 1)),
        example=example,
    )
    assert [line.split() for line in diff(net, new, example).splitlines()] == [
        [
            "~",
            "block0",
            "PositionalBlock",
            "float32[2,8,8,8]",
            "->",
            "float32[2,8,8,8]",
            "1,184",
            "parameters",
        ],
        [
            "->",
            "PreActivationBlock",
            "float32[2,8,8,8]",
            "->",
            "float32[2,8,8,8]",
            "240",
            "parameters",
        ],
        [
            "~",
            "block1/branch/conv",
            "Conv",
            "float32[2,8,8,8]",
            "->",
            "float32[2,4,4,16]",
            "1,168",
            "parameters",
        ],
        ["->", "Conv", "float32[2,8,8,8]", "->", "float32[2,4,4,16]", "144", "parameters"],
        ["parameters:", "5,124", "->", "3,156"],
    ]
    assert diff(net, net, example) == "no difference\nparameters: 5,124 -> 5,124"
    gone = diff(Setup(3), Setup(2), VECTOR)
    assert "- layers_2" in gone
    assert "+ layers_2" in diff(Setup(2), Setup(3), VECTOR)
