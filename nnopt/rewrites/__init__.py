"""What people import: rules that rewrite networks."""

from nnopt.core import Keeps, Rewrite, carry, history, replay, rewrite
from nnopt.layers import AddGate, AddTap
from nnopt.rewrites.block import Genotype, ReplaceBlock
from nnopt.rewrites.choice import CODE_CHOICES, PAPER_CHOICES, Choice, Groups, S, choice
from nnopt.rewrites.family import largest_within
from nnopt.rewrites.fold import FoldBatchNorm
from nnopt.rewrites.genotype import load_genotype, save_genotype
from nnopt.rewrites.importance import (
    at_random,
    batch_norm_scale,
    by_group,
    channel_gradients,
    fisher,
    gated,
    magnitude,
    taylor,
)
from nnopt.rewrites.operation import MutateConv
from nnopt.rewrites.prune import (
    combined,
    masked,
    parameters_without,
    prunable,
    prune,
    removed_by,
    weakest,
)
from nnopt.rewrites.resize import Extent, Resize
from nnopt.rewrites.skeleton import (
    Bottleneck,
    ScaleDepth,
    ScaleProfile,
    ScaleResolution,
    ScaleWidth,
    inner_groups,
    resize_groups,
)
from nnopt.rewrites.structural import Configure, LowerGroupedConvs, Replace

__all__ = [
    "CODE_CHOICES",
    "PAPER_CHOICES",
    "AddGate",
    "AddTap",
    "Bottleneck",
    "Choice",
    "Configure",
    "Extent",
    "FoldBatchNorm",
    "Genotype",
    "Groups",
    "Keeps",
    "LowerGroupedConvs",
    "MutateConv",
    "Replace",
    "ReplaceBlock",
    "Resize",
    "Rewrite",
    "S",
    "ScaleDepth",
    "ScaleProfile",
    "ScaleResolution",
    "ScaleWidth",
    "at_random",
    "batch_norm_scale",
    "by_group",
    "carry",
    "channel_gradients",
    "choice",
    "combined",
    "fisher",
    "gated",
    "history",
    "inner_groups",
    "largest_within",
    "load_genotype",
    "magnitude",
    "masked",
    "parameters_without",
    "prunable",
    "prune",
    "removed_by",
    "replay",
    "resize_groups",
    "rewrite",
    "save_genotype",
    "taylor",
    "weakest",
]
