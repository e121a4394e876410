"""Channels that belong together: every way in which they hang together, and what happens when some go."""

import dataclasses
import math
import pickle
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import prunable_networks as networks
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prunable_networks import EXACT, IMAGES

from nnopt.core import Example, carry, from_record, rewrite, sites, to_record
from nnopt.core.channel_shapes import runs_of
from nnopt.core.channels import channel_groups
from nnopt.costs import macs, parameters
from nnopt.errors import (
    BudgetError,
    PruneError,
    RewriteError,
    SelectionError,
    UnsupportedNetworkError,
)
from nnopt.networks import NAMES, named
from nnopt.rewrites import (
    ScaleWidth,
    at_random,
    batch_norm_scale,
    by_group,
    channel_gradients,
    combined,
    fisher,
    magnitude,
    masked,
    parameters_without,
    prunable,
    prune,
    removed_by,
    taylor,
    weakest,
)


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
    """Each program here runs once, on a few numbers: compiling it well takes longer than running it."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


KEY = jax.random.key(0)
BY_NAME = {type(n).__name__: n for n in EXACT}


def variables_of(net, example=IMAGES, key=KEY):
    """Variables none of which is zero or one, or a test of zeros would prove nothing."""
    example = Example.of(example)
    made = jax.jit(lambda key: example.init(net, key))(key)
    leaves, structure = jax.tree.flatten(made)
    keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
    drawn = [
        jax.random.uniform(k, leaf.shape, leaf.dtype, 0.3, 1.5)
        if not leaf.any() or leaf.ndim == 1
        else leaf
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def without(net, groups, removed, variables, example=IMAGES):
    """The pruned network and its variables, none of them fresh."""
    small = rewrite(net, prune(groups, removed), example=example)
    made, report = carry(net, small, variables, example=example, key=KEY)
    assert not report.fresh
    return small, made


def size(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


# --- pruned networks are masked networks ---


@pytest.mark.parametrize("net", EXACT, ids=lambda n: type(n).__name__)
def test_a_pruned_network_is_the_masked_one(net):
    groups = channel_groups(net, IMAGES)
    # Channels that stand beside zeros which are padding can't go, and only those.
    padded = ["add in '.' combines channels with what has a fixed number of them"]
    kept = padded if isinstance(net, networks.PaddedShortcut) else []
    assert [str(n) for n in groups.kept_whole] == kept
    variables = variables_of(net)
    images = jax.random.normal(jax.random.key(2), IMAGES.shape)
    scores = {n: s for n, s in magnitude(groups, variables).items() if n in prunable(groups)}
    removed = weakest(groups, scores, fraction=0.3, scope="group")
    assert removed
    zeros = masked(groups, removed, variables)
    run = jax.jit(net.apply)
    wanted = run(zeros, images)
    assert not np.allclose(run(variables, images), wanted)  # something went that mattered
    # With zeros in what goes: any that is left is a channel that the rule has missed.
    small, made = without(net, groups, removed, zeros)
    np.testing.assert_allclose(jax.jit(small.apply)(made, images), wanted, rtol=1e-5, atol=1e-5)
    for path, array in jax.tree.leaves_with_path(made):
        for axis in range(array.ndim):
            others = tuple(a for a in range(array.ndim) if a != axis)
            assert np.abs(np.asarray(array)).max(others).min() > 0, (path, axis)
    assert size(made) == parameters_without(groups, removed) == parameters(small, IMAGES)
    assert size(made) < size(variables)
    assert from_record(to_record(small)) == small
    assert pickle.loads(pickle.dumps(small)) == small
    found = channel_groups(small, IMAGES)
    for name, group in groups.items():
        left = group.size - len(removed.get(name, ()))
        assert (left == 1 and name not in found) or found[name].size == left


def test_training_mode_finds_the_same_groups():
    for name in ("Plain", "Blocks", "DenseConcat"):
        net = BY_NAME[name]
        here = channel_groups(net, Example(IMAGES, train=False))
        there = channel_groups(net, Example(IMAGES, train=True))
        assert {n: g.size for n, g in here.items()} == {n: g.size for n, g in there.items()}
        for group in here:
            members = [[(m.leaf, m.axis) for m in g[group].members] for g in (here, there)]
            assert members[0] == members[1]


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_any_choice_of_channels_may_go(data):
    net = BY_NAME[data.draw(st.sampled_from(("Blocks", "DenseConcat", "UNet", "Shuffle", "Attention")))]  # fmt: skip
    groups = channel_groups(net, IMAGES)
    removed = {}
    for name in prunable(groups):
        every = range(groups[name].size)
        removed[name] = data.draw(st.lists(st.sampled_from(every), max_size=len(every) - 1, unique=True))  # fmt: skip
    variables = variables_of(net)
    images = jax.random.normal(jax.random.key(3), IMAGES.shape)
    small, made = without(net, groups, removed, variables) if any(removed.values()) else (net, variables)  # fmt: skip
    wanted = jax.jit(net.apply)(masked(groups, removed, variables), images)
    np.testing.assert_allclose(jax.jit(small.apply)(made, images), wanted, rtol=1e-4, atol=1e-4)


# --- what is tied to what ---


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Plain", {"first": 8, "second": 6}),
        ("Residual", {"stem": 8, "up0": 12, "up1": 12}),
        ("DenseConcat", {"stem": 8, "layer0": 4, "layer1": 4, "layer2": 4}),
        ("Grouped", {"first": 6, "grouped": 4, "last": 6}),
        ("Depthwise", {"first": 8, "last": 6}),
        ("Split", {"first": 8, "last": 6}),
        ("Shared", {"stem": 8}),
        ("Flatten", {"first": 6, "dense": 10}),
        ("PaddedShortcut", {"stem": 6, "inner": 14}),
        ("Scanned", {"first": 8, "layers/up": 12}),
        ("Stacked", {"one": 8}),
        ("SplitKernel", {"halves": 8}),
    ],
)
def test_groups(name, sizes):
    assert {n: g.size for n, g in channel_groups(BY_NAME[name], IMAGES).items()} == sizes


def test_a_residual_stream_is_one_group():
    group = channel_groups(BY_NAME["Residual"], IMAGES)["stem"]
    kernels = {("/".join(m.module), m.axis) for m in group.members if m.leaf[-1] == "kernel"}
    assert kernels == {("stem", 3), ("up0", 2), ("down0", 3), ("up1", 2), ("down1", 3), ("head", 0)}
    assert {"/".join(m.module) for m in group.makers} == {"stem", "down0", "down1"}


def test_a_flattened_channel_has_all_of_its_positions():
    group = channel_groups(BY_NAME["Flatten"], IMAGES)["first"]
    (dense,) = [m for m in group.members if m.module == ("dense",)]
    assert dense.channels.tolist() == list(range(6)) * 4  # 2 x 2 positions, channels last


def test_heads_may_go_exactly_and_their_inside_not():
    groups = channel_groups(BY_NAME["Attention"], IMAGES)
    heads, inside = groups["attention/query"], groups["attention/query#2"]
    assert heads.exact
    assert not inside.exact
    assert "multiplies two activations" in str(inside.inexact[0])
    removed = {inside.name: [1]}
    with pytest.raises(RewriteError, match="'attention/query#2' cannot be pruned exactly"):
        prune(groups, removed)
    net = BY_NAME["Attention"]
    small = rewrite(net, prune(groups, removed, exact=False), example=IMAGES)
    assert parameters(small, IMAGES) == parameters_without(groups, removed)


def test_heads_that_cannot_go_are_reported():
    groups = channel_groups(networks.FusedAttention(), IMAGES)
    assert {n: (g.size, g.exact) for n, g in groups.items()} == {"qkv": (4, False), "out": (6, True)}  # fmt: skip
    (note,) = map(str, groups.kept_whole)
    assert note == "reshape in '.' splits channels into 3 x 2 x 4, of which only those of the last may go"  # fmt: skip


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.SimpleCell], ids=lambda cell: cell.__name__)
def test_recurrent_cells_stay_as_wide_as_they_are(cell):
    net = networks.Recurrent(cell)
    groups = channel_groups(net, IMAGES)
    before, inside = groups
    small = rewrite(net, prune(groups, {before: [1, 2]}), example=IMAGES)
    assert parameters(small, IMAGES) == parameters_without(groups, {before: [1, 2]})
    message = f"'{cell.__name__}_0' of Recurrent, a {cell.__name__}, starts from a carry .*; leave its channels as they are"
    for rule in (prune(groups, {inside: [0]}), ScaleWidth(0.5, 1)):
        with pytest.raises(RewriteError, match=message):
            rewrite(net, rule, example=IMAGES)


def test_means_over_channels_are_reported():
    groups = channel_groups(networks.Norms(), IMAGES)
    assert {n: g.exact for n, g in groups.items()} == {
        "first": False,
        "second": False,
        "third": True,
    }
    assert groups["second"].size == 4  # each of two groups loses the same
    assert "reduce_sum in 'layer'" in str(groups["first"].inexact[0])
    assert prunable(groups) == ["third"]
    small = rewrite(
        networks.Norms(), prune(groups, {"second": [0, 3]}, exact=False), example=IMAGES
    )
    assert small.init(KEY, jnp.zeros(IMAGES.shape))["params"]["group"]["scale"].shape == (4,)


def test_unknown_operations_keep_what_they_touch_and_are_reported():
    net = networks.ByNumber()
    groups = channel_groups(net, IMAGES)
    assert list(groups) == ["fourth"]
    notes = [str(n) for n in groups.kept_whole]
    assert any(n.startswith("gather in '.'") for n in notes)
    assert any(n.startswith("sort in '.'") for n in notes)
    assert any(n.startswith("fft in '.' has no rule") for n in notes)
    variables = variables_of(net)
    images = jax.random.normal(KEY, IMAGES.shape)
    removed = {"fourth": [1, 2]}
    small, made = without(net, groups, removed, variables)
    wanted = net.apply(masked(groups, removed, variables), images)
    np.testing.assert_allclose(small.apply(made, images), wanted, rtol=1e-5, atol=1e-5)


def test_numbers_written_into_the_code_are_an_error_with_the_place():
    groups = channel_groups(networks.Fixed(), IMAGES)
    with pytest.raises(RewriteError, match=r"Fixed does not run at these widths: .*reshape"):
        rewrite(networks.Fixed(), prune(groups, {"first": [0]}, exact=False), example=IMAGES)


@pytest.mark.parametrize("code", networks.CODE)
def test_numbers_of_channels_in_the_code_are_an_error(code):
    """Whatever follows the width though no rule of JAX says so: the result would be another function."""
    net = networks.InCode(code)
    groups = channel_groups(net, IMAGES)
    size = groups["first"].size
    refused = r"InCode (is another function|does not run) at these widths: .*leave the channels there as they are"
    for gone in ([0], list(range(size // 2)), list(range(size - 1))):
        with pytest.raises(RewriteError, match=refused):
            rewrite(net, prune(groups, {"first": gone}), example=IMAGES)
    if size == 8:  # what is inexact by permission is not held against the code
        rewrite(net, prune(groups, {"first": [0]}, exact=False), example=IMAGES)


def test_fields_as_large_as_a_width_by_chance_stay():
    net = BY_NAME["Numbers"]
    groups = channel_groups(net, IMAGES)
    removed = {n: [0, 5] for n in groups}
    small, _ = without(net, groups, removed, variables_of(net))
    found = sites(small, IMAGES)
    assert (found["linear"].module.features, found["linear"].module.temperature) == (6, 8)
    assert (found["block"].module.features, found["block"].module.gain) == (6, 8)


class Either(nn.Module):
    """Two fields that both are the width of what it adds to."""

    first: int
    second: int

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, (self.first,))
        assert x.shape[-1] == self.first == self.second
        return x * w[None, None, None]


class Ambiguous(nn.Module):
    """Holds one."""

    @nn.compact
    def __call__(self, x):
        x = Either(8, 8, name="either")(nn.Conv(8, (3, 3), name="first")(x))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


def test_a_choice_between_fields_is_refused():
    groups = channel_groups(Ambiguous(), IMAGES)
    with pytest.raises(
        RewriteError, match=r"'either' of Either .* which may be 'first' or 'second'"
    ):
        rewrite(Ambiguous(), prune(groups, {"first": [0]}), example=IMAGES)


@pytest.mark.parametrize("way", ["div", "power", "root", "log", "norm", "safe"])
def test_weights_that_are_divided_by_are_not_exact(way):
    group = channel_groups(networks.Division(way), IMAGES)["first"]
    assert group.exact == (way == "safe")
    if not group.exact:
        assert "is not finite where these weights are zero" in str(group.inexact[0])


@pytest.mark.parametrize("kernel", networks.KERNELS)
def test_kernels_that_are_not_zero_where_weights_are_are_not_exact(kernel):
    group = channel_groups(networks.Kernel(kernel), IMAGES)["first"]
    assert group.exact == networks.KERNELS_EXACT[kernel]
    if not group.exact:
        assert "dot_general in '.' " in str(group.inexact[0])


def test_kernels_computed_of_weights_are_pruned_exactly():
    net = networks.Kernels()
    groups = channel_groups(net, IMAGES)
    variables = variables_of(net)
    images = jax.random.normal(jax.random.key(2), IMAGES.shape)
    removed = {"first": [0, 3, 6]}
    small, made = without(net, groups, removed, variables)
    wanted = net.apply(masked(groups, removed, variables), images)
    np.testing.assert_allclose(small.apply(made, images), wanted, rtol=1e-5, atol=1e-5)
    assert not np.allclose(net.apply(variables, images), wanted)


def test_what_is_frozen_is_reported():
    for way, note in (("where", "select_n"), ("add", "add"), ("counted", "add"), ("rolled", "add")):
        groups = channel_groups(networks.Frozen(way), IMAGES)
        assert not groups
        by_number = ["slice in '.' takes channels by number"] if way == "rolled" else []
        assert [str(n) for n in groups.kept_whole] == [
            *by_number, f"{note} in '.' combines channels with what has a fixed number of them"
        ]  # fmt: skip


def test_what_could_not_go_anyway_is_not_reported():
    """A vocabulary, the layers of a loop."""
    tokens = channel_groups(networks.Tokens(), jax.ShapeDtypeStruct((2, 6), jnp.int32))
    assert {n: g.size for n, g in tokens.items()} == {"table": 8, "up": 12}
    assert not tokens.kept_whole
    assert not channel_groups(BY_NAME["Scanned"], IMAGES).kept_whole


def test_random_numbers_are_reported():
    groups = channel_groups(networks.Dropped(), Example(IMAGES, train=True))
    assert groups.draws
    assert "draws other random numbers" in str(groups["first"].inexact[0])
    still = channel_groups(networks.Dropped(), Example(IMAGES, train=False))
    assert still["first"].exact
    assert not still.draws


@pytest.mark.parametrize("name", [n for n in NAMES if "imagenet" not in n])
def test_reference_networks(name):
    """Every one of them loses a third of each group, and nothing keeps its channels from going."""
    net = named(name, 10)
    example = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    groups = channel_groups(net, example)
    assert not groups.kept_whole
    assert all(g.exact for g in groups.values())
    makers = {m.module for g in groups.values() for m in g.makers}
    linear = {s.path for s in groups.sites if hasattr(s.module, "features") and not any(
        o.path != s.path and o.path[: len(s.path)] == s.path for o in groups.sites)}  # fmt: skip
    head = next(p for p in reversed(groups.sites.paths) if p in linear)
    assert makers == linear - {head}
    removed = {n: list(range(g.size // 3)) for n, g in groups.items()}
    small = rewrite(net, prune(groups, removed), example=example)
    assert parameters(small, example) == parameters_without(groups, removed)


def test_analysis_is_quick():
    example = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    net = named("resnet-50-imagenet", 1000)
    began = time.process_time()
    assert len(channel_groups(net, example)) == 37
    assert time.process_time() - began < 5  # ten times what it takes


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.data())
def test_reshapes_are_split_into_runs_of_equal_size(before, data):
    total = math.prod(before)
    after = []
    while total > 1:
        factor = data.draw(st.sampled_from([d for d in range(2, total + 1) if total % d == 0]))
        after.append(factor)
        total //= factor
    after += [1] * data.draw(st.integers(0, 2))
    blocks = runs_of(before, after)
    assert [a for b, _ in blocks for a in b] == list(range(len(before)))
    assert [a for _, b in blocks for a in b] == list(range(len(after)))
    for old, new in blocks:
        assert math.prod(before[a] for a in old) == math.prod(after[a] for a in new)


# --- importance ---


def test_magnitude_by_hand():
    net = BY_NAME["Residual"]
    variables = variables_of(net)
    groups = channel_groups(net, IMAGES)
    kernel = {k: np.asarray(v["kernel"], np.float64) for k, v in variables["params"].items() if "kernel" in v}  # fmt: skip
    for order in (1, 2):
        found = magnitude(groups, variables, order)
        stream = sum(
            (np.abs(kernel[k]) ** order).sum((0, 1, 2)) for k in ("stem", "down0", "down1")
        )
        np.testing.assert_allclose(found["stem"], stream ** (1 / order))
        np.testing.assert_allclose(found["up0"], ((np.abs(kernel["up0"]) ** order).sum((0, 1, 2))) ** (1 / order))  # fmt: skip
    scales = batch_norm_scale(groups, variables)
    params = variables["params"]
    np.testing.assert_allclose(scales["stem"], np.abs(params["norm0"]["scale"]) + np.abs(params["norm1"]["scale"]))  # fmt: skip
    assert set(scales) == {"stem"}
    drawn = at_random(groups, KEY)
    assert {n: s.shape for n, s in drawn.items()} == {n: (g.size,) for n, g in groups.items()}


def mean_cross_entropy(outputs, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs), labels[:, None], 1).mean()


@pytest.mark.parametrize("name", ["Residual", "DenseConcat", "Flatten", "Depthwise", "Shuffle"])
def test_fisher_and_taylor_are_derivatives_of_kernels(name):
    """Scaling a channel once, for one image, is scaling the slices of the kernels that read it: no gate needed."""
    net = BY_NAME[name]
    images = jax.random.normal(KEY, (3, *IMAGES.shape[1:]))
    labels = jnp.array([0, 3, 1])
    variables = variables_of(net)
    groups = channel_groups(net, Example(images))
    units = np.concatenate([group.units for group in groups.values()])

    def loss(factors, image, label):
        flat = {k: dict(v) for k, v in variables["params"].items()}
        for group in groups.values():
            for m in group.members:
                depthwise = name == "Depthwise" and m.leaf[1] in ("depthwise", "again")
                if m in group.makers or m.leaf[-1] != "kernel" or depthwise:
                    continue
                array = flat[m.leaf[1]]["kernel"]
                vector = jnp.ones(array.shape[m.axis]).at[m.indices].set(factors[group.units[m.channels]])  # fmt: skip
                others = [a for a in range(array.ndim) if a != m.axis]
                flat[m.leaf[1]]["kernel"] = array * jnp.expand_dims(vector, others)
        out = net.apply({**variables, "params": flat}, image[None])
        return mean_cross_entropy(out, label[None]) / len(images)

    def both(images, labels):
        found = channel_gradients(groups, [images], labels, variables, mean_cross_entropy)
        ones = jnp.ones(groups.units)
        return found, jax.vmap(jax.grad(loss), (None, 0, 0))(ones, images, labels)

    gradients, wanted = (np.asarray(a) for a in jax.jit(both)(images, labels))
    assert (np.abs(wanted[:, units]).max(0) > 0).mean() > 0.8  # some ReLU is shut
    np.testing.assert_allclose(gradients[:, units], wanted[:, units], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(fisher(gradients), 0.5 * (gradients**2).mean(0), rtol=1e-5)
    np.testing.assert_allclose(taylor(gradients), np.abs(gradients.sum(0)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "group", "why"),
    [
        ("Scanned", "first", "dot_general in 'layers/up' reads them inside of a loop"),
        ("Attention", "attention/query#2", "no weights sum over them"),
    ],
)
def test_what_no_derivative_sees_is_an_error(name, group, why):
    net = BY_NAME[name]
    groups = channel_groups(net, IMAGES)
    arguments = [jnp.zeros(IMAGES.shape)], jnp.zeros(2, int), variables_of(net), mean_cross_entropy
    message = f"channels of '{group}' have no .*: {why}.*; judge them by their weights"
    with pytest.raises(UnsupportedNetworkError, match=message):
        channel_gradients(groups, *arguments, names=[group])
    assert group not in by_group(groups, np.zeros(groups.units))


def test_fisher_is_at_the_probe_of_the_paper():
    """In a wide residual network: what the second convolution of a block reads."""
    net = named("wrn-16-1", 10)
    images = jax.random.normal(KEY, (3, 8, 8, 3))
    labels = jnp.array([1, 2, 3])
    example = Example(images, train=True)
    variables = jax.jit(lambda key: example.init(net, key))(KEY)
    groups = channel_groups(net, example)
    name = "stage2_block1/conv1"

    def loss(probe):
        captured = []

        def add(next_fun, args, kwargs, context):
            if context.module.path == ("stage2_block1", "conv2"):
                captured.append(args[0])
                args = (args[0] + probe,)
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(add):
            out, _ = net.apply(variables, images, train=True, mutable=["batch_stats"])
        return mean_cross_entropy(out, labels), captured[0]

    def both(probe):
        gradients = channel_gradients(groups, [images], labels, variables, mean_cross_entropy)
        return gradients, *jax.grad(loss, has_aux=True)(probe)

    gradients, gradient, act = jax.jit(both)(jnp.zeros((3, 4, 4, 32)))
    wanted = 0.5 * (np.asarray((act * gradient).sum((1, 2))) ** 2).mean(0)
    np.testing.assert_allclose(fisher(gradients)[groups[name].units], wanted, rtol=2e-3)


# --- what goes ---


@pytest.fixture(scope="module")
def blocks():
    net = BY_NAME["Blocks"]
    return net, channel_groups(net, IMAGES), variables_of(net)


def test_the_least_important_go_first(blocks):
    _, groups, _ = blocks
    scores = {
        n: np.arange(g.size, dtype=float) + 100 * i for i, (n, g) in enumerate(groups.items())
    }
    first = next(iter(groups))
    assert weakest(groups, scores, count=3) == {first: [0, 1, 2]}
    # A group keeps its last channel, whatever that costs elsewhere.
    assert weakest(groups, scores, count=8) == {first: list(range(7)), "block0/first": [0]}
    spread = weakest(groups, scores, fraction=0.5, scope="group")
    assert {n: len(c) for n, c in spread.items()} == {n: g.size // 2 for n, g in groups.items()}
    assert set(groups.isomorphic().values()) == {
        ("stem",),
        ("block0/first",),
        ("block1/first",),
        ("block1/second",),
        ("block2/first",),
    }
    assert weakest(groups, scores, count=0) == {}


def test_isomorphic_groups_are_compared():
    groups = channel_groups(BY_NAME["Residual"], IMAGES)
    assert ("up0", "up1") in groups.isomorphic().values()
    scores = {"stem": np.full(8, 1e9), "up0": np.arange(12.0), "up1": np.arange(12.0) + 100}
    removed = weakest(groups, scores, fraction=0.25, scope="isomorphic")
    assert {n: len(c) for n, c in removed.items()} == {"stem": 2, "up0": 6}


@pytest.mark.parametrize("multiple", [1, 2, 4, 5])
def test_widths_are_multiples(blocks, multiple):
    _, groups, variables = blocks
    for fraction in (0.1, 0.4, 0.9):
        removed = weakest(
            groups, magnitude(groups, variables), fraction=fraction, multiple=multiple
        )
        for name, channels in removed.items():
            assert (groups[name].size - len(channels)) % multiple == 0


def test_a_budget_is_met_and_hardly_more(blocks):
    net, groups, variables = blocks
    scores = magnitude(groups, variables)
    for budget in (4000, 2500, 1000):
        removed = weakest(groups, scores, budget=budget)
        assert parameters_without(groups, removed) <= budget
        fewer = weakest(groups, scores, count=sum(map(len, removed.values())) - 1)
        assert parameters_without(groups, fewer) > budget

    def cost(removed):
        return macs(rewrite(net, prune(groups, removed), example=IMAGES), IMAGES)

    limit = 0.5 * macs(net, IMAGES)
    assert cost(weakest(groups, scores, budget=limit, cost=cost)) <= limit


def test_removals_add_up():
    assert combined({"a": [2, 0]}, {"a": [1], "b": [4]}) == {"a": [0, 1, 2], "b": [4]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of"),
        ({"count": 1, "fraction": 0.5}, "give one of"),
        ({"fraction": 1.0}, "fraction of 1.0"),
        ({"fraction": -0.1}, "fraction of -0.1"),
        ({"fraction": "0.3"}, "fraction of '0.3' cannot be removed; give one from"),
        ({"budget": "400K"}, "budget of '400K' cannot be met; give a finite"),
        ({"count": 10_000}, "10000 channels cannot be removed"),
        ({"budget": 10}, "the smallest network costs"),
        ({"budget": float("nan")}, "a budget of nan"),
        ({"count": 2.5}, "2.5 channels cannot be removed; give a whole number"),
        ({"count": 2, "multiple": 0}, "multiples of 0"),
        ({"count": 2, "multiple": -2}, "multiples of -2"),
        ({"count": 2, "scope": "isomorph"}, "not 'isomorph'"),
    ],
)
def test_bad_budgets(blocks, options, message):
    _, groups, variables = blocks
    with pytest.raises(BudgetError, match=message):
        weakest(groups, magnitude(groups, variables), **options)


def test_bad_variables(blocks):
    _, groups, variables = blocks
    params = variables["params"]
    scale = {"scale": jnp.zeros(3), "bias": jnp.zeros(3)}
    norm = {**params["block0"], "first": {"kernel": jnp.zeros((3, 3, 8, 3))}, "norm": scale}
    narrow = {"params": {**params, "block0": norm}}
    whole = {"params": params}  # statistics are not read
    for call in (magnitude, batch_norm_scale, lambda g, v: masked(g, {"stem": [0], "block0/first": [1]}, v)):  # fmt: skip
        with pytest.raises(PruneError, match=r"Blocks: variables '.* are missing; give those of"):
            call(groups, {"params": {}})
        with pytest.raises(PruneError, match=r"Blocks: variables 'params/block0/.* and not \("):
            call(groups, narrow)
    assert set(magnitude(groups, whole)) == set(groups)
    with pytest.raises(PruneError, match="no norm of order 3; give 1 or 2"):
        magnitude(groups, variables, 3)


def test_bad_scores(blocks):
    _, groups, _ = blocks
    with pytest.raises(BudgetError, match="'block0/first' has 8 channels and scores of shape"):
        weakest(groups, {"block0/first": np.ones(3)}, count=1)
    scores = np.arange(8.0)
    scores[3] = np.nan
    with pytest.raises(BudgetError, match="channel 3 of 'block0/first' has a score of nan"):
        weakest(groups, {"block0/first": scores}, count=1)


@pytest.mark.parametrize(
    ("removed", "error", "message"),
    [
        ({"nowhere": [0]}, SelectionError, "no group of channels is called 'nowhere'"),
        ({"block0/first": [8]}, RewriteError, "has channels 0 to 7, not 8"),
        ({"block0/first": [-1]}, RewriteError, "has channels 0 to 7, not -1"),
        ({"block0/first": list(range(8))}, RewriteError, "would lose all of its 8 channels"),
        (
            {"block0/first": [False] * 7 + [True]},
            RewriteError,
            r"flat list of integers, not bool\[8\]",
        ),
        ({"block0/first": [1.9]}, RewriteError, r"flat list of integers, not float64\[1\]"),
        (
            {"block0/first": np.array([[1], [2]])},
            RewriteError,
            r"flat list of integers, not int64\[2, 1\]",
        ),
    ],
)
def test_bad_removals(blocks, removed, error, message):
    _, groups, _ = blocks
    with pytest.raises(error, match=message):
        prune(groups, removed)


def test_parameters_without_channels_that_are_not_there(blocks):
    _, groups, _ = blocks
    with pytest.raises(RewriteError, match="has channels 0 to 7, not 99"):
        parameters_without(groups, {"block0/first": [99]})


def test_a_rule_for_another_network_says_so(blocks):
    _, groups, _ = blocks
    rule = prune(groups, {"block0/first": [0]})
    with pytest.raises(RewriteError, match="Plain has a variable 'params/block0/first"):
        rewrite(BY_NAME["Plain"], rule, example=IMAGES)
    empty = dataclasses.replace(rule, extents=(dataclasses.replace(rule.extents[0], size=0),))
    with pytest.raises(RewriteError, match="keep at least one channel"):
        rewrite(BY_NAME["Blocks"], empty, example=IMAGES)


# --- masks ---


def stays(count, *gone):
    return [i not in gone for i in range(count)]


def test_masks_of_modules():
    groups = channel_groups(BY_NAME["Residual"], IMAGES)
    assert removed_by(groups, {"up0": stays(12, 3, 4)}) == {"up0": [3, 4]}
    tied = {name: stays(8, 1) for name in ("stem", "down0", "down1")}
    assert removed_by(groups, tied) == {"stem": [1]}
    split = channel_groups(BY_NAME["Split"], IMAGES)
    assert removed_by(split, {"first": stays(16, 2, 10)}) == {"first": [2]}


def test_masks_of_groups():
    """Where a module makes channels along several axes, or with several kernels, only a group's mask is clear."""
    attention = channel_groups(BY_NAME["Attention"], IMAGES)
    assert removed_by(attention, {"attention/query": stays(4, 2)}) == {"attention/query": [2]}
    assert removed_by(attention, {"attention/query#2": stays(4, 1)}) == {"attention/query#2": [1]}
    own = channel_groups(networks.TwoKernels(), IMAGES)
    assert removed_by(own, {".": stays(8, 1), ".#2": stays(6, 5)}) == {".": [1], ".#2": [5]}
    with pytest.raises(
        RewriteError,
        match=r"'\.' has 6 entries.* of '\.' \(8\), '\.#2' \(6\)",
    ):
        removed_by(own, {".": stays(6, 1)})
    with pytest.raises(RewriteError, match=r"int64\[2\]; give a flat list of booleans"):
        removed_by(own, {".": [1, 2]})


@pytest.mark.parametrize(
    ("net", "masks", "message"),
    [
        ("Residual", {"stem": stays(8, 1)}, "half of a tied group: 'down0'"),
        ("Residual", {"stem": stays(8, 1), "down0": stays(8, 2), "down1": stays(8, 1)}, "half of a tied group: 'down0'"),
        ("Split", {"first": stays(16, 2)}, "cuts part of channel 2 of 'first'"),
        ("Residual", {"up0": stays(11, 2)}, "11 entries, and the module makes 12"),
        ("Residual", {"head": stays(5, 2)}, "no channel that 'head' makes can go"),
    ],
)  # fmt: skip
def test_bad_masks(net, masks, message):
    with pytest.raises(RewriteError, match=message):
        removed_by(channel_groups(BY_NAME[net], IMAGES), masks)
