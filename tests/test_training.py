import dataclasses
import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnopt import data
from nnopt.core import Example, Patched, rewrite
from nnopt.errors import DataError, RecipeError
from nnopt.rewrites import Configure
from nnopt.training import (
    Evaluator,
    Recipe,
    Trainer,
    apply,
    evaluate,
    evaluate_test,
    loop,
    recipe,
    train,
)


class Small(nn.Module):
    """Everything that training has to handle: normalisation statistics and dropout."""

    classes: int = 10

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), strides=4, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.8)(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(self.classes)(x)


class Plain(nn.Module):
    """No modes, no statistics."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x[:, ::4, ::4].reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def digits():
    return data.load("digits").subset(64, 50)


@pytest.fixture(scope="module")
def net():
    return Small()


@pytest.fixture(scope="module")
def variables(net):
    return net.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


QUICK = Recipe(epochs=3, batch=30, learning_rate=0.05, augmentation=data.Augmentation(pad=1))


# --- recipes ---

RECIPES = {name: value for name, value in vars(recipe).items() if isinstance(value, Recipe)}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name):
    value = RECIPES[name]
    again = Recipe.from_json(json.loads(json.dumps(value.to_json())))
    assert again == value
    assert hash(again) == hash(value)
    assert eval(repr(value), {"Recipe": Recipe, "Augmentation": data.Augmentation}) == value


def test_published_recipes():
    wrn, blockswap = recipe.CLOSER_LOOK_WRN, recipe.BLOCKSWAP
    assert (wrn.epochs, wrn.batch, wrn.weight_decay) == (200, 128, 5e-4)
    rates = [float(wrn.learning_rate_schedule(390)(390 * e)) for e in (0, 59, 60, 120, 160, 199)]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.02, 0.004, 0.0008, 0.0008], rtol=1e-6)
    assert blockswap.schedule == "cosine"
    assert blockswap.augmentation == data.Augmentation(4, "constant", True, 16)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({}, "epochs"),
        ({"epochs": 1, "speed": 2}, "speed"),
        ({"epochs": 0}, "integer from 1"),
        ({"epochs": 2.5}, "integer from 1"),
        ({"epochs": "3"}, "integer from 1"),
        ({"epochs": 1, "momentum": "0.9"}, "no training recipe"),
        ({"epochs": 1, "learning_rate": -1.0}, "0 or more"),
        ({"epochs": 1, "learning_rate": float("nan")}, "0 or more"),
        ({"epochs": 1, "momentum": 1.0}, "below 1"),
        ({"epochs": 1, "schedule": "linear"}, "cosine, multistep, constant"),
        ({"epochs": 9, "schedule": "multistep", "milestones": [5, 3]}, "increasing"),
        ({"epochs": 1, "nesterov": True, "momentum": 0.0}, "nesterov"),
        ({"epochs": 1, "augmentation": {"spin": 1}}, "spin"),
    ],
)
def test_nonsense_is_refused(record, said):
    with pytest.raises(RecipeError, match=said):
        Recipe.from_json(record)


def test_cosine_ends_at_zero():
    rate = Recipe(epochs=4, learning_rate=0.1).learning_rate_schedule(10)
    np.testing.assert_allclose([rate(0), rate(20), rate(40)], [0.1, 0.05, 0.0], atol=1e-8)
    expected = [0.05 * (1 + np.cos(np.pi * i / 40)) for i in range(41)]
    np.testing.assert_allclose([rate(i) for i in range(41)], expected, atol=1e-7)


def test_warmup_rises_to_the_peak():
    rate = Recipe(epochs=2, learning_rate=0.1, warmup_steps=4).learning_rate_schedule(10)
    np.testing.assert_allclose(
        [rate(i) for i in range(5)], [0.02, 0.04, 0.06, 0.08, 0.1], rtol=1e-5
    )
    np.testing.assert_allclose(rate(20), 0.0, atol=1e-8)
    with pytest.raises(RecipeError, match="warmup_steps=20"):
        Recipe(epochs=2, warmup_steps=20).learning_rate_schedule(10)


def test_milestones_are_counted_from_the_start():
    value = Recipe(
        epochs=6,
        schedule="multistep",
        milestones=(1, 3),
        gamma=0.5,
        warmup_steps=2,
        learning_rate=1.0,
    )
    rate = value.learning_rate_schedule(2)
    expected = [1 / 3, 2 / 3, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]
    np.testing.assert_allclose([rate(i) for i in range(8)], expected, rtol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay_all", [False, True])
def test_optimizer_is_torch_sgd(nesterov, decay_all):
    """Against the update rule of torch.optim.SGD written out in float64."""
    value = Recipe(
        epochs=3, learning_rate=0.3, weight_decay=0.1, nesterov=nesterov, decay_all=decay_all
    )
    rng = np.random.default_rng(0)
    weights = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    gradients = [{k: rng.normal(size=w.shape) for k, w in weights.items()} for _ in range(6)]

    optimizer = value.optimizer(2)
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), weights)
    state = optimizer.init(params)
    buffers = {k: np.zeros_like(w) for k, w in weights.items()}
    for i, gradient in enumerate(gradients):
        given = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradient)
        changes, state = optimizer.update(given, state, params)
        params = jax.tree.map(lambda p, c: p + c, params, changes)
        rate = 0.15 * (1 + np.cos(np.pi * i / 6))
        for k, w in weights.items():
            decay = 0.1 if decay_all or k == "kernel" else 0.0
            g = gradient[k] + decay * w
            buffers[k] = 0.9 * buffers[k] + g
            weights[k] = w - rate * (g + 0.9 * buffers[k] if nesterov else buffers[k])
    for k, w in weights.items():
        np.testing.assert_allclose(params[k], w, rtol=1e-5, atol=1e-6)


def test_label_smoothing():
    logits = jnp.asarray([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    labels = jnp.asarray([2, 0])
    log_p = np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
    target = np.eye(3)[[2, 0]]
    expected = -(log_p * (0.9 * target + 0.1 / 3)).sum(1).mean()
    np.testing.assert_allclose(loop.cross_entropy(logits, labels, 0.1), expected, rtol=1e-6)
    np.testing.assert_allclose(
        loop.cross_entropy(logits, labels), -(log_p * target).sum(1).mean(), rtol=1e-6
    )


# --- evaluation ---


def test_evaluation_is_exact(net, variables, digits):
    logits = net.apply(variables, digits.normalize(digits.test_images))
    right = int((np.argmax(logits, axis=-1) == digits.test_labels).sum())
    for batch in (7, 50, 64):
        assert evaluate_test(net, variables, digits, batch=batch) == right / 50
    images = digits.normalize(digits.test_images)
    assert evaluate(net, variables, images, digits.test_labels, batch=16) == right / 50


def test_padding_never_counts(digits):
    """A network that always answers 0, which is what the padding's pixels are."""

    def apply_eval(variables, images):
        return jnp.zeros((images.shape[0], 10))

    labels = np.asarray([0, 1, 0], np.int32)
    images = digits.normalize(digits.test_images[:3])
    assert evaluate(None, {}, images, labels, batch=8, apply_eval=apply_eval) == 2 / 3


def test_evaluator_compiles_once(net, variables, digits):
    apply_eval = chex.assert_max_traces(apply.default_apply_eval(net), n=1)
    evaluator = Evaluator(net, digits.mean, digits.std, batch=16, apply_eval=apply_eval)
    for n in (50, 16, 3):
        evaluator(variables, digits.test_images[:n], digits.test_labels[:n])


def test_evaluation_errors(net, variables, digits):
    with pytest.raises(DataError, match="mean and std"):
        evaluate(net, variables, digits.test_images, digits.test_labels)
    with pytest.raises(DataError, match="0 images"):
        evaluate(net, variables, digits.test_images[:0], digits.test_labels[:0])
    with pytest.raises(DataError, match="49 labels"):
        evaluate(net, variables, digits.test_images, digits.test_labels[:-1])


# --- training ---


def assert_same(a, b):
    chex.assert_trees_all_equal_structs(a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def test_training_learns_and_traces_once(net, variables, digits):
    rows = []
    apply_train = chex.assert_max_traces(apply.default_apply_train(net), n=1)
    # Once for the check of the outputs' shape, once for the evaluation.
    apply_eval = chex.assert_max_traces(apply.default_apply_eval(net), n=2)
    before = jax.tree.map(np.array, variables)
    value = dataclasses.replace(QUICK, epochs=10)
    result = train(
        net,
        variables,
        digits,
        value,
        jax.random.key(1),
        rows.append,
        apply_train=apply_train,
        apply_eval=apply_eval,
    )
    assert tuple(rows) == result.history
    assert [row.epoch for row in rows] == list(range(1, 11))
    assert rows[-1].loss < 0.5 * rows[0].loss
    assert rows[-1].train_accuracy > 0.8
    assert result.test_accuracy == rows[-1].test_accuracy > 0.5
    assert result.test_accuracy == evaluate_test(net, result.variables, digits)
    assert all(row.seconds > 0 for row in rows)
    assert result.split_note == digits.split_note
    assert int(result.state.step) == 10 * (64 // 30)
    chex.assert_trees_all_equal_shapes_and_dtypes(result.variables, variables)
    assert_same(before, variables)  # the caller's arrays are neither changed nor donated


def test_a_resumed_run_is_bit_identical(net, variables, digits):
    through = train(net, variables, digits, QUICK, jax.random.key(2))

    first = Trainer(net, digits, QUICK)
    state, _ = first.run_epoch(first.start(variables, jax.random.key(2)))
    saved = jax.tree.map(np.asarray, state.replace(key=jax.random.key_data(state.key)))
    restored = jax.tree.map(jnp.asarray, saved)
    restored = restored.replace(key=jax.random.wrap_key_data(restored.key))

    second = Trainer(net, digits, QUICK)
    assert second.epoch(restored) == 1
    resumed = second.run(restored)
    assert_same(through.state, resumed.state)
    for a, b in zip(through.history[1:], resumed.history, strict=True):
        assert dataclasses.replace(a, seconds=0.0) == dataclasses.replace(b, seconds=0.0)
    with pytest.raises(DataError, match="3 of 3 epochs"):
        second.run(resumed.state)


def test_another_key_is_another_run(net, variables, digits):
    value = dataclasses.replace(QUICK, epochs=1)
    a, b, c = (train(net, variables, digits, value, jax.random.key(k)) for k in (0, 0, 1))
    assert_same(a.state.params, b.state.params)
    assert a.history[0].loss != c.history[0].loss


def test_old_style_keys_work(variables, net, digits):
    value = dataclasses.replace(QUICK, epochs=1)
    old = train(net, variables, digits, value, jax.random.PRNGKey(0))
    new = train(net, variables, digits, value, jax.random.key(0))
    assert_same(old.state.params, new.state.params)


def test_each_epoch_visits_each_image_once():
    orders = [
        np.asarray(loop._order(jax.random.key(0), np.int32(e), images=64, batch=30)) for e in (0, 1)
    ]
    assert all(order.shape == (2, 30) for order in orders)
    assert all(len(np.unique(order)) == 60 for order in orders)
    assert not np.array_equal(*orders)


def test_one_step_is_the_textbook_one(digits):
    """One minibatch without augmentation, against gradients written out by hand."""
    net, key = Plain(), jax.random.key(0)
    variables = net.init(key, jnp.zeros((1, 32, 32, 3)))
    value = Recipe(
        epochs=1,
        batch=64,
        weight_decay=0.01,
        schedule="constant",
        augmentation=data.NO_AUGMENTATION,
    )
    result = train(net, variables, digits, value, key)
    x = np.asarray(digits.normalize(digits.train_images), np.float64)[:, ::4, ::4].reshape(64, -1)
    dense = jax.tree.map(lambda w: np.asarray(w, np.float64), variables["params"]["Dense_0"])
    logits = x @ dense["kernel"] + dense["bias"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    error = (p - np.eye(10)[digits.train_labels]) / 64
    kernel = dense["kernel"] - 0.1 * (x.T @ error + 0.01 * dense["kernel"])
    bias = dense["bias"] - 0.1 * (error.sum(0) + 0.01 * dense["bias"])
    trained = result.variables["params"]["Dense_0"]
    np.testing.assert_allclose(trained["kernel"], kernel, atol=1e-5)
    np.testing.assert_allclose(trained["bias"], bias, atol=1e-5)
    loss = -np.log(p[np.arange(64), digits.train_labels]).mean()
    np.testing.assert_allclose(result.history[0].loss, loss, rtol=1e-5)
    assert set(result.variables) == {"params"}


def test_digits_are_not_flipped(net, digits):
    assert QUICK.augmentation.flip
    assert not Trainer(net, digits, QUICK).recipe.augmentation.flip
    flippable = dataclasses.replace(digits, flip_ok=True)
    assert Trainer(net, flippable, QUICK).recipe == QUICK


def test_constant_padding_is_black(digits):
    """Before normalisation, as the published pipelines pad."""
    seen = []

    def apply_train(variables, images, key):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), images)
        return images.mean((1, 2)) @ variables["params"]["w"], {}

    def apply_eval(variables, images):
        return apply_train(variables, images, None)[0]

    white = dataclasses.replace(digits, train_images=np.full_like(digits.train_images, 255))
    augmentation = data.Augmentation(pad=2, pad_mode="constant")
    value = Recipe(epochs=1, batch=32, augmentation=augmentation)
    variables = {"params": {"w": jnp.zeros((3, 10))}}
    train(
        None,
        variables,
        white,
        value,
        jax.random.key(0),
        apply_train=apply_train,
        apply_eval=apply_eval,
    )
    jax.effects_barrier()
    black, full = digits.normalize(np.asarray([0, 255], np.uint8).reshape(2, 1, 1, 1).repeat(3, 3))
    levels = np.unique(seen[0][..., 0])
    np.testing.assert_allclose(levels, [black[0, 0, 0], full[0, 0, 0]], rtol=1e-5)


def test_other_collections_stay(digits):
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            mask = self.variable("masks", "inputs", lambda: jnp.arange(64 * 3) % 2)
            x = x[:, ::4, ::4].reshape(x.shape[0], -1)
            return nn.Dense(10)(x * mask.value.astype(x.dtype)[None])

    net = Masked()
    variables = net.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), False)
    result = train(net, variables, digits, QUICK, jax.random.key(0))
    assert_same(result.variables["masks"], variables["masks"])


@pytest.mark.parametrize("keyword", ["train", "training", "deterministic", "use_running_average"])
def test_the_mode_is_passed_by_its_keyword(keyword):
    namespace = {}
    exec(f"def call(self, x, *, {keyword}): return {keyword}", namespace)
    net = type("Net", (), {"__call__": namespace["call"]})()
    normal = keyword in ("train", "training")
    assert apply.mode_of(net, True) == {keyword: normal}
    assert apply.mode_of(net, False) == {keyword: not normal}


def test_wrappers_are_asked_by_their_base():
    class Wrapper(nn.Module):
        base: nn.Module

        def __call__(self, *args, **kwargs):
            return self.base(*args, **kwargs)

    class Takes(nn.Module):
        def __call__(self, x, **kwargs):
            return x

    assert apply.mode_of(Wrapper(Plain()), True) == {}
    assert apply.mode_of(Wrapper(Small()), True) == {"train": True}
    assert apply.mode_of(Takes(), False) == {"train": False}


def test_a_rewritten_network_is_trained(net, digits):
    """In training mode: the statistics move, and dropout gets its key."""
    example = Example(jnp.zeros((1, 32, 32, 3)))
    wide = rewrite(net, Configure.of("Conv_0", features=6), example=example)
    assert isinstance(wide, Patched)
    assert apply.mode_of(wide, True) == {"train": True}
    assert apply.mode_of(wide, False) == {"train": False}
    variables = wide.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    result = train(wide, variables, digits, QUICK, jax.random.key(0))
    assert result.history[-1].loss < result.history[0].loss
    mean = result.variables["batch_stats"]["BatchNorm_0"]["mean"]
    assert mean.shape == (6,)
    assert np.abs(mean).max() > 0
    assert evaluate_test(wide, result.variables, digits) == result.test_accuracy


def test_an_objective_replaces_the_cross_entropy(digits):
    net = Plain()
    variables = net.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))

    def objective(variables, images, labels, key):
        logits = net.apply(variables, images)
        return jnp.mean(logits**2), (logits, {})

    value = dataclasses.replace(QUICK, learning_rate=0.002)
    result = train(net, variables, digits, value, jax.random.key(0), objective=objective)
    losses = [row.loss for row in result.history]
    assert losses == sorted(losses, reverse=True)


def test_training_errors(net, variables, digits):
    with pytest.raises(DataError, match="no minibatch of 128"):
        Trainer(net, digits, Recipe(epochs=1))
    five = Small(classes=5)
    wrong = five.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(DataError, match=r"\[1, 5\] instead of \[1, 10\]"):
        train(five, wrong, digits, QUICK, jax.random.key(0))
