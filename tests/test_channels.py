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

from nnopt.core import Example, carry, from_record, rewrite, to_record
from nnopt.core.channel_rules import _blocks
from nnopt.core.channels import channel_groups
from nnopt.costs import macs, parameters
from nnopt.errors import BudgetError, RewriteError, SelectionError
from nnopt.networks import NAMES, named
from nnopt.rewrites import (
    at_random,
    batch_norm_scale,
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

KEY = jax.random.key(0)
BY_NAME = {type(n).__name__: n for n in EXACT}


def variables_of(net, example=IMAGES, key=KEY):
    """Variables none of which is zero or one, or a test of zeros would prove nothing."""
    example = Example.of(example)
    made = example.init(net, key)
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
    assert not groups.kept_whole
    variables = variables_of(net)
    images = jax.random.normal(jax.random.key(2), IMAGES.shape)
    scores = {n: s for n, s in magnitude(groups, variables).items() if n in prunable(groups)}
    removed = weakest(groups, scores, fraction=0.3, scope="group")
    assert removed
    wanted = net.apply(masked(groups, removed, variables), images)
    assert not np.allclose(net.apply(variables, images), wanted)  # something went that mattered
    small, made = without(net, groups, removed, variables)
    np.testing.assert_allclose(small.apply(made, images), wanted, rtol=1e-5, atol=1e-5)
    assert size(made) == parameters_without(groups, removed) == parameters(small, IMAGES)
    assert size(made) < size(variables)
    again = from_record(to_record(small))
    np.testing.assert_array_equal(again.apply(made, images), small.apply(made, images))
    assert pickle.loads(pickle.dumps(small)) == small


@pytest.mark.parametrize("net", EXACT, ids=lambda n: type(n).__name__)
def test_no_array_keeps_a_dead_channel(net):
    """In the pruned network the same channels are found again, fewer of them, and nothing that is zero throughout."""
    groups = channel_groups(net, IMAGES)
    variables = variables_of(net)
    removed = {n: [0] for n in prunable(groups)}
    small, made = without(net, groups, removed, variables)
    found = channel_groups(small, IMAGES)
    for name, group in groups.items():
        left = group.size - len(removed.get(name, ()))
        assert (left == 1 and name not in found) or found[name].size == left
    for path, array in jax.tree.leaves_with_path(made):
        for axis in range(array.ndim):
            others = tuple(a for a in range(array.ndim) if a != axis)
            assert np.abs(np.asarray(array)).max(others).min() > 0, (path, axis)


def test_training_mode_finds_the_same_groups():
    for name in ("Plain", "Blocks", "DenseConcat"):
        net = BY_NAME[name]
        here = channel_groups(net, Example(IMAGES, train=False))
        there = channel_groups(net, Example(IMAGES, train=True))
        assert {n: g.size for n, g in here.items()} == {n: g.size for n, g in there.items()}
        for group in here:
            members = [[(m.leaf, m.axis) for m in g[group].members] for g in (here, there)]
            assert members[0] == members[1]


@settings(max_examples=25, deadline=None)
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
    wanted = net.apply(masked(groups, removed, variables), images)
    np.testing.assert_allclose(small.apply(made, images), wanted, rtol=1e-4, atol=1e-4)


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
    blocks = _blocks(before, after)
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


@pytest.mark.parametrize(
    "name", ["Plain", "Residual", "DenseConcat", "Flatten", "Depthwise", "Shuffle"]
)
def test_fisher_and_taylor_are_derivatives_of_kernels(name):
    """Scaling a channel where it is read is scaling the slices of the kernels that read it: one image at a time, no gate needed."""
    net = BY_NAME[name]
    images = jax.random.normal(KEY, (4, *IMAGES.shape[1:]))
    labels = jnp.array([0, 3, 1, 3])
    variables = variables_of(net)
    groups = channel_groups(net, Example(images))
    gradients = channel_gradients(groups, [images], labels, variables, mean_cross_entropy)
    for group in groups.values():
        readers = [m for m in group.members if m not in group.makers and m.leaf[-1] == "kernel"]

        def loss(factors, image, label, readers=readers):
            flat = dict(variables["params"])
            for m in readers:
                array = flat[m.leaf[1]][m.leaf[2]]
                vector = jnp.ones(array.shape[m.axis]).at[m.indices].set(factors[m.channels])
                shape = [1] * array.ndim
                shape[m.axis] = -1
                flat[m.leaf[1]] = {**flat[m.leaf[1]], m.leaf[2]: array * vector.reshape(shape)}
            out = net.apply({**variables, "params": flat}, image[None])
            return mean_cross_entropy(out, label[None]) / 4

        if name == "Depthwise" and group.name == "first":
            continue  # a depthwise kernel makes the channel that it reads
        wanted = [jax.grad(loss)(jnp.ones(group.size), i, y) for i, y in zip(images, labels, strict=True)]  # fmt: skip
        np.testing.assert_allclose(gradients[:, group.units], np.stack(wanted), rtol=1e-4, atol=1e-6)  # fmt: skip
    np.testing.assert_allclose(
        fisher(gradients), 0.5 * (np.asarray(gradients) ** 2).mean(0), rtol=1e-5
    )
    np.testing.assert_allclose(
        taylor(gradients), np.abs(np.asarray(gradients).sum(0)), rtol=1e-4, atol=1e-6
    )


def test_fisher_is_at_the_probe_of_the_paper():
    """In a wide residual network: what the second convolution of a block reads."""
    net = named("wrn-16-1", 10)
    images = jax.random.normal(KEY, (3, 16, 16, 3))
    labels = jnp.array([1, 2, 3])
    example = Example(images, train=True)
    variables = example.init(net, KEY)
    groups = channel_groups(net, example)
    gradients = channel_gradients(groups, [images], labels, variables, mean_cross_entropy)
    name = "stage2_block1/conv1"

    captured = []

    def loss(probe):
        def add(next_fun, args, kwargs, context):
            if context.module.path == ("stage2_block1", "conv2"):
                captured.append(args[0])
                args = (args[0] + probe,)
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(add):
            out, _ = net.apply(variables, images, train=True, mutable=["batch_stats"])
        return mean_cross_entropy(out, labels)

    gradient = jax.grad(loss)(jnp.zeros((3, 8, 8, 32)))
    captured.clear()
    loss(jnp.zeros((3, 8, 8, 32)))
    (act,) = captured
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
    alike = groups.isomorphic()
    assert ("block1/first",) in alike.values() or len(alike) == len(groups)
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
        ({"count": 10_000}, "10000 channels cannot be removed"),
        ({"budget": 10}, "the smallest network costs"),
    ],
)
def test_bad_budgets(blocks, options, message):
    _, groups, variables = blocks
    with pytest.raises(BudgetError, match=message):
        weakest(groups, magnitude(groups, variables), **options)


def test_bad_scores(blocks):
    _, groups, _ = blocks
    with pytest.raises(BudgetError, match="'block0/first' has 8 channels and scores of shape"):
        weakest(groups, {"block0/first": np.ones(3)}, count=1)


@pytest.mark.parametrize(
    ("removed", "error", "message"),
    [
        ({"nowhere": [0]}, SelectionError, "no group of channels is called 'nowhere'"),
        ({"block0/first": [8]}, RewriteError, "has channels 0 to 7, not 8"),
        ({"block0/first": [-1]}, RewriteError, "has channels 0 to 7, not -1"),
        ({"block0/first": list(range(8))}, RewriteError, "would lose all of its 8 channels"),
    ],
)
def test_bad_removals(blocks, removed, error, message):
    _, groups, _ = blocks
    with pytest.raises(error, match=message):
        prune(groups, removed)


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
