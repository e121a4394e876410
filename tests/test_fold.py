"""Batch norms folded away: the function of inference is kept, whatever the network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from foreign_networks import CASES

from nnopt.core import Example, Glob, Under, carry, diff, from_record, rewrite, sites, to_record
from nnopt.costs import parameters
from nnopt.errors import RewriteError
from nnopt.layers import Conv, Identity, ScaleShift
from nnopt.nests import Bottleneck, Depthwise, Group, Program, Share, Slabs, Split, Tie, Untie
from nnopt.networks import VGG, DenseNet, ResNet, WideResNet, mobilenet_v2
from nnopt.rewrites import AddTap, FoldBatchNorm, MutateConv

IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
norm = functools.partial(nn.BatchNorm, use_running_average=True)


class Twice(nn.Module):
    """A convolution's output used twice, another's returned, a third's folded."""

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(4, (3, 3), name="twice")(x)
        y = y + norm(name="norm1")(y)
        z = nn.Conv(4, (1, 1), name="returned")(y)
        y = nn.relu(norm(name="norm2")(z))
        y = norm(name="norm3")(nn.Conv(6, (1, 1), name="once")(y))
        # Something stands between, if only a view.
        y = nn.Conv(8, (1, 1), name="viewed")(y).reshape(2, -1, 8)
        return norm(name="norm4")(y), z


class Shared(nn.Module):
    """Modules called more than once."""

    @nn.compact
    def __call__(self, x):
        conv = nn.Conv(3, (3, 3), use_bias=False, name="conv")
        after = norm(name="after")
        x = nn.relu(after(conv(x)))
        x = nn.relu(after(conv(x)))  # always these two: folded
        other = nn.Conv(3, (3, 3), name="other")
        x = nn.relu(norm(name="first")(other(x)))
        x = nn.relu(norm(name="second")(other(x)))  # two norms for one convolution
        both = norm(name="both")
        left = both(nn.Conv(4, (1, 1), name="left")(x))
        right = both(nn.Conv(4, (3, 3), name="right")(x))  # one norm for two: folded into both
        mixed = norm(name="mixed")
        x = mixed(nn.Conv(4, (1, 1), name="mix")(left * right))
        return mixed(nn.relu(x))  # of something else, too


class Tied(nn.Module):
    """A kernel that is used outside of its layer."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(3, name="dense")
        y = nn.relu(norm(name="norm")(dense(x)))
        return y @ dense.variables["params"]["kernel"]


class Kinds(nn.Module):
    """Every kind of layer, and of batch norm behind it."""

    @nn.compact
    def __call__(self, x):
        x = norm(epsilon=0.1)(nn.Conv(8, (3, 3), strides=2, use_bias=False)(x))
        x = norm(use_scale=False)(nn.Conv(12, (3, 3), feature_group_count=4)(x))
        x = norm(use_bias=False)(Conv(24, (3, 3), feature_group_count=12, use_bias=False)(x))
        x = norm(use_bias=False, use_scale=False)(nn.Conv(6, (1, 1), use_bias=False)(x))
        x = norm()(nn.ConvTranspose(6, (2, 2), strides=(2, 2))(x))
        x = nn.ConvTranspose(6, (3, 3), transpose_kernel=True, use_bias=False)(x)
        x = norm(axis=3)(x)
        x = norm()(nn.Conv(5, 3, padding="CIRCULAR")(x.reshape(2, -1, 6)))
        x = norm(axis=(-1,))(inputs := nn.Dense(7, use_bias=False)(inputs=x))
        assert inputs.shape[-1] == 7
        return norm()(x=nn.Dense(7, name="last")(x))


class Axes(nn.Module):
    """Batch norms over other axes than the last, which no convolution can do."""

    @nn.compact
    def __call__(self, x):
        x = norm(axis=1, name="rows")(nn.Conv(8, (3, 3), name="a")(x))
        return norm(axis=(3, 1), name="both")(nn.Conv(8, (3, 3), name="b")(x))


class Renamed(nn.BatchNorm):
    """Other defaults, the same methods."""

    use_running_average: bool | None = True
    epsilon: float = 0.5


class Absolute(nn.BatchNorm):
    """A method of its own."""

    def __call__(self, x):
        return jnp.abs(super().__call__(x, use_running_average=True))


class Rounded(nn.Dense):
    """A layer that is not linear in its kernel."""

    def param(self, name, *args, **kwargs):
        return jnp.round(super().param(name, *args, **kwargs))


class Subclasses(nn.Module):
    """Of batch norm and of dense layers."""

    @nn.compact
    def __call__(self, x):
        x = Renamed(name="renamed")(nn.Dense(4, name="a")(x))
        x = Absolute(name="absolute")(nn.Dense(4, name="b")(x))
        x = norm(name="behind")(Rounded(4, name="c")(x))
        return norm(name="normed")(nn.WeightNorm(nn.Dense(4, name="d"), name="weight_norm")(x))


class Layer(nn.Module):
    """dense, norm, activation."""

    use_scale: bool = True

    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(6, name="dense")(x)
        return nn.relu(
            norm(use_scale=self.use_scale, use_bias=self.use_scale, name="norm")(x)
        ), None


class Stack(nn.Module):
    """Such layers stacked by `nn.scan`, or side by side by `nn.vmap`."""

    lift: str
    axis: int = 0
    length: int = 3
    use_scale: bool = True

    @nn.compact
    def __call__(self, x):
        axes = {"params": self.axis, "batch_stats": 0}
        options = {"variable_axes": axes, "split_rngs": {"params": True}}
        if self.lift == "scan":
            lifted = nn.scan(Layer, **options, length=self.length)
        else:
            lifted = nn.vmap(Layer, **options, in_axes=None, axis_size=self.length)
        return lifted(self.use_scale, name="layers")(nn.Dense(6, name="first")(x), None)[0]


class Watched(nn.Module):
    """A batch norm whose scale the network reads."""

    @nn.compact
    def __call__(self, x):
        own = norm(name="norm")
        return own(nn.Dense(4, name="dense")(x)) + own.variables["params"]["scale"].sum()


class Half(nn.Module):
    """A convolution in bfloat16 before a batch norm in float32, and one before another in bfloat16."""

    @nn.compact
    def __call__(self, x):
        half = {"dtype": jnp.bfloat16}
        x = norm(dtype=jnp.float32, name="up")(nn.Conv(8, (3, 3), **half)(x))
        return norm(**half, name="same")(nn.Conv(8, (3, 3), **half)(nn.relu(x)))


def random_like(specs, seed=0):
    """Weights and statistics as training would leave them, in no way neutral."""
    rng = np.random.default_rng(seed)

    def value(name, spec):
        shape = spec.shape
        if name[-1] == "var":
            return rng.uniform(0.2, 3.0, shape)
        if name[-1] == "scale":
            return rng.uniform(0.5, 2.0, shape) * rng.choice([-1, 1], shape)
        spread = 1.0 if len(shape) < 2 else np.prod(shape[:-1]) ** -0.5
        return spread * rng.normal(size=shape)

    flat = flatten_dict(specs)
    return unflatten_dict({n: jnp.asarray(value(n, s), s.dtype) for n, s in flat.items()})


def compiled(function):
    """Runs once: compile time is all there is to save."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def folded(net, example, rule=None):
    """The network before and after, with weights for both, and the new sites."""
    example = Example.of(example)
    variables = random_like(sites(net, example).variables)
    new = rewrite(net, rule or FoldBatchNorm(), example=example)
    found, report = carry(net, new, variables, example=example, key=jax.random.key(1))
    assert not report.fresh
    return variables, new, found, sites(new, example)


def assert_same_function(net, variables, new, found, example, tolerance=1e-5):
    """In float64, so that nothing but the rounding of the new weights to float32 is left."""
    example = Example.of(example)
    rng = np.random.default_rng(7)
    images = [rng.normal(size=a.shape) for a in example.args]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):

        def run(net, variables):
            variables, args = jax.tree.map(jnp.float64, (variables, images))
            call = functools.partial(net.apply, **example.kwargs)
            return compiled(call)(variables, *args)

        old, after = jax.device_get((run(net, variables), run(new, found)))
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(after), strict=True):
        assert a.dtype == b.dtype == np.float64
        assert np.std(a) > 1e-3
        assert np.abs(a - b).max() <= tolerance * np.abs(a).max()


def names_of(found, cls):
    return {"/".join(s.path) for s in found if type(s.module) is cls}


# Network, its batch norms, and those that stay as a multiplication and an addition.
NETWORKS = {
    "resnet": (ResNet((1, 1), widths=(8, 16), stem_features=8), 6, 0),
    # Of seven: norm2 of each of the three blocks; what norm1 takes is also added to the branch.
    "wrn-10-1": (WideResNet(10, 1.0), 7, 4),
    "densenet": (DenseNet(10, 4), 9, 6),
    "mobilenet": (mobilenet_v2(width=0.1), 52, 0),
    "vgg": (VGG((1, 1), (4, 8)), 2, 0),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_reference_networks(name):
    net, norms, stay = NETWORKS[name]
    before = sites(net, IMAGES)
    assert sum(type(s.module) is nn.BatchNorm for s in before) == norms
    variables, new, found, after = folded(net, IMAGES)
    assert not names_of(after, nn.BatchNorm)
    assert len(names_of(after, ScaleShift)) == stay
    assert len(names_of(after, Identity)) == norms - stay
    assert list(found) == ["params"]
    saved = sum(
        # A scale and a bias go, the bias of a layer that had none comes.
        2 * s.inputs[0].shape[-1] - s.inputs[0].shape[-1]
        for s in before
        if "/".join(s.path) in names_of(after, Identity)
    )
    biases = sum(
        s.module.features for s in before if isinstance(s.module, nn.Conv) and s.module.use_bias
    )
    assert parameters(net, IMAGES) - parameters(new, IMAGES) == saved + biases
    assert_same_function(net, variables, new, found, IMAGES)


def test_what_stays_in_a_wide_resnet():
    def rewritten(net):
        return sites(rewrite(net, FoldBatchNorm(), example=IMAGES), IMAGES)

    found = rewritten(WideResNet(10, 1.0))
    stay = {"stage1_block0/norm1", "stage2_block0/norm1", "stage3_block0/norm1", "norm"}
    assert names_of(found, ScaleShift) == stay
    assert all(found[f"stage{i}_block0/conv1"].module.use_bias for i in (1, 2, 3))
    assert not found["stem"].module.use_bias
    # Here the first block has a shortcut after its norm1, so the stem's output goes nowhere else.
    found = rewritten(WideResNet(10, 1.5))
    assert names_of(found, ScaleShift) == stay - {"stage1_block0/norm1"}
    assert found["stem"].module.use_bias


@pytest.mark.parametrize(
    ("name", "folds", "stay"),
    [
        ("norm_dropout", 1, 0),
        ("partial_resnet", 8, 0),
        ("train_field", 2, 0),
        ("residual_positional", 0, 2),
        ("residual_keyword", 0, 2),
        ("residual_deterministic", 0, 2),
        ("residual_field", 0, 2),
    ],
)
def test_foreign_networks(name, folds, stay):
    case = CASES[name]
    example = Example(*case.inputs, **case.eval)
    variables, new, found, after = folded(case.net, example)
    assert (len(names_of(after, Identity)), len(names_of(after, ScaleShift))) == (folds, stay)
    assert list(found) == ["params"]
    assert_same_function(case.net, variables, new, found, example)


ODD = {
    "twice": (Twice(), {"norm3"}, {"norm1", "norm2", "norm4"}),
    "shared": (Shared(), {"after", "both"}, {"first", "second", "mixed"}),
    "tied": (Tied(), set(), {"norm"}),
    "kinds": (Kinds(), {f"BatchNorm_{i}" for i in range(9)}, set()),
    "axes": (Axes(), set(), {"rows", "both"}),
    "subclasses": (Subclasses(), {"renamed"}, {"behind", "normed"}),
    "scan": (Stack("scan"), set(), {"layers/norm"}),
    "scan, square": (Stack("scan", length=6), set(), {"layers/norm"}),
    "vmap": (Stack("vmap"), set(), {"layers/norm"}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_networks(name):
    net, folds, stay = ODD[name]
    variables, new, found, after = folded(net, IMAGES)
    assert names_of(after, Identity) == folds
    assert names_of(after, ScaleShift) == stay
    assert ("batch_stats" in found) == bool(names_of(after, Absolute))
    assert_same_function(net, variables, new, found, IMAGES)


def test_dtypes_are_kept():
    net = Half()
    with jax.numpy_dtype_promotion("standard"):
        variables, new, found, after = folded(net, IMAGES)
        # The first norm also widens what the convolution rounded.
        assert (names_of(after, ScaleShift), names_of(after, Identity)) == ({"up"}, {"same"})
        x = jax.random.normal(jax.random.key(0), IMAGES.shape)
        a, b = compiled(net.apply)(variables, x), compiled(new.apply)(found, x)
    assert a.dtype == b.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(a), np.float32(b), atol=0.05 * float(abs(a).max()))


PROGRAMS = {
    "grouped": (Program((Group("co", "ci", 2),)), True),
    "depthwise": (Program((Depthwise("co", "ci"),)), True),
    "bottleneck in": (Program((Bottleneck("ci", 2),)), True),
    "untied": (Program((Split("co", (2,)), Untie())), True),
    "rows of their own": (Program((Slabs("oh", 2), Untie("oh_o"))), True),
    "diagonal window": (Program((Tie("kh", "kw"), Split("oh", (3,)))), True),
    # One weight serves several channels, each of which has a factor.
    "bottleneck out": (Program((Bottleneck("co", 2),)), False),
    "shared": (Program((Share("co"),)), False),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_generated_operators(name):
    program, folds = PROGRAMS[name]
    case = CASES["norm_dropout"]
    example = Example(jax.ShapeDtypeStruct((2, 8, 8, 8), jnp.float32), **case.eval)
    net = rewrite(case.net, MutateConv("conv", program), example=example)
    variables, new, found, after = folded(net, example)
    assert names_of(after, Identity if folds else ScaleShift) == {"norm"}
    assert list(found) == ["params"]
    assert_same_function(net, variables, new, found, example)


def test_a_tapped_value_stays_as_it_is():
    net = WideResNet(10, 1.5)
    tapped = rewrite(net, AddTap("stem"), example=IMAGES)
    new = rewrite(tapped, FoldBatchNorm(), example=IMAGES)
    assert "stage1_block0/norm1" in names_of(sites(new, IMAGES), ScaleShift)


def test_some_of_them():
    net = WideResNet(10, 1.0)
    variables, new, _, after = folded(net, IMAGES, FoldBatchNorm(Under("stage2_block0")))
    assert names_of(after, Identity) == {"stage2_block0/norm2"}
    assert len(names_of(after, nn.BatchNorm)) == 5
    every = rewrite(new, FoldBatchNorm(), example=IMAGES)
    assert not names_of(sites(every, IMAGES), nn.BatchNorm)
    final, _ = carry(net, every, variables, example=IMAGES, key=jax.random.key(1))
    assert_same_function(net, variables, every, final, IMAGES)
    assert rewrite(every, FoldBatchNorm(), example=IMAGES) is every


def test_records_and_differences():
    net = WideResNet(10, 1.0)
    new = rewrite(net, FoldBatchNorm(Glob("**")), example=IMAGES)
    assert from_record(to_record(new)) == new
    text = diff(net, new, IMAGES)
    assert all(f"->  {name}" in text for name in ("Conv", "Identity", "ScaleShift"))
    assert text.endswith("parameters: 77,850 -> 77,738")  # 16 + 32 + 64 for the three folded


def test_in_training_it_is_refused():
    example = Example(IMAGES, train=True)
    with pytest.raises(
        RewriteError, match=r"'stage1_block0/norm1' runs with .* Example\(images, train=False\)"
    ):
        rewrite(WideResNet(10, 1.0), FoldBatchNorm(), example=example)
    with pytest.raises(RewriteError, match=r"'bn_init' .* Example\(images, train=False\)"):
        rewrite(CASES["partial_resnet"].net, FoldBatchNorm(), example=IMAGES)


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (Watched(), "also uses the 'scale' of the batch norm at 'norm' elsewhere"),
        (Stack("scan", axis=1), "'layers/norm' elsewhere, or transforms it before"),
        (Stack("scan", use_scale=False), "lifted by nn.scan, and shapes of variables"),
        (Stack("vmap", axis=1), "lifted by nn.vmap, and shapes"),
        (Stack("vmap", length=6), "lifted by nn.vmap, and shapes"),
    ],
)
def test_what_is_not_clear_is_refused(net, says):
    with pytest.raises(RewriteError, match=says) as raised:
        rewrite(net, FoldBatchNorm(), example=IMAGES)
    assert "leave" in str(raised.value)
    assert "\n" not in str(raised.value)
