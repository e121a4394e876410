"""Convolutions of whole networks, mutated by programs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign_networks import CASES

from nnopt.core import Example, carry, diff, from_record, rewrite, sites, to_record
from nnopt.costs import macs, parameters
from nnopt.errors import RewriteError
from nnopt.nests import Bottleneck, Group, Program, Slabs, Split, StripMine, Untie, Widen
from nnopt.nests.canonical import canonical, weights
from nnopt.networks import WideResNet
from nnopt.rewrites import LowerGroupedConvs, MutateConv
from nnopt.rewrites.operation import operator_at

IMAGES = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
NET = WideResNet(10, 1.0)
HALF = Program((Group("co", "ci", 2),))


def test_a_mutated_network():
    where = "stage2*/conv2"
    small = rewrite(NET, MutateConv(where, HALF), example=IMAGES)
    (site,) = [s for s in sites(NET, IMAGES) if "/".join(s.path) == "stage2_block0/conv2"]
    before, after = operator_at(site), operator_at(site, HALF)
    saved = weights(canonical(before)) - weights(canonical(after))
    assert parameters(NET, IMAGES) - parameters(small, IMAGES) == saved > 0
    assert macs(NET, IMAGES[:1]) - macs(small, IMAGES[:1]) == before.domain_size - after.domain_size
    assert "ProgramConv" in str(diff(NET, small, IMAGES))
    y = small.apply(small.init(jax.random.key(1), IMAGES), IMAGES)
    assert y.shape == (2, 10)
    again = from_record(to_record(small))
    assert parameters(again, IMAGES) == parameters(small, IMAGES)
    # Every other rewrite applies to what comes out.
    lowered = rewrite(small, LowerGroupedConvs("**"), example=IMAGES)
    assert lowered is small


def test_weights_are_carried_into_a_network():
    variables = NET.init(jax.random.key(1), IMAGES)
    keeping = Program((StripMine("co", 8), Split("oh", (3,)), Widen("kh", 5), Untie()))
    same = rewrite(NET, MutateConv("*/conv*", keeping), example=IMAGES)
    found, report = carry(NET, same, variables, example=IMAGES, key=jax.random.key(2))
    assert not report.fresh
    np.testing.assert_allclose(same.apply(found, IMAGES), NET.apply(variables, IMAGES), atol=2e-5)


@pytest.mark.parametrize("name", sorted(CASES))
def test_foreign_networks(name):
    """Whatever convolutions and dense layers somebody's network has: all that can be are mutated, and it runs."""
    case = CASES[name]
    example = Example.of(Example(*case.inputs, **case.eval))
    rules = []
    for site in sites(case.net, example):
        for program in (HALF, Program((Bottleneck("ci", 2),)), Program((Bottleneck("co", 2),))):
            try:
                operator_at(site, program)
            except RewriteError:
                continue
            rules.append(MutateConv("/".join(site.path), program))
            break
    assert rules
    small = rewrite(case.net, *rules, example=example)
    assert parameters(small, example) < parameters(case.net, example)
    key = jax.random.key(0)
    before, after = (
        jax.eval_shape(
            lambda net=net: net.init_with_output(
                {"params": key, "dropout": key}, *case.arrays(), **case.eval
            )[0]
        )
        for net in (case.net, small)
    )
    assert before == after


def test_layers_stacked_by_scan():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.relu(nn.Conv(4, (3, 3), name="conv")(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return layers(name="blocks")(x, None)[0]

    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
    variables = Stack().init(jax.random.key(1), x)
    wide = rewrite(Stack(), MutateConv("blocks/conv", Program((Widen("kw", 5),))), example=x)
    found, report = carry(Stack(), wide, variables, example=x, key=jax.random.key(2))
    assert not report.fresh
    np.testing.assert_allclose(wide.apply(found, x), Stack().apply(variables, x), atol=1e-5)


@pytest.mark.parametrize(
    ("where", "program", "message"),
    [
        (
            "stem",
            Program((Group("co", "ci", 2),)),
            "at 'stem': step 1 of 1, Group('co', 'ci', 2): group count 2 does not divide the 3 of ci",
        ),
        (
            "stage1_block0/norm1",
            HALF,
            "BatchNorm at 'stage1_block0/norm1' is no nn.Conv or nn.Dense",
        ),
        (
            "stage3_block0/conv2",
            Program((Slabs("oh", 8),)),
            "slab count 8 does not divide the 4 of oh",
        ),
    ],
)
def test_bad_mutations(where, program, message):
    with pytest.raises(RewriteError) as error:
        rewrite(NET, MutateConv(where, program), example=IMAGES)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_layer_shared_by_two_shapes():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            conv = nn.Conv(4, (3, 3), name="conv")
            return conv(x).mean() + conv(x[:, ::2, ::2]).mean()

    x = jnp.ones((1, 8, 8, 4))
    with pytest.raises(RewriteError, match="shared by images of shapes"):
        rewrite(Shared(), MutateConv("conv", HALF), example=x)
