"""Programs of every transformation, drawn at random: what they state of themselves, and the canonical form of what they make."""

from fractions import Fraction

import numpy as np
import pytest

from nnopt.errors import NestError
from nnopt.nests import (
    Bottleneck,
    Fuse,
    Interchange,
    Program,
    Share,
    Shift,
    Split,
    StripMine,
    Tie,
    Untie,
    Widen,
    canonical,
    convolution,
    dense,
)
from nnopt.nests.canonical import check_disjoint, weights
from nnopt.nests.interpret import interpret, kernel_box
from nnopt.nests.module import prepared
from nnopt.nests.program import STEPS
from nnopt.nests.reuse import distinct
from nnopt.nests.sample import divisors

MOST_NESTS = 8


def by_canonical_form(operator, x, box):
    """What the canonical form makes of an image and of weights in `kernel_box`: its loops run one by one, `[1, *output]`."""
    canon, kept = prepared(operator)
    lows, _ = kernel_box(operator)
    arrays = [box[tuple(np.moveaxis(v.places - np.array(lows), -1, 0))] for v in kept.variables]
    y = np.zeros((1, *operator.output))
    for form, kernel in zip(canon.forms, kept.kernels(arrays), strict=True):
        extents = [b.extent for b in form.bands]
        at = np.indices(extents).reshape(len(extents), int(np.prod(extents)))

        def place(start, steps, at=at):
            moved = np.array(steps, int).reshape(len(at), len(start)).T @ at
            return np.array(start)[:, None] + moved

        read = place(form.x, [b.x for b in form.bands])
        inside = np.ones(at.shape[1], bool)
        where = [np.zeros(at.shape[1], int) for _ in operator.input]
        for (axis, size), digit in zip(form.view, read, strict=True):
            inside &= (digit >= 0) & (digit < size)
            where[axis] = where[axis] * size + digit
        values = np.where(inside, x[0][tuple(np.where(inside, w, 0) for w in where)], 0)
        weight = kernel[tuple(n for b, n in zip(form.bands, at, strict=True) if b.weighs)]
        np.add.at(y[0], tuple(place(form.y, [b.y for b in form.bands])), values * weight)
    return y


def check_canonical(operator, rng):
    """Its canonical form computes what the operator does, with as many weights."""
    check_disjoint(operator)
    assert weights(canonical(operator)) == distinct(operator, "k")
    x = rng.normal(size=(1, *operator.input))
    box = rng.normal(size=kernel_box(operator)[1])
    np.testing.assert_allclose(
        by_canonical_form(operator, x, box), interpret(operator, x, box), rtol=1e-9, atol=1e-9
    )


def stated_size(operator, step):
    """The domain's size after a step, by what the step states."""
    return sum(
        nest.domain_size * (step.domain_ratio(nest) if i in step.chosen(operator) else 1)
        for i, nest in enumerate(operator.nests)
    )


SMALL = convolution((5, 5), 8, 8, (3, 3))
HARD = {
    "a copy fused with what it copies": (
        SMALL, (StripMine("co", 4), Bottleneck("co_o", 2), Fuse("co_o_r", "co_i")), 288,
    ),
    "shared weights fused with others": (SMALL, (StripMine("ci", 2), Share("ci_o"), Fuse("ci_o", "ci_i")), 144),
    "digits apart": (
        dense(8, 8),
        (
            Fuse("co", "ci"), Untie(), StripMine("co.ci", 2), Interchange("co.ci_o", "co.ci_i"),
            Fuse("co.ci_i", "co.ci_o"),
        ),
        64,
    ),
    "three elements around a corner": (
        convolution((4, 5), 4, 1, (1, 4), strides=(3, 1), padding="VALID"),
        (Split("ow", (1,)), Split("oh", (1,)), Bottleneck("ci", 2, part=0)),
        16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HARD)
def test_canonical_forms_of_hard_programs(name):
    conv, steps, count = HARD[name]
    operator = Program(steps)(conv)
    check_canonical(operator, np.random.default_rng(0))
    assert weights(canonical(operator)) == count


RATIOS = [
    ((Bottleneck("ow", 5),), Shift("co", "oh", 1), 1),
    ((Bottleneck("co", 2),), Shift("co_r", "ow", 1), 2),
    ((Bottleneck("co", 2), Shift("co_r", "ow", 1)), Shift("co_r", "ow", -1), Fraction(1, 2)),
    ((StripMine("ci", 2), Bottleneck("co", 2)), Tie("co_r", "ci_i"), 1),
    ((StripMine("ci", 2), StripMine("co", 2)), Tie("co_i", "ci_i"), Fraction(1, 2)),
    ((Bottleneck("co", 2),), Split("co_r", (1,)), 2),
    ((Bottleneck("co", 2),), Fuse("co", "co_r"), 2),
    ((Bottleneck("co", 2), Fuse("co", "co_r")), StripMine("co.co_r", 2), Fraction(1, 2)),
    ((Bottleneck("co", 2), Interchange("co", "co_r"), Fuse("co_r", "co")), Bottleneck("co_r.co", 4), Fraction(1, 8)),
]  # fmt: skip


@pytest.mark.parametrize(("before", "step", "ratio"), RATIOS, ids=str)
def test_loops_that_copy_are_no_part_of_the_domain(before, step, ratio):
    operator = Program(before)(SMALL)
    (nest,) = operator.nests
    assert step.domain_ratio(nest) == ratio
    assert step(operator).domain_size == operator.domain_size * ratio


def test_a_window_is_widened_around_its_parts_only():
    conv = convolution((12, 12), 2, 2, (3, 6))
    operator = Program((StripMine("kw", 3), Widen("kw_o", 4)))(conv)
    assert weights(canonical(operator)) == distinct(operator, "k") == 2 * 2 * 3 * 12
    with pytest.raises(NestError, match="widen before cutting the window"):
        Program((StripMine("kw", 3), Widen("kw_i", 5)))(conv)


def drawn_convolution(rng):
    """A small one of 0 to 3 axes."""
    rank = rng.choice((0, 1, 1, 2, 2, 3))
    inputs, outputs = ((4, 4), (4, 8), (6, 4), (8, 8), (1, 4), (2, 6), (4, 1))[rng.integers(7)]
    if rank == 0:
        return dense(inputs, outputs)

    def each(*values):
        return [int(rng.choice(values)) for _ in range(rank)]

    try:
        return convolution(
            each(3, 4) if rank == 3 else each(3, 4, 5, 6), inputs, outputs, each(1, 2, 3, 3, 4), strides=each(1, 1, 2, 3),
            dilation=each(1, 1, 2), padding=[(a, b) for a, b in zip(each(0, 1, 2), each(-1, 1, 3), strict=True)],
            groups=2 if inputs % 2 == outputs % 2 == 0 and rng.random() < 0.3 else 1,
        )  # fmt: skip
    except NestError:  # a window larger than its image
        return dense(inputs, outputs)


def drawn_step(operator, rng):
    """Any transformation but marks, with arguments that often fit."""
    part = int(rng.integers(len(operator.nests)))
    extents = operator.nests[part].extents
    names = list(extents)
    a, b = (str(n) for n in rng.choice(names, 2))
    alike = [n for n in names if extents[n] == extents[a] and n != a]

    def size(name):
        return int(rng.choice((1, *divisors(extents[name]), extents[name])))

    low = int(rng.integers(extents[a]))
    neighbour = names[min(names.index(a) + 1, len(names) - 1)]
    arguments = {
        "Interchange": (a, b), "StripMine": (a, size(a)), "Tile": (a, b, size(a), size(b)), "Fuse": (a, neighbour),
        "Split": (a, (int(rng.integers(1, max(2, extents[a]))),)), "Bottleneck": (a, size(a)),
        "Restrict": (a, low, int(rng.integers(low + 1, extents[a] + 1))), "Tie": (a, str(rng.choice(alike)) if alike else b),
        "Group": (a, b, size(b)), "Depthwise": (a, b), "Widen": (a, extents[a] + 2), "Dilate": (a, int(rng.integers(1, 4))),
        "Shift": (a, b, int(rng.integers(-2, 3))), "Share": (a,),
        "Untie": (a,) if rng.random() < 0.8 else (), "Slabs": (a, size(a)),
    }  # fmt: skip
    kind = str(rng.choice(list(arguments)))
    return STEPS[kind](*arguments[kind], part=None if rng.random() < 0.3 else part)


def test_programs_of_any_steps():
    taken = set()
    for seed in range(500):
        rng = np.random.default_rng(seed)
        operator, steps = drawn_convolution(rng), []
        for _ in range(int(rng.integers(1, 8))):
            step = drawn_step(operator, rng)
            try:
                changed = step(operator)
            except NestError:
                continue
            if len(changed.nests) > MOST_NESTS:
                continue
            steps.append(step)
            assert changed.domain_size == stated_size(operator, step), (seed, steps)
            if step.keeps_function:
                assert canonical(changed) == canonical(operator), (seed, steps)
            operator = changed
        try:
            check_canonical(operator, rng)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {Program(tuple(steps))}") from error
        taken |= {type(step).__name__ for step in steps}
    marks = {"Unroll", "Vectorize", "Parallel", "Prefetch", "Bind"}
    assert taken == set(STEPS) - marks
