"""Loop nests: what transformations do to them, when programs are the same operator, what is refused."""

import csv
import functools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnopt.errors import NestError
from nnopt.nests import (
    Bind,
    Bottleneck,
    Depthwise,
    Dilate,
    Fuse,
    Group,
    Interchange,
    Parallel,
    Prefetch,
    Program,
    Restrict,
    Share,
    Shift,
    Slabs,
    Split,
    StripMine,
    Tie,
    Tile,
    Unroll,
    Untie,
    Vectorize,
    Widen,
    canonical,
    convolution,
    dense,
)
from nnopt.nests.canonical import check_disjoint, weights
from nnopt.nests.interpret import interpret, kernel_box
from nnopt.nests.named import (
    depthwise,
    dilated,
    grouped,
    pointwise,
    sequence1,
    sequence2,
    sequence3,
    sequence4,
    spatial_bottleneck,
)
from nnopt.nests.sample import distinct, divisors, draw

CONV = convolution((8, 8), 8, 12, (3, 3))


def made(*steps, of=CONV):
    return Program(steps)(of)


def same(a, b):
    return canonical(a) == canonical(b) and hash(canonical(a)) == hash(canonical(b))


def values(operator, seed=0, box=None):
    """The operator's result on random numbers, by the oracle."""
    rng = np.random.default_rng(seed)
    _, extents = box or kernel_box(operator)
    return interpret(operator, rng.normal(size=(1, *operator.input)), rng.normal(size=extents))


def test_a_convolution_by_hand():
    x = np.arange(10.0).reshape(1, 5, 2)
    conv = convolution((5,), 2, 1, (3,), strides=(2,), padding=((1, 0),))
    kernel = np.array([[[1.0], [0]], [[0], [2]], [[3], [0]]])
    assert conv.output == (2, 1)
    # element 0: row -1 is zero, 2 * x[0, 1] + 3 * x[1, 0]; element 1: x[1, 0] + 2 * x[2, 1] + 3 * x[3, 0]
    np.testing.assert_array_equal(interpret(conv, x, kernel), [[[2 + 6], [2 + 10 + 18]]])


KEEPING = [
    (Interchange("co", "kw"),),
    (StripMine("oh", 4),),
    (Tile("co", "ci", 4, 2),),
    (StripMine("co", 6), StripMine("co_i", 2), Interchange("co_o", "co_ii")),
    (StripMine("oh", 4), Fuse("oh_o", "oh_i")),
    (Fuse("oh", "ow"), StripMine("oh.ow", 16)),
    (Fuse("oh", "ow"), StripMine("oh.ow", 4), Interchange("oh.ow_o", "kh")),
    (Fuse("kh", "kw"), Fuse("ow", "kh.kw")),
    (Split("co", (5,)),),
    (Split("oh", (1, 6)), Split("co", (4, 8), part=1), Interchange("ci", "kh", part=2)),
    (StripMine("co", 3), Split("co_i", (1,))),
    (Unroll("kw"), Interchange("ow", "kw"), Vectorize("ow"), Parallel("co")),
    (Unroll("ci", 4), Prefetch("k", "ci_o"), Bind("oh", "blockIdx.x"), Bind("ow", "threadIdx.x")),
]


@pytest.mark.parametrize("steps", KEEPING, ids=str)
def test_schedules_keep_the_function_and_the_operator(steps):
    operator = made(*steps)
    assert Program(steps).keeps_function
    np.testing.assert_allclose(values(operator), values(CONV), rtol=0, atol=1e-12)
    assert operator.domain_size == CONV.domain_size
    assert same(operator, CONV)


def test_groups_arise():
    by_hand = made(Tile("co", "ci", 3, 2), Tie("co_o", "ci_o"))
    assert same(by_hand, made(Group("co", "ci", 4)))
    blocks = [Restrict("ci", 2 * p, 2 * p + 2, part=p) for p in range(4)]
    assert same(
        made(Split("co", (3, 6, 9)), *blocks), by_hand
    )  # each block on its own: the same operator again
    assert same(by_hand, convolution((8, 8), 8, 12, (3, 3), groups=4))
    assert not same(by_hand, made(Group("co", "ci", 2)))
    assert same(made(Group("co", "ci", 2), Group("co", "ci", 2)), made(Group("co", "ci", 4)))


def test_named_operators_are_what_their_names_say():
    square = convolution((8, 8), 8, 8, (3, 3))
    assert same(depthwise()(square), convolution((8, 8), 8, 8, (3, 3), groups=8))
    assert same(grouped(2)(square), convolution((8, 8), 8, 8, (3, 3), groups=2))
    assert same(pointwise((3, 3))(square), convolution((8, 8), 8, 8, (1, 1)))
    assert same(
        dilated()(square), convolution((8, 8), 8, 8, (2, 2), dilation=(2, 2), padding=((1, 1),) * 2)
    )
    assert same(sequence1(8, (1, 1, 1, 1))(square), square)
    assert same(sequence3(1)(square), square)
    assert same(sequence4(8, (3, 3), (3, 3))(square), grouped(2)(square))
    halves = sequence4(8, (3, 3), (1, 5))(square)
    assert weights(canonical(halves)) == 4 * 4 * (1 + 25)
    assert spatial_bottleneck(2)(square).domain_size * 4 == square.domain_size


def test_sequence2_of_one_group_is_the_convolution_without_some_weights():
    square = convolution((8, 8), 8, 8, (3, 3))
    operator = sequence2(8, 2, 1)(square)
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, *square.input)), rng.normal(size=square.kernel)
    zeroed = kernel.copy()
    zeroed[:, :, :2, 2:] = 0  # outputs from the third on do not see the first two inputs
    np.testing.assert_allclose(
        interpret(operator, x, kernel), interpret(square, x, zeroed), atol=1e-12
    )


def test_published_counts(data_dir):
    rows = list(
        csv.DictReader(
            (data_dir / "reference" / "sequence_operator_counts.csv").read_text().splitlines()
        )
    )
    assert len(rows) == 23
    for row in rows:
        inputs, outputs, size, stride = (int(row[k]) for k in ("c_in", "c_out", "H=W", "stride"))
        given_ = json.loads(row["args"])
        conv = convolution(
            (size, size), inputs, outputs, (3, 3), strides=(stride,) * 2, padding=((1, 1),) * 2
        )
        program = {
            "Conv": Program,
            "Seq1": lambda a=given_, n=outputs: sequence1(n, a["g"]),
            "Seq2": lambda a=given_, n=inputs: sequence2(n, a["uf"], a["g"]),
            "Seq3": lambda a=given_: sequence3(a["sf"]),
        }[row["op"]]()
        if row["status"] == "invalid":
            with pytest.raises(NestError, match="does not divide"):
                program(conv)
            continue
        operator = program(conv)
        check_disjoint(operator)
        assert weights(canonical(operator)) == int(row["weights(no bias,k=3)"])
        assert operator.domain_size == int(row["macs_per_image"])
        assert "x".join(map(str, (operator.output[-1], *operator.output[:-1]))) == row["out_CxHxW"]


CHANGING = [
    Bottleneck("co", 3), Bottleneck("oh", 2), Bottleneck("ci", 4), Bottleneck("kh", 3), Group("co", "ci", 2), Depthwise("co", "ci"),
    Tie("kh", "kw"), Tie("oh", "ci"), Restrict("ci", 3, 5), Widen("kw", 7), Dilate("kh", 2), Shift("ci", "ow", 1), Share("ci"),
    Share("co"), Slabs("oh", 4), Untie("oh"),
]  # fmt: skip


@pytest.mark.parametrize("step", CHANGING, ids=str)
def test_domains_change_by_the_stated_factor(step):
    conv = convolution((8, 8), 8, 24, (3, 3)) if isinstance(step, Depthwise) else CONV
    (nest,) = conv.nests
    operator = step(conv)
    assert operator.domain_size == conv.domain_size * step.domain_ratio(nest)
    assert operator.output == conv.output
    assert not step.keeps_function
    assert not same(operator, conv)
    check_disjoint(operator)


def numpy_conv(x, kernel):
    """`[h, w, in]` by `[3, 3, in, out]`, same size, as a sum of shifted products."""
    h, w, _ = x.shape
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    return sum(padded[i : i + h, j : j + w] @ kernel[i, j] for i in range(3) for j in range(3))


def test_what_transformations_mean():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(8, 8, 8)), rng.normal(size=(3, 3, 8, 12))
    full = numpy_conv(x, kernel)

    def run(*steps):
        operator = made(*steps)
        box = tuple(
            slice(low, low + extent) for low, extent in zip(*kernel_box(operator), strict=True)
        )
        return interpret(operator, x[None], kernel[box])[0]

    np.testing.assert_allclose(run(), full, atol=1e-12)
    every_other = full[::2].repeat(2, axis=0)
    np.testing.assert_allclose(run(Bottleneck("oh", 2)), every_other, atol=1e-12)
    seen = kernel.copy()
    seen[:, :, 2:] = 0
    np.testing.assert_allclose(run(Bottleneck("ci", 4)), numpy_conv(x, seen), atol=1e-12)
    diagonal = kernel * np.eye(3)[:, :, None, None]
    np.testing.assert_allclose(run(Tie("kh", "kw")), numpy_conv(x, diagonal), atol=1e-12)
    middle = kernel * (np.arange(3) == 1)[:, None, None, None]
    np.testing.assert_allclose(run(Bottleneck("kh", 3)), numpy_conv(x, middle), atol=1e-12)
    slabs = np.concatenate([numpy_conv(x[:4], kernel), numpy_conv(x[4:], kernel)])
    np.testing.assert_allclose(run(Slabs("oh", 2)), slabs, atol=1e-12)
    apart = np.pad(x, ((2, 2), (0, 0), (0, 0)))
    shifted = sum(
        numpy_conv(apart[2 + s : 10 + s] * (np.arange(8) // 2 == c), kernel)
        for c, s in enumerate((-2, -1, 0, 1))
    )
    # the rows beside the image are zero for a shifted one too, but a window reaches them from within: compare away from the border
    np.testing.assert_allclose(
        run(StripMine("ci", 2), Shift("ci_o", "oh", 1))[3:5], shifted[3:5], atol=1e-12
    )


REFUSED = [
    ((Group("co", "ci", 4), StripMine("oh", 3)), "step 2 of 2, StripMine('oh', 3): tile 3 does not divide the 8 of oh"),
    ((Group("co", "oh", 4),), "step 1 of 1, Group('co', 'oh', 4): oh is no loop of input channels"),
    ((Group("ci", "ci", 4),), "ci is no loop of output channels"),
    ((Group("co", "ci", 8),), "group count 8 does not divide the 12 of co"),
    ((Bottleneck("co", 0),), "bottleneck 0 is below 1"),
    ((Bottleneck("co", 24),), "bottleneck 24 does not divide the 12 of co"),
    ((Share("co"), Bottleneck("co", 2)), "copies what is computed once"),
    ((Restrict("co", 0, 4),), "use Bottleneck, which copies"),
    ((Restrict("ci", 4, 4),), "4..4 is no range of the 8 of ci"),
    ((Tie("co", "ci"),), "co has 12 iterations and ci has 8"),
    ((Tie("oh", "ow"),), "leaves elements unwritten"),
    ((Tie("ci", "ci"),), "cannot be tied to itself"),
    ((Split("ci", (4,)),), "ci is a loop of a reduction"),
    ((Split("co", (12,)),), "do not cut the 12 of co into parts"),
    ((Fuse("co", "oh"),), "oh is not directly within co"),
    ((Parallel("ci"),), "ci is a loop of a reduction"),
    ((Fuse("co", "ci"), Parallel("co.ci")), "co.ci is a loop of a reduction"),
    ((Vectorize("co"),), "co is not the innermost loop"),
    ((Unroll("ci"), StripMine("ci", 2)), "ci is marked unroll"),
    ((Unroll("ci"), Unroll("ci")), "marked unroll already"),
    ((Prefetch("k", "oh"),), "does not depend on oh"),
    ((Prefetch("y", "oh"),), "it is x or k"),
    ((Bind("oh", "warp"),), "there is no 'warp'"),
    ((Bind("oh", "blockIdx.x"), Bind("ow", "blockIdx.x")), "oh is bound to blockIdx.x already"),
    ((Widen("kh", 4),), "cannot become 4 about its middle"),
    ((Widen("ci", 10),), "ci is no loop of a window"),
    ((Dilate("kh", 2), Widen("kh", 9), StripMine("kh", 3), Widen("kh_i", 5)), "kh_i is a part of a window that kh_o moves"),
    ((Fuse("co", "ci"), Bottleneck("co.ci", 24)), "co.ci was fused from loops of the output and of a reduction"),
    ((Interchange("oh", "ow"), Interchange("oh", "kh"), Fuse("ow", "kh"), Bottleneck("ow.kh", 12)), "ow.kh was fused from loops"),
    ((Dilate("kh", 0),), "dilation 0 is below 1"),
    ((Shift("kh", "oh", 1),), "kh is no loop of channels"),
    ((Shift("ci", "co", 1),), "co is no loop of rows or columns"),
    ((Share("oh"),), "do not depend on oh"),
    ((Untie("co"),), "depend on co already"),
    ((Untie("ci"),), "ci is a loop of a reduction"),
    ((Slabs("oh", 3),), "slab count 3 does not divide the 8 of oh"),
    ((Slabs("co", 2),), "co is no loop of rows or columns"),
    ((Interchange("co", "z"),), "there is no loop 'z'; there are co, ci, oh, ow, kh, kw"),
    ((Unroll("co", part=1),), "there is no part 1; there are 1, numbered from 0"),
    ((Fuse("oh", "ow"), Split("oh.ow", (8,))), "oh.ow was fused; split before that"),
    ((Fuse("oh", "ow"), Bottleneck("kh", 3), Slabs("oh.ow", 2)), "is no loop of rows or columns"),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "message"), REFUSED, ids=lambda v: str(v)[:60])
def test_impossible_programs_are_refused_with_the_step(steps, message):
    with pytest.raises(NestError) as error:
        made(*steps)
    assert message in str(error.value)
    assert str(error.value).startswith("step ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((8, 8), 8, 12, (3,)), "window (3,) for an image of 2 dimensions"),
        (((8, 8), 0, 12, (3, 3)), "at least 1"),
        (((8,) * 4, 8, 12, (3,) * 4), "nests are for 1 to 3"),
    ],
)
def test_impossible_convolutions(arguments, message):
    with pytest.raises(NestError) as error:
        convolution(*arguments)
    assert message in str(error.value)
    with pytest.raises(NestError, match="do not divide"):
        convolution((8, 8), 8, 12, (3, 3), groups=5)
    with pytest.raises(NestError, match="larger than the image"):
        convolution((2, 2), 8, 12, (3, 3), padding="VALID")
    with pytest.raises(NestError, match="SAME, VALID or pairs"):
        convolution((8, 8), 8, 12, (3, 3), padding="CIRCULAR")


def test_programs_replay_from_json():
    program = Program((Split("co", (4, 8)), Group("co", "ci", 4, part=2), Unroll("kw"), Untie()))
    text = json.dumps(program.to_json())
    assert Program.from_json(text) == program
    assert hash(Program.from_json(json.loads(text))) == hash(program)
    assert (
        str(program) == "Split('co', (4, 8)), Group('co', 'ci', 4, part=2), Unroll('kw'), Untie()"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a program is a JSON list of steps"),
        ("{}", "a program is a list of steps"),
        ("[3]", "step 1 is 3"),
        ('[{"step": "Prune"}]', "step 1: there is no 'Prune'"),
        ('[{"step": "Untie"}, {"step": "Group", "output": "co"}]', "step 2: Group needs 'input'"),
        ('[{"step": "Untie", "loops": "co"}]', "step 1: Untie has no 'loops'"),
        (
            '[{"step": "StripMine", "loop": "co", "size": "4"}]',
            "step 1: size of StripMine is '4', which does not fit",
        ),
        (
            '[{"step": "Split", "loop": "co", "at": 4}]',
            "step 1: at of Split is 4, which does not fit",
        ),
    ],
)
def test_damaged_programs(text, message):
    with pytest.raises(NestError) as error:
        Program.from_json(text)
    assert message in str(error.value)


def test_code_is_readable():
    operator = made(Split("co", (8,)), Bottleneck("oh", 2, part=0), Group("co", "ci", 4, part=1))
    first, second = str(operator).split("for co in 8:")[1].split("for g in 4:")
    assert "for oh_r in 2:  # copies" in first
    assert (
        "y[2*oh + oh_r, ow, co] += x[2*oh + kh - 1, ow + kw - 1, ci] * k[kh, kw, ci, co]" in first
    )
    assert (
        "y[oh, ow, g + 8] += x[oh + kh - 1, ow + kw - 1, 2*g + ci] * k[kh, kw, 2*g + ci, g + 8]"
        in second
    )
    fused = str(made(Fuse("oh", "ow"), StripMine("oh.ow", 4)))
    assert "y[oh.ow_o//2, 4*(oh.ow_o%2) + oh.ow_i, co]" in fused


@functools.cache
def points(name):
    """Divisors of a loop, for drawing schedules."""
    return divisors(CONV.nests[0].extents[name])


@st.composite
def schedules(draw_):
    """A random schedule, step by step, of what is possible."""
    operator, steps = CONV, []
    for _ in range(draw_(st.integers(1, 6))):
        part = draw_(st.integers(0, len(operator.nests) - 1))
        loops = operator.nests[part].loops
        kind = draw_(st.sampled_from(("interchange", "strip", "fuse", "split")))
        loop = draw_(st.sampled_from(loops))
        if kind == "interchange":
            step = Interchange(loop.name, draw_(st.sampled_from(loops)).name, part=part)
        elif kind == "strip":
            step = StripMine(
                loop.name,
                draw_(st.sampled_from((1, *divisors(loop.extent), loop.extent))),
                part=part,
            )
        elif kind == "fuse":
            at = min(loops.index(loop), len(loops) - 2)
            step = Fuse(loops[at].name, loops[at + 1].name, part=part)
        elif loop.extent > 1 and len(operator.nests) < 6:
            step = Split(loop.name, (draw_(st.integers(1, loop.extent - 1)),), part=part)
        else:
            continue
        try:
            operator = step(operator)
        except NestError:
            continue
        steps.append(step)
    return Program(tuple(steps))


@given(schedules())
@settings(max_examples=150, deadline=None)
def test_any_schedule_keeps_the_function(program):
    operator = program(CONV)
    np.testing.assert_allclose(values(operator), values(CONV), rtol=0, atol=1e-12)
    assert same(operator, CONV)
    check_disjoint(operator)


@given(st.integers(0, 2**32 - 1), schedules())
@settings(max_examples=60, deadline=None)
def test_operators_are_equal_however_they_are_scheduled(seed, program):
    """The steps of a schedule that still apply to a changed operator leave its canonical form alone."""
    drawn = draw(CONV, np.random.default_rng(seed))
    operator = drawn.operator
    for step in program.steps:
        try:
            operator = step(operator)
        except NestError:
            continue
    assert canonical(operator) == drawn.canon


def test_draws_are_possible_distinct_and_repeatable():
    conv = convolution((16, 16), 16, 32, (3, 3), strides=(2, 2))
    found = distinct(conv, 300, np.random.default_rng(0))
    assert len({d.canon for d in found}) == 300
    for d in found:
        assert not d.program.keeps_function
        assert d.program(conv) == d.operator
        assert d.operator.output == conv.output
        check_disjoint(d.operator)
    again = distinct(conv, 300, np.random.default_rng(0))
    assert [d.program for d in again] == [d.program for d in found]


def test_filters_and_exhaustion():
    small = dense(2, 2)
    every = distinct(small, 1000, np.random.default_rng(0), moves=2)
    assert 0 < len(every) < 1000
    few = distinct(
        small, 1000, np.random.default_rng(0), moves=2, accept=lambda d: weights(d.canon) <= 2
    )
    assert {d.canon for d in few} == {d.canon for d in every if weights(d.canon) <= 2}
    with pytest.raises(NestError, match="no transformation is possible"):
        draw(dense(1, 1), np.random.default_rng(0))
