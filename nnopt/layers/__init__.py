"""Linen modules that rewrites put in place."""

from nnopt.layers.combinators import GATES, TAPS, AtResolution, Gate, Identity, Tap, Then
from nnopt.layers.conv import Conv, LoweredConvolution
from nnopt.layers.conv_primitives import convolve
from nnopt.layers.dense_lowerings import block_diagonal, diagonal_blocks
from nnopt.layers.instrument import AddGate, AddTap
from nnopt.layers.lowering import (
    ConvShape,
    Direction,
    Fenced,
    Lowering,
    Native,
    Patches,
    Pointwise,
    ShiftedPlanes,
    ShiftedSum,
    SplitGroups,
    choose,
    explain,
)
from nnopt.layers.residual import (
    BottleneckOperator,
    DenseOperator,
    GroupedOperator,
    PreActivationBlock,
    TrainingFlag,
)
from nnopt.layers.scale_shift import ScaleShift

__all__ = [
    "GATES",
    "TAPS",
    "AddGate",
    "AddTap",
    "AtResolution",
    "BottleneckOperator",
    "Conv",
    "ConvShape",
    "DenseOperator",
    "Direction",
    "Fenced",
    "Gate",
    "GroupedOperator",
    "Identity",
    "LoweredConvolution",
    "Lowering",
    "Native",
    "Patches",
    "Pointwise",
    "PreActivationBlock",
    "ScaleShift",
    "ShiftedPlanes",
    "ShiftedSum",
    "SplitGroups",
    "Tap",
    "Then",
    "TrainingFlag",
    "block_diagonal",
    "choose",
    "convolve",
    "diagonal_blocks",
    "explain",
]
