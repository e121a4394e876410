"""What people import: rules that rewrite networks."""

from nnopt.core import Keeps, Rewrite, carry, history, replay, rewrite
from nnopt.layers import AddGate, AddTap
from nnopt.rewrites.block import Genotype, ReplaceBlock
from nnopt.rewrites.choice import CODE_CHOICES, PAPER_CHOICES, Choice, Groups, S, choice
from nnopt.rewrites.genotype import load_genotype, save_genotype
from nnopt.rewrites.structural import Configure, LowerGroupedConvs, Replace

__all__ = [
    "CODE_CHOICES",
    "PAPER_CHOICES",
    "AddGate",
    "AddTap",
    "Choice",
    "Configure",
    "Genotype",
    "Groups",
    "Keeps",
    "LowerGroupedConvs",
    "Replace",
    "ReplaceBlock",
    "Rewrite",
    "S",
    "carry",
    "choice",
    "history",
    "load_genotype",
    "replay",
    "rewrite",
    "save_genotype",
]
