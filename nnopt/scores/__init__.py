"""Training-free scores: one file for each, and one program for any number of them."""

from nnopt.scores.aggregations import ChannelMean, LogSum, RelativeTo, Sum
from nnopt.scores.counts import Macs, Parameters
from nnopt.scores.epe_nas import EpeNas
from nnopt.scores.fisher import Fisher, FisherPotential
from nnopt.scores.grad_norm import GradNorm
from nnopt.scores.grasp import Grasp
from nnopt.scores.jacob_cov import JacobCov
from nnopt.scores.l2_norm import L2Norm
from nnopt.scores.layer_fisher import LayerFisher
from nnopt.scores.meco import MeCo
from nnopt.scores.naswot import Naswot
from nnopt.scores.ntk import NtkCondition
from nnopt.scores.plain import Plain
from nnopt.scores.score import Score, ScoreValue
from nnopt.scores.scorer import Scorer
from nnopt.scores.snip import Snip
from nnopt.scores.sources import mean_cross_entropy
from nnopt.scores.swap import Swap
from nnopt.scores.synflow import SynFlow
from nnopt.scores.zen import Zen
from nnopt.scores.zico import Zico

__all__ = [
    "ChannelMean",
    "EpeNas",
    "Fisher",
    "FisherPotential",
    "GradNorm",
    "Grasp",
    "JacobCov",
    "L2Norm",
    "LayerFisher",
    "LogSum",
    "Macs",
    "MeCo",
    "Naswot",
    "NtkCondition",
    "Parameters",
    "Plain",
    "RelativeTo",
    "Score",
    "ScoreValue",
    "Scorer",
    "Snip",
    "Sum",
    "Swap",
    "SynFlow",
    "Zen",
    "Zico",
    "mean_cross_entropy",
]
