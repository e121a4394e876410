"""Linen modules that rewrites put in place."""

from nnopt.layers.combinators import GATES, TAPS, Gate, Identity, Tap, Then
from nnopt.layers.conv import Conv, block_diagonal, grouped_conv_general_dilated
from nnopt.layers.instrument import AddGate, AddTap
from nnopt.layers.residual import (
    BottleneckOperator,
    DenseOperator,
    GroupedOperator,
    PreActivationBlock,
    TrainingFlag,
)

__all__ = [
    "GATES",
    "TAPS",
    "AddGate",
    "AddTap",
    "BottleneckOperator",
    "Conv",
    "DenseOperator",
    "Gate",
    "GroupedOperator",
    "Identity",
    "PreActivationBlock",
    "Tap",
    "Then",
    "TrainingFlag",
    "block_diagonal",
    "grouped_conv_general_dilated",
]
