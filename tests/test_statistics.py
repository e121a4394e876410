import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from nnopt.scores.agreement import agreement, fidelity, spearman
from nnopt.scores.statistics import Repeats, rank_confidence, ranks

NAN, INF = float("nan"), float("inf")
AWKWARD = st.sampled_from([NAN, INF, -INF, 0.0, 1.0, 1.0, 2.0, 3.5, -2.0, 1e300])
POSITIVE = st.sampled_from([NAN, INF, 0.0, 1e-12, 1e-12, 0.5, 2.0, 7.0, 1e30])


def tables(elements, most=(6, 5)):
    shapes = st.tuples(*(st.integers(1, n) for n in most))
    return shapes.flatmap(lambda s: hnp.arrays(np.float64, s, elements=elements))


# --- oracles: the definitions, one candidate at a time ---


def better(a, b):
    """Whether a score beats another: what is not finite beats nothing, and is beaten by all that is."""
    if not math.isfinite(a):
        return False
    return not math.isfinite(b) or a > b


def literal_ranks(values):
    above = [sum(better(other, v) for other in values) for v in values]
    level = [sum(not better(o, v) and not better(v, o) for o in values) for v in values]
    return [a + (n - 1) / 2 for a, n in zip(above, level, strict=True)]


def literal_mean(row, geometric):
    logs = [math.log(v) if v > 0 else -INF for v in row] if geometric else list(row)
    if not all(math.isfinite(v) for v in logs):
        return NAN
    return math.fsum(logs) / len(logs)


def literal_spearman(a, b):
    x, y = literal_ranks(a), literal_ranks(b)
    mx, my = sum(x) / len(x), sum(y) / len(y)
    cross = sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
    norm = math.sqrt(sum((p - mx) ** 2 for p in x) * sum((q - my) ** 2 for q in y))
    return cross / norm if norm > 0 else NAN


def literal_tau_b(a, b):
    same = opposite = level_a = level_b = 0
    for i, j in itertools.combinations(range(len(a)), 2):
        x = better(a[i], a[j]) - better(a[j], a[i])
        y = better(b[i], b[j]) - better(b[j], b[i])
        same += x * y > 0
        opposite += x * y < 0
        level_a += x == 0
        level_b += y == 0
    pairs = math.comb(len(a), 2)
    norm = math.sqrt((pairs - level_a) * (pairs - level_b))
    return (same - opposite) / norm if norm > 0 else NAN


# --- repeats ---


@given(tables(POSITIVE), st.booleans())
def test_repeats_are_averaged_by_the_definition(scores, geometric):
    repeats = Repeats(scores, geometric)
    means = [literal_mean(row, geometric) for row in scores]
    np.testing.assert_allclose(repeats.mean, means, rtol=1e-12, atol=1e-12)
    expected = [math.exp(m) if geometric else m for m in means]
    np.testing.assert_allclose(repeats.score, expected, rtol=1e-11)
    bad = [sum(not math.isfinite(v) or (geometric and v == 0) for v in row) for row in scores]
    assert repeats.unusable.tolist() == bad
    np.testing.assert_array_equal(np.isnan(repeats.mean), np.array(bad) > 0)
    assert repeats.ranks.tolist() == literal_ranks(repeats.mean.tolist())
    ordered = repeats.mean[repeats.order]
    assert not any(better(b, a) for a, b in itertools.pairwise(ordered))
    np.testing.assert_array_equal(repeats.scores, scores)  # kept as they were


def test_spread_and_standard_error():
    scores = np.random.default_rng(0).lognormal(size=(5, 7))
    repeats = Repeats(scores)
    for i, row in enumerate(scores):
        logs = [math.log(v) for v in row]
        mean = sum(logs) / 7
        deviation = math.sqrt(sum((v - mean) ** 2 for v in logs) / 6)
        np.testing.assert_allclose(repeats.spread[i], deviation, rtol=1e-12)
        np.testing.assert_allclose(repeats.standard_error[i], deviation / math.sqrt(7), rtol=1e-12)
    plain = Repeats(scores, geometric=False)
    np.testing.assert_allclose(plain.spread, [np.std(r, ddof=1) for r in scores], rtol=1e-12)


def test_a_single_repeat_has_no_spread():
    once = Repeats([[1.0], [2.0]])
    assert np.isnan([once.spread, once.standard_error]).all()
    assert once.ranks.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 0.0])
def test_one_bad_repeat_makes_a_candidate_last(bad):
    geometric = bad == 0
    repeats = Repeats([[1e9, 1e9, bad], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]], geometric)
    assert repeats.ranks.tolist() == [2.0, 1.0, 0.0]
    assert repeats.unusable.tolist() == [1, 0, 0]


@pytest.mark.parametrize("scores", [[1.0, 2.0], [[]], np.zeros((0, 3)), 1.0])
def test_repeats_refuses_what_is_no_table(scores):
    with pytest.raises(ValueError, match=r"give \[candidates, repeats\]"):
        Repeats(scores)


def test_negative_scores_have_no_logarithm():
    with pytest.raises(ValueError, match=r"2 scores are negative.*geometric=False"):
        Repeats([[1.0, -1.0], [-INF, 1.0]])
    assert Repeats([[1.0, -1.0]], geometric=False).mean.tolist() == [0.0]


def test_the_order_of_repeats_parts_no_candidates():
    row = np.exp(np.random.default_rng(0).normal(size=5)).tolist()
    repeats = Repeats(list(itertools.permutations(row)))
    assert len(set(repeats.ranks.tolist())) == 1


@given(hnp.arrays(np.float64, st.integers(1, 9), elements=AWKWARD))
def test_ranks_count_who_is_better(values):
    assert ranks(values).tolist() == literal_ranks(values.tolist())


# --- agreement ---


@given(st.integers(2, 9).flatmap(lambda n: hnp.arrays(np.float64, (2, n), elements=AWKWARD)))
@settings(max_examples=60)
def test_correlations_are_those_of_the_definition(pair):
    a, b = pair.tolist()
    found = agreement(a, b, seed=0, resamples=5)
    np.testing.assert_allclose(found.spearman.value, literal_spearman(a, b), atol=1e-12)
    np.testing.assert_allclose(found.kendall.value, literal_tau_b(a, b), atol=1e-12)
    np.testing.assert_allclose(spearman(a, b), literal_spearman(a, b), atol=1e-12)
    assert found.candidates == len(a)
    bad = sum(not (math.isfinite(x) and math.isfinite(y)) for x, y in zip(a, b, strict=True))
    assert found.unusable == bad


def test_correlations_are_those_of_scipy():
    rng = np.random.default_rng(0)
    a = rng.normal(size=200)
    b = np.round(a + rng.normal(size=200), 1)  # with equal values
    found = agreement(a, b, seed=0, resamples=2)
    np.testing.assert_allclose(found.spearman.value, stats.spearmanr(a, b).statistic, rtol=1e-12)
    np.testing.assert_allclose(found.kendall.value, stats.kendalltau(a, b).statistic, rtol=1e-12)


def test_bootstrap_of_agreement_is_the_literal_one():
    """Same draws, everything else written out."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 12))
    found = agreement(a, b, seed=7, confidence=0.8, resamples=40)
    picks = np.random.default_rng(7).integers(12, size=(40, 12))
    for interval, statistic in (
        (found.spearman, literal_spearman),
        (found.kendall, literal_tau_b),
    ):
        resampled = [statistic(a[p].tolist(), b[p].tolist()) for p in picks]
        np.testing.assert_allclose(
            (interval.low, interval.high), np.quantile(resampled, (0.1, 0.9)), rtol=1e-12
        )


def test_agreement_in_pieces_is_agreement(monkeypatch):
    a, b = np.random.default_rng(1).normal(size=(2, 10))
    whole = agreement(a, b, seed=0, resamples=50)
    monkeypatch.setattr("nnopt.scores.agreement.CHUNK", 70)
    assert agreement(a, b, seed=0, resamples=50) == whole
    assert agreement(a, b, seed=1, resamples=50) != whole


@pytest.mark.parametrize(("sign", "value"), [(1, 1.0), (-1, -1.0)])
def test_perfect_agreement_is_certain(sign, value):
    a = np.arange(20.0)
    found = agreement(a, sign * np.exp(a), seed=0, resamples=50)
    for interval in (found.spearman, found.kendall):
        np.testing.assert_allclose((interval.value, interval.low, interval.high), value)


def test_no_order_no_correlation():
    found = agreement([1.0, 1.0, NAN], [1.0, 2.0, 3.0], seed=0, resamples=50)
    assert found.unusable == 1
    assert math.isfinite(found.spearman.value)  # NaN is last: an order
    level = agreement([NAN, INF, -INF], [1.0, 2.0, 3.0], seed=0, resamples=50)
    for interval in (level.spearman, level.kendall):
        assert np.isnan([interval.value, interval.low, interval.high]).all()


def test_agreement_intervals_cover():
    """Of the correlation of two normal variables, which is known: 6/pi asin(rho/2), 2/pi asin(rho)."""
    rho, count, trials = 0.8, 40, 80
    true = 6 / math.pi * math.asin(rho / 2), 2 / math.pi * math.asin(rho)
    rng = np.random.default_rng(5)
    hits = np.zeros((2, 2))
    for trial in range(trials):
        a, b = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], count).T
        for row, confidence in enumerate((0.95, 0.5)):
            found = agreement(a, b, seed=trial, confidence=confidence, resamples=120)
            for column, interval in enumerate((found.spearman, found.kendall)):
                hits[row, column] += interval.low <= true[column] <= interval.high
    assert (hits[0] >= 0.85 * trials).all(), hits
    assert (np.abs(hits[1] - 0.5 * trials) <= 0.2 * trials).all(), hits


@pytest.mark.parametrize(
    ("a", "b", "options"),
    [
        ([1.0, 2.0], [1.0], {}),
        ([1.0], [1.0], {}),
        ([[1.0, 2.0]], [[1.0, 2.0]], {}),
        ([1.0, 2.0], [1.0, 2.0], {"confidence": 1.0}),
        ([1.0, 2.0], [1.0, 2.0], {"resamples": 0}),
    ],
)
def test_agreement_refuses(a, b, options):
    with pytest.raises(ValueError, match="give"):
        agreement(a, b, seed=0, **options)


# --- fidelity ---


def literal_fidelity(cheap, reference, group, top, geometric):
    rest = [s for s in range(reference.shape[1]) if s not in group]

    def means(table, columns):
        return [literal_mean([row[c] for c in columns], geometric) for row in table.tolist()]

    def best_first(values):
        return sorted(
            range(len(values)),
            key=lambda i: (-values[i] if math.isfinite(values[i]) else INF, i),
        )

    own, consensus = means(cheap, group), means(reference, rest)
    same = means(reference, group)
    first = best_first(own)
    return (
        literal_spearman(own, consensus),
        literal_spearman(own, same),
        literal_ranks(consensus)[first[0]],
        len(set(first[:top]) & set(best_first(consensus)[:top])),
    )


@given(
    st.data(),
    st.integers(2, 6),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 4),
    st.booleans(),
)
@settings(max_examples=60)
def test_fidelity_is_that_of_the_definition(data, candidates, tried, more, top, geometric):
    draw = data.draw
    cheap = draw(hnp.arrays(np.float64, (candidates, tried), elements=POSITIVE))
    reference = draw(hnp.arrays(np.float64, (candidates, tried + more), elements=POSITIVE))
    together = draw(st.integers(1, tried))
    found = fidelity(cheap, reference, seeds_together=together, top=top, geometric=geometric)
    groups = list(itertools.combinations(range(tried), together))
    assert [tuple(g) for g in found.seeds.tolist()] == groups
    assert found.top == min(top, candidates)
    for i, group in enumerate(groups):
        expected = literal_fidelity(cheap, reference, group, top, geometric)
        own = found.spearman[i], found.same_seeds[i], found.best_rank[i], found.overlap[i]
        np.testing.assert_allclose(own, expected, atol=1e-12)


def test_fidelity_never_sees_its_own_seeds():
    """The luck of a seed, shared by cheap and reference, must not count."""
    luck = np.random.default_rng(0).normal(size=(300, 4))
    found = fidelity(luck, luck, geometric=False)
    np.testing.assert_allclose(found.same_seeds, 1.0)
    assert np.abs(found.spearman).max() < 0.2


def test_more_seeds_together_are_more_faithful():
    rng = np.random.default_rng(0)
    quality = rng.normal(size=(200, 1))
    scores = np.exp(quality + 0.7 * rng.normal(size=(200, 6)))
    alone, together = fidelity(scores, scores), fidelity(scores, scores, seeds_together=3)
    assert together.spearman.mean() > alone.spearman.mean() + 0.03
    assert len(together.seeds) == 20
    assert str(together).startswith(f"Spearman {together.spearman.mean():.3f} to the consensus")
    assert str(together).endswith("of its best 10 are there (means of 20)")


@pytest.mark.parametrize(
    ("cheap", "reference", "options", "message"),
    [
        ((3, 2), (4, 2), {}, "same candidates"),
        ((1, 2), (1, 3), {}, "2 or more"),
        ((3, 3), (3, 2), {}, "at least the seeds"),
        ((3, 2), (3, 2), {"seeds_together": 2}, "none for the consensus"),
        ((3, 2), (3, 3), {"seeds_together": 3}, "3 seeds together"),
        ((3, 2), (3, 3), {"top": 0}, "top=1"),
    ],
)
def test_fidelity_refuses(cheap, reference, options, message):
    with pytest.raises(ValueError, match=message):
        fidelity(np.ones(cheap), np.ones(reference), **options)


# --- confidence in a rank ---


def exact(means_of_resamples, top, confidence):
    """Interval of the rank and probabilities, from all equally probable resamples `[candidates, resamples]`."""
    found = np.array([literal_ranks(column) for column in means_of_resamples.T.tolist()]).T
    best = (found == 0).mean(axis=1)  # no ties in these cases
    in_top = (found < top).mean(axis=1)
    tail = (1 - confidence) / 2
    ordered = np.sort(found, axis=1)
    count = found.shape[1]
    low = ordered[:, math.ceil(tail * count) - 1]
    high = ordered[:, math.ceil((1 - tail) * count) - 1]
    return best, in_top, low, high


def assert_estimates(found, wanted, resamples):
    best, in_top, low, high = wanted
    noise = 4.5 * 0.5 / math.sqrt(resamples)
    np.testing.assert_allclose(found.best, best, atol=noise)
    np.testing.assert_allclose(found.in_top, in_top, atol=noise)
    np.testing.assert_array_equal(found.low, low)
    np.testing.assert_array_equal(found.high, high)


def test_whole_repeats_are_drawn_as_if_all_draws_were_tried():
    values = np.random.default_rng(2).normal(size=(5, 4)) + np.arange(5.0)[:, None] / 3
    draws = list(itertools.product(range(4), repeat=3))
    means = np.array([[sum(row[r] for r in d) / 3 for d in draws] for row in values.tolist()])
    found = rank_confidence(
        Repeats(values, False), seed=0, pooled=False, top=2, confidence=0.4, resamples=20_000
    )
    wanted = exact(means, 2, 0.4)
    assert_estimates(found, wanted, 20_000)
    *_, high = wanted
    *_, highest = exact(means, 2, 0.999)
    assert (high < highest).any()


def test_residuals_are_drawn_as_if_all_draws_were_tried():
    values = np.array([[1.0, 1.31], [1.05, 0.72], [0.2, 1.09]])
    candidates, repeats = values.shape
    residuals = []
    for i, r in np.ndindex(3, 2):
        rest = values[i, r] - values[i].mean() - values[:, r].mean() + values.mean()
        residuals.append(rest * math.sqrt(repeats / (repeats - 1) * candidates / (candidates - 1)))
    pairs = [(a + b) / 2 for a, b in itertools.product(residuals, repeat=2)]
    means = np.array(
        [values.mean(axis=1) + noise for noise in itertools.product(pairs, repeat=3)]
    ).T  # 46,656 of them
    found = rank_confidence(Repeats(values, False), seed=0, top=2, confidence=0.6, resamples=20_000)
    # Residuals come in opposite pairs, so some resamples are level; they share the place.
    high = np.sort(means, axis=0)[::-1]
    assert (np.abs(high[0] - high[1]) < 1e-12).mean() < 0.02
    best, in_top, *_ = exact(means, 2, 0.6)
    np.testing.assert_allclose(found.best, best, atol=0.03)
    np.testing.assert_allclose(found.in_top, in_top, atol=0.03)


def test_pooled_residuals_have_the_variance_of_the_noise():
    """For noise of deviation 0.5 the mean of two repeats has 0.5 / sqrt(2), which two far candidates show in their ranks."""
    noise = 0.5 * np.random.default_rng(0).normal(size=(400, 2))
    gap = 0.4
    values = np.arange(400)[:, None] % 2 * gap + np.arange(400)[:, None] // 2 * 100.0 + noise
    found = rank_confidence(Repeats(values, False), seed=0, resamples=500)
    # Ranks of a pair swap if the difference of two noisy means exceeds what was observed.
    observed = values.mean(axis=1)
    top_pair = observed[-1] - observed[-2]
    expected = stats.norm.cdf(top_pair / (math.sqrt(2) * 0.5 / math.sqrt(2)))
    np.testing.assert_allclose(found.best[-1], expected, atol=0.08)


def simulated(rng, candidates, repeats, noise=0.33):
    """True values, and scores with noise and an offset for each repeat."""
    true = rng.normal(size=candidates)
    offsets = 3 * rng.normal(size=(1, repeats))
    return true, true[:, None] + offsets + noise * rng.normal(size=(candidates, repeats))


@pytest.mark.parametrize(
    ("pooled", "repeats", "least", "most"),
    [(True, 2, 0.92, 0.995), (True, 5, 0.92, 0.995), (False, 8, 0.9, 0.99), (False, 2, 0.3, 0.7)],
)
def test_rank_intervals_cover(pooled, repeats, least, most):
    """95% are meant; the docstring owns up to what two repeats without pooling give."""
    rng = np.random.default_rng(9)
    covered, claimed, right = [], [], []
    for trial in range(25):
        true, scores = simulated(rng, 50, repeats)
        found = rank_confidence(Repeats(scores, False), seed=trial, pooled=pooled, resamples=300)
        rank = ranks(true)
        covered.append(((found.low <= rank) & (rank <= found.high)).mean())
        claimed += found.in_top.tolist()
        right += (rank < 10).tolist()
    assert least <= np.mean(covered) <= most
    if pooled:  # of those said to be in the top with a probability, that share is
        claimed, right = np.array(claimed), np.array(right)
        for low, high in ((0.0, 0.1), (0.2, 0.8), (0.9, 1.01)):
            bin_ = (claimed >= low) & (claimed < high)
            assert bin_.sum() > 20
            assert abs(right[bin_].mean() - claimed[bin_].mean()) < 0.12


@pytest.mark.parametrize("pooled", [True, False])
def test_repeats_that_agree_leave_no_doubt(pooled):
    scores = np.repeat([[3.0], [9.0], [1.0], [9.0]], 4, axis=1)
    found = rank_confidence(Repeats(scores), seed=0, pooled=pooled, top=3, resamples=50)
    assert found.low.tolist() == found.high.tolist() == [2.0, 0.5, 3.0, 0.5]
    assert found.best.tolist() == [0.0, 0.5, 0.0, 0.5]
    assert found.in_top.tolist() == [1.0, 1.0, 0.0, 1.0]


def test_level_candidates_share_the_last_place_of_the_top():
    found = rank_confidence(Repeats([[5.0] * 2, [1.0] * 2, [1.0] * 2]), seed=0, top=2, resamples=9)
    assert found.in_top.tolist() == [1.0, 0.5, 0.5]


@pytest.mark.parametrize("pooled", [True, False])
def test_one_repeat_says_nothing(pooled):
    found = rank_confidence(Repeats([[1.0], [2.0], [4.0]]), seed=0, pooled=pooled)
    assert found.says_nothing
    assert str(found) == "one repeat says nothing about how sure a rank is; score with more seeds"
    assert (found.low.tolist(), found.high.tolist()) == ([0.0] * 3, [2.0] * 3)
    assert np.isnan([found.best, found.in_top]).all()


def test_confidence_speaks_of_the_winner():
    found = rank_confidence(Repeats([[1.0, 1.1], [50.0, 49.0]]), seed=0, resamples=50)
    assert not found.says_nothing
    assert (
        str(found)
        == "candidate 1 is the best with probability 1.00, its rank is 0 to 0, by 2 repeats"
    )


@given(tables(POSITIVE, (6, 4)), st.booleans(), st.integers(1, 7))
@settings(max_examples=60)
def test_probabilities_are_shared_out(scores, pooled, top):
    repeats = Repeats(scores)
    found = rank_confidence(repeats, seed=0, pooled=pooled, top=top, resamples=20)
    usable = repeats.unusable == 0
    if scores.shape[1] == 1:
        assert found.says_nothing
        return
    assert found.top == min(top, len(scores))
    assert (found.low >= 0).all()
    assert (found.low <= found.high).all()
    assert (found.high <= len(scores) - 1).all()
    np.testing.assert_allclose(found.best.sum(), 1.0 if usable.any() else 0.0)
    np.testing.assert_allclose(found.in_top.sum(), min(found.top, usable.sum()))
    last = len(scores) - 1 - (np.count_nonzero(~usable) - 1) / 2
    for array in (found.low, found.high):
        np.testing.assert_array_equal(array[~usable], last)
    assert not found.best[~usable].any()
    assert not found.in_top[~usable].any()


@pytest.mark.parametrize("pooled", [True, False])
@given(hnp.arrays(np.int64, (4, 3), elements=st.integers(-4, 4)), st.integers(-9, 9))
@settings(max_examples=30)
def test_what_all_candidates_share_moves_no_rank(pooled, scores, offset):
    if pooled:  # residuals that are zero but for rounding must not decide between level candidates
        scores = scores + 1e-3 * np.arange(12).reshape(4, 3) ** 2
    moved = scores + np.array([0, 1, 2]) * offset
    one, other = (
        rank_confidence(Repeats(s, False), seed=0, pooled=pooled, top=2, resamples=30)
        for s in (scores, moved)
    )
    np.testing.assert_allclose(one.in_top, other.in_top, atol=0.07)
    if not pooled:  # whole numbers: exact
        np.testing.assert_array_equal(one.low, other.low)
        np.testing.assert_array_equal(one.best, other.best)


@pytest.mark.parametrize("pooled", [True, False])
def test_confidence_depends_on_its_seed_alone(pooled, monkeypatch):
    _, scores = simulated(np.random.default_rng(0), 12, 3, noise=2.0)

    def run(seed):
        return rank_confidence(
            Repeats(scores, False), seed=seed, pooled=pooled, resamples=100
        ).in_top

    assert run(1).tolist() == run(1).tolist() != run(2).tolist()
    whole = run(1)
    monkeypatch.setattr("nnopt.scores.statistics.CHUNK", 12 * 7)  # resampled in pieces
    np.testing.assert_allclose(run(1), whole, atol=0.35)
    np.testing.assert_allclose(run(1).sum(), 10)


@pytest.mark.parametrize("options", [{"top": 0}, {"confidence": 0.0}, {"resamples": 0}])
def test_confidence_refuses(options):
    with pytest.raises(ValueError, match="give"):
        rank_confidence(Repeats([[1.0, 2.0]]), seed=0, **options)


def test_statistics_of_scipy_are_imported_when_they_are_needed():
    code = (
        "import sys, nnopt.scores.agreement\nassert 'scipy.stats' not in sys.modules\n"
        "nnopt.scores.agreement.spearman([1.0, 2.0], [1.0, 2.0])\nassert 'scipy.stats' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
