"""The benchmark networks of experiments/scores, their published counts, their tables, and the statistics on them."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.scores import nasbench201 as nb
from experiments.scores import nasbench_macro as macro
from experiments.scores import scoring, tables
from experiments.scores.correlation import (
    best_of,
    equal_count_bins,
    estimate,
    kendall,
    ranks,
    spearman,
)
from experiments.scores.weights import SharedWeights
from nnopt.core import Example
from nnopt.costs import macs, parameters
from nnopt.errors import DataError, ResultFolderError
from nnopt.scores import Fisher, Parameters, Scorer, SynFlow
from nnopt.scores.programs import ProgramCache

IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)

cells = st.lists(st.sampled_from(nb.OPERATIONS), min_size=6, max_size=6).map(
    lambda operations: nb.Cell(tuple(operations))
)
layers = st.lists(st.integers(0, 2), min_size=8, max_size=8).map(
    lambda choices: macro.Layers(tuple(choices))
)

# From the published table: parameters and FLOPs in millions.
PUBLISHED_CELLS = (
    ("|avg_pool_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|avg_pool_3x3~0|avg_pool_3x3~1|avg_pool_3x3~2|", 0.559386, 84.743872),
    ("|avg_pool_3x3~0|+|skip_connect~0|none~1|+|none~0|none~1|skip_connect~2|", 0.073306, 9.234112),
    ("|nor_conv_3x3~0|+|none~0|none~1|+|avg_pool_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|", 0.802426, 116.692672),
    ("|skip_connect~0|+|none~0|none~1|+|none~0|nor_conv_3x3~1|nor_conv_1x1~2|", 0.344346, 48.125632),
)  # fmt: skip
PUBLISHED_LAYERS = (
    ("00011110", 1118378, 31390208),
    ("21110010", 975466, 41808384),
    ("00111012", 1861354, 44642816),
    ("02222211", 2055082, 81928704),
)


@pytest.mark.parametrize(("text", "millions", "flops"), PUBLISHED_CELLS)
def test_a_cells_network_has_the_published_counts(text, millions, flops):
    cell = nb.Cell.parse(text)
    net = nb.NASBench201(cell)
    assert parameters(net, IMAGE) == nb.published_parameters(cell) == round(millions * 1e6)
    assert nb.published_flops(cell) == round(flops * 1e6)
    assert macs(net, IMAGE) == nb.convolution_macs(cell)


@pytest.mark.parametrize(("text", "count", "flops"), PUBLISHED_LAYERS)
def test_a_macro_network_has_the_published_counts(text, count, flops):
    choice = macro.Layers.parse(text)
    net = macro.NASBenchMacro(choice)
    assert parameters(net, IMAGE) == macro.published_parameters(choice) == count
    assert macs(net, IMAGE) == macro.published_flops(choice) == flops


@settings(max_examples=5, deadline=None)
@given(cells)
def test_counts_of_any_cell_are_those_of_its_network(cell):
    net = nb.NASBench201(cell)
    assert parameters(net, IMAGE) == nb.published_parameters(cell)
    assert macs(net, IMAGE) == nb.convolution_macs(cell)


@settings(max_examples=5, deadline=None)
@given(layers)
def test_counts_of_any_macro_network_are_those_of_its_network(choice):
    net = macro.NASBenchMacro(choice)
    assert parameters(net, IMAGE) == macro.published_parameters(choice)
    assert macs(net, IMAGE) == macro.published_flops(choice)


def test_counts_of_every_row_of_nasbench201(data_dir):
    for row in tables.nasbench201(data_dir):
        assert nb.published_parameters(row.network) == round(row.parameters_million * 1e6)
        assert nb.published_flops(row.network) == round(row.flops_million * 1e6)


def test_counts_of_every_row_of_nasbench_macro(data_dir):
    for row in tables.nasbench_macro(data_dir):
        assert macro.published_parameters(row.network) == row.parameters
        assert macro.published_flops(row.network) == row.flops


@given(cells)
def test_a_cell_survives_its_notation(cell):
    assert nb.Cell.parse(str(cell)) == cell


@given(layers)
def test_layers_survive_their_notation(choice):
    assert macro.Layers.parse(str(choice)) == choice


@pytest.mark.parametrize(
    "text",
    [
        "",
        "|none~0|",
        "|none~0|+|none~0|none~1|+|none~0|none~1|none~1|",
        "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|+|none~0|",
        "|none~0|+|none~0|none~1|+|none~0|none~1|conv~2|",
    ],
)
def test_what_is_no_cell_is_refused(text):
    with pytest.raises(ValueError, match=r"not of the form|no operation"):
        nb.Cell.parse(text)


@pytest.mark.parametrize("text", ["", "0001111", "000111100", "00011113", "0001111x", "-0011110"])
def test_what_are_no_layers_is_refused(text):
    with pytest.raises(ValueError, match="is not 8 digits"):
        macro.Layers.parse(text)


# --- the forward pass against loops over float64 NumPy arrays -------------------------------------


def np_conv(x, kernel, stride=1, groups=1):
    """`x [batch, height, width, in]`, `kernel [k, k, in / groups, out]`, padded by `k // 2`."""
    k, _, depth, out = kernel.shape
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    height, width = (x.shape[1] - 1) // stride + 1, (x.shape[2] - 1) // stride + 1
    y = np.zeros((len(x), height, width, out))
    for i, j in itertools.product(range(height), range(width)):
        window = padded[:, i * stride : i * stride + k, j * stride : j * stride + k]
        for c in range(out):
            first = c // (out // groups) * depth
            y[:, i, j, c] = (window[..., first : first + depth] * kernel[..., c]).sum((1, 2, 3))
    return y


def np_norm(x, p):
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]


def np_relu(x):
    return np.maximum(x, 0)


def np_pool3(x):
    """Mean over the 3 x 3 neighbours that lie inside the image."""
    y = np.zeros_like(x)
    for i, j in itertools.product(range(x.shape[1]), range(x.shape[2])):
        window = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
        y[:, i, j] = window.mean((1, 2))
    return y


def np_relu_conv_norm(x, p, stride=1):
    return np_norm(np_conv(np_relu(x), p["conv"]["kernel"], stride), p["norm"])


def np_cell(cell, x, p):
    nodes = [x]
    for node in (1, 2, 3):
        total = np.zeros_like(x)
        for (source, target), operation in zip(nb.EDGES, cell.operations, strict=True):
            if target == node:
                if operation == "skip_connect":
                    total += nodes[source]
                elif operation == "avg_pool_3x3":
                    total += np_pool3(nodes[source])
                elif operation != "none":
                    total += np_relu_conv_norm(nodes[source], p[f"edge{source}{node}"])
        nodes.append(total)
    return nodes[3]


def np_reduction(x, p):
    y = np_relu_conv_norm(np_relu_conv_norm(x, p["a"], 2), p["b"])
    batch, height, width, channels = x.shape
    halved = x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    return np_conv(halved, p["shortcut"]["kernel"]) + y


def np_nasbench201(cell, x, p):
    x = np_norm(np_conv(x, p["stem"]["kernel"]), p["stem_norm"])
    for stage in (1, 2, 3):
        if stage > 1:
            x = np_reduction(x, p[f"reduction{stage}"])
        for i in range(5):
            x = np_cell(cell, x, p.get(f"stage{stage}_cell{i}", {}))
    x = np_relu(np_norm(x, p["norm"])).mean((1, 2))
    return x @ p["head"]["kernel"] + p["head"]["bias"]


def np_nasbench_macro(choice, x, p):
    x = np_relu(np_norm(np_conv(x, p["stem"]["kernel"]), p["stem_norm"]))
    for number, digit in enumerate(choice.choices, start=1):
        stride = 2 if number in (1, 3, 6) else 1
        q = p.get(f"layer{number}", {})
        if digit == 0:
            if stride == 2:
                x = np_norm(np_conv(x, q["conv"]["kernel"], 2), q["norm"])
            continue
        y = np_relu(np_norm(np_conv(x, q["conv1"]["kernel"]), q["norm1"]))
        inner = y.shape[-1]
        assert inner == x.shape[-1] * (3, 6)[digit - 1]
        assert q["conv2"]["kernel"].shape == ((3, 3, 1, inner), (5, 5, 1, inner))[digit - 1]
        y = np_relu(np_norm(np_conv(y, q["conv2"]["kernel"], stride, inner), q["norm2"]))
        y = np_norm(np_conv(y, q["conv3"]["kernel"]), q["norm3"])
        x = x + y if stride == 1 else y
    x = np_relu(np_norm(np_conv(x, p["tail"]["kernel"]), p["tail_norm"]))
    return x.mean((1, 2)) @ p["head"]["kernel"] + p["head"]["bias"]


def random_variables(net, images, seed):
    """Values far from the initial ones, so that scales of one and biases of zero hide nothing."""
    shapes = flatten_dict(jax.eval_shape(net.init, jax.random.key(0), images.astype(np.float32)))
    rng = np.random.default_rng(seed)
    values = {}
    for path, shape in shapes.items():
        value = rng.normal(size=shape.shape) / math.sqrt(max(math.prod(shape.shape[:-1]), 1))
        values[path] = np.abs(value) + 0.5 if path[-1] in ("scale", "var") else value
    return values


@pytest.mark.parametrize(
    ("net", "oracle"),
    [
        (nb.NASBench201(cell), lambda x, p, cell=cell: np_nasbench201(cell, x, p))
        for cell in (
            nb.Cell.parse("|nor_conv_1x1~0|+|avg_pool_3x3~0|nor_conv_3x3~1|+|skip_connect~0|none~1|avg_pool_3x3~2|"),
            nb.Cell.parse("|none~0|+|none~0|none~1|+|skip_connect~0|nor_conv_1x1~1|nor_conv_1x1~2|"),
        )
    ]
    + [
        (macro.NASBenchMacro(choice), lambda x, p, choice=choice: np_nasbench_macro(choice, x, p))
        for choice in (macro.Layers.parse("01021020"),)
    ],
    ids=["pools", "nones", "macro"],
)  # fmt: skip
def test_networks_compute_what_they_are_said_to(net, oracle):
    # Flax's batch normalisation promotes float64 with float32, to float64.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        images = np.random.default_rng(1).normal(size=(2, 8, 8, 3))
        flat = random_variables(net, images, 2)
        logits, _ = jax.jit(lambda v, x: net.apply(v, x, train=True, mutable=["batch_stats"]))(
            jax.tree.map(jnp.asarray, unflatten_dict(flat)), jnp.asarray(images)
        )
        assert logits.dtype == jnp.float64
        np.testing.assert_allclose(
            logits, oracle(images, unflatten_dict(flat)["params"]), rtol=1e-9, atol=1e-9
        )


def test_default_weights_are_pytorchs_uniform():
    net = nb.NASBench201(nb.Cell(("none",) * 6))
    variables = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    flat = flatten_dict(variables["params"])
    kernels = {path: value for path, value in flat.items() if path[-1] == "kernel"}
    assert len(kernels) == 8
    for value in [*kernels.values(), flat["head", "bias"]]:
        fan_in = 64 if value.ndim == 1 else math.prod(value.shape[:-1])
        bound = 1 / math.sqrt(fan_in)
        assert abs(value).max() <= bound
        if value.size > 200:
            # Of a uniform variable on [-b, b]: largest magnitude near b, variance b^2 / 3.
            assert abs(value).max() > 0.97 * bound
            np.testing.assert_allclose(value.var(), bound**2 / 3, rtol=0.2)


def test_the_initialiser_is_an_option():
    ones = nb.NASBench201(nb.Cell(("nor_conv_1x1",) * 6), kernel_init=nn.initializers.ones)
    for net in (
        ones,
        macro.NASBenchMacro(macro.Layers((0,) * 8), kernel_init=nn.initializers.ones),
    ):
        variables = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
        kernels = [v for p, v in flatten_dict(variables["params"]).items() if p[-1] == "kernel"]
        assert len(kernels) > 5
        assert all(bool((kernel == 1).all()) for kernel in kernels)


def test_a_cell_of_nones_ignores_its_input():
    net = nb.CellNetwork(nb.Cell(("none",) * 6))
    images = jnp.ones((2, 8, 8, 3))
    assert not net.apply({}, images, True).any()


# --- tables ---------------------------------------------------------------------------------------

HEADER_201 = (
    "index,arch_str,c10_test200,c10_valid200,c100_test200,in16_test200,params_M_c10,flops_M_c10,"
    "synflow_c10,naswot_c10"
)
LINE_201 = f"7,{PUBLISHED_CELLS[0][0]},85.74,81.9,54.8,27.2,0.559386,84.743872,3.4e+32,-inf"


def write_table(folder, file, *lines):
    path = folder / file
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines) + "\n")


def test_rows_of_nasbench201_are_read(tmp_path):
    write_table(tmp_path, tables.NASBENCH201, HEADER_201, LINE_201)
    (row,) = tables.nasbench201(tmp_path)
    assert (row.index, row.accuracy, row.synflow, row.naswot) == (7, 85.74, 3.4e32, -math.inf)
    assert str(row.network) == PUBLISHED_CELLS[0][0]
    assert (row.parameters_million, row.flops_million) == (0.559386, 84.743872)


def test_rows_of_nasbench_macro_are_read(tmp_path):
    lines = ("arch,acc1,acc2,acc3,mean_acc,params,flops", "00011110,1,2,3,85.2767,1118378,31390208")
    write_table(tmp_path, tables.NASBENCH_MACRO, *lines)
    (row,) = tables.nasbench_macro(tmp_path)
    assert row == tables.TrainedLayers(
        120, macro.Layers.parse("00011110"), 85.2767, 1118378, 31390208
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((HEADER_201,), "holds no rows"),
        ((HEADER_201.replace("arch_str", "arch"), LINE_201), "no column 'arch_str'"),
        ((HEADER_201, LINE_201, LINE_201.replace("nor_conv_3x3~0", "conv~0")), "line 3: no operation"),
        ((HEADER_201, LINE_201.replace("85.74", "")), "line 2: could not convert"),
        ((HEADER_201, LINE_201.replace("85.74", "857.4")), "line 2: an accuracy of 857.4 percent"),
        ((HEADER_201, LINE_201.replace("85.74", "nan")), "line 2: an accuracy of nan percent"),
        ((HEADER_201, LINE_201.partition(",27.2")[0]), "line 2: "),
    ],
)  # fmt: skip
def test_a_damaged_table_is_one_clear_line(tmp_path, lines, message):
    write_table(tmp_path, tables.NASBENCH201, *lines)
    with pytest.raises(DataError) as error:
        tables.nasbench201(tmp_path)
    text = str(error.value)
    assert message in text
    assert "nb201_sample4000.csv" in text
    assert "\n" not in text


def test_a_table_that_is_missing_says_where_it_should_be(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"nasbench_macro_sample2000.csv cannot be read"):
        tables.nasbench_macro(tmp_path)
    monkeypatch.delenv("NNOPT_DATA", raising=False)
    with pytest.raises(DataError, match="give --data-dir or set NNOPT_DATA"):
        tables.nasbench_macro()


# --- rank correlation -----------------------------------------------------------------------------

values = st.lists(
    st.sampled_from([-math.inf, -2.0, 0.0, 0.5, 3.0, 1e40, math.inf]), min_size=3, max_size=12
)
pairs = values.flatmap(
    lambda a: st.tuples(st.just(a), st.lists(st.integers(0, 5), min_size=len(a), max_size=len(a)))
)


def loop_ranks(a):
    return [sum(y < x for y in a) + (sum(y == x for y in a) + 1) / 2 for x in a]


def loop_spearman(a, b):
    a, b = loop_ranks(a), loop_ranks(b)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    over = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    below = math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))
    return over / below if below else 0.0


def loop_kendall(a, b):
    sign = lambda x, y: (x > y) - (x < y)  # noqa: E731 - inf - inf is no number
    over = pairs_a = pairs_b = 0
    for i, j in itertools.combinations(range(len(a)), 2):
        over += sign(a[i], a[j]) * sign(b[i], b[j])
        pairs_a += a[i] != a[j]
        pairs_b += b[i] != b[j]
    return over / math.sqrt(pairs_a * pairs_b) if pairs_a * pairs_b else 0.0


@given(pairs)
def test_rank_correlations_are_their_definitions(pair):
    a, b = np.array(pair[0]), np.array(pair[1], float)
    assert spearman(a, b) == pytest.approx(loop_spearman(*pair), abs=1e-12)
    assert kendall(a, b) == pytest.approx(loop_kendall(*pair), abs=1e-12)


def test_what_is_no_number_ranks_lowest():
    np.testing.assert_array_equal(ranks(np.array([1.0, math.nan, -5.0])), [3, 1, 2])
    assert spearman(np.array([math.nan, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(1)


def test_bins_hold_neighbours_of_equal_count():
    costs = np.array([5, 1, 4, 2, 3, 0])
    np.testing.assert_array_equal(equal_count_bins(costs, 3), [2, 0, 2, 1, 1, 0])


def test_correlation_within_bins_is_not_that_between_them():
    # Between the bins accuracy rises with the score, within each it falls.
    scores = np.array([3.0, 2, 1, 30, 20, 10])
    accuracies = np.array([1.0, 2, 3, 10, 20, 30])
    bins = np.array([0, 0, 0, 1, 1, 1])
    rng = np.random.default_rng
    assert estimate(spearman, scores, accuracies, rng(0), bins).value == pytest.approx(-1)
    assert estimate(spearman, scores, accuracies, rng(0)).value > 0


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    # For two normal variables of correlation r, Spearman's is 6/pi asin(r/2).
    r, hits = 0.6, 0
    truth = 6 / math.pi * math.asin(r / 2)
    rng = np.random.default_rng(0)
    for _ in range(100):
        x, noise = rng.normal(size=(2, 80))
        found = estimate(spearman, x, r * x + math.sqrt(1 - r**2) * noise, rng, resamples=200)
        hits += found.low <= truth <= found.high
    assert 87 <= hits <= 100


def test_the_interval_is_determined_by_its_generator():
    x, y = np.random.default_rng(0).normal(size=(2, 30))
    first, second, other = (
        estimate(kendall, x, y, np.random.default_rng(seed), resamples=50) for seed in (1, 1, 2)
    )
    assert first == second
    assert first.value == other.value
    assert (first.low, first.high) != (other.low, other.high)


@pytest.mark.parametrize(
    ("scores", "accuracies", "bins"),
    [([1, 2], [1, 2, 3], None), ([1], [1], None), ([1, 2, 3], [1, 2, 3], [0, 0, 1])],
)
def test_estimates_of_too_little_are_refused(scores, accuracies, bins):
    bins = None if bins is None else np.array(bins)
    with pytest.raises(ValueError, match=r"scores|at least two"):
        estimate(spearman, np.array(scores), np.array(accuracies), np.random.default_rng(0), bins)


@given(pairs, st.data())
def test_the_best_of_some_draws_is_the_mean_over_all_subsets(pair, data):
    scores, accuracies = pair
    draws = data.draw(st.integers(1, min(len(scores), 4)))
    picks = []
    for subset in itertools.combinations(range(len(scores)), draws):
        top = max(scores[i] for i in subset)
        tied = [accuracies[i] for i in subset if scores[i] == top]
        picks.append(sum(tied) / len(tied))
    expected = sum(picks) / len(picks)
    found = best_of(np.array(scores), np.array(accuracies, float), draws)
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("draws", [0, 4])
def test_no_more_networks_are_drawn_than_there_are(draws):
    with pytest.raises(ValueError, match=f"{draws} of 3 networks"):
        best_of(np.arange(3.0), np.arange(3.0), draws)


# --- published scores -----------------------------------------------------------------------------


def he_variables(net, seed):
    """Kernels from N(0, 2 / fan_out), as PyTorch's kaiming_normal draws them; scales one, biases zero."""
    shapes = flatten_dict(jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    rng = np.random.default_rng(seed)
    values = {}
    for path, shape in shapes.items():
        if path[-1] == "kernel":
            *window, _, out = shape.shape
            deviation = math.sqrt(2 / (math.prod(window) * out))
            values[path] = (deviation * rng.normal(size=shape.shape)).astype(np.float32)
        else:
            values[path] = np.full(shape.shape, path[-1] in ("scale", "var"), np.float32)
    return unflatten_dict(values)


def test_synflow_of_a_cell_is_the_published_number():
    # FreeREA's table for this cell; its weights are He's, its figure the mean of three draws.
    published = 3.40287082e32
    net = nb.NASBench201(nb.Cell.parse(PUBLISHED_CELLS[0][0]))
    scorer = Scorer(
        net, Example(jnp.zeros((1, 32, 32, 3)), train=True), (SynFlow(),), programs=ProgramCache()
    )
    draws = [scorer(he_variables(net, seed))[SynFlow()].total for seed in range(3)]
    # Draws of eighty layers' weights differ by a tenth or so; a missing layer would cost a factor of ten.
    assert np.mean(draws) == pytest.approx(published, rel=0.2)


# --- scoring --------------------------------------------------------------------------------------


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


def test_shared_weights_are_those_of_initialisation():
    example = Example(tiny_batch()[0], train=True)
    weights = SharedWeights([Tiny(1), Tiny(3)], example, seed=3)
    net = Tiny(2)
    jax.tree.map(
        np.testing.assert_array_equal, weights.of(net), example.init(net, jax.random.key(3))
    )
    with pytest.raises(KeyError):
        weights.of(Tiny(4))


def job(folder, **changes):
    fields = {
        "benchmark": "macro",
        "network": macro.NASBenchMacro,
        "covering": (macro.Layers((0,) * 8),),
        "scores": {"synflow": SynFlow(), "fisher": Fisher(), "parameters": Parameters()},
        "data_dir": str(folder),
        "batch": 4,
        "seed": 0,
    }
    return scoring.Job(**(fields | changes))


def test_a_result_file_goes_on_where_it_was_killed(tmp_path):
    work = job(tmp_path)
    file = scoring.ResultFile(tmp_path, work)
    assert file.rows() == {}
    rows = [
        scoring.ScoredNetwork(i, 1.25, {"synflow": 1e-40 * i, "fisher": value, "parameters": 3.0})
        for i, value in ((5, math.nan), (2, -math.inf), (9, 1 / 3))
    ]
    for row in rows:
        file.add(row)
    with file.path.open("a") as stream:
        stream.write("7,2.00,1.0,0.")
    again = scoring.ResultFile(tmp_path, work)
    found = again.rows()
    assert list(found) == [5, 2, 9]
    assert math.isnan(found[5].scores["fisher"])
    assert found[2] == rows[1]
    assert found[9] == rows[2]
    again.add(scoring.ScoredNetwork(7, 1.0, rows[2].scores))
    assert list(again.rows()) == [5, 2, 9, 7]


@pytest.mark.parametrize("change", [{"batch": 8}, {"seed": 1}, {"scores": {"fisher": Fisher()}}])
def test_results_of_other_settings_are_not_mixed(tmp_path, change):
    scoring.ResultFile(tmp_path, job(tmp_path))
    with pytest.raises(
        ResultFolderError, match=f"other settings .{next(iter(change))}.; name another"
    ) as e:
        scoring.ResultFile(tmp_path, job(tmp_path, **change))
    assert "\n" not in str(e.value)


def test_a_result_folder_that_is_a_file_is_one_clear_line(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ResultFolderError, match=r"taken: .*; name another folder with --out"):
        scoring.ResultFile(tmp_path / "taken", job(tmp_path))


def test_a_score_that_a_network_does_not_have_is_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "_images", lambda _: tiny_batch())
    worker = scoring._Worker(job(tmp_path, network=Tiny, covering=(3,)))
    plain, again, residual = (worker.score(7, depth) for depth in (0, 0, 2))
    assert (plain.index, plain.scores["parameters"]) == (7, 3 * 9 * 4 + 4 + 4 * 3 + 3)
    assert plain.scores["synflow"] > 0
    assert math.isnan(plain.scores["fisher"])
    assert str(again.scores) == str(plain.scores)
    assert residual.scores["fisher"] > 0


def test_scoring_without_data_says_so(tmp_path):
    with pytest.raises(DataError, match="cifar"):
        scoring.score_all(job(tmp_path), {}, 1, lambda row: None)
