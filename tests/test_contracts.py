"""One table of rewrites on networks, one test for each contract that every rewrite keeps."""

import dataclasses
import functools
import json
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from foreign_networks import CASES, Case

from nnopt.core import (
    All,
    At,
    Example,
    Glob,
    Keeps,
    Of,
    Patched,
    Rewrite,
    base_of,
    carry,
    fingerprint,
    from_record,
    history,
    replay,
    rewrite,
    sites,
    to_record,
)
from nnopt.layers import TAPS, Identity
from nnopt.nests import Bottleneck, Group, Program, Split, Untie
from nnopt.rewrites import (
    AddGate,
    AddTap,
    Configure,
    FoldBatchNorm,
    Genotype,
    LowerGroupedConvs,
    MutateConv,
    Replace,
    ReplaceBlock,
    choice,
)


@dataclasses.dataclass(frozen=True)
class Itself(Rewrite):
    """Every site's own module."""

    keeps = Keeps.FUNCTION

    def __call__(self, sites):
        return {site.path: site.module for site in sites}


@dataclasses.dataclass(frozen=True)
class Nothing(Rewrite):
    """No edits."""

    def __call__(self, sites):
        return {}


TABLE: dict[str, tuple[str, Rewrite]] = {
    "identity": ("partial_resnet", Itself()),
    "identity, setup": ("codec", Itself()),
    "identity, scan": ("scanned_remat", Itself()),
    "tap": ("norm_dropout", AddTap("norm")),
    "tap, shared": ("shared_twice", AddTap("layer")),
    "tap, tied": ("tied_direct", AddTap("embed")),
    "tap, lent": ("passed_around", AddTap("shared")),
    "tap, list": ("setup", AddTap(Glob("layers_*"))),
    "tap, method": ("codec", AddTap("inner/down")),
    "tap, vmap": ("ensemble", AddTap("head")),
    "gate": ("norm_dropout", AddGate("drop")),
    "gate, attention": ("transformer", AddGate("layer0/MultiHeadDotProductAttention_0")),
    "gate, scan": ("scanned", AddGate("layers/mlp/hidden")),
    "gate, remat": ("remat_class", AddGate(Glob("layer?/hidden"))),
    "gate, flag in a field": ("train_field", AddGate(Glob("block?"))),
    "gate, everywhere": ("compact", AddGate(Of(nn.Conv) | Of(nn.Dense))),
    "configure width": ("norm_dropout", Configure.of("conv", features=12)),
    "configure window": ("norm_dropout", Configure.of("conv", kernel_size=(5, 5))),
    "configure momentum": ("norm_dropout", Configure.of("norm", momentum=0.5)),
    "configure in scan": ("scanned", Configure.of("layers/mlp/hidden", features=20)),
    "configure in vmap": ("ensemble", Configure.of("members/hidden", features=5)),
    "configure inline": ("inline_sequential", Configure.of("Dense_0", features=10)),
    "configure a subclass": ("conv_subclass", Configure.of("grouped", feature_group_count=4)),
    "configure the network": ("setup", Configure.of(".", depth=2)),
    "configure u-net": ("u_net", Configure.of("middle", features=6)),
    "replace": ("squeeze_excite", Replace("se", Identity(parent=None))),
    "replace a field": ("owned_field", Replace("backbone", nn.Dense(7, parent=None))),
    "gate, nested fields": ("nested_fields", AddGate("after_0")),
    "gate, deep in fields": ("nested_fields", AddGate(At(("base/backbone", "after_0")))),
    "replace a cell": ("recurrent", Replace("head", nn.Dense(3, use_bias=False, parent=None))),
    "block S": ("residual_positional", ReplaceBlock(Glob("block*"), choice("S"))),
    "block G(4)": ("residual_keyword", ReplaceBlock(Glob("block*"), choice("G(4)"))),
    "block B(2)": ("residual_field", ReplaceBlock(Glob("block*"), choice("B(2)"))),
    "block BG(2,M/2)": ("partial_resnet", ReplaceBlock("PartialBlock_1", choice("BG(2,M/2)"))),
    "genotype": ("residual_deterministic", Genotype((choice("G(N)"), None))),
    "lower": ("compact", LowerGroupedConvs(All())),
    "fold": ("partial_resnet", FoldBatchNorm()),
    "fold, multiplied": ("residual_field", FoldBatchNorm()),
    "mutate": (
        "residual_keyword",
        MutateConv(Glob("block*/branch/conv"), Program((Group("co", "ci", 4),))),
    ),
    "mutate in scan": ("scanned", MutateConv("layers/mlp/hidden", Program((Bottleneck("co", 2),)))),
    "mutate in vmap": (
        "ensemble",
        MutateConv("members/hidden", Program((Split("co", (2,)), Untie()))),
    ),
}
ROWS = pytest.mark.parametrize("row", TABLE)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table, applied."""

    case: Case
    rule: Rewrite
    new: nn.Module
    example: Example


@functools.cache
def applied(name: str) -> Row:
    network, rule = TABLE[name]
    case = CASES[network]
    example = Example(*case.inputs, **case.eval)
    return Row(case, rule, rewrite(case.net, rule, example=example), example)


def compiled(function):
    """Runs once or twice: compile time is all there is to save."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def specs_of(net: nn.Module, example: Example):
    return jax.eval_shape(functools.partial(example.init, net), jax.random.key(0))


def values_like(specs):
    """Positive random values, so that they may stand for variances as well: no compilation."""
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.1, 0.4, s.shape), s.dtype), specs)


def outputs(net: nn.Module, case: Case, variables, train: bool):
    rngs = {"dropout": jax.random.key(1)}
    flags = case.train if train else case.eval

    def run(variables, *args):
        return net.apply(variables, *args, **flags, rngs=rngs, mutable=["batch_stats"])

    return compiled(run)(variables, *case.arrays())


@ROWS
def test_keeps_what_it_says(row):
    made = applied(row)
    if made.rule.keeps is Keeps.FUNCTION:
        old = values_like(specs_of(made.case.net, made.example))
        key = jax.random.key(9)
        new, report = carry(made.case.net, made.new, old, example=made.example, key=key)
        assert not [name for name in report.fresh if not name.startswith(TAPS)]
        infers = isinstance(made.rule, FoldBatchNorm)  # the others also keep what training computes
        if not infers:
            assert not report.dropped
        for train in {False, bool(made.case.train) and not infers}:
            before = outputs(made.case.net, made.case, old, train)
            after = outputs(made.new, made.case, new, train)
            if infers:
                before, after = before[0], after[0]
            chex.assert_trees_all_close(
                before,
                after,
                rtol=1e-5,
                atol=1e-5,
            )
        return
    for flags in (made.case.eval, made.case.train):
        example = Example(*made.case.inputs, **flags)
        old, new = sites(made.case.net, example), sites(made.new, example)
        chex.assert_trees_all_equal_shapes_and_dtypes(old.outputs, new.outputs)


@pytest.mark.parametrize(
    "row",
    [
        "identity, setup",
        "tap",
        "tap, lent",
        "tap, list",
        "gate, scan",
        "configure width",
        "configure in scan",
        "configure in vmap",
        "replace",
        "replace a field",
        "replace a cell",
        "block B(2)",
        "lower",
    ],
)
def test_what_it_does_not_touch_keeps_its_values(row):
    made = applied(row)
    key = jax.random.key(5, impl="unsafe_rbg")  # compiles fast
    old, new = (
        flatten_dict(compiled(functools.partial(made.example.init, net))(key))
        for net in (made.case.net, made.new)
    )
    edited = history(made.new)[0].paths
    if made.rule.keeps is Keeps.FUNCTION:
        edited = ()
    untouched = [n for n in old if not any(n[1 : 1 + len(p)] == p for p in edited)]
    # What stands behind an edit may take more or fewer channels.
    untouched = [n for n in untouched if old[n].shape == new[n].shape]
    assert untouched
    for name in untouched:
        np.testing.assert_array_equal(old[name], new[name], err_msg="/".join(name))


@ROWS
def test_no_second_trace_for_an_equal_network(row):
    made = applied(row)
    copy = pickle.loads(pickle.dumps(made.new))
    chex.clear_trace_counter()

    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(1)
    def run(net, variables, *args):
        return net.apply(variables, *args, **made.case.eval)

    variables = specs_of(made.new, made.example)
    for net in (made.new, made.new, copy):
        run.lower(net, variables, *made.case.inputs)


@ROWS
def test_pickles(row):
    made = applied(row)
    copy = pickle.loads(pickle.dumps(made.new))
    assert copy == made.new
    assert hash(copy) == hash(made.new)
    assert copy != made.case.net
    assert fingerprint(copy) == fingerprint(made.new)
    assert [s.rule for s in history(copy)] == [s.rule for s in history(made.new)]
    assert pickle.loads(pickle.dumps(made.rule)) == made.rule
    assert hash(made.rule) == hash(pickle.loads(pickle.dumps(made.rule)))


@ROWS
def test_record_round_trips_through_text(row):
    made = applied(row)
    text = json.dumps(to_record(made.new))
    again = from_record(json.loads(text))
    assert again == made.new
    assert fingerprint(again) == fingerprint(made.new)
    assert json.dumps(to_record(again)) == text


@ROWS
def test_replays(row):
    made = applied(row)
    again = replay(base_of(made.new), history(made.new))
    assert again == made.new
    assert base_of(again) is made.case.net
    assert history(again) == history(made.new)


@ROWS
def test_two_rules_at_once_or_one_after_another(row):
    made = applied(row)
    root = AddTap(At("."))
    at_once = rewrite(made.case.net, made.rule, root, example=made.example)
    in_turn = rewrite(made.new, root, example=made.example)
    assert at_once == in_turn
    assert at_once != made.new
    assert [s.fingerprint for s in history(at_once)] == [s.fingerprint for s in history(in_turn)]
    assert isinstance(at_once, Patched)
    assert base_of(at_once) is made.case.net


@ROWS
def test_differentiates_under_jit(row):
    made = applied(row)
    variables = specs_of(made.new, made.example)
    rest = {k: v for k, v in variables.items() if k != "params"}

    def loss(params, rest, *args):
        leaves = jax.tree.leaves(
            made.new.apply({"params": params, **rest}, *args, **made.case.eval)
        )
        return sum((leaf**2).mean() for leaf in leaves)

    run = jax.jit(jax.value_and_grad(loss))
    _, gradient = jax.eval_shape(run, variables["params"], rest, *made.case.inputs)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, variables["params"])
    if row in ("gate, scan", "configure in vmap", "lower", "block BG(2,M/2)"):
        variables = values_like(variables)
        rest = {k: v for k, v in variables.items() if k != "params"}
        _, gradient = compiled(run)(variables["params"], rest, *made.case.arrays())
        chex.assert_tree_all_finite(gradient)
        assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("network", CASES)
def test_no_edits_return_the_same_object(network):
    case = CASES[network]
    example = Example(*case.inputs, **case.eval)
    assert rewrite(case.net, Nothing(), example=example) is case.net
    assert rewrite(case.net, example=example) is case.net
    tapped = rewrite(case.net, AddTap("."), example=example)
    assert rewrite(tapped, Nothing(), example=example) is tapped


def test_strict_promotion_is_on():
    """The settings that all tests here run under; see conftest."""
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    assert jax.config.jax_numpy_rank_promotion == "raise"
