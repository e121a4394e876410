"""Prune-and-tune: the same training, a smaller network at the end, the same function."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prunable_networks import Layer

from nnopt.core import Example
from nnopt.costs import parameters
from nnopt.data import Augmentation, load
from nnopt.errors import BudgetError, PruneError, UnsupportedNetworkError
from nnopt.networks import VGG, WideResNet
from nnopt.rewrites import at_random
from nnopt.training import (
    Pruner,
    PruneRecipe,
    PruneState,
    Recipe,
    Trainer,
    evaluate_test,
    load_checkpoint,
    save_checkpoint,
)


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
    """Each program here takes a few steps: compiling it well takes longer than running it."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


PLAIN = Augmentation(pad=0, flip=False)
TUNING = Recipe(epochs=4, batch=16, learning_rate=0.01, schedule="constant", augmentation=PLAIN)
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def variables(digits):
    return Example(jnp.zeros((1, *digits.image_shape))).init(WideResNet(10, 1.0), KEY)


def pruner_for(digits, net=None, **options):
    options = {"tuning": TUNING, "steps": 3, "at_once": 2} | options
    return Pruner(net or WideResNet(10, 1.0), digits, PruneRecipe(**options))


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def test_the_network_without_channels_is_the_one_with_zeros(digits, variables):
    pruner = pruner_for(digits)
    state = pruner.start(variables, KEY)
    whole = pruner.parameters(state)
    assert pruner.finish(copied(state))[0] == WideResNet(10, 1.0)
    rows = []
    for _ in range(4):
        state, row = pruner.round(state)
        rows.append(row)
    assert [r.removed for r in rows] == [2, 4, 6, 8]
    assert rows[-1].parameters == pruner.parameters(state) < rows[0].parameters < whole
    assert all(len(r.last) == 2 and np.isfinite(r.loss) for r in rows)
    small, made = pruner.finish(state)
    assert parameters(small, jnp.zeros((1, *digits.image_shape))) == rows[-1].parameters
    images = jax.random.normal(KEY, (4, *digits.image_shape))
    wanted = WideResNet(10, 1.0).apply(state.train.variables, images)
    np.testing.assert_allclose(small.apply(made, images), wanted, rtol=1e-4, atol=1e-4)
    assert evaluate_test(small, made, digits) == pruner.accuracy(state)
    history = [name for row in rows for name in row.last]
    first = pruner.removed(state, 2)
    assert sorted(f"{n}:{c}" for n, cs in first.items() for c in cs) == sorted(history[:2])


def test_between_removals_it_is_plain_training(digits, variables):
    """Same minibatches, same updates as `Trainer`, as long as nothing has gone."""
    pruner = pruner_for(digits, steps=2, at_once=1)
    state, _ = pruner.round(pruner.start(variables, KEY))
    trainer = Trainer(WideResNet(10, 1.0), digits, TUNING)
    wanted = trainer.start(variables, KEY)
    sums = {"loss": jnp.zeros(()), "right": jnp.zeros((), jnp.int32)}
    for _ in range(2):
        wanted, sums = trainer._step(
            state=wanted, sums=sums, images=trainer._train_images, labels=trainer._train_labels,
            order=trainer.order(KEY, 0),
        )  # fmt: skip
    live = {n: np.setdiff1d(np.arange(g.size), pruner.removed(state).get(n, [])) for n, g in pruner.groups.items()}  # fmt: skip
    kept = live["stage1_block0/conv1"]
    np.testing.assert_allclose(
        state.train.params["stage1_block0"]["conv1"]["kernel"][..., kept],
        wanted.params["stage1_block0"]["conv1"]["kernel"][..., kept],
        rtol=1e-3, atol=1e-5,
    )  # fmt: skip
    np.testing.assert_allclose(
        state.train.batch_stats["stage2_block0"]["norm1"]["mean"],
        wanted.batch_stats["stage2_block0"]["norm1"]["mean"],
        rtol=1e-3, atol=1e-5,
    )  # fmt: skip


class Small(nn.Module):
    """Two groups of channels."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), strides=4, name="first")(x)
        x = nn.relu(nn.BatchNorm(not train, name="norm1")(x))
        x = nn.Conv(5, (3, 3), name="second")(x)
        x = nn.relu(nn.BatchNorm(not train, name="norm2")(x))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def read_by_layers(params, images, labels):
    """`(activation x gradient)` of each channel of each image, `[batch, channels]`, by hand: what `second` and `head` read."""

    def loss(probes):
        seen = {}

        def add(next_fun, args, kwargs, context):
            name = context.module.name
            if name in ("second", "head") and context.method_name == "__call__":
                seen[name] = args[0]
                args = (args[0] + probes.get(name, jnp.zeros(())),)
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(add):
            out, _ = Small().apply(params, images, train=True, mutable=["batch_stats"])
        logs = jax.nn.log_softmax(out)
        return -jnp.take_along_axis(logs, labels[:, None], 1).mean(), seen

    shapes = jax.eval_shape(loss, {})[1]
    probes = {name: jnp.zeros(spec.shape) for name, spec in shapes.items()}
    gradients, seen = jax.jit(jax.grad(loss, has_aux=True))(probes)
    first, second = (np.asarray(seen[n] * gradients[n]) for n in ("second", "head"))
    return {"first": first.sum((1, 2)), "second": second}


@pytest.mark.parametrize("criterion", ["fisher", "taylor", "l1", "l2", "batch_norm", "random"])
def test_the_least_important_by_hand_goes_first(digits, criterion):
    """After one step that hardly moves a weight, so that its start can be judged."""
    tuning = dataclasses.replace(TUNING, learning_rate=1e-12)
    pruner = pruner_for(digits, Small(), tuning=tuning, criterion=criterion, steps=1, at_once=1, only="all")  # fmt: skip
    made = Example(jnp.zeros((1, *digits.image_shape))).init(Small(), KEY)
    params = dict(made["params"])
    for i, norm in enumerate(("norm1", "norm2")):
        scale = jax.random.uniform(jax.random.key(i), params[norm]["scale"].shape, minval=0.3)
        params[norm] = {**params[norm], "scale": scale}
    variables = {**made, "params": params}
    start = pruner.start(variables, KEY)
    kernels = {name: np.abs(np.asarray(params[name]["kernel"])) for name in ("first", "second")}
    if criterion in ("fisher", "taylor"):
        images, labels = pruner._trainer.minibatch(start.train, pruner._trainer.order(KEY, 0))
        products = read_by_layers(variables, images, labels)
        scores = {
            n: (v**2).mean(0) / 2 if criterion == "fisher" else np.abs(v.sum(0))
            for n, v in products.items()
        }
    elif criterion == "batch_norm":
        scores = {"first": params["norm1"]["scale"], "second": params["norm2"]["scale"]}
    elif criterion == "random":
        scores = at_random(pruner.groups, jax.random.fold_in(start.train.key, 1))
    else:
        order = 1 if criterion == "l1" else 2
        scores = {n: (k**order).sum((0, 1, 2)) ** (1 / order) for n, k in kernels.items()}
    each = {(n, c): float(v) for n, score in scores.items() for c, v in enumerate(score)}
    assert len(set(each.values())) > 8
    (group, channel), least = min(each.items(), key=lambda item: item[1])
    found = pruner._scores
    seen = []
    pruner._scores = lambda state: seen.append(found(state)) or seen[-1]
    state, row = pruner.round(start)
    assert row.last == (f"{group}:{channel}",)
    np.testing.assert_allclose(seen[0][pruner.groups[group].units[channel]], least, rtol=1e-3)
    assert not np.asarray(state.train.params[group]["kernel"])[..., channel].any()


def test_scores_that_are_no_numbers_are_an_error(digits):
    pruner = pruner_for(digits, Small(), criterion="l1", steps=1, only="all")
    made = Example(jnp.zeros((1, *digits.image_shape))).init(Small(), KEY)
    bias = made["params"]["head"]["bias"].at[3].set(jnp.nan)
    head = {**made["params"]["head"], "bias": bias}
    state = pruner.start({**made, "params": {**made["params"], "head": head}}, KEY)
    with pytest.raises(PruneError, match="round 1: l1 of channel 0 of 'first' is nan"):
        pruner.round(state)


class Layers(nn.Module):
    """Layers in a loop."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), strides=4, name="first")(x).mean((1, 2))
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(10, name="head")(layers(name="layers")(x, None)[0])


def test_layers_in_a_loop_are_judged_by_their_weights_only(digits):
    with pytest.raises(UnsupportedNetworkError, match="'first' have no Fisher or Taylor score"):
        pruner_for(digits, Layers(), only="all")
    pruner = pruner_for(digits, Layers(), only="all", criterion="l2", steps=1, at_once=5)
    variables = Example(jnp.zeros((1, *digits.image_shape))).init(Layers(), KEY)
    state, row = pruner.round(pruner.start(variables, KEY))
    small, made = pruner.finish(state)
    images = jax.random.normal(KEY, (4, *digits.image_shape))
    wanted = Layers().apply(state.train.variables, images)
    np.testing.assert_allclose(small.apply(made, images), wanted, rtol=1e-5, atol=1e-5)
    assert row.parameters == sum(a.size for a in jax.tree.leaves(made["params"]))


def test_groups_keep_one_channel(digits, variables):
    pruner = pruner_for(digits, steps=1, at_once=200, criterion="random")
    assert pruner.most == 16 + 32 + 64 - 3
    state, row = pruner.round(pruner.start(variables, KEY))
    assert row.removed == pruner.most
    with pytest.raises(BudgetError, match="all of the 109 channels"):
        pruner.round(state)
    small, _ = pruner.finish(state)
    shapes = jax.eval_shape(small.init, KEY, jnp.zeros((1, *digits.image_shape)))["params"]
    assert shapes["stage3_block0"]["conv1"]["kernel"].shape[-1] == 1


def test_a_killed_run_takes_up_where_it_stopped(digits, variables, tmp_path):
    pruner = pruner_for(digits)
    state, _ = pruner.round(pruner.start(variables, KEY))
    save_checkpoint(tmp_path / "state", WideResNet(10, 1.0), state)
    state, row = pruner.round(state)
    again = pruner_for(digits)
    restored = load_checkpoint(tmp_path / "state", WideResNet(10, 1.0), again.start(variables, KEY))
    assert isinstance(restored, PruneState)
    resumed, other = again.round(restored)
    assert other.last == row.last
    chex.assert_trees_all_equal(jax.tree.leaves(resumed.train.params), jax.tree.leaves(state.train.params))  # fmt: skip


def test_any_channels_of_a_plain_network(digits):
    net = VGG(widths=(4, 4, 8, 8, 8))
    with pytest.raises(Exception, match="shortcut"):
        pruner_for(digits, net)
    pruner = pruner_for(digits, net, only="all", steps=1)
    variables = Example(jnp.zeros((1, *digits.image_shape))).init(net, KEY)
    state, row = pruner.round(pruner.start(variables, KEY))
    _, made = pruner.finish(state)
    assert row.parameters == sum(a.size for a in jax.tree.leaves(made["params"]))


class Dropout(nn.Module):
    """Draws random numbers."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(10)(x.mean((1, 2)))


def test_networks_that_draw_random_numbers_are_refused(digits):
    with pytest.raises(UnsupportedNetworkError, match="Dropout draws random numbers"):
        pruner_for(digits, Dropout(), only="all")


@pytest.mark.parametrize("options", [{"steps": 0}, {"at_once": 0}])
def test_bad_recipes(digits, options):
    with pytest.raises(BudgetError, match="at least one of both"):
        pruner_for(digits, **options)
