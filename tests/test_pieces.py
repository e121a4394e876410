"""Functions in small shared programs: scores are those of one program, and a second network compiles next to nothing."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnopt.core import Example
from nnopt.scores import Fisher, GradNorm, Grasp, Naswot, Scorer, Zen
from nnopt.scores.pieces import InPieces
from nnopt.scores.programs import ProgramCache


class Branch(nn.Module):
    """A residual block of `depth` convolutions; without any it doubles its input."""

    depth: int

    @nn.compact
    def __call__(self, x, train):
        y = x
        for i in range(self.depth):
            y = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"norm{i}")(y))
            y = nn.Conv(4, (3, 3), name=f"conv{i}")(y)
        return x + y


class Tiny(nn.Module):
    """A residual block between a stem and a head."""

    depth: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        x = nn.relu(Branch(self.depth, name="block")(x, train))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def tiny_batch():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(6, 8, 8, 3)), jnp.float32)
    return images, jnp.asarray([0, 1, 2, 2, 1, 0])


def test_scores_in_pieces_are_those_of_one_program():
    images, labels = tiny_batch()
    example = Example(images, train=True)
    net = Tiny(2)
    variables = example.init(net, jax.random.key(1))
    scores = (GradNorm(), Fisher(), Grasp(), Naswot(), Zen())
    whole = Scorer(net, example, scores)(variables, images, labels)
    cut = Scorer(net, example, scores, programs=ProgramCache())(variables, images, labels)
    assert list(cut) == list(whole)
    for score, value in whole.items():
        assert value.finite
        assert cut[score].total == pytest.approx(value.total, rel=1e-3), score
        assert cut[score].sites == pytest.approx(value.sites, rel=1e-2, abs=1e-6), score


def test_pieces_are_shared_between_networks():
    images, labels = tiny_batch()
    example = Example(images, train=True)
    programs = ProgramCache()

    def score(depth):
        net = Tiny(depth)
        scorer = Scorer(net, example, (GradNorm(),), programs=programs)
        scorer(example.init(net, jax.random.key(1)), images, labels)
        return programs.statistics.programs

    first = score(2)
    assert 4 < first < 40
    # A second network of the same shape needs no program, a deeper one only another last sum over its kernels.
    assert score(2) == first
    assert score(4) <= first + 3


def test_a_function_is_traced_once_for_each_shape_of_its_arguments():
    @chex.assert_max_traces(n=2)
    def multiply_and_add(a, b):
        return {"product": jnp.tanh(a @ b["matrix"]), "same": a, "number": 3.0}

    run = InPieces(multiply_and_add, ProgramCache())
    for size in (2, 3, 2, 3):
        a, matrix = jnp.ones((size, 4)), jnp.full((4, 4), 0.1)
        found = run(a, {"matrix": matrix})
        np.testing.assert_allclose(found["product"], np.tanh(np.asarray(a @ matrix)), rtol=1e-6)
        np.testing.assert_array_equal(found["same"], a)
        assert found["number"] == 3.0
