"""Data reuse of loop nests against sets filled by literal loops, closed forms of the literature, and examples worked by hand."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from nnopt.errors import NestError
from nnopt.nests import (
    Bottleneck,
    Depthwise,
    Dilate,
    Fuse,
    Group,
    Interchange,
    Loop,
    Nest,
    Operator,
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
    Widen,
    convolution,
    dense,
)
from nnopt.nests.index import Index, Term
from nnopt.nests.nest import Dim
from nnopt.nests.reuse import ARRAYS, data_reuse, distinct
from nnopt.nests.roofline import (
    Machine,
    Memory,
    arithmetic_intensity,
    roofline,
    under_cache,
)


def visits(nest, array):
    """Every iteration, as its loops' values, with the place that it touches in an array, None for a read outside."""
    dims = getattr(nest, array)
    names = [loop.name for loop in nest.loops]
    copies = [i for i, n in enumerate(names) if not (nest.uses("x", n) or nest.uses("k", n))]
    for point in itertools.product(*(range(loop.extent) for loop in nest.loops)):
        if array != "y" and any(point[i] for i in copies):
            continue  # results are copied
        value = dict(zip(names, point, strict=True))
        place = tuple(d.at.constant + sum(t.value(value[t.loop]) for t in d.at.terms) for d in dims)
        inside = array != "x" or all(0 <= p < d.size for p, d in zip(place, dims, strict=True))
        yield point, place if inside else None


def counted(nest, array):
    """Footprints, traffic, and traffic where a block is kept while no loop moves that the array depends on; by level."""
    points = list(visits(nest, array))
    uses = [nest.uses(array, loop.name) for loop in nest.loops]
    found = []
    for level in range(len(nest.loops) + 1):
        blocks = {}
        for point, place in points:
            blocks.setdefault(point[:level], set()).update(() if place is None else (place,))
        kept, held = 0, None
        for around, block in blocks.items():
            here = tuple(p for p, used in zip(around, uses, strict=False) if used)
            kept += len(block) if here != held else 0
            held = here
        sizes = [len(b) for b in blocks.values()]
        found.append((max(sizes), sum(sizes), kept))
    return tuple(zip(*found, strict=True))


def touched(operator, array):
    """Elements of an array that any nest touches: of the input in its own axes, of which a view's dimensions are digits."""
    found = set()
    for nest in operator.nests:
        dims = getattr(nest, array)
        for _, place in visits(nest, array):
            if place is None:
                continue
            if array == "x":
                axes = [0] * len(operator.input)
                for d, p in zip(dims, place, strict=True):
                    axes[d.axis] = axes[d.axis] * d.size + p
                place = tuple(axes)
            found.add(place)
    return found


def check(operator):
    for nest in operator.nests:
        found = data_reuse(nest)
        assert found.macs == nest.domain_size
        for array in ARRAYS:
            got = getattr(found, array)
            assert (got.footprints, got.traffic, got.stationary) == counted(nest, array), array
            assert got.accesses == sum(p is not None for _, p in visits(nest, array))
    for array in ARRAYS:
        assert distinct(operator, array) == len(touched(operator, array)), array


@st.composite
def convolutions(draw):
    rank = draw(st.sampled_from([1, 1, 2, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=rank, max_size=rank)

    def each(low, high):
        return st.tuples(*[st.integers(low, high)] * rank)

    try:
        return convolution(
            draw(each(1, (12, 6, 3)[rank - 1])),
            groups * draw(st.integers(1, 4 if rank < 3 else 2)),
            groups * draw(st.integers(1, 4 if rank < 3 else 2)),
            draw(each(1, 3 if rank < 3 else 2)),
            strides=draw(each(1, 3)),
            padding=draw(st.one_of(st.sampled_from(["SAME", "VALID"]), pairs)),
            dilation=draw(each(1, 2)),
            groups=groups,
        )
    except NestError:  # the window is larger than the image
        assume(False)


@st.composite
def programs(draw, operator):
    """The operator transformed by up to five steps, those that are not possible left out."""
    for _ in range(draw(st.integers(1, 5))):
        part = draw(st.sampled_from([None, *range(len(operator.nests))]))
        nest = operator.nests[part or 0]
        names = [loop.name for loop in nest.loops]
        equal = [
            (a.name, b.name)
            for a, b in itertools.permutations(nest.loops, 2)
            if a.extent == b.extent and not nest.is_output(b.name)
        ]
        name, number = st.sampled_from(names), st.sampled_from([2, 2, 3])
        # Letters of loops that a step is possible on, so that more than a few are.
        c, o, k = (st.sampled_from([n for n in names if n[0] == a] or names) for a in "cok")
        place = draw(st.integers(0, len(names) - 2))
        tied = draw(st.sampled_from(equal or [("ci", "ci")]))
        kinds = {
            StripMine: (name, number),
            Interchange: (name, name),
            Fuse: (st.just(names[place]), st.just(names[place + 1])),
            Split: (o | c, st.tuples(st.integers(1, 3))),
            Group: (st.just("co"), st.just("ci"), number),
            Tie: (st.just(tied[0]), st.just(tied[1])),
            Bottleneck: (name, number),
            Slabs: (o, number),
            Shift: (c, o, st.sampled_from([-2, -1, 1, 2])),
            Dilate: (k, number),
            Untie: (name | st.just(""),),
            Share: (name,),
            Restrict: (c | k, st.integers(0, 1), st.integers(1, 3)),
            Widen: (k, st.sampled_from([3, 5])),
        }
        kind = draw(st.sampled_from(list(kinds)))
        try:
            after = kind(*map(draw, kinds[kind]), part=part)(operator)
        except NestError:
            continue
        if after.domain_size <= 3000:
            operator = after
    return operator


@settings(max_examples=50, deadline=None, derandomize=True)
@given(operator=convolutions())
def test_convolutions_by_counting(operator):
    assume(operator.domain_size <= 4000)
    check(operator)


@settings(max_examples=90, deadline=None, derandomize=True)
@given(data=st.data())
def test_programs_by_counting(data):
    operator = data.draw(convolutions())
    assume(operator.domain_size <= 1500)
    check(data.draw(programs(operator)))


@st.composite
def affine_nests(draw):
    """Any indices: steps of either sign, several loops or parts of one loop along each dimension, any size."""
    loops = tuple(Loop(n, draw(st.sampled_from([1, 2, 3, 4, 4, 6]))) for n in "abcd")

    def index(loops):
        at = Index(draw(st.integers(-4, 4)))
        for name, extent, _ in loops:
            step = draw(st.sampled_from([0, 0, 1, 1, 2, 3, 4, 6, -1, -2]))
            low = draw(st.sampled_from([1, 1, 2])) if extent in (4, 6) else 1
            high = draw(st.sampled_from([low * 2, extent])) if extent == 4 and low == 1 else extent
            at = at.plus(Term(name, step, low, high // low))
        return at

    def dims(size):
        axes = range(draw(st.integers(1, 3)))
        return tuple(Dim(a, draw(size), index(loops)) for a in axes)

    return Nest(loops, dims(st.just(0)), dims(st.integers(1, 12)), dims(st.just(0)))


def one_index(*digits):
    """A nest of which `x` has one index, of steps and extents."""
    loops = tuple(Loop(f"l{i}", extent) for i, (_, extent) in enumerate(digits))
    terms = [Term(loop.name, d[0], 1, d[1]) for loop, d in zip(loops, digits, strict=True)]
    dim = Dim(0, 99, Index().plus(*terms))
    return Nest(loops, (dim,), (dim,), (dim._replace(size=0),))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(nest=affine_nests())
@example(
    nest=one_index((1, 3), (4, 2), (6, 2))
)  # 0, 4, 6, 10 are as far apart as 0, 1, 2 are wide: 2 + 4 is 6
def test_any_indices_by_counting(nest):
    found = data_reuse(nest)
    for array in ARRAYS:
        got = getattr(found, array)
        assert (got.footprints, got.traffic, got.stationary) == counted(nest, array), array


PLANE = convolution((6, 6), 4, 4, (3, 3))
STEPS = {
    "strip-mined window position": (StripMine("ow", 2), Interchange("ow_i", "kh")),
    "blocks": (Tile("co", "ci", 2, 2), Interchange("co_i", "kw")),
    "rows and columns as one": (Fuse("oh", "ow"),),
    "a part of rows and columns": (Fuse("oh", "ow"), StripMine("oh.ow", 3), Interchange("ci", "oh.ow_i")),
    "channel and row as one": (Fuse("ci", "oh"), Interchange("co", "kw")),
    "groups": (Group("co", "ci", 2),),
    "groups turned outside in": (Group("co", "ci", 2), Interchange("g", "kw"), Interchange("co", "oh")),
    "depthwise": (Depthwise("co", "ci"),),
    "diagonal window": (Tie("kh", "kw"),),
    "diagonal window outside": (Tie("kh", "kw"), Interchange("kh", "co")),
    "shift along rows": (Shift("ci", "oh", 1),),
    "shift along both axes": (Shift("ci", "oh", -1), Shift("ci", "ow", 2), Interchange("co", "kw")),
    "shift in groups": (Group("co", "ci", 2), Shift("ci", "oh", 1), Shift("g", "ow", 1)),
    "shift of tiles": (StripMine("ci", 2), Shift("ci_o", "oh", 1), Shift("ci_i", "ow", 1)),
    "slabs": (Slabs("oh", 3), Untie("oh_o"), Interchange("oh_o", "kw")),
    "slabs of slabs": (Slabs("oh", 3), Slabs("oh_i", 2)),
    "copies": (Bottleneck("oh", 2), Interchange("oh_r", "co")),
    "shared weights": (Share("co"),),
    "a part of a channel's digits": (StripMine("co", 2), Share("co_o"), Fuse("co_o", "co_i")),
    "channels in two parts": (Split("co", (1,)), Group("co", "ci", 1, part=1), Untie()),
    "rows in two parts": (Split("oh", (2,)),),
    "rows in two parts, of windows that meet": (
        Split("oh", (2,)), Restrict("kw", 0, 2, part=0), Restrict("kw", 1, 3, part=1),
    ),
    "rows in two parts, the second of fewer channels": (Split("oh", (2,)), Restrict("ci", 1, 3, part=1)),
    "parts of a shifted view": (Slabs("ow", 2), Split("oh", (3,)), Shift("ci", "oh", 1, part=1)),
    "dilated and wider": (Dilate("kh", 2), Widen("kw", 5)),
}  # fmt: skip


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_each_transformation_by_counting(steps):
    check(Program(steps)(PLANE))


def test_digits_of_a_loop_that_overlap_are_refused():
    at = Index(0, (Term("i", 1, 1, 4), Term("i", 1, 1, 6)))
    nest = Nest((Loop("i", 12),), (Dim(0, 12, at),), (Dim(0, 12, at),), (Dim(0, 0, at),))
    with pytest.raises(NestError, match="neither divides"):
        data_reuse(nest)


@pytest.mark.parametrize(("t", "k"), [(1, 1), (5, 3), (4, 5), (7, 2)])
@pytest.mark.parametrize(("s", "d"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_overlapping_windows(t, k, s, d):
    size = s * (t - 1) + d * (k - 1) + 1
    operator = convolution((size,), 1, 1, (k,), strides=(s,), dilation=(d,), padding="VALID")
    (found,) = data_reuse(operator.nests[0]).x.footprints[:1]
    steps = {s * i + d * j for i in range(t) for j in range(k)}
    assert found == len(steps)
    if (d == 1 and s <= k) or (s == 1 and d <= t):
        assert found == size
    if d == 1 and s >= k:
        assert found == t * k


def test_weights_are_the_product_of_their_extents():
    reuse = data_reuse(convolution((9, 7), 6, 8, (3, 5), groups=2).nests[0])
    assert reuse.loops == ("g", "co", "ci", "oh", "ow", "kh", "kw")
    assert reuse.k.footprints == (2 * 4 * 3 * 15, 4 * 3 * 15, 3 * 15, 15, 15, 15, 5, 1)
    assert reuse.k.accesses == reuse.macs == 2 * 4 * 3 * 63 * 15


@pytest.mark.parametrize("tile", [1, 2, 4, 8])
def test_a_tiled_matrix_product(tile):
    """Hong and Kung (STOC 1981): tiles of `T x T` bring the traffic of `N x N` matrices to `2 N^3 / T`."""
    n = 16
    tiles = [StripMine(a, tile) for a in ("co", "ow", "ci")]
    names = ("co_o", "ow_o", "ci_o", "co_i", "ow_i", "ci_i")
    nest = Program(tuple(tiles))(convolution((n,), n, n, (1,))).nests[0]
    rest = tuple(loop for loop in nest.loops if loop.name not in names)
    nest = dataclasses.replace(nest, loops=(*map(nest.loop, names), *rest))
    reuse = data_reuse(nest)
    assert reuse.footprint(3) == 3 * tile**2
    assert reuse.x.traffic[3] + reuse.k.traffic[3] == 2 * n**3 // tile
    assert reuse.y.stationary[3] == n**2  # the reduction's tiles are innermost: a block of y stays
    assert reuse.x.reuse(3) == reuse.k.reuse(3) == tile
    use = under_cache(nest, 4 * 3 * tile**2)
    assert use.levels == (3,)
    assert use.bytes_moved == 4 * (2 * n**3 // tile + n**2)
    assert use.intensity == 2 * n**3 / use.bytes_moved


def test_interchange_by_hand():
    """`y[co] += x[ci] * k[ci, co]`, 3 outputs and 5 inputs: the array that the outer loop does not move is gone through again."""
    operator = dense(5, 3)
    before, after = (data_reuse(o.nests[0]) for o in (operator, Interchange("co", "ci")(operator)))
    assert (before.loops, after.loops) == (("co", "ci"), ("ci", "co"))
    assert (before.x.footprints, after.x.footprints) == ((5, 5, 1), (5, 1, 1))
    assert (before.x.traffic, after.x.traffic) == ((5, 15, 15), (5, 5, 15))
    assert (before.x.stationary, after.x.stationary) == ((5, 5, 15), (5, 5, 5))
    assert (before.y.stationary, after.y.stationary) == ((3, 3, 3), (3, 3, 15))
    assert before.k.traffic == after.k.traffic == (15, 15, 15)
    # A cache of an element of each: y is written 3 times, or 15 times and read back 12 times.
    small = [under_cache(o, 12) for o in (operator, Interchange("co", "ci")(operator))]
    assert [(u.x.fetched, u.k.fetched, u.y.fetched, u.y.written) for u in small] == [
        (15, 15, 0, 3),
        (5, 15, 12, 15),
    ]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_order_does_not_matter_to_the_whole(data):
    """Whatever keeps the function touches the same; a nest's larger levels touch no less and move no more."""
    operator = data.draw(convolutions())
    first = [distinct(operator, a) for a in ARRAYS]
    for _ in range(4):
        nest = operator.nests[0]
        names = [loop.name for loop in nest.loops]
        pair = st.sampled_from(list(itertools.pairwise(names)))
        step = data.draw(
            st.one_of(
                st.builds(Interchange, st.sampled_from(names), st.sampled_from(names)),
                st.builds(StripMine, st.sampled_from(names), st.sampled_from([2, 3])),
                pair.map(lambda p: Fuse(*p)),
                st.builds(Unroll, st.sampled_from(names)),
                st.builds(lambda n, i: Split(n, (i,)), st.sampled_from(names), st.integers(1, 3)),
            )
        )
        try:
            operator = step(operator)
        except NestError:
            continue
    assert [distinct(operator, a) for a in ARRAYS] == first
    for nest in operator.nests:
        reuse = data_reuse(nest)
        for array in (reuse.x, reuse.k, reuse.y):
            assert list(array.footprints) == sorted(array.footprints, reverse=True)
            assert list(array.traffic) == sorted(array.traffic)
            assert list(array.stationary) == sorted(array.stationary)
            assert all(a <= b for a, b in zip(array.stationary, array.traffic, strict=True))
            assert array.traffic[0] == array.stationary[0] == array.footprints[0]


def test_cache_chooses_the_outermost_level_that_fits():
    operator = convolution((8, 8), 4, 4, (3, 3))
    nest = operator.nests[0]
    reuse = data_reuse(nest)
    sizes = [reuse.footprint(level) for level in range(len(nest.loops) + 1)]
    assert sizes == sorted(set(sizes), reverse=True)
    for level, size in enumerate(sizes):
        use = under_cache(operator, 2 * size, 2)
        assert use == under_cache(nest, 2 * size, 2)
        assert use.levels == (level,)
        for flow, array in ((use.x, reuse.x), (use.k, reuse.k), (use.y, reuse.y)):
            assert flow.reuse == array.reuse(level)
        if level:
            assert under_cache(operator, 2 * sizes[level - 1] - 1, 2).levels == (level,)
    whole = under_cache(operator, 2 * sizes[0], 2)
    assert whole.bytes_moved == 2 * sizes[0] == 2 * (8 * 8 * 4 + 9 * 16 + 8 * 8 * 4)
    assert whole.intensity == whole.compulsory_intensity == arithmetic_intensity(operator, None, 2)
    assert whole.intensity == 2 * 64 * 16 * 9 / whole.bytes_moved
    assert (
        arithmetic_intensity(operator, 100)
        == under_cache(operator, 100).intensity
        < whole.intensity
    )


def test_parts_of_an_operator_add_up():
    operator = Program((Split("co", (1,)), Restrict("ci", 0, 2, part=1)))(PLANE)
    whole, parts = under_cache(operator, 400), [under_cache(n, 400) for n in operator.nests]
    assert whole.levels == tuple(level for p in parts for level in p.levels)
    assert whole.macs == operator.domain_size == sum(p.macs for p in parts)
    assert whole.bytes_moved == sum(p.bytes_moved for p in parts)
    assert whole.x.reuse == whole.x.accesses / sum(p.x.fetched for p in parts)
    # Both parts read the first two channels of the input: the whole operator touches them once.
    assert whole.compulsory == 36 * 4 + 9 * (4 + 3 * 2) + 36 * 4
    assert sum(p.compulsory for p in parts) == whole.compulsory + 36 * 2
    assert whole.compulsory_intensity == arithmetic_intensity(operator)


def test_an_input_that_is_never_read():
    operator = Restrict("kw", 0, 1)(convolution((1,), 2, 3, (3,)))
    reuse = data_reuse(operator.nests[0])
    assert set(reuse.x.traffic) == {0}
    assert reuse.x.reuse(0) == under_cache(operator, 64).x.reuse == 1


def test_roofline_by_hand():
    """Dense, 5 to 3: 15 multiply-accumulates, 23 elements, 92 bytes if all of them fit."""
    operator = dense(5, 3)
    fast = Machine("fast memory", 10.0, (Memory("DRAM", 1e3, 92),))
    found = roofline(operator, fast)
    assert (found.bound, found.flops, found.seconds) == ("compute", 30, 3.0)
    assert found.attainable_flops == 10
    slow = Machine("slow memory", 1e3, (Memory("DRAM", 4.0, 92),))
    found = roofline(operator, slow)
    assert (found.bound, found.seconds, found.intensities) == ("DRAM", 23.0, (30 / 92,))
    assert found.attainable_flops == pytest.approx(4 * 30 / 92)
    # With one element of each array: 5 * 3 of x and of k in, 3 of y out.
    cached = Machine("slow cache", 1e3, (Memory("DRAM", 4.0, 92), Memory("L1", 4.0, 12)))
    found = roofline(operator.nests[0], cached)
    assert (found.bound, found.seconds, found.intensities) == ("L1", 33.0, (30 / 92, 30 / 132))


def test_roofline_of_nests_one_after_another():
    operator = Split("co", (4,))(dense(8, 6))
    machine = Machine("m", 30.0, (Memory("DRAM", 100.0, 64), Memory("L1", 200.0, 16)))
    parts = [roofline(nest, machine) for nest in operator.nests]
    whole = roofline(operator, machine)
    assert whole.seconds == sum(p.seconds for p in parts)
    assert whole.flops == sum(p.flops for p in parts) == 2 * 48
    assert whole.bound in {p.bound for p in parts}
    moved = sum(p.flops / p.intensities[0] for p in parts)
    assert whole.intensities[0] == pytest.approx(whole.flops / moved)
    assert whole.attainable_flops <= machine.peak_flops


@settings(max_examples=30, deadline=None, derandomize=True)
@given(operator=convolutions(), cache=st.integers(12, 5000), peak=st.floats(1, 1e6))
def test_roofline_is_the_lower_of_two_lines(operator, cache, peak):
    found = roofline(operator, Machine("m", peak, (Memory("DRAM", 1e3, cache),)))
    line = 1e3 * arithmetic_intensity(operator, cache)
    assert found.attainable_flops == pytest.approx(min(peak, line))
    assert found.bound == ("compute" if line >= peak else "DRAM")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: data_reuse(PLANE.nests[0]).footprint(7), "no level 7 of 6 loops"),
        (lambda: data_reuse(PLANE.nests[0]).x.reuse(-1), "no level -1 of 6 loops"),
        (lambda: distinct(PLANE, "w"), "no array 'w'; there are x, k, y"),
        (lambda: under_cache(PLANE, 11), "11 bytes of cache do not hold one iteration: 3 elements"),
        (lambda: under_cache(PLANE, 0), "cache_bytes is 0"),
        (lambda: under_cache(PLANE, 64, 0), "element_bytes is 0"),
        (lambda: arithmetic_intensity(PLANE, element_bytes=-4), "element_bytes is -4"),
        (lambda: Memory("DRAM", 0.0, 64), "bandwidth of DRAM is 0.0"),
        (lambda: Memory("DRAM", 1.0, -64), "cache_bytes of DRAM is -64"),
        (lambda: Machine("m", math.nan, (Memory("DRAM", 1.0, 64),)), "peak_flops of m is nan"),
        (lambda: Machine("m", 1.0, ()), "memories of m are none"),
        (lambda: Machine("m", 1.0, (Memory("compute", 1.0, 64),)), "none 'compute'"),
        (lambda: Machine("m", 1.0, (Memory("a", 1.0, 64), Memory("a", 1.0, 32))), "different names"),
        (lambda: Machine("m", 1.0, (Memory("a", 1.0, 64), Memory("b", 1.0, 64))), "begin with the largest"),
    ],
)  # fmt: skip
def test_errors_are_one_line(wrong, message):
    with pytest.raises(NestError, match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value)


def test_sizes_of_real_layers_need_no_enumeration():
    """4096 x 4096 channels at 512 x 512, of which the domain could never be walked through."""
    reuse = data_reuse(convolution((512, 512), 4096, 4096, (3, 3)).nests[0])
    assert reuse.macs == 4096**2 * 512**2 * 9
    assert reuse.x.accesses == 4096**2 * (3 * 512 - 2) ** 2
    assert reuse.k.footprints[0] == 9 * 4096**2
    assert reuse.x.footprints[2:] == (512**2, 3 * 512, 9, 3, 1)


def test_a_group_of_large_channels():
    grouped = Group("co", "ci", 4)(convolution((14, 14), 1024, 1024, (3, 3)))
    assert isinstance(grouped, Operator)
    assert distinct(grouped, "k") == 9 * 1024**2 // 4
    assert np.prod([loop.extent for loop in grouped.nests[0].loops]) == grouped.domain_size
