import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnopt import networks
from nnopt.core import Example, rewrite, sites
from nnopt.core.paths import as_path, path_text
from nnopt.errors import SelectionError, UnsupportedNetworkError
from nnopt.layers import AddGate, AddTap
from nnopt.rewrites import CODE_CHOICES, PAPER_CHOICES, Genotype, choice
from nnopt.scores.fisher import (
    FisherPotential,
    block_probes,
    fisher_potential,
    mean_cross_entropy,
)

BATCH, CLASSES = 4, 5


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    features: int
    stride: int = 1
    norm: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        def active(x, name):
            if self.norm:
                x = nn.BatchNorm(use_running_average=not train, name=name)(x)
            return nn.softplus(x)  # smooth, for the finite differences

        y = nn.Conv(self.features, (3, 3), self.stride, name="first")(active(x, "norm1"))
        y = nn.Dropout(self.dropout, deterministic=not train)(active(y, "norm2"))
        y = nn.Conv(self.features, (3, 3), name="last")(y)
        if y.shape != x.shape:
            x = nn.Conv(self.features, (1, 1), self.stride, name="shortcut")(x)
        return x + y


def run(net, x, train):
    block = nn.remat(Block, static_argnums=(2,)) if net.remat else Block
    x = nn.Conv(4, (3, 3), name="stem")(x)
    for i, (features, stride) in enumerate(((4, 1), (6, 2))[: net.blocks]):
        x = block(features, stride, net.norm, net.dropout, name=f"block{i}")(x, train)
    return nn.Dense(CLASSES, name="head")(x.mean(axis=(1, 2)))


class Tiny(nn.Module):
    blocks: int = 2
    norm: bool = True
    dropout: float = 0.0
    remat: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        return run(self, x, train)


class TinyTraining(Tiny):
    @nn.compact
    def __call__(self, x, *, training):
        return run(self, x, training)


class TinyDeterministic(Tiny):
    @nn.compact
    def __call__(self, x, deterministic=True):
        return run(self, x, not deterministic)


def filled(net, images, **train):
    """Variables of a network without its slow initialisation: He-like kernels, positive statistics."""
    specs = jax.eval_shape(functools.partial(net.init, jax.random.key(0), **train), images)
    rng = np.random.default_rng(0)

    def fill(path, spec):
        name = path[-1].key
        if name == "kernel":
            values = rng.normal(0, (2 / np.prod(spec.shape[:-1])) ** 0.5, spec.shape)
        else:
            values = rng.uniform(0.5, 1.5, spec.shape) if name in ("scale", "var") else 0.1
        return jnp.asarray(np.broadcast_to(values, spec.shape), spec.dtype)

    return jax.tree_util.tree_map_with_path(fill, specs)


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, 8, 8, 3)), jnp.float32)


@pytest.fixture(scope="module")
def labels():
    return jnp.asarray([0, 4, 2, 2])


@pytest.fixture(scope="module")
def variables(images):
    return {norm: filled(Tiny(norm=norm), images) for norm in (True, False)}


@pytest.fixture(scope="module")
def plain(variables, images, labels):
    """The scores of the network with batch norms and without."""
    return {n: fisher_potential(Tiny(norm=n), v, images, labels) for n, v in variables.items()}


def probed(net, variables, images, labels, probes, rngs, deltas, **train):
    """The loss with `deltas[probe]` added at each probe, and the probes' activations: no gates, no rewriting."""
    seen = {}

    def intercept(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        path = context.module.scope.path if context.module.scope else None
        if path in probes and context.method_name == "__call__":
            y = seen[path] = y + deltas[path]
        return y

    with nn.intercept_methods(intercept):
        logits, _ = net.apply(variables, images, **train, mutable=["batch_stats"], rngs=rngs)
    log_p = logits - jnp.log(jnp.exp(logits).sum(axis=1, keepdims=True))
    return -sum(log_p[n, c] for n, c in enumerate(labels.tolist())) / len(labels), seen


@contextlib.contextmanager
def doubles(enable=True):
    """Float64, which batch norm promotes its float32 constants to."""
    with jax.enable_x64(enable), jax.numpy_dtype_promotion("standard"):
        yield


def literal(net, variables, images, labels, probes, key=None, dtype=np.float64, **train):
    """`1/(2N) sum_n (sum_ij a g)^2` written out, each channel of each probe, in float64 unless told otherwise."""
    with doubles(dtype == np.float64):
        cast = functools.partial(jnp.asarray, dtype=dtype)
        variables, images = jax.tree.map(cast, variables), cast(images)
        rngs = {} if key is None else {"dropout": key}
        loss = functools.partial(probed, net, variables, images, labels, probes, rngs, **train)
        none = dict.fromkeys(probes, 0.0)
        shapes = jax.eval_shape(lambda: loss(none)[1])
        zeros = {p: np.zeros(s.shape, dtype) for p, s in shapes.items()}
        (_, a), g = jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(zeros))
    found = {}
    for probe in probes:
        n = len(a[probe])
        per_image = (a[probe].astype(np.float64) * g[probe]).sum(axis=(1, 2))
        found[probe] = (per_image**2).sum(axis=0) / (2 * n)
    return found


TINY_PROBES = (("block0", "last"), ("block1", "last"))


def assert_same_channels(score, expected, rtol=1e-3):
    for values, wanted in zip(score.channels.values(), expected.values(), strict=True):
        np.testing.assert_allclose(values, wanted, rtol=rtol, atol=rtol * wanted.max())
        np.testing.assert_allclose(values.sum(), wanted.sum(), rtol=rtol)


# --- the definition ---


@pytest.mark.parametrize("norm", [True, False])
def test_gate_gradient_is_activation_times_gradient(norm, plain, variables, images, labels):
    score = plain[norm]
    expected = literal(Tiny(norm=norm), variables[norm], images, labels, TINY_PROBES, train=True)
    assert list(score.blocks) == ["block0", "block1"]
    assert_same_channels(score, expected)


def test_finite_differences(plain, variables, images, labels):
    """Of the loss in single gates, in float64, without any gradient."""
    net = Tiny()
    step = 1e-5
    with doubles():
        exact = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), variables[True])
        loss = jax.jit(
            lambda deltas: probed(
                net, exact, jnp.asarray(images, jnp.float64), labels, TINY_PROBES, {}, deltas,
                train=True,
            )
        )  # fmt: skip
        zeros = {
            p: np.zeros((BATCH, *s))
            for p, s in zip(TINY_PROBES, ((8, 8, 4), (4, 4, 6)), strict=True)
        }
        activations = jax.device_get(loss(zeros)[1])

        def slope(probe, n, c):
            moved = np.zeros_like(activations[probe])
            moved[n, :, :, c] = step * activations[probe][n, :, :, c]  # a gate of 1 + step
            up, down = (float(loss({**zeros, probe: s * moved})[0]) for s in (1, -1))
            return (up - down) / (2 * step)

        expected = {
            (probe, c): sum(slope(probe, n, c) ** 2 for n in range(BATCH)) / (2 * BATCH)
            for probe, c in ((TINY_PROBES[0], 1), (TINY_PROBES[1], 0), (TINY_PROBES[1], 5))
        }
    for (probe, c), wanted in expected.items():
        np.testing.assert_allclose(plain[True].channels[probe[0]][c], wanted, rtol=1e-3)


def test_sums(plain):
    score = plain[True]
    assert [v.shape for v in score.channels.values()] == [(4,), (6,)]
    assert all(v.dtype == np.float64 and (v > 0).all() for v in score.channels.values())
    for block, values in score.channels.items():
        np.testing.assert_allclose(score.blocks[block], values.sum(), rtol=1e-12)
    np.testing.assert_allclose(score.total, sum(score.blocks.values()), rtol=1e-12)
    assert "channels" not in repr(score)


@pytest.mark.parametrize("scale", [1e-22, -1e-8, 1e8, 1e22])
def test_scaling_the_loss_scales_the_score_by_the_square(scale, plain, variables, images, labels):
    def scaled(logits, labels):
        return scale * mean_cross_entropy(logits, labels)

    score = fisher_potential(Tiny(), variables[True], images, labels, loss=scaled)
    for block, values in score.channels.items():
        np.testing.assert_allclose(values, scale**2 * plain[True].channels[block], rtol=1e-4)
    assert 0 < score.total < np.inf


@pytest.mark.parametrize("norm", [True, False])
def test_every_image_twice_divides_by_four(norm, plain, variables, images, labels):
    twice = fisher_potential(
        Tiny(norm=norm), variables[norm], jnp.repeat(images, 2, 0), jnp.repeat(labels, 2)
    )
    for block, values in plain[norm].channels.items():
        np.testing.assert_allclose(twice.channels[block], values / 4, rtol=1e-3)


def test_statistics_are_those_of_the_batch(plain, variables, images, labels):
    kept = dict(variables[True])
    garbage = {**kept, "batch_stats": jax.tree.map(lambda v: 9 * v + 3, kept["batch_stats"])}
    assert fisher_potential(Tiny(), garbage, images, labels).blocks == plain[True].blocks
    inference = FisherPotential(Tiny(), Example(images, train=False))
    totals = [inference(v, images, labels).total for v in (kept, garbage)]
    assert abs(totals[0] / totals[1] - 1) > 0.01
    assert abs(totals[0] / plain[True].total - 1) > 0.01


def test_mean_cross_entropy():
    logits = jnp.asarray([[1.0, 2.0, 4.0], [1000.0, 0.0, 0.0]])
    expected = [np.log(np.exp([1.0, 2.0, 4.0]).sum()) - 2.0, 1000.0]
    np.testing.assert_allclose(
        mean_cross_entropy(logits, jnp.asarray([1, 2])), np.mean(expected), rtol=1e-6
    )


@pytest.mark.parametrize("names", [("S", "G(4)", "BG(2,2)"), ("B(2)", "G(N)", "G(N/8)")])
def test_rewritten_wide_resnet(names, labels):
    net = networks.named("wrn-10-1", CLASSES)
    images = jnp.asarray(np.random.default_rng(2).normal(size=(BATCH, 8, 8, 3)), jnp.float32)
    made = rewrite(net, Genotype(tuple(map(choice, names))), example=images)
    variables = filled(made, images)
    last = {"S": "op2/conv", "G": "op2/pointwise", "B": "op1/expand"}
    probes = [as_path(f"stage{i}_block0/{last[name[0]]}") for i, name in enumerate(names, start=1)]
    score = fisher_potential(made, variables, images, labels)
    assert_same_channels(score, literal(made, variables, images, labels, probes, train=True))


# --- where the probes are ---


def probes_of(net, size=32, where=None, **train):
    found = sites(net, Example(jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32), **train))
    return {path_text(b): path_text(p) for b, p in block_probes(found, where).items()}


@pytest.mark.parametrize(
    ("name", "blocks", "last"),
    [
        ("wrn-16-1", 6, "conv2"),
        ("resnet-18", 8, "conv2"),
        ("resnet-50", 16, "conv3"),
        ("preact-resnet-18", 8, "conv2"),
        ("resnext-29", 9, "conv3"),
    ],
)
def test_the_last_convolution_before_the_addition(name, blocks, last):
    probes = probes_of(networks.named(name), train=True)
    assert len(probes) == blocks
    assert all(probe == f"{block}/{last}" for block, probe in probes.items())


def test_only_inverted_residuals_with_a_shortcut():
    probes = probes_of(networks.named("mobilenet-v2"), train=True)
    extra = {
        2: 1,
        3: 2,
        4: 3,
        5: 2,
        6: 2,
    }  # blocks of a stage after its first, which changes the shape
    names = [f"stage{s}_block{b}" for s, n in extra.items() for b in range(1, n + 1)]
    assert probes == {name: f"{name}/conv3" for name in names}


CHOICES = tuple(dict.fromkeys((*CODE_CHOICES, *PAPER_CHOICES)))


@pytest.mark.parametrize("first", range(0, len(CHOICES), 3))
def test_after_rewriting_to_every_choice(first):
    """Three choices at a time, one for each block of the network."""
    net = networks.named("wrn-10-2")
    trio = (CHOICES[first : first + 3] * 3)[:3]
    image = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    made = rewrite(net, Genotype(trio), example=image)
    probes = probes_of(made, 16, train=True)
    assert len(probes) == 3
    for c, (block, probe) in zip(trio, probes.items(), strict=True):
        kind = c.name[0]  # S, G, or B with and without groups
        last = {"S": "op2/conv", "G": "op2/pointwise", "B": "op1/expand"}[kind]
        assert probe == f"{block}/{last}", c


def test_blocks_can_be_selected(plain, variables, images, labels):
    one = fisher_potential(Tiny(), variables[True], images, labels, where="block1")
    assert list(one.blocks) == ["block1"]
    np.testing.assert_allclose(one.total, plain[True].blocks["block1"], rtol=1e-5)


def test_probes_that_are_tapped_already(plain, variables, images, labels):
    tapped = rewrite(Tiny(), AddTap("block0/last"), AddGate("block1/last"), example=images)
    score = fisher_potential(tapped, variables[True], images, labels)
    assert score.blocks == plain[True].blocks


class Nested(nn.Module):
    """A residual addition around a residual block: both end in the same convolution."""

    @nn.compact
    def __call__(self, x, train=False):
        return x + Block(4, name="inner")(x, train)


class WithNested(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = Nested(name="outer")(nn.Conv(4, (3, 3), name="stem")(x), train)
        return nn.Dense(CLASSES, name="head")(x.mean(axis=(1, 2)))


def test_two_blocks_with_one_probe(images, labels):
    net = WithNested()
    score = fisher_potential(net, filled(net, images), images, labels)
    assert set(score.blocks) == {"outer", "outer/inner"}
    assert score.blocks["outer"] == score.blocks["outer/inner"] > 0


# --- how networks are told that they train ---


@pytest.mark.parametrize(
    ("net", "train"),
    [(TinyTraining(), {"training": True}), (TinyDeterministic(), {"deterministic": False})],
)
def test_other_names_of_the_flag(net, train, plain, variables, images, labels):
    score = fisher_potential(net, variables[True], images, labels, train=train)
    assert score.blocks == plain[True].blocks


def test_a_flag_given_by_position(plain, variables, images, labels):
    score = FisherPotential(Tiny(), Example(images, True))(variables[True], images, labels)
    assert score.blocks == plain[True].blocks


def test_dropout(variables, images, labels):
    net, key = Tiny(dropout=0.5), jax.random.key(3)
    fisher = FisherPotential(net, Example(images, train=True))
    score = fisher(variables[True], images, labels, key)
    expected = literal(
        net, variables[True], images, labels, TINY_PROBES, key, np.float32, train=True
    )
    assert_same_channels(score, expected)
    assert fisher(variables[True], images, labels, key).total == score.total
    assert fisher(variables[True], images, labels, jax.random.key(4)).total != score.total
    assert fisher(variables[True], images, labels).total > 0


def test_blocks_under_remat(plain, variables, images, labels):
    score = fisher_potential(Tiny(remat=True), variables[True], images, labels)
    for block, values in score.channels.items():
        np.testing.assert_allclose(values, plain[True].channels[block], rtol=1e-4)


# --- what it costs ---


def test_other_variables_do_not_compile_again(variables, images, labels):
    traces = []

    def counted(logits, labels):
        traces.append(1)
        return mean_cross_entropy(logits, labels)

    fisher = FisherPotential(Tiny(), Example(images, train=True), loss=counted)
    first = fisher(variables[True], images, labels)
    seen = len(traces)
    assert seen > 0
    other = jax.tree.map(lambda v: 1.1 * v, variables[True])
    assert fisher(other, images + 1, labels[::-1], jax.random.key(9)).total != first.total
    assert len(traces) == seen


def test_jit_changes_nothing(images, labels):
    net = Tiny(blocks=1, norm=False)
    fisher, made = FisherPotential(net, Example(images, train=True)), filled(net, images)
    jitted = fisher(made, images, labels)
    with jax.disable_jit():
        plain = fisher(made, images, labels)
    np.testing.assert_allclose(jitted.channels["block0"], plain.channels["block0"], rtol=1e-4)


def convolutions(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            yield eqn
        for value in eqn.params.values():
            if hasattr(value, "jaxpr"):
                yield from convolutions(value.jaxpr)


def test_no_gradients_of_weights(variables, images, labels):
    fisher = FisherPotential(Tiny(), Example(images, train=True))
    traced = jax.make_jaxpr(fisher._energies)(variables[True], images, labels, jax.random.key(0))
    # Forward: stem, two and two in the blocks, a shortcut. Backward: through the three of the last block.
    assert len(list(convolutions(traced.jaxpr))) == 6 + 3


# --- what is refused ---


class StackedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Block(4, norm=False, name="block")(x, True), None


class Stacked(nn.Module):
    """Residual blocks under `nn.scan`."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        stack = nn.scan(
            StackedBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(CLASSES, name="head")(x.mean(axis=(1, 2)))


@pytest.mark.parametrize(
    ("net", "where", "said"),
    [
        (networks.named("vgg-16"), None, "VGG has no module that adds a branch of convolutions"),
        (Tiny(), "stem", "'stem' adds no branch .* select residual blocks"),
        (Tiny(), "blok0", "did you mean 'block0'"),
        (Stacked(), None, "'layers/block/last' stands for several layers stacked by nn.scan"),
    ],
)
def test_networks_without_probes(net, where, said):
    with pytest.raises(SelectionError, match=said) as caught:
        probes_of(net, where=where, train=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("example", [Example(), Example(train=True)])
def test_examples_without_images(example):
    with pytest.raises(UnsupportedNetworkError, match=r"give Example\(images, train=True\)"):
        FisherPotential(Tiny(), example)


def test_examples_with_other_arrays(images):
    example = Example(images, train=True, mask=jnp.ones(BATCH))
    with pytest.raises(UnsupportedNetworkError, match="mask"):
        FisherPotential(Tiny(), example)


def test_scores_that_overflow_are_not_finite(variables, images, labels):
    huge = jax.tree.map(lambda v: 1e30 * v, variables[False])
    assert not np.isfinite(fisher_potential(Tiny(norm=False), huge, images, labels).total)


def test_a_network_that_does_not_depend_on_its_blocks(variables, images, labels):
    dead = dict(variables[False])
    dead["params"] = {
        **dead["params"],
        "head": jax.tree.map(jnp.zeros_like, dead["params"]["head"]),
    }
    assert fisher_potential(Tiny(norm=False), dead, images, labels).total == 0
