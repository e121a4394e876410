"""Rewriting, selecting and carrying: what comes out, and the errors."""

import dataclasses
import pickle
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from foreign_networks import CASES, IMAGE, VECTOR, Compact, Mlp, Scanned, Setup

from nnopt.core import (
    At,
    Exactly,
    Example,
    Glob,
    Keeps,
    Leaves,
    Of,
    Patched,
    Rewrite,
    Under,
    base_of,
    carry,
    history,
    rewrite,
    select,
    sites,
)
from nnopt.errors import CarryError, RewriteError, SelectionError, UnsupportedNetworkError
from nnopt.layers import GATES, TAPS, Gate, Identity, Then
from nnopt.rewrites import AddGate, AddTap, Configure, Replace

NET = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(4)])


@dataclasses.dataclass(frozen=True)
class Edit(Rewrite):
    """Any edits, given as pairs of path text and module."""

    pairs: tuple[tuple[str, nn.Module], ...]

    def __call__(self, sites):
        return {tuple(path.split("/")) if path != "." else (): m for path, m in self.pairs}


@dataclasses.dataclass(frozen=True)
class Widen(Rewrite):
    """A dense layer and the one behind it, wider: new units are never listened to, so the function is kept."""

    keeps: ClassVar[Keeps] = Keeps.FUNCTION
    first: str
    second: str
    features: int

    def __call__(self, sites):
        module, behind = sites[self.first], sites[self.second]
        return {
            module.path: module.module.clone(features=self.features),
            behind.path: behind.module,
        }

    def carry(self, path, old, new):
        def padded(name):
            have, spec = old[name], new[name]
            pads = [(0, want - got) for got, want in zip(have.shape, spec.shape, strict=True)]
            return jnp.pad(have, pads) if any(p for _, p in pads) else have

        return {name: padded(name) for name in old}


def init(net, example=VECTOR):
    return Example.of(example).init(net, jax.random.key(0))


def test_paths_and_values_of_the_sites():
    found = sites(CASES["norm_dropout"].net, IMAGE)
    assert [s.path for s in found] == [(), ("conv",), ("norm",), ("drop",), ("head",)]
    assert found["norm"].module.use_running_average is True
    assert found["conv"].outputs.shape == (2, 8, 8, 8)
    assert found["conv"].inputs[0].shape == (2, 8, 8, 3)
    assert found["conv"].parameters == 3 * 3 * 3 * 8
    assert set(found["norm"].variables) == {"params", "batch_stats"}


@pytest.mark.parametrize(
    ("network", "path", "lifted"),
    [
        ("scanned", "layers/mlp/hidden", ("scan",)),
        ("scanned_remat", "layers/mlp/hidden", ("scan", "remat")),
        ("remat_class", "layer0/hidden", ("remat",)),
        ("ensemble", "members/out", ("vmap",)),
        ("setup", "layers_0", ()),
    ],
)
def test_lifting_is_noted(network, path, lifted):
    case = CASES[network]
    site = sites(case.net, case.inputs[0])[path]
    assert site.lifted == lifted


def test_calls_of_a_shared_module_are_counted():
    found = sites(CASES["shared_twice"].net, VECTOR)
    assert len(found["layer"].calls) == 2
    lent = sites(CASES["passed_around"].net, VECTOR)
    assert len(lent["shared"].calls) == 2
    assert len(lent["first"].calls) == 1
    inner = sites(CASES["codec"].net, VECTOR)["inner"]
    assert [c.method for c in inner.calls] == ["encode", "decode"]


def test_a_network_that_cannot_be_called_says_so():
    with pytest.raises(UnsupportedNetworkError, match="cannot be called with"):
        sites(Compact(), Example(IMAGE, nonsense=1))


@pytest.mark.parametrize(
    ("where", "paths"),
    [
        ("conv", ["conv"]),
        (At(("head", "conv")), ["conv", "head"]),
        ("*o*", ["conv", "norm", "drop"]),
        (Glob("**"), [".", "conv", "norm", "drop", "head"]),
        (Of(nn.BatchNorm), ["norm"]),
        (~Of(nn.BatchNorm) & Leaves(), ["conv", "drop", "head"]),
        (Of(nn.Conv) | "head", ["conv", "head"]),
        (Under("."), ["conv", "norm", "drop", "head"]),
        (Exactly(Leaves(), 4), ["conv", "norm", "drop", "head"]),
    ],
)
def test_selectors(where, paths):
    found = select(sites(CASES["norm_dropout"].net, IMAGE), where)
    assert ["/".join(p) or "." for p in found.paths] == paths


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("cnov", "no module at 'cnov' in NormDropout: did you mean 'conv'"),
        (Glob("haed*"), "no module matches 'haed\\*' in NormDropout"),
        (Under("nrom"), "did you mean 'norm'"),
        (Exactly(Leaves(), 3), "holds 4 sites of NormDropout .*expected 3"),
        (7, "7 selects nothing"),
    ],
)
def test_selectors_that_find_nothing(where, message):
    with pytest.raises(SelectionError, match=message):
        select(sites(CASES["norm_dropout"].net, IMAGE), where)


@pytest.mark.parametrize(
    ("edits", "error", "message"),
    [
        ([("layer_0", Identity(parent=None))], SelectionError, "did you mean 'layers_0'"),
        ([("layers_2", nn.Dense(5, parent=None))], RewriteError, r"'layers_2' now returns .*2,5"),
        ([("layers_0", nn.LayerNorm)], RewriteError, "expected an unbound linen module"),
        ([("layers_0", Mlp(parent=None)), (".", nn.Dense(4, parent=None))], RewriteError, "never"),
        ([("layers_0", Compact(parent=None))], RewriteError, "'layers_0.*' raises"),
    ],
)
def test_edits_that_do_not_fit(edits, error, message):
    with pytest.raises(error, match=message) as caught:
        rewrite(NET, Edit(tuple(edits)), example=VECTOR)
    assert "\n" not in str(caught.value)


def test_a_shape_that_breaks_the_network_names_the_guilty_site():
    net = CASES["u_net"].net
    with pytest.raises(RewriteError, match=r"'down' now returns float32\[2,4,4,4\] instead of"):
        rewrite(net, Configure.of("down", strides=2), example=IMAGE)


def test_a_bound_module_is_refused():
    bound = nn.Dense(8).bind(init(nn.Dense(8)))
    with pytest.raises(RewriteError, match="expected an unbound linen module"):
        rewrite(NET, Edit((("layers_0", bound),)), example=VECTOR)


def test_an_unknown_field_is_refused():
    with pytest.raises(RewriteError, match="Dense at 'layers_0' has no field 'filters'; it has"):
        rewrite(NET, Configure.of("layers_0", filters=3), example=VECTOR)


def test_a_method_the_stand_in_lacks_is_named():
    case = CASES["tied_attend"]
    with pytest.raises(RewriteError, match=r"Then cannot stand at 'embed': .*method 'attend'"):
        rewrite(case.net, AddTap("embed"), example=case.inputs[0])


def test_edits_below_a_replaced_module_are_dropped():
    net = CASES["remat_class"].net
    gated = rewrite(net, AddGate("layer0/hidden"), AddGate("layer1/hidden"), example=VECTOR)
    replaced = rewrite(gated, Replace("layer0", nn.Dense(6, parent=None)), example=VECTOR)
    assert {p for p, _ in replaced.patch.items()} == {("layer0",), ("layer1", "hidden")}


def test_edits_below_a_kept_module_survive():
    net = CASES["remat_class"].net
    gated = rewrite(net, AddGate("layer0/hidden"), AddTap("layer0"), example=VECTOR)
    assert {p for p, _ in gated.patch.items()} == {("layer0",), ("layer0", "hidden")}
    assert isinstance(sites(gated, VECTOR)["layer0/hidden"].module, Then)


def test_parent_and_child_edited_by_one_rule():
    net = CASES["owned_field"].net
    rule = Edit((("backbone", Mlp(parent=None)), ("backbone/hidden", nn.Dense(9, parent=None))))
    once = rewrite(net, rule, example=VECTOR)
    assert init(once)["params"]["backbone"]["hidden"]["kernel"].shape == (6, 9)
    in_turn = rewrite(net, Edit(rule.pairs[:1]), Edit(rule.pairs[1:]), example=VECTOR)
    assert in_turn == once


def test_one_thing_after_another_at_one_path():
    net = rewrite(NET, AddGate("layers_0"), AddTap("layers_0"), AddGate("."), example=VECTOR)
    assert not isinstance(base_of(net), Patched)
    assert base_of(net) is NET
    assert len(history(net)) == 3
    variables = init(NET)
    x = jax.random.normal(jax.random.key(1), VECTOR.shape)
    hidden = x @ variables["params"]["layers_0"]["kernel"]
    gates = {
        "layers_0": {"after": {"gate": jnp.full((2, 8), 2.0)}},
        "after": {"gate": jnp.full((2, 4), 3.0)},  # of the network itself
    }
    found = sites(net, VECTOR)
    assert isinstance(found["layers_0"].module, Then)
    inner = found["layers_0"].module.module
    assert isinstance(inner, Then)
    assert isinstance(inner.module, nn.Dense)
    out, taps = net.apply({**variables, GATES: gates}, x, mutable=[TAPS])
    np.testing.assert_allclose(taps[TAPS]["layers_0"]["after2"]["value"], 2 * hidden, rtol=1e-5)
    expected = nn.relu(2 * hidden) @ variables["params"]["layers_2"]["kernel"] * 3
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_a_rewritten_network_inside_another():
    inner = rewrite(NET, AddGate("layers_0"), example=VECTOR)
    outer = nn.Sequential([inner, nn.relu, nn.Dense(3)])
    plain = nn.Sequential([NET, nn.relu, nn.Dense(3)])
    variables = init(outer)
    assert jax.tree.structure(variables) == jax.tree.structure(init(plain))
    net = rewrite(outer, AddGate("layers_2"), example=VECTOR)
    x = jax.random.normal(jax.random.key(1), VECTOR.shape)
    hidden = {"layers_0": {"layers_0": {"after": {"gate": jnp.zeros((2, 8))}}}}
    last = {"layers_2": {"after": {"gate": jnp.full((2, 3), 5.0)}}}
    expected = plain.apply(variables, x)
    np.testing.assert_array_equal(net.apply(variables, x), expected)
    np.testing.assert_allclose(net.apply({**variables, GATES: last}, x), 5 * expected, rtol=1e-6)
    silent = net.apply({**variables, GATES: hidden}, x)
    np.testing.assert_array_equal(silent, jnp.zeros((2, 3)))  # biases are zero at first
    tapped = rewrite(net, AddTap("layers_0/layers_0"), example=VECTOR)
    _, taps = tapped.apply({**variables, GATES: hidden}, x, mutable=[TAPS])
    np.testing.assert_array_equal(jax.tree.leaves(taps)[0], jnp.zeros((2, 8)))


@pytest.mark.parametrize("network", ["norm_dropout", "train_field", "residual_field"])
def test_an_edit_made_in_one_mode_works_in_the_other(network):
    """What the network sets anew in each call, a stand-in takes from it, unless the rule sets it."""
    case = CASES[network]
    where = {"norm_dropout": "norm", "train_field": "block1", "residual_field": "block0/norm"}
    gated = rewrite(case.net, AddGate(where[network]), example=IMAGE)
    again = rewrite(gated, AddTap(where[network]), AddGate("."), example=IMAGE)
    variables = jax.eval_shape(gated.init, jax.random.key(0), IMAGE)

    def updates(net):
        def run(v, x):
            rngs = {"dropout": jax.random.key(0)}
            return net.apply(v, x, train=True, rngs=rngs, mutable=["batch_stats"])[1]

        return str(jax.make_jaxpr(run)(variables, jnp.zeros(IMAGE.shape)))

    assert updates(gated) == updates(case.net)
    assert "reduce_sum" in updates(again)
    pinned = Configure.of(Of(nn.BatchNorm), use_running_average=True)
    frozen = rewrite(case.net, pinned, AddGate("."), example=IMAGE)
    assert updates(frozen) != updates(case.net)
    assert len(updates(frozen)) < len(updates(case.net))


def test_other_methods_of_a_rewritten_network():
    net = CASES["auto_encoder"].net
    wide = rewrite(net, Configure.of("down", features=5), example=VECTOR)
    variables = init(wide)
    z = wide.apply(variables, "encode", jnp.ones((2, 6)), method="run")
    assert z.shape == (2, 5)


def test_carry_reports_and_keeps_values():
    net = Setup()
    new = rewrite(net, Configure.of("layers_1", features=9), AddTap("layers_0"), example=VECTOR)
    old = init(net)
    values, report = carry(net, new, old, example=VECTOR, key=jax.random.key(1))
    assert set(report.fresh) == {
        "params/layers_1/kernel",
        "params/layers_1/bias",
        "params/layers_2/kernel",
        "taps/layers_0/after/value",
    }
    assert not report.transformed
    assert set(report.dropped) == {
        "params/layers_1/kernel",
        "params/layers_1/bias",
        "params/layers_2/kernel",
    }
    assert str(report) == f"{len(report.copied)} arrays copied, 0 transformed, 4 fresh, 3 dropped"
    for name in report.copied:
        a, b = old, values
        for part in name.split("/"):
            a, b = a[part], b[part]
        np.testing.assert_array_equal(a, b)
    structure = jax.tree.structure(init(new))
    assert jax.tree.structure(values) == structure


def test_a_rule_with_mathematics_of_its_own_keeps_the_function():
    new = rewrite(
        NET,
        Widen("layers_0", "layers_2", 9),
        AddGate("."),
        Widen("layers_0", "layers_2", 11),
        example=VECTOR,
    )
    old = init(NET)
    values, report = carry(NET, new, old, example=VECTOR, key=jax.random.key(1))
    assert set(report.transformed) == {
        "params/layers_0/kernel",
        "params/layers_0/bias",
        "params/layers_2/kernel",
    }
    assert report.copied == ("params/layers_2/bias",)
    assert not report.fresh
    assert values["params"]["layers_0"]["kernel"].shape == (6, 11)
    x = jax.random.normal(jax.random.key(2), VECTOR.shape)
    np.testing.assert_allclose(new.apply(values, x), NET.apply(old, x), rtol=1e-5, atol=1e-6)


def test_carry_refuses_strangers():
    new = rewrite(NET, AddTap("."), example=VECTOR)
    key = jax.random.key(0)
    with pytest.raises(CarryError, match="was not rewritten from the old Setup"):
        carry(Setup(), new, init(Setup()), example=VECTOR, key=key)
    with pytest.raises(
        CarryError, match=r"not those of the old network: 'params/layers_.* should have shape"
    ):
        carry(NET, new, init(Setup()), example=VECTOR, key=key)
    with pytest.raises(CarryError, match="found None"):
        carry(NET, new, {"params": {}}, example=VECTOR, key=key)


@dataclasses.dataclass(frozen=True)
class Miscarry(Widen):
    """Forgets to pad."""

    def carry(self, path, old, new):
        return dict(old)


def test_carry_names_the_rule_that_carries_a_wrong_shape():
    new = rewrite(NET, Miscarry("layers_0", "layers_2", 11), example=VECTOR)
    with pytest.raises(CarryError, match=r"Miscarry.*mend the rule's carry"):
        carry(NET, new, init(NET), example=VECTOR, key=jax.random.key(1))


def test_equality_and_hash():
    a, b, other = (
        rewrite(Scanned(), Configure.of("layers/mlp/hidden", features=n), example=VECTOR)
        for n in (10, 10, 11)
    )
    assert a == b
    assert hash(a) == hash(b)
    assert a != other
    assert len({a, b, other}) == 2
    assert pickle.loads(pickle.dumps(a)) == a
    assert Gate() == Gate()
