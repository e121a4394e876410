"""Operators that have names, as programs.

Sequences 1 to 3 are those that Turner et al. (Neural Architecture Search as Program Transformation Exploration, ASPLOS 2021) found;
the fourth mixes kernel sizes. All are for a convolution as `nnopt.nests.convolution` makes it, of one group.

Of the blocks of Moonshine and BlockSwap (`nnopt.rewrites.Choice`) each convolution is a program: `grouped` and `depthwise` (G, BG),
`pointwise` (the 1x1 of G, B and BG), `dilated` (`Conv2x2`). The blocks themselves are none, and no transformation makes them: they
run two or three convolutions one after another, with a norm and a ReLU between, while the statements of a nest read the input of
the convolution and nothing that another has computed. Without what stands between them they would still be none: their kernels
multiply, so that the function is not linear in the weights. For the same reason there is no program for inverted bottlenecks
(`MBConv6`), nor for `ACDC`, whose cosine transforms are no loops over weights. A block is replaced by `ReplaceBlock`, and the
convolutions within it by `MutateConv`.
"""

from collections.abc import Sequence

from nnopt.errors import NestError
from nnopt.nests.neural import Bottleneck, Depthwise, Dilate, Group, Restrict, Slabs, Untie, Widen
from nnopt.nests.program import Program
from nnopt.nests.schedule import Split
from nnopt.nests.step import Step


def grouped(groups: int) -> Program:
    """Grouped convolution: `conv -> conv(feature_group_count=groups)`; also Moonshine's and BlockSwap's `G(g)`, before its 1x1."""
    return Program((Group("co", "ci", groups),))


def depthwise() -> Program:
    """Depthwise convolution: `conv -> conv(feature_group_count=inputs)`."""
    return Program((Depthwise("co", "ci"),))


def pointwise(window: Sequence[int]) -> Program:
    """The 1x1 convolution in the middle of a window: the second half of Moonshine's and BlockSwap's separable ones.

    Args:
        window: of the convolution, odd extents.
    """
    letters = "dhw"[-len(window) :]
    return Program(
        tuple(Bottleneck(f"k{a}", n) for a, n in zip(letters, window, strict=True) if n > 1)
    )


def dilated(rank: int = 2) -> Program:
    """The 2x2 convolution with dilation 2 in the corners of a 3x3 window: BlockSwap's `Conv2x2`.

    Args:
        rank: number of axes, each of window 3.
    """
    return Program(
        tuple(s for a in "dhw"[-rank:] for s in (Restrict(f"k{a}", 0, 2), Dilate(f"k{a}", 2)))
    )


def spatial_bottleneck(by: int, rank: int = 2) -> Program:
    """Every `by`-th row and column of the output is computed, and repeated.

    Args:
        by: step along each axis.
        rank: number of axes.
    """
    return Program(tuple(Bottleneck(f"o{a}", by) for a in "dhw"[-rank:]))


def sequence1(outputs: int, groups: Sequence[int]) -> Program:
    """Output channels in equal parts, each with as many groups as given over *all* inputs.

    `Split -> Group` of each part. Weights `sum(k^2 * inputs / g * outputs / parts)`.

    Args:
        outputs: channels of the convolution.
        groups: of each part.

    Raises:
        NestError: the parts do not divide the channels.
    """
    parts = len(groups)
    if parts < 1 or outputs % parts:
        raise NestError(f"{parts} parts do not divide the {outputs} output channels")
    size = outputs // parts
    steps: list[Step] = [Split("co", tuple(range(size, outputs, size)))] if parts > 1 else []
    steps += [Group("co", "ci", g, part=i) for i, g in enumerate(groups) if g != 1]
    return Program(tuple(steps))


def sequence2(inputs: int, unrolled: int, groups: int) -> Program:
    """The first outputs see every input, the others form groups over the inputs after as many.

    `Split -> Restrict -> Group` of the second part. Weights `k^2 * (inputs * u + (inputs - u) * (outputs - u) / g)`.

    Args:
        inputs: channels of the convolution's input.
        unrolled: outputs computed in full.
        groups: of the others.
    """
    return Program(
        (
            Split("co", (unrolled,)),
            Restrict("ci", unrolled, inputs, part=1),
            Group("co", "ci", groups, part=1),
        )
    )


def sequence3(slabs: int) -> Program:
    """The image in horizontal slabs that do not see each other, each with a kernel of its own: `slabs` times the weights.

    Args:
        slabs: of equal height.
    """
    return Program((Slabs("oh", slabs), Untie("oh_o"))) if slabs != 1 else Program()


def sequence4(outputs: int, window: Sequence[int], sizes: Sequence[int]) -> Program:
    """Groups of equal size, each with a window of its own: mixed kernels.

    `Split -> Restrict` to the group's inputs `-> Restrict` or `Widen` of its window.

    Args:
        outputs: channels of input and output, which are as many.
        window: of the convolution, the same odd extent along each axis.
        sizes: odd extent of each group's window.

    Raises:
        NestError: the groups do not divide the channels, or an extent is even.
    """
    parts = len(sizes)
    if parts < 1 or outputs % parts:
        raise NestError(f"{parts} groups do not divide the {outputs} channels")
    if len(set(window)) > 1 or any(n % 2 == 0 or n < 1 for n in (*window, *sizes)):
        raise NestError(
            f"windows {tuple(window)} and {tuple(sizes)}: extents are odd, and equal along all axes"
        )
    size, have = outputs // parts, window[0]
    steps: list[Step] = [Split("co", tuple(range(size, outputs, size)))] if parts > 1 else []
    for part, extent in enumerate(sizes):
        steps.append(Restrict("ci", part * size, (part + 1) * size, part=part))
        for axis in "dhw"[-len(window) :]:
            if extent < have:
                start = (have - extent) // 2
                steps.append(Restrict(f"k{axis}", start, start + extent, part=part))
            elif extent > have:
                steps.append(Widen(f"k{axis}", extent, part=part))
    return Program(tuple(steps))
