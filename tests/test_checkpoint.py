import contextlib
import json
import os
import subprocess
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nnopt import data
from nnopt.core import Example, Patched, rewrite
from nnopt.errors import CheckpointError
from nnopt.rewrites import Configure
from nnopt.training import (
    Recipe,
    Trainer,
    checkpoint,
    checkpoint_info,
    load_checkpoint,
    save_checkpoint,
)

EXAMPLE = Example(jnp.zeros((2, 32, 32, 3)))
QUICK = Recipe(epochs=2, batch=30, learning_rate=0.05)


class Small(nn.Module):
    features: int = 4

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.features, (3, 3), strides=4, use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = x.mean((1, 2))
        return nn.Dense(10, name="head")(nn.Dropout(0.1, deterministic=not train)(x))


def assert_same(a, b):
    """Equal structure, types, dtypes and bits."""
    chex.assert_trees_all_equal_structs(a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert isinstance(x, np.ndarray) == isinstance(y, np.ndarray)
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def init(net):
    """Variables with positive values: JAX's own initialisation compiles for seconds."""
    specs = jax.eval_shape(lambda: EXAMPLE.init(net, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.1, 0.2, s.shape), s.dtype), specs)


@pytest.fixture(scope="module")
def net():
    return Small()


@pytest.fixture(scope="module")
def variables(net):
    return init(net)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoint"


def plus_one(tree):
    return jax.tree.map(lambda x: x + jnp.ones_like(x), tree)


# --- what is saved comes back ---


def test_variables_come_back(net, variables, folder):
    save_checkpoint(folder, net, variables, extra={"epoch": 3, "name": "über"})
    like = jax.eval_shape(lambda: variables)
    assert_same(load_checkpoint(folder, Small(), like), variables)
    info = checkpoint_info(folder)
    assert info.extra == {"epoch": 3, "name": "über"}
    assert info.arrays["params/conv/kernel"] == "float32[3,3,3,4]"
    assert os.listdir(folder.parent) == ["checkpoint"]


def test_every_dtype_comes_back(net, folder):
    tree = {
        "bfloat16": jnp.asarray([1.5, float("nan"), -0.0], jnp.bfloat16),
        "float8": jnp.ones((2, 2), jnp.float8_e4m3fn),
        "bool": jnp.asarray(True),
        "complex": jnp.asarray([1j]),
        "int8": jnp.asarray([-1], jnp.int8),
        "numpy": np.asarray([1e300]),
        "numpy bfloat16": np.ones(2, ml_dtypes.bfloat16),
        "empty": jnp.zeros((0, 3)),
        "key": jax.random.key(1),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
        "no keys": jax.random.split(jax.random.key(0), 0),
        "raw key": jax.random.PRNGKey(0),
        "odd/na.me": [jnp.zeros(1), (jnp.ones(1), {})],
    }
    save_checkpoint(folder, net, tree)
    assert_same(load_checkpoint(folder, net, tree), tree)


def test_wide_values_stay_wide(net, folder):
    wide = {"w": np.asarray([1 + 1e-15])}
    save_checkpoint(folder, net, wide)
    like = {"w": jax.ShapeDtypeStruct((1,), np.float64)}
    assert_same(load_checkpoint(folder, net, like), wide)


@pytest.mark.parametrize("tree", [{}, {"params": {}}, {"w": jnp.zeros((0,))}])
def test_networks_without_weights(net, folder, tree):
    save_checkpoint(folder, net, tree)
    assert_same(load_checkpoint(folder, net, tree), tree)


def test_plain_orbax_reads_the_arrays(net, variables, folder):
    save_checkpoint(folder, net, variables)
    with checkpoint._orbax() as ocp, ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(folder / "arrays")
    chex.assert_trees_all_equal(arrays, dict(variables))


def test_relative_paths(net, variables, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("a/b", net, variables)
    assert_same(load_checkpoint("a/b", net, variables), variables)


def test_a_rewritten_network(net, variables, folder):
    wide = rewrite(net, Configure.of("conv", features=6), example=EXAMPLE)
    assert isinstance(wide, Patched)
    widened = init(wide)
    save_checkpoint(folder, wide, widened)
    again = rewrite(net, Configure.of("conv", features=6), example=EXAMPLE)
    assert_same(load_checkpoint(folder, again, widened), widened)
    with pytest.raises(CheckpointError, match="another structure"):
        load_checkpoint(folder, net, variables)


def test_a_run_goes_on_bit_for_bit(net, variables, folder):
    digits = data.load("digits").subset(64, 50)
    trainer = Trainer(net, digits, QUICK)
    through = trainer.run(trainer.start(variables, jax.random.key(2)))
    state, _ = trainer.run_epoch(trainer.start(variables, jax.random.key(2)))
    save_checkpoint(folder, net, state, extra={"recipe": QUICK.to_json()})

    assert Recipe.from_json(checkpoint_info(folder).extra["recipe"]) == QUICK
    restored = load_checkpoint(folder, net, trainer.start(variables, jax.random.key(9)))
    assert_same(restored, state)
    assert_same(trainer.run(restored).state, through.state)


def test_shards_come_back_as_shards(folder):
    """Needs more than one device, and so a process of its own."""
    code = f"""
import jax, numpy as np
from nnopt.networks import WideResNet
from nnopt.training import load_checkpoint, save_checkpoint
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
tree = {{"w": jax.device_put(np.arange(6.0, dtype=np.float32), sharding)}}
save_checkpoint({str(folder)!r}, WideResNet(), tree)
again = load_checkpoint({str(folder)!r}, WideResNet(), tree)
assert again["w"].sharding == sharding
assert again["w"].tolist() == tree["w"].tolist()
"""
    env = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- what is refused ---


def test_nothing_there(net, variables, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere"):
        load_checkpoint(tmp_path / "nowhere", net, variables)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoint_info(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoint_info(tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: {"params": v["params"]}, "'batch_stats/norm/mean' is only in it .and 1 more"),
        (lambda v: {**v, "masks": {"m": jnp.ones(2)}}, "'masks/m' is not in it"),
        (
            lambda v: jax.tree.map(lambda x: x.astype(jnp.bfloat16), v),
            r"float32\[4\] there and bfloat16\[4\] here",
        ),
    ],
)
def test_other_arrays(net, variables, folder, change, said):
    save_checkpoint(folder, net, variables)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(folder, net, change(variables))


def test_damage_is_noticed(net, variables, folder, capfd):
    save_checkpoint(folder, net, variables)
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    assert len(files) > 3
    for path in files:
        whole = path.read_bytes()
        for broken in (None, whole[: len(whole) // 2], whole[:-9] + b"\0" + whole[-8:]):
            path.unlink() if broken is None else path.write_bytes(broken)
            with pytest.raises(CheckpointError, match=r"damaged|no complete") as caught:
                load_checkpoint(folder, net, variables)
            assert "\n" not in str(caught.value)
        path.write_bytes(whole)
    assert_same(load_checkpoint(folder, net, variables), variables)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("format", "another", "does not have"),
        ("version", 99, "version 99"),
        ("files", None, "no valid 'files'"),
        ("fingerprint", 3, "no valid 'fingerprint'"),
    ],
)
def test_other_records(net, variables, folder, field, value, said):
    save_checkpoint(folder, net, variables)
    record = json.loads((folder / "nnopt.json").read_text())
    (folder / "nnopt.json").write_text(json.dumps({**record, field: value}))
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(folder, net, variables)


def test_what_cannot_be_saved(net, variables, folder):
    for tree, said in (
        ({"a": {"b": 3}}, "'a/b' of the tree is int"),
        (jnp.ones(2), "tree of named arrays"),
        ({"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}, "name of another array"),
        (jax.eval_shape(lambda: variables), "spec without values"),
    ):
        with pytest.raises(CheckpointError, match=said):
            save_checkpoint(folder, net, tree)
    with pytest.raises(CheckpointError, match="not JSON"):
        save_checkpoint(folder, net, variables, extra={"net": net})
    assert not folder.parent.exists()


def test_other_folders_are_not_replaced(net, variables, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="give another folder"):
        save_checkpoint(tmp_path, net, variables)
    with pytest.raises(CheckpointError, match="give another folder"):
        save_checkpoint(tmp_path / "thesis.txt", net, variables)
    with pytest.raises(CheckpointError, match=r"cannot save .*NotADirectory"):
        save_checkpoint(tmp_path / "thesis.txt" / "a", net, variables)
    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", net, variables)


# --- a killed process ---


class Killed(BaseException):
    """What no handler catches, so that nothing is cleaned up."""


MOMENTS = ("_write_arrays", "_digests", "write_whole", "_rename", "_remove")


@contextlib.contextmanager
def killed(name, count, after):
    """Makes the `count`th call of a function the process's last, before or after its effect."""
    original, calls = getattr(checkpoint, name), []

    def dying(*args, **kwargs):
        calls.append(name)
        if len(calls) < count:
            return original(*args, **kwargs)
        if after:
            original(*args, **kwargs)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, name, dying)
        yield


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize("earlier", [True, False])
def test_killed_at_any_moment(net, variables, folder, name, after, earlier):
    old, new = variables, plus_one(variables)
    died = 0
    for count in range(1, 10):
        place = folder.parent / str(count)
        if earlier:
            save_checkpoint(place, net, old)
        with contextlib.suppress(Killed), killed(name, count, after):
            save_checkpoint(place, net, new)
            break  # there was no such call
        died += 1
        if earlier or place.exists():
            found = load_checkpoint(place, net, like=old)
            is_new = bool(found["params"]["head"]["bias"][0] >= 1)
            assert_same(found, new if is_new else old)
        else:
            with contextlib.suppress(CheckpointError):  # the first one was never completed
                assert_same(load_checkpoint(place, net, old), new)
        save_checkpoint(place, net, new)
        assert_same(load_checkpoint(place, net, old), new)
        assert [p.name for p in place.parent.iterdir() if p.name.startswith(".")] == []
    assert died >= (2 if name == "_rename" and earlier else 1)


@pytest.mark.parametrize("moment", [1, 2])
def test_killed_twice(net, variables, folder, moment):
    """The second save is killed before it has written anything: what the first one left must stay."""
    save_checkpoint(folder, net, variables)
    with pytest.raises(Killed), killed("_rename", moment, after=True):
        save_checkpoint(folder, net, plus_one(variables))
    with pytest.raises(Killed), killed("_write_arrays", 1, after=False):
        save_checkpoint(folder, net, plus_one(variables))
    assert_same(load_checkpoint(folder, net, variables), plus_one(variables))


def test_a_failure_leaves_the_old_one_and_no_litter(net, variables, folder, monkeypatch):
    save_checkpoint(folder, net, variables)

    def full(folder, arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_arrays", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_checkpoint(folder, net, plus_one(variables))
    assert_same(load_checkpoint(folder, net, variables), variables)
    assert os.listdir(folder.parent) == [folder.name]


# --- orbax keeps quiet ---


def test_orbax_is_imported_when_needed_and_keeps_quiet(tmp_path):
    code = f"""
import logging, sys
import nnopt.training
assert "orbax" not in sys.modules and "orbax.checkpoint" not in sys.modules
logging.basicConfig(level=logging.INFO)
before = list(logging.getLogger().handlers)
import numpy as np
from nnopt.networks import WideResNet
for _ in range(2):
    nnopt.training.save_checkpoint({str(tmp_path / "a")!r}, WideResNet(), {{"w": np.ones(2)}})
    nnopt.training.load_checkpoint({str(tmp_path / "a")!r}, WideResNet(), {{"w": np.ones(2)}})
assert "orbax.checkpoint" in sys.modules
assert logging.getLogger().handlers == before and logging.getLogger("absl").level == 0
"""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}  # JAX logs what other platforms it looks for
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
