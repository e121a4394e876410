import ast
import csv
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnopt.costs.counts import parameters
from nnopt.data import CIFAR10_BLOCKSWAP, cifar10
from nnopt.errors import CheckpointError, GenotypeError
from nnopt.networks import WideResNet, preact_resnet34
from nnopt.rewrites import Genotype, choice, rewrite
from nnopt.rewrites.published import as_trained, load_published
from nnopt.training import evaluate

IMAGE = jnp.zeros((1, 32, 32, 3))
SMALL = WideResNet(16, 1.0)  # two blocks in each stage
# Each stage mixes both wrappers, so that two blocks are not what their names say.
NAMES = ("DConvA4", "ConvB2", "A4B2", "DConvA2", "Conv", "G4B2")
OPERATORS = (2, 2, 1, 1, 2, 2)

# Parameters as trained, of BlockSwap's genotype files.
AS_TRAINED = {
    "bs150k": 172_858,
    "bs200k": 301_210,
    "bs250k": 403_018,
    "bs400k": 459_930,
    "bs500k": 535_738,
    "bs800k": 837_034,
    "bs1.6m": 1_645_018,
    "bs_imagenet_1": 3_247_528,
    "bs_imagenet_2": 8_862_376,
}
INTENDED = {"bs400k": 404_250, "bs800k": 811_370, "bs_imagenet_1": 3_080_488}


# --- the wrapper of a stage's first block ---


def test_a_stage_takes_the_wrapper_of_its_first_block():
    assert as_trained([choice(n) for n in NAMES], (2, 2, 2)) == OPERATORS
    assert as_trained([choice("B(2)"), choice("S"), choice("S")], (1, 2)) == (1, 2, 2)


@pytest.mark.parametrize("stages", [(2, 2), (3, 3, 1), (0, 6), ()])
def test_stages_must_hold_the_choices(stages):
    with pytest.raises(GenotypeError, match="6 choices"):
        as_trained([choice(n) for n in NAMES], stages)


@pytest.mark.parametrize("operators", [(1, 2), (1, 2, 3)])
def test_operators_must_fit_the_blocks(operators):
    rule = Genotype((choice("S"),) * 3, operators=operators)
    with pytest.raises(GenotypeError, match="one or two for each of its 3 blocks"):
        rewrite(WideResNet(10, 1.0), rule, example=IMAGE)


@pytest.fixture(scope="module")
def genotype_of(data_dir):
    def read(name):
        with (data_dir / "blockswap" / "genotypes" / f"{name}.csv").open(newline="") as file:
            return tuple(choice(n) for n in ast.literal_eval(next(csv.DictReader(file))["convs"]))

    return read


@pytest.mark.parametrize("name", AS_TRAINED)
def test_parameters_of_the_published_genotypes(name, genotype_of):
    choices = genotype_of(name)
    imagenet = "imagenet" in name
    net = preact_resnet34(1000, "imagenet") if imagenet else WideResNet(40, 2.0)
    example = jnp.zeros((1, 224, 224, 3)) if imagenet else IMAGE
    operators = as_trained(choices, (3, 4, 6, 3) if imagenet else (6, 6, 6))
    trained = rewrite(net, Genotype(choices, operators=operators), example=example)
    assert parameters(trained, example) == AS_TRAINED[name]
    if name in INTENDED:
        assert (
            parameters(rewrite(net, Genotype(choices), example=example), example) == INTENDED[name]
        )


# --- published weights ---


@pytest.mark.parametrize(
    ("name", "error", "count"), [("bs400k_1", 5.31, 459_930), ("bs800k_1", 4.62, 837_034)]
)
def test_published_students_err_as_published(name, error, count, data_dir):
    net, variables = load_published(
        data_dir / "blockswap" / "weights" / f"{name}.npz", WideResNet(40, 2.0)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count
    data = cifar10(data_dir)
    images, labels = data.test_images[:1017], data.test_labels[:1017]
    mean, std = CIFAR10_BLOCKSWAP
    accuracy = evaluate(net, variables, images, labels, mean=mean, std=std, batch=113)
    assert 100 * (1 - accuracy) == pytest.approx(error, abs=0.1)


# --- archives written here ---


def in_torch(variables):
    """The state dictionary of a network, named and laid out as PyTorch does."""
    state = {}

    def walk(tree, stats, prefix):
        if "kernel" in tree:
            kernel = np.asarray(tree["kernel"])
            state[f"{prefix}.weight"] = (
                kernel.T if kernel.ndim == 2 else np.einsum("hwio->oihw", kernel)
            )
            if "bias" in tree:
                state[f"{prefix}.bias"] = np.asarray(tree["bias"])
        elif "scale" in tree:
            for ours, theirs in (("scale", "weight"), ("bias", "bias")):
                state[f"{prefix}.{theirs}"] = np.asarray(tree[ours])
            for ours in ("mean", "var"):
                state[f"{prefix}.running_{ours}"] = np.asarray(stats[ours])
        else:
            for name, below in tree.items():
                theirs = (
                    "bn1" if tree is top and name == "norm" else theirs_of(name, "reduce" in tree)
                )
                walk(below, stats.get(name, {}), f"{prefix}.{theirs}".lstrip("."))

    def theirs_of(name, bottleneck):
        block = re.fullmatch(r"stage(.)_block(.)", name)
        if block:
            return f"block{block[1]}.0.layer.{block[2]}"
        if name == "spatial":
            return "conv" if bottleneck else "convdw"
        plain = {"stem": "conv1", "head": "fc", "shortcut": "convShortcut", "pointwise": "conv1x1"}
        plain |= {"reduce": "conv1x1_down", "expand": "conv1x1_up"}
        return plain.get(name) or name.replace("norm", "bn").replace("op", "conv")

    top = variables["params"]
    walk(top, variables["batch_stats"], "")
    return state


@pytest.fixture(scope="module")
def student():
    """A rewritten network as trained, with variables that are all different from each other."""
    rule = Genotype(tuple(choice(n) for n in NAMES), operators=OPERATORS)
    net = rewrite(SMALL, rule, example=IMAGE)
    specs = jax.eval_shape(net.init, jax.random.key(0), IMAGE)
    rng = np.random.default_rng(0)

    def draw(spec):
        signs = rng.choice([-1, 1], spec.shape)
        return jnp.asarray(rng.uniform(0.5, 1.5, spec.shape) * signs, spec.dtype)

    variables = jax.tree.map(draw, specs)
    variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
    return net, variables


@pytest.fixture
def archive(student, tmp_path):
    def write(change=lambda state: state):
        state = {**in_torch(student[1]), "__convs__": np.array(NAMES)}
        np.savez(tmp_path / "student.npz", **change(state))
        return tmp_path / "student.npz"

    return write


def test_an_archive_gives_the_network_it_was_written_from(student, archive):
    net, variables = student
    loaded, values = load_published(archive(), SMALL)
    jax.tree.map(np.testing.assert_array_equal, values, variables)
    x = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    outputs, expected = loaded.apply(values, x), net.apply(variables, x)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(outputs, expected)


def without(name):
    return lambda state: {k: v for k, v in state.items() if k != name}


def with_array(name, array):
    return lambda state: {**state, name: array}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("fc.bias"), "lacks array 'fc.bias', which WideResNet"),
        (without("__convs__"), "no list of block choices"),
        (with_array("fc.scale", np.zeros(3)), "has array 'fc.scale'.*no place"),
        (with_array("fc.bias", np.zeros((1, 10), np.float32)), r"'fc.bias' is float32\[1, 10\]"),
        (with_array("fc.bias", np.zeros(10, np.int32)), r"'fc.bias' is int32\[10\]"),
        (with_array("conv1.weight", np.zeros((3, 3, 3, 16), np.float32)), "'conv1.weight'"),
        (with_array("__convs__", np.array(["S", "T"])), "unknown block choice 'T'"),
        (with_array("__convs__", np.array(["S"] * 4)), "2 blocks|do not hold|4 choices"),
        (with_array("__convs__", np.array(["S"] * 9)), "genotype does not fit WideResNet"),
        (with_array("__convs__", np.array(["S"] * 6)), "array"),
        (with_array("__convs__", np.array([], "U4")), "genotype does not fit WideResNet"),
        (with_array("__convs__", np.array([{}], object)), "allow_pickle"),
    ],
)
def test_a_changed_archive_is_refused(archive, change, message):
    check_refused(archive(change), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"", "no .npz archive"),
        (b"not an archive", "no .npz archive"),
        (b"\x80\x04N.", "no .npz archive"),
    ],
)
def test_what_is_no_archive_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "student.npz").write_bytes(content)
    check_refused(tmp_path / "student.npz", message)


def test_damage_is_noticed(archive, tmp_path):
    content = archive().read_bytes()
    whole = tmp_path / "student.npz"
    whole.write_bytes(content[: len(content) // 2])
    check_refused(whole, "no .npz archive")
    middle = len(content) // 2
    whole.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
    check_refused(whole, "damaged")
    check_refused(tmp_path, "cannot read")


def check_refused(path, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load_published(path, SMALL)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
