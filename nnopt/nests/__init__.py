"""Operators as loop nests: transformations, canonical form, data reuse, lowering to linen modules."""

from nnopt.nests.canonical import Canonical, canonical
from nnopt.nests.nest import Loop, Nest, Operator, convolution, dense
from nnopt.nests.neural import (
    Bottleneck,
    Depthwise,
    Dilate,
    Group,
    Restrict,
    Share,
    Shift,
    Slabs,
    Tie,
    Untie,
    Widen,
)
from nnopt.nests.program import Program
from nnopt.nests.schedule import (
    Bind,
    Fuse,
    Interchange,
    Parallel,
    Prefetch,
    Split,
    StripMine,
    Tile,
    Unroll,
    Vectorize,
)
from nnopt.nests.step import Step

__all__ = [
    "Bind",
    "Bottleneck",
    "Canonical",
    "Depthwise",
    "Dilate",
    "Fuse",
    "Group",
    "Interchange",
    "Loop",
    "Nest",
    "Operator",
    "Parallel",
    "Prefetch",
    "Program",
    "Restrict",
    "Share",
    "Shift",
    "Slabs",
    "Split",
    "Step",
    "StripMine",
    "Tie",
    "Tile",
    "Unroll",
    "Untie",
    "Vectorize",
    "Widen",
    "canonical",
    "convolution",
    "dense",
]
