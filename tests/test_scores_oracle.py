"""Every score against an evaluation of its definition in NumPy float64."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from score_oracle import BATCH, CLASSES, QUICK, STEP, Oracle, Small, conv, doubles, problem

from nnopt.core import Example
from nnopt.scores import (
    ChannelMean,
    EpeNas,
    Fisher,
    FisherPotential,
    GradNorm,
    Grasp,
    JacobCov,
    L2Norm,
    LayerFisher,
    LogSum,
    Macs,
    MeCo,
    Naswot,
    NtkCondition,
    Parameters,
    Plain,
    Scorer,
    Snip,
    Swap,
    SynFlow,
    Zen,
    Zico,
    zen,
)

ORDER = ["stem", "block/first", "block/last", "down", "hidden", "head"]
SCORES = (
    GradNorm(), Snip(), Plain(), Grasp(), L2Norm(), LayerFisher(), Fisher(), Fisher(LogSum()), Fisher(ChannelMean()), Zico(),
    Zico(3), JacobCov(), EpeNas(), EpeNas(many=2), Naswot(), Swap(), MeCo(), SynFlow(), SynFlow(saturate=True), SynFlow(log=True),
    NtkCondition(), Parameters(), Macs(),
)  # fmt: skip


@pytest.fixture(scope="module")
def scored():
    """All scores of the small network in float64: score -> value."""
    _, variables, images, labels = problem()
    with doubles():
        exact = jax.tree.map(jnp.asarray, variables)
        scorer = Scorer(
            Small(), Example(jnp.asarray(images), train=True), SCORES, compiler_options=QUICK
        )
        return scorer(exact, jnp.asarray(images), labels)


def assert_sites(value, expected, rtol=1e-9, atol=0.0):
    """Sites in the order of the network, with these values; the total is their sum."""
    assert list(value.sites) == list(expected)
    for site, wanted in expected.items():
        np.testing.assert_allclose(value.sites[site], wanted, rtol=rtol, atol=atol, err_msg=site)
    np.testing.assert_allclose(value.total, sum(expected.values()), rtol=rtol, atol=atol)
    assert value.finite


@functools.cache
def gradients():
    oracle = problem()[0]
    return {site: oracle.gradient(f"{site}/kernel") for site in ORDER}


def weights():
    return {site: problem()[0].params[f"{site}/kernel"] for site in ORDER}


def test_the_two_networks_are_one():
    oracle, variables, images, _ = problem()
    with doubles():
        outputs, _ = Small().apply(
            variables, jnp.asarray(images), train=True, mutable=["batch_stats"]
        )
    np.testing.assert_allclose(outputs, oracle.forward()[0], rtol=1e-12)


def test_grad_norm(scored):
    expected = {s: math.sqrt((g**2).sum()) for s, g in gradients().items()}
    assert_sites(scored[GradNorm()], expected)


def test_snip(scored):
    expected = {s: np.abs(weights()[s] * g).sum() for s, g in gradients().items()}
    assert_sites(scored[Snip()], expected)


def test_plain(scored):
    expected = {s: (weights()[s] * g).sum() for s, g in gradients().items()}
    assert_sites(scored[Plain()], expected, atol=1e-12)


def test_grasp(scored):
    """The gradient at weights moved along the gradient, either way."""
    oracle, step = problem()[0], 1e-5
    moved = []
    for sign in (1, -1):
        shift = {
            f"{s}/kernel": oracle.params[f"{s}/kernel"] + sign * step * g
            for s, g in gradients().items()
        }
        there = {**oracle.params, **shift}
        moved.append({s: oracle.gradient(f"{s}/kernel", params=there) for s in ORDER})
    product = {s: (moved[0][s] - moved[1][s]) / (2 * step) for s in ORDER}
    expected = {s: -(weights()[s] * product[s]).sum() for s in ORDER}
    assert_sites(scored[Grasp()], expected, rtol=1e-6, atol=1e-8)


def test_l2_norm(scored):
    assert_sites(scored[L2Norm()], {s: math.sqrt((w**2).sum()) for s, w in weights().items()})


def gate_gradients(site, channels):
    """Of the mean loss in a gate on one channel of one image, `[batch, channels]`."""
    oracle = problem()[0]
    slopes = np.zeros((BATCH, channels))
    for n, c in np.ndindex(slopes.shape):
        gate = np.ones(slopes.shape, complex)
        gate[n, c] += 1j * STEP
        slopes[n, c] = np.imag(oracle.loss(gates={site: gate})) / STEP
    return slopes


CHANNELS = {"stem": 4, "block/first": 4, "block/last": 4, "down": 3, "hidden": 5, "head": 3}
WEIGHTS_PER_CHANNEL = {
    "stem": 18,
    "block/first": 18,
    "block/last": 36,
    "down": 36,
    "hidden": 3,
    "head": 5,
}


def test_layer_fisher(scored):
    expected = {}
    for site, channels in CHANNELS.items():
        potential = (gate_gradients(site, channels) ** 2).mean(axis=0) / 2
        expected[site] = sum(potential[c] * WEIGHTS_PER_CHANNEL[site] for c in range(channels))
    assert_sites(scored[LayerFisher()], expected)


def test_fisher(scored):
    slopes = gate_gradients("block/last", 4)
    potential = [sum(slopes[n, c] ** 2 for n in range(BATCH)) / (2 * BATCH) for c in range(4)]
    assert_sites(scored[Fisher()], {"block": sum(potential)})
    assert_sites(scored[Fisher(LogSum())], {"block": math.log(sum(potential))})
    assert_sites(scored[Fisher(ChannelMean())], {"block": sum(potential) / 4})


def test_fisher_is_fisher_potential(scored):
    _, variables, images, labels = problem()
    single = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), (variables, images))
    found = FisherPotential(Small(), Example(single[1], train=True))(*single, jnp.asarray(labels))
    np.testing.assert_allclose(found.total, scored[Fisher()].total, rtol=1e-4)


@pytest.mark.parametrize("parts", [2, 3])
def test_zico(parts, scored):
    oracle, size = problem()[0], BATCH // parts
    expected = {}
    for site in ORDER:
        each = [
            oracle.part(slice(i * size, (i + 1) * size)).gradient(f"{site}/kernel").ravel()
            for i in range(parts)
        ]
        total = 0.0
        for values in zip(*each, strict=True):
            mean = sum(values) / parts
            deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / parts)
            if deviation > 0:
                total += sum(map(abs, values)) / parts / deviation
        expected[site] = math.log(total)
    assert_sites(scored[Zico(parts)], expected, rtol=1e-7)


@functools.cache
def jacobian():
    """`[batch, pixels]`, of the sum of all logits."""
    oracle, _, images, _ = problem()
    slopes = np.zeros(images.shape)
    for index in np.ndindex(images.shape):
        moved = images.astype(complex)
        moved[index] += 1j * STEP
        slopes[index] = np.imag(oracle.forward(images=moved)[0].sum()) / STEP
    return slopes.reshape(BATCH, -1)


def test_jacob_cov(scored):
    values = np.linalg.eigvals(np.corrcoef(jacobian())).real
    expected = -sum(math.log(v + 1e-5) + 1 / (v + 1e-5) for v in values)
    np.testing.assert_allclose(scored[JacobCov()].total, expected, rtol=1e-8)
    assert not scored[JacobCov()].sites


def energies():
    labels = problem()[3]
    found = {}
    for label in range(CLASSES):
        matrix = np.corrcoef(jacobian()[labels == label])
        found[label] = (sum(math.log(abs(r) + 1e-5) for r in matrix.ravel()), len(matrix))
    return found


def test_epe_nas(scored):
    expected = {f"class {c}": abs(e) for c, (e, _) in energies().items()}
    value = scored[EpeNas()]
    assert value.sites == pytest.approx(expected, rel=1e-8)
    assert value.total == pytest.approx(sum(expected.values()), rel=1e-8)


def test_epe_nas_of_many_classes(scored):
    each = [e / rows for e, rows in energies().values()]
    expected = sum(abs(a - b) for a, b in itertools.product(each, each)) / CLASSES
    assert scored[EpeNas(many=2)].total == pytest.approx(expected, rel=1e-8)


def codes():
    """`[batch, units]` of all four ReLUs."""
    keep = problem()[0].forward()[1]
    layers = [keep[f"relu {i}"].reshape(BATCH, -1) for i in range(4)]
    assert "relu 4" not in keep
    return np.concatenate(layers, axis=1) > 0


def test_naswot(scored):
    bits = codes()
    kernel = [[sum(a == b for a, b in zip(c, d, strict=True)) for d in bits] for c in bits]
    sign, expected = np.linalg.slogdet(np.asarray(kernel, float))
    assert sign == 1
    np.testing.assert_allclose(scored[Naswot()].total, expected, rtol=1e-12)


def test_swap(scored):
    bits = codes()
    assert scored[Swap()].total == len({tuple(unit) for unit in bits.T})
    keep = problem()[0].forward()[1]
    hidden = keep["relu 3"] > 0
    assert sum(scored[Swap()].sites.values()) >= scored[Swap()].total
    down_and_hidden = np.concatenate([(keep["relu 2"] > 0).reshape(BATCH, -1), hidden], axis=1)
    assert scored[Swap()].sites["."] == len({tuple(unit) for unit in down_and_hidden.T})


def test_meco(scored):
    keep = problem()[0].forward()[1]
    expected = {}
    for site in ORDER[:4]:
        feature_map = keep[site][0].reshape(-1, CHANNELS[site]).T
        expected[site] = min(np.linalg.eigvals(np.corrcoef(feature_map)).real)
    assert_sites(scored[MeCo()], expected, rtol=1e-8, atol=1e-13)


class Absolute(Oracle):
    """The small network for synaptic flow: absolute weights, no normalisation, an image of ones."""

    def __init__(self, params, cap):
        super().__init__({k: np.abs(v) for k, v in params.items()}, np.ones((1, 5, 5, 2)), None)
        self.cap = cap

    def norm(self, x, name, keep):
        return x

    def flow(self, params):
        p = params
        x = conv(self.images, p["stem/kernel"])
        y = conv(x, p["block/first/kernel"], groups=2)
        x = x + conv(y, p["block/last/kernel"]) + p["block/last/bias"]
        x = conv(x, p["down/kernel"], stride=2) + p["down/bias"]
        x = np.where(x.real < self.cap, x, self.cap)
        x = x.mean(axis=(1, 2)) @ p["hidden/kernel"] + p["hidden/bias"]
        return (x @ p["head/kernel"] + p["head/bias"]).sum()


@pytest.mark.parametrize(("saturate", "cap"), [(False, np.inf), (True, 6.0)])
def test_synflow(saturate, cap, scored):
    oracle = Absolute(problem()[0].params, cap)
    expected = {}
    for site in ORDER:
        name = f"{site}/kernel"
        expected[site] = np.abs(oracle.params[name] * oracle.gradient(name, oracle.flow)).sum()
    assert_sites(scored[SynFlow(saturate=saturate)], expected)
    if not saturate:
        log = scored[SynFlow(log=True)]
        assert log.total == pytest.approx(math.log(sum(expected.values())), rel=1e-12)
        assert log.sites == pytest.approx({s: math.log(v) for s, v in expected.items()}, rel=1e-10)


def test_ntk_condition(scored):
    oracle = problem()[0]
    rows = np.concatenate(
        [
            oracle.gradient(f"{s}/kernel", lambda p: oracle.forward(p)[0].sum(axis=1)).reshape(
                BATCH, -1
            )
            for s in ORDER
        ],
        axis=1,
    )
    values = np.linalg.eigvalsh(rows @ rows.T)
    np.testing.assert_allclose(scored[NtkCondition()].total, -values[-1] / values[0], rtol=1e-7)


def test_counts(scored):
    assert scored[Parameters()].total == sum(v.size for v in problem()[0].params.values())
    assert scored[Parameters()].sites["block/last"] == 9 * 4 * 4 + 4
    macs = {
        "stem": 25 * 18 * 4,
        "block/first": 25 * 18 * 4,
        "block/last": 25 * 36 * 4,
        "down": 9 * 36 * 3,
        "hidden": 15,
        "head": 15,
    }
    assert_sites(scored[Macs()], macs)


def test_zen():
    """The Gaussian weights and images that the score draws, through the NumPy network without its residual link."""
    oracle, variables, images, _ = problem()
    both = [Zen(), Zen(0.1, residual=True)]
    with doubles():
        exact, like = jax.tree.map(jnp.asarray, variables), jnp.asarray(images)
        scorer = Scorer(Small(), Example(like, train=True), both, compiler_options=QUICK)
        key = jax.random.key(0)
        found = scorer(exact, images, key=key)
        drawn, x, e = jax.device_get(zen.gaussian_draws(scorer.network, exact, like, key))
    params = {"/".join(path): v for path, v in flatten_dict(drawn["params"]).items()}
    for name, array in params.items():
        if name.endswith("kernel"):
            assert abs(array.std() - 1) < 0.5
        else:
            assert (array == (1.0 if name.endswith("scale") else 0.0)).all()
    assert abs(np.corrcoef(x.ravel(), e.ravel())[0, 1]) < 0.3
    for score in both:
        _, before = oracle.forward(params, images=x, residual=score.residual)
        _, after = oracle.forward(params, images=x + score.alpha * e, residual=score.residual)
        moved = before["features"] - after["features"]
        response = math.log(np.mean([math.sqrt((m**2).sum()) for m in moved]))
        sigma = {
            n: math.log(math.sqrt(before[f"variance {n}"].mean())) for n in ("block/norm", "norm")
        }
        assert_sites(found[score], {".": response} | sigma)
