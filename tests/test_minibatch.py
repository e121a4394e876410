"""Every way to a score refuses the same minibatches and losses, and sees a loss that is not finite."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from score_oracle import QUICK

from nnopt.core import Example
from nnopt.errors import ScoreError
from nnopt.scores import Fisher, GradNorm, Grasp, LayerFisher, Scorer, Snip, Zico
from nnopt.scores.fisher import FisherPotential, fisher_potential, mean_cross_entropy
from nnopt.scores.fisher_engine import FisherEngine
from nnopt.scores.minibatch import check_labels, guarded

BATCH, CLASSES = 4, 5
KEY = jax.random.key(5)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Conv(4, (3, 3), name="conv")(nn.relu(x))


class Net(nn.Module):
    masked: int | None = None

    @nn.compact
    def __call__(self, x, train=False):
        x = Block(name="block")(nn.Conv(4, (1, 1), name="stem")(x))
        x = nn.Dense(CLASSES, name="head")(x.mean((1, 2)))
        return x if self.masked is None else jnp.where(jnp.arange(CLASSES) == self.masked, -jnp.inf, x)  # fmt: skip


IMAGES = np.random.default_rng(0).normal(size=(BATCH, 4, 4, 3)).astype(np.float32)
LABELS = np.asarray([0, 4, 2, 2])
EXAMPLE = Example(IMAGES, train=True)
NET = Net()
VARIABLES = NET.init(jax.random.key(0), IMAGES)


@functools.cache
def potential(net, loss):
    return FisherPotential(net, EXAMPLE, loss=loss)


@functools.cache
def engine(net, loss):
    made = FisherEngine(net, EXAMPLE, loss=loss)
    assert made.engines
    return made


@functools.cache
def scorer(net, loss):
    return Scorer(net, EXAMPLE, [Fisher()], loss=loss, compiler_options=QUICK)


def by_function(images, labels, loss=mean_cross_entropy, net=NET):
    # Its example is the images themselves, so there is no shape that they could miss.
    return fisher_potential(net, VARIABLES, images, labels, loss=loss).total


def by_potential(images, labels, loss=mean_cross_entropy, net=NET):
    return potential(net, loss)(VARIABLES, images, labels).total


def by_engine(images, labels, loss=mean_cross_entropy, net=NET):
    return engine(net, loss)({}, images, labels, KEY).total


def by_stream(images, labels, loss=mean_cross_entropy, net=NET):
    ((score,),) = engine(net, loss).stream([{}], [(images, labels, KEY)], lanes=2)
    return score.total


def by_scorer(images, labels, loss=mean_cross_entropy, net=NET):
    return scorer(net, loss)(VARIABLES, images, labels)[Fisher()].total


WAYS = (by_function, by_potential, by_engine, by_stream, by_scorer)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1, 2, 5], "labels go from 0 to 5, and the network has 5 classes"),
        ([-100] * 4, "labels go from -100 to -100"),
        ([0, 1, 2], r"labels are int64\[3\]; give integer classes \[4\]"),
        ([0], r"labels are int64\[1\]"),
        ([0.0, 1.0, 2.0, 3.0], r"float64\[4\]"),
        (np.eye(4, 5), r"float64\[4,5\]"),
    ],
)
def test_labels_that_do_not_fit(way, labels, said):
    with pytest.raises(ScoreError, match=said) as caught:
        way(IMAGES, np.asarray(labels))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("count", [1, 3])
def test_images_that_do_not_fit(way, count):
    with pytest.raises(
        ScoreError, match=rf"images are float32\[{count},4,4,3\].* float32\[4,4,4,3\]"
    ):
        way(IMAGES[:count], LABELS[:count])


def test_the_engine_takes_one_dtype():
    run = engine(NET, mean_cross_entropy)
    with pytest.raises(ScoreError, match="images are float16"):
        run({}, IMAGES.astype(np.float16), LABELS, KEY)
    every = [run({}, IMAGES, LABELS.astype(t), KEY).total for t in (np.int32, np.int64, np.uint8)]
    assert every[0] > 0
    assert len(set(every)) == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda outputs, labels: (outputs**2).sum(-1), r"the loss returns float32\[4\], .* take the mean"),
        (lambda outputs, labels: (outputs.mean(), labels), r"float32\[\], int"),
        (lambda outputs, labels: labels.sum(), "no gradient"),
    ],
)  # fmt: skip
def test_a_loss_that_is_not_one_number(way, loss, said):
    with pytest.raises(ScoreError, match=said):
        way(IMAGES, LABELS, loss)


@pytest.mark.parametrize("way", WAYS)
def test_an_infinite_loss_of_finite_gradient(way):
    """The logit of a class masked by minus infinity: harmless where it is nobody's label."""
    masked = Net(masked=2)
    assert math.isnan(way(IMAGES, LABELS, net=masked))
    assert way(IMAGES, LABELS % 2, net=masked) > 0


def test_an_infinite_loss_in_every_pass_that_has_a_loss():
    scores = [Fisher(), LayerFisher(), GradNorm(), Snip(), Grasp(), Zico()]
    every = Scorer(Net(masked=2), EXAMPLE, scores, compiler_options=QUICK)
    values = every(VARIABLES, IMAGES, np.full(BATCH, 2))
    assert all(math.isnan(v.total) for v in values.values())
    assert all(v.finite for v in every(VARIABLES, IMAGES, np.full(BATCH, 1)).values())


def test_a_guarded_loss_is_the_loss_to_the_last_bit():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, CLASSES)), jnp.float32)
    labels = jnp.asarray(LABELS)
    losses = mean_cross_entropy, guarded(mean_cross_entropy)
    plain, seen = (jax.jit(jax.value_and_grad(loss))(logits, labels) for loss in losses)
    assert plain[0] == seen[0]
    np.testing.assert_array_equal(plain[1], seen[1])


def test_labels_under_tracing():
    """Shapes are checked, values are not there to be."""
    logits = jax.ShapeDtypeStruct((BATCH, CLASSES), jnp.float32)

    @jax.jit
    def checked(labels):
        check_labels(labels, BATCH, logits, mean_cross_entropy)
        return labels

    assert checked(np.full(BATCH, 99))[0] == 99
    with pytest.raises(ScoreError, match=r"int32\[3\]"):
        checked(np.zeros(3, np.int32))


def test_labels_of_another_loss():
    def soft(outputs, targets):
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(outputs) * targets, -1))

    targets = np.eye(CLASSES, dtype=np.float32)[LABELS]
    assert by_potential(IMAGES, targets, soft) == pytest.approx(by_potential(IMAGES, LABELS), rel=1e-5)  # fmt: skip
    assert by_scorer(IMAGES, targets, soft) == pytest.approx(by_scorer(IMAGES, LABELS), rel=1e-5)
    logits = jax.ShapeDtypeStruct((BATCH, CLASSES), jnp.float32)
    check_labels({"soft": targets, "weights": np.ones(BATCH)}, BATCH, logits, soft)
    for few in (targets[:3], {"soft": targets, "weights": np.ones(3)}, 1.0):
        with pytest.raises(ScoreError, match="one for each image"):
            check_labels(few, BATCH, logits, soft)
    with pytest.raises(ScoreError, match="one for each image"):
        by_potential(IMAGES, targets[:3], soft)

    def doubled(outputs, labels):  # the engine's programs take integer classes, whatever the loss
        return 2 * mean_cross_entropy(outputs, labels)

    with pytest.raises(ScoreError, match="give integer classes"):
        by_engine(IMAGES, targets, doubled)
