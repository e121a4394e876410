"""Prune-and-tune: the same training, a smaller network at the end, the same function."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnopt.core import Example
from nnopt.costs import parameters
from nnopt.data import Augmentation, load
from nnopt.errors import BudgetError, UnsupportedNetworkError
from nnopt.networks import VGG, WideResNet
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


def test_fisher_removes_the_least(digits, variables):
    """The mean over the steps of what one minibatch says, by the formula, for the first step."""
    pruner = pruner_for(digits, steps=1, at_once=1)
    start = pruner.start(variables, KEY)
    images, labels = pruner._trainer.minibatch(start.train, pruner._trainer.order(KEY, 0))
    probes, net = {}, WideResNet(10, 1.0)
    blocks = ("stage1_block0", "stage2_block0", "stage3_block0")

    def run(extra):
        def add(next_fun, args, kwargs, context):
            path = context.module.path
            if len(path) == 2 and path[1] == "conv2":
                probes[path[0]] = args[0]
                args = (args[0] + extra.get(path[0], jnp.zeros(())),)
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(add):
            out, _ = net.apply(variables, images, train=True, mutable=["batch_stats"])
        return -jnp.take_along_axis(jax.nn.log_softmax(out), labels[:, None], 1).mean()

    run({})
    activations = dict(probes)
    gradients = jax.grad(run)({b: jnp.zeros(activations[b].shape) for b in blocks})
    scores = {
        (b, c): float(v)
        for b in blocks
        for c, v in enumerate(0.5 * ((activations[b] * gradients[b]).sum((1, 2)) ** 2).mean(0))
    }
    block, channel = min(scores, key=scores.__getitem__)
    state, row = pruner.round(start)
    assert row.last == (f"{block}/conv1:{channel}",)
    assert pruner.count(state) == 1


@pytest.mark.parametrize("criterion", ["taylor", "l1", "l2", "batch_norm", "random"])
def test_criteria(digits, variables, criterion):
    pruner = pruner_for(digits, criterion=criterion, steps=1, at_once=3)
    state, row = pruner.round(pruner.start(variables, KEY))
    assert row.removed == 3
    if criterion == "l1":
        params = state.train.params
        for name in row.last:
            group, channel = name.split(":")
            block, conv = group.split("/")
            assert not np.asarray(params[block][conv]["kernel"])[..., int(channel)].any()


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
