"""A rule that puts every module where it already stands changes nothing: same programs, same initial weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from foreign_networks import CASES, JITTED, VECTOR, Case

from nnopt.core import Example, Patched, Rewrite, base_of, fingerprint, rewrite, sites
from nnopt.errors import UnsupportedNetworkError
from nnopt.networks import NAMES, named


@dataclasses.dataclass(frozen=True)
class Itself(Rewrite):
    """Every site's own module, the network itself included."""

    def __call__(self, sites):
        return {site.path: site.module for site in sites}


def example_of(case: Case) -> Example:
    return Example(*case.inputs, **case.eval)


def program(net: nn.Module, case: Case) -> str:
    """StableHLO of init, inference and one training step's forward pass, in one module."""

    def run(key, variables, *args):
        keys = {"params": key, "dropout": key}
        made = net.init(keys, *args, **case.eval)
        rngs = {"dropout": key}
        inferred = net.apply(variables, *args, **case.eval)
        trained = net.apply(variables, *args, **case.train, rngs=rngs, mutable=["batch_stats"])
        return made, inferred, trained

    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(
        lambda k, *a: net.init({"params": k, "dropout": k}, *a, **case.eval), key, *case.inputs
    )
    return jax.jit(run).lower(key, variables, *case.inputs).as_text()


def check_identity(case: Case) -> None:
    new = rewrite(case.net, Itself(), example=example_of(case))
    assert isinstance(new, Patched)
    assert len(new.patch) == len(sites(case.net, example_of(case)))
    assert program(new, case) == program(case.net, case)


@pytest.mark.parametrize("name", CASES)
def test_foreign_network_gives_the_same_program(name):
    check_identity(CASES[name])


@pytest.mark.parametrize("name", NAMES)
def test_reference_network_gives_the_same_program(name):
    size = 64 if name.endswith("-imagenet") else 32
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    check_identity(Case(named(name), (image,), {"train": True}))


def test_networks_differ_in_their_programs():
    """The comparison above can fail: another width or another mode is another program."""
    case = CASES["norm_dropout"]
    assert program(case.net, case) != program(case.net, dataclasses.replace(case, train={}))
    twice = Case(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(5)]), CASES["sequential"].inputs)
    assert program(twice.net, twice) != program(CASES["sequential"].net, CASES["sequential"])


@pytest.mark.parametrize("name", ["norm_dropout", "scanned", "passed_around", "ensemble"])
def test_initial_weights_are_the_same_bits(name):
    case = CASES[name]
    new = rewrite(case.net, Itself(), example=example_of(case))
    key = jax.random.key(3, impl="unsafe_rbg")  # compiles fast
    old_values, new_values = (
        jax.jit(example_of(case).init, static_argnums=0)(net, key) for net in (case.net, new)
    )
    assert jax.tree.structure(old_values) == jax.tree.structure(new_values)
    jax.tree.map(np.testing.assert_array_equal, old_values, new_values)


@pytest.mark.parametrize("name", ["norm_dropout", "residual_field", "recurrent", "passed_around"])
def test_identity_twice_is_still_the_identity(name):
    case = CASES[name]
    once = rewrite(case.net, Itself(), example=example_of(case))
    twice = rewrite(once, Itself(), example=Example(*case.inputs, **case.train))
    assert base_of(twice) is case.net
    assert program(twice, case) == program(case.net, case)


def test_fingerprint_counts_the_patch():
    case = CASES["setup"]
    new = rewrite(case.net, Itself(), example=example_of(case))
    assert fingerprint(new) != fingerprint(case.net)


@pytest.mark.parametrize("name", JITTED)
@pytest.mark.parametrize("run_before", [False, True])
def test_jit_inside_is_refused(name, run_before):
    net = JITTED[name]
    if run_before:  # Flax then holds traces, and does not enter the jitted method again
        net.init(jax.random.key(0), jnp.zeros(VECTOR.shape))
    with pytest.raises(UnsupportedNetworkError, match=r"nn\.jit.*stale traces.*remove nn\.jit"):
        sites(net, VECTOR)
    with pytest.raises(UnsupportedNetworkError, match="would ignore a rewrite"):
        rewrite(net, Itself(), example=VECTOR)
