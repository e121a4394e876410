import dataclasses
import gc
import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnopt.core import Example, ResidualBlocks, fingerprint, rewrite, select, sites
from nnopt.core.example import rngs
from nnopt.core.rewrite import rewrite_traced
from nnopt.errors import SelectionError, UnsupportedNetworkError
from nnopt.layers import Conv
from nnopt.networks import WideResNet, named
from nnopt.rewrites import CODE_CHOICES, Genotype, choice
from nnopt.rewrites.block import block_for
from nnopt.rewrites.structural import Configure
from nnopt.scores.chain import Chain
from nnopt.scores.engine import Engine, Stand
from nnopt.scores.fisher import FisherPotential, mean_cross_entropy
from nnopt.scores.fisher_engine import FisherEngine
from nnopt.scores.looks import LookForFisherPotential
from nnopt.scores.programs import ProgramCache
from nnopt.scores.units import Initialiser
from nnopt.search.sampler import BudgetSampler
from nnopt.search.space import block_space

KEY = jax.random.key(11)


def batch_of(size=4, side=8, dtype=jnp.float32):
    """Images and labels."""
    images = jax.random.normal(jax.random.key(1), (size, side, side, 3), dtype)
    return images, jnp.arange(size, dtype=jnp.int32) % 10


def engine_for(net, images, **options):
    example = Example(images, train=True)
    return Engine(net, example, LookForFisherPotential(), loss=mean_cross_entropy, **options)


def plainly(net, edits, images, labels, key=KEY):
    """Fisher potential of the whole network, compiled as one program, its convolutions as XLA has them."""
    example = Example(images, train=True)
    whole = rewrite_traced(sites(net, example), Stand(tuple(edits.items()))) if edits else net
    # The same draws to the last bit, which are those of `init` but for rounding (tested below).
    initialise = Initialiser(whole, example, ())
    leaves = initialise(key, ProgramCache(), ())
    variables = jax.tree.unflatten(jax.tree.structure(initialise.variables), leaves)
    native = Conv.conv_general_dilated
    Conv.conv_general_dilated = None
    try:
        options = {"xla_backend_optimization_level": 0}
        score = FisherPotential(whole, example, compiler_options=options)
        return score(variables, images, labels)
    finally:
        Conv.conv_general_dilated = native


def modules_of(net, images, choices=CODE_CHOICES):
    """Path of each block -> modules of each choice that is possible there."""
    space = block_space(net, images[:1], choices)
    traced = sites(net, images[:1])
    return {
        path: [block_for(traced[path], traced, c) for c in here]
        for path, here in zip(space.paths, space.choices, strict=True)
    }


def assert_same(found, wanted, tolerance):
    assert list(found.blocks) == list(wanted.blocks)
    for block, channels in wanted.channels.items():
        np.testing.assert_allclose(found.blocks[block], wanted.blocks[block], rtol=tolerance)
        # Single channels may cancel to nothing: they are held to the size of the block.
        scale = np.abs(channels).max()
        np.testing.assert_allclose(found.channels[block], channels, rtol=tolerance, atol=tolerance * scale)


# --- the engine computes what a whole network computes ---


def test_every_choice_at_every_position_in_double_precision():
    net = WideResNet(10, 1.0)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        images, labels = batch_of(dtype=jnp.float64)
        modules = modules_of(net, images)
        engine = engine_for(net, images)
        for number in range(max(map(len, modules.values()))):
            # Each block takes another choice, so that neighbours differ.
            edits = {p: m[(number + 7 * i) % len(m)] for i, (p, m) in enumerate(modules.items())}
            found = engine.score(engine.candidate(edits), images, labels, KEY)
            assert_same(found, plainly(net, edits, images, labels), 1e-9)
    assert engine.statistics.units == len({fingerprint(m) for ms in modules.values() for m in ms})


@pytest.mark.parametrize("name", ["wrn-16-1", "resnet-18", "preact-resnet-18", "resnext-29-2x64d", "mobilenet-v2"])
def test_reference_networks(name):
    net = named(name, 10)
    images, labels = batch_of(side=16)
    engine = engine_for(net, images)
    found = engine.score(engine.candidate(), images, labels, KEY)
    assert_same(found, plainly(net, {}, images, labels), 1e-2)


def test_weights_are_those_of_init():
    for name in ("wrn-10-1", "densenet-bc-100-12", "mobilenet-v2"):
        net, example = named(name, 10), Example(batch_of(2)[0], train=True)
        initialise = Initialiser(net, example, ())
        found = initialise(KEY, ProgramCache(), ())
        wanted = jax.tree.leaves(net.lazy_init(rngs(KEY), *example.args, **example.kwargs))
        for a, b in zip(found, wanted, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7)
