import ast
import collections
import csv
import itertools
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnopt.core.paths import path_text
from nnopt.costs.counts import parameters
from nnopt.errors import BudgetError, ChoiceError, SelectionError
from nnopt.networks import WideResNet, preact_resnet34
from nnopt.rewrites import CODE_CHOICES, PAPER_CHOICES, S, choice, rewrite
from nnopt.search.budget import budget_range, parse_budget
from nnopt.search.sampler import BudgetSampler
from nnopt.search.space import BlockSpace, block_space

IMAGE = jnp.zeros((1, 32, 32, 3))


@pytest.fixture(scope="module")
def space():
    """The space of BlockSwap: 23 choices at each of the 18 blocks of WRN-40-2."""
    return block_space(WideResNet(40, 2.0), IMAGE)


@pytest.fixture(scope="module")
def at_400k(space):
    return BudgetSampler(space, 400_000)


def plain_space(costs, fixed=0):
    """A space that has costs and nothing else."""
    paths = tuple((f"block{i}",) for i in range(len(costs)))
    return BlockSpace(paths, tuple((S,) * len(c) for c in costs), costs, fixed)


# --- budgets ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("400K", 400_000),
        ("1.6M", 1_600_000),
        ("0.4M", 400_000),
        ("250000", 250_000),
        (" 811.4k ", 811_400),
        ("2G", 2_000_000_000),
        ("0.0005K", None),
        ("1.5", None),
        ("0", None),
        ("-4K", None),
        ("", None),
        ("K", None),
        ("400 Kb", None),
        ("1e5", None),
        ("nan", None),
        ("٤K", None),
    ],
)
def test_budgets_are_read_from_text(text, value):
    if value is None:
        with pytest.raises(BudgetError, match="is no budget; give a positive whole number"):
            parse_budget(text)
    else:
        assert parse_budget(text) == value


def test_the_interval_is_open():
    assert budget_range(400_000, 0.025) == (390_001, 409_999)
    assert budget_range(162_202, 0.025) == (158_147, 166_257)
    assert budget_range(100, 1 / 3) == (67, 133)
    low, high = budget_range(10, 0.05)
    assert low == high == 10
    # In floats, 3 * (1 - 1 / 3) is not 2 and 10 * (1 + 0.1) is not 11.
    assert budget_range(10, 0.1) == (10, 10)


@pytest.mark.parametrize(
    ("budget", "tolerance"), [(0, 0.1), (-5, 0.1), (10, 0.0), (10, math.nan), (10, -0.1)]
)
def test_a_budget_and_its_tolerance_are_positive(budget, tolerance):
    with pytest.raises(BudgetError, match="positive number"):
        budget_range(budget, tolerance)


# --- spaces ---


def test_the_published_space(space):
    assert space.size == 23**18
    assert (space.fixed, space.smallest, space.largest) == (1978, 84_410, 2_243_546)
    assert path_text(space.paths[0]) == "stage1_block0"
    assert all(choices == CODE_CHOICES for choices in space.choices)
    means, variances = zip(*((np.mean(c), np.var(c)) for c in space.costs), strict=True)
    assert round(space.fixed + sum(means)) == 429_672
    assert round(math.sqrt(sum(variances))) == 154_678


def test_totals_of_a_single_choice(space, data_dir):
    with (data_dir / "reference" / "block_choice_counts_wrn40_2.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 23
    for row in rows:
        index = [c.genotype_name for c in CODE_CHOICES].index(row["conv_name"])
        assert space.names((index,) * 18) == (row["paper_name"],) * 18
        assert space.total((index,) * 18) == int(row["wrn40_2_params"])


def test_totals_of_the_published_genotypes(space, data_dir):
    for name, total in (("bs150k", 162_202), ("bs400k", 404_250), ("bs1.6m", 1_645_018)):
        with (data_dir / "blockswap" / "genotypes" / f"{name}.csv").open(newline="") as file:
            names = ast.literal_eval(next(csv.DictReader(file))["convs"])
        assert space.total([CODE_CHOICES.index(choice(n)) for n in names]) == total


def test_totals_of_an_imagenet_network():
    kinds = [S, choice("G(4)"), choice("G(N)")]
    space = block_space(preact_resnet34(1000, "imagenet"), jnp.zeros((1, 224, 224, 3)), kinds)
    assert [space.total((i,) * 16) for i in range(3)] == [21_794_984, 8_143_912, 3_129_832]


def test_totals_are_those_of_the_rewritten_network(space):
    indices = np.random.default_rng(0).integers(23, size=18).tolist()
    net = rewrite(WideResNet(40, 2.0), space.genotype(indices), example=IMAGE)
    assert parameters(net, IMAGE) == space.total(indices)


def test_impossible_choices_are_left_out():
    net = WideResNet(10, 1.0)  # stages of 16, 32 and 64 channels
    space = block_space(net, IMAGE, PAPER_CHOICES)
    names = [{c.name for c in choices} for choices in space.choices]
    everywhere = {c.name for c in PAPER_CHOICES}
    assert everywhere - names[0] == {"BG(2,16)", "BG(2,M/16)"}  # 8 channels in the bottleneck
    assert everywhere - names[1] == everywhere - names[2] == set()
    assert space.size == 19 * 21 * 21
    for indices in ((0, 0, 0), (18, 20, 20)):
        rewritten = rewrite(net, space.genotype(indices), example=IMAGE)
        assert parameters(rewritten, IMAGE) == space.total(indices)


def test_a_position_keeps_a_choice():
    with pytest.raises(ChoiceError, match="none of the 1 choices is possible at 'stage1_block0'"):
        block_space(WideResNet(10, 1.0), IMAGE, [choice("BG(2,16)")])


def test_positions_are_blocks_and_there_are_some():
    net = WideResNet(10, 1.0)
    with pytest.raises(ChoiceError, match="select residual blocks"):
        block_space(net, IMAGE, where="head")
    with pytest.raises(SelectionError, match="no module matches"):
        block_space(net, IMAGE, where="body*")


class Unit(nn.Module):
    """A residual block that knows no training mode but its own field."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.BatchNorm(use_running_average=not self.train, name="norm")(x))
        return x + nn.Conv(16, (3, 3), padding=1, use_bias=False, name="conv")(y)


class Layer(nn.Module):
    """`Unit` with the signature that `nn.scan` asks for."""

    @nn.compact
    def __call__(self, x, _):
        return Unit(name="unit")(x), None


class Stacked(nn.Module):
    """Three units in one scanned module, then one on its own."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 3), name="stem")(x)
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(10, name="head")(Unit(name="unit")(x).mean(axis=(1, 2)))


def test_scanned_blocks_cost_as_many_times():
    net = Stacked()
    space = block_space(net, IMAGE, where="**/unit")
    assert [path_text(p) for p in space.paths] == ["layers/unit", "unit"]
    assert space.costs[0] == tuple(3 * c for c in space.costs[1])
    for indices in ((0, 0), (3, 11)):
        rewritten = rewrite(net, space.genotype(indices), example=IMAGE)
        assert parameters(rewritten, IMAGE) == space.total(indices)


# --- how many candidates qualify ---


def test_acceptance_is_that_of_uniform_rejection(space, data_dir):
    with (data_dir / "reference" / "uniform_sampler_acceptance.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14
    for row in rows:
        sampler = BudgetSampler(space, int(row["param_budget"]))
        expected = float(row["acceptance_probability_uniform_23_options"])
        assert sampler.acceptance == pytest.approx(expected, rel=1e-6)
        assert sampler.count == pytest.approx(expected * 23.0**18, rel=1e-6)
        assert sampler.low > float(row["lower_exclusive"])
        assert sampler.high < float(row["upper_exclusive"])


@pytest.mark.parametrize(
    ("budget", "acceptance"),
    [("150K", 7.4e-5), ("200K", 4.6e-3), ("400K", 4.9e-2), ("800K", 9.9e-3), ("1.6M", 6.2e-7)],
)
def test_acceptance_at_some_budgets(space, budget, acceptance):
    sampler = BudgetSampler(space, parse_budget(budget))
    assert sampler.acceptance == pytest.approx(acceptance, rel=0.02)
    total = space.total(sampler.draw(0, 0))
    assert sampler.low <= total <= sampler.high


@st.composite
def small_problems(draw):
    unit = draw(st.integers(1, 16))
    costs = st.lists(st.integers(0, 40), min_size=1, max_size=4)
    positions = draw(st.lists(costs, min_size=1, max_size=5))
    fixed = draw(st.integers(0, 50))
    space = plain_space(tuple(tuple(unit * c for c in p) for p in positions), fixed)
    budget = draw(st.integers(1, space.largest + 20))
    return space, budget, draw(st.integers(1, 60))


def feasible(space, budget, fortieths):
    """Candidates with `|total - budget| < fortieths / 40 * budget`, found one by one."""
    every = itertools.product(*(range(len(c)) for c in space.costs))
    return [i for i in every if 40 * abs(space.total(i) - budget) < fortieths * budget]


@given(small_problems())
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_agrees_with_enumeration(problem):
    space, budget, fortieths = problem
    expected = set(feasible(space, budget, fortieths))
    if not expected:
        with pytest.raises(BudgetError, match="no candidate"):
            BudgetSampler(space, budget, fortieths / 40)
        return
    sampler = BudgetSampler(space, budget, fortieths / 40)
    assert sampler.count == len(expected)
    assert sampler.acceptance == pytest.approx(len(expected) / space.size, rel=1e-15)
    # With 16 candidates, one stays out of 800 draws with a probability below 1e-21.
    drawn = set(map(tuple, sampler.draws(0, range(800 if len(expected) <= 16 else 20)).tolist()))
    assert drawn == expected if len(expected) <= 16 else drawn <= expected


def test_more_candidates_than_floats_reach():
    one_third = plain_space(((0, 0, 1),) * 700)  # 3^700 is about 1e334
    sampler = BudgetSampler(one_third, budget=233, tolerance=0.001)
    assert sampler.count == math.inf
    expected = scipy.stats.binom.pmf(233, 700, 1 / 3)
    assert sampler.acceptance == pytest.approx(expected, rel=1e-9)
    drawn = sampler.draws(0, range(50))
    assert all(one_third.total(indices) == 233 for indices in drawn)
    assert np.mean(drawn[drawn != 2]) == pytest.approx(0.5, abs=0.02)  # the two that cost nothing


@pytest.mark.parametrize(
    ("budget", "tolerance"), [(50_000, 0.025), (5_000_000, 0.025), (400_001, 1e-6)]
)
def test_an_empty_budget_says_what_there_is(space, budget, tolerance):
    with pytest.raises(BudgetError) as caught:
        BudgetSampler(space, budget, tolerance)
    message = str(caught.value)
    assert f"(budget {budget:,}, tolerance" in message
    assert "84,410 to 2,243,546" in message
    assert "\n" not in message


# --- draws ---


def test_uniform_over_an_enumerable_space():
    rng = np.random.default_rng(1)
    costs = tuple(tuple(int(c) for c in rng.integers(0, 50, 4)) for _ in range(5))
    space = plain_space(costs, fixed=3)
    expected = feasible(space, 130, 2)
    sampler = BudgetSampler(space, 130, 0.05)
    assert sampler.count == len(expected) > 100
    drawn = [tuple(row) for row in sampler.draws(7, range(100 * len(expected))).tolist()]
    counter = collections.Counter(drawn)
    counts = [counter[candidate] for candidate in expected]
    assert sum(counts) == len(drawn)
    assert scipy.stats.chisquare(counts).pvalue > 0.001


def test_like_rejection_at_400k(space, at_400k):
    rng = np.random.default_rng(0)
    costs = np.array(space.costs)
    kept = []
    for _ in range(8):
        naive = rng.integers(23, size=(100_000, 18))
        totals = space.fixed + np.take_along_axis(costs.T, naive, axis=0).sum(axis=1)
        kept.append(naive[(totals > 390_000) & (totals < 410_000)])
    rejected = np.concatenate(kept)
    assert len(rejected) / 800_000 == pytest.approx(at_400k.acceptance, rel=0.02)
    exact = at_400k.draws(0, range(len(rejected)))
    for i in range(18):
        table = np.array([np.bincount(s[:, i], minlength=23) for s in (rejected, exact)])
        common = table[:, table.sum(axis=0) >= 20]  # the rest is too rare for the test
        assert scipy.stats.chi2_contingency(common).pvalue > 0.001
    totals = [np.take_along_axis(costs.T, s, axis=0).sum(axis=1) for s in (rejected, exact)]
    assert scipy.stats.ks_2samp(*totals).pvalue > 0.001


def test_a_draw_depends_on_seed_and_index_alone(space, at_400k):
    together = at_400k.draws(3, range(40))
    again = BudgetSampler(space, 400_000)
    for index in (39, 0, 17):
        assert again.draw(3, index) == tuple(together[index])
    assert again.draws(3, [5, 2**40, 5]).tolist()[::2] == together[[5, 5]].tolist()
    assert len({at_400k.draw(seed, index) for seed in range(10) for index in range(10)}) == 100
    assert at_400k.draws(3, []).shape == (0, 18)


def test_draws_stay_what_they_were(at_400k):
    """A search that was interrupted goes on with the same candidates, also after an upgrade."""
    first, second = at_400k.draw(0, 0), at_400k.draw(0, 1)
    assert first == (0, 10, 20, 5, 8, 22, 20, 7, 19, 1, 3, 20, 1, 22, 9, 7, 21, 10)
    assert second == (10, 8, 13, 20, 22, 5, 0, 2, 6, 0, 12, 12, 3, 19, 18, 15, 6, 18)
    assert all(type(i) is int for i in first)
