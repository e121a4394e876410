"""Recipes, the training loop, and checkpoints."""

from nnopt.training.apply import (
    ApplyEval,
    ApplyTrain,
    default_apply_eval,
    default_apply_train,
    mode_of,
)
from nnopt.training.checkpoint import (
    CheckpointInfo,
    checkpoint_info,
    load_checkpoint,
    save_checkpoint,
)
from nnopt.training.evaluation import Evaluator, evaluate, evaluate_test
from nnopt.training.loop import Objective, Trainer, cross_entropy, train
from nnopt.training.prune_and_tune import Pruner, PruneRecipe, PruneRow, PruneState
from nnopt.training.recipe import (
    BLOCKSWAP,
    CLOSER_LOOK_DENSENET,
    CLOSER_LOOK_TUNING_DENSENET,
    CLOSER_LOOK_TUNING_WRN,
    CLOSER_LOOK_WRN,
    MOONSHINE,
    QUICK,
    Recipe,
    Schedule,
)
from nnopt.training.resume import train_in
from nnopt.training.state import EpochRow, TrainResult, TrainState

__all__ = [
    "BLOCKSWAP",
    "CLOSER_LOOK_DENSENET",
    "CLOSER_LOOK_TUNING_DENSENET",
    "CLOSER_LOOK_TUNING_WRN",
    "CLOSER_LOOK_WRN",
    "MOONSHINE",
    "QUICK",
    "ApplyEval",
    "ApplyTrain",
    "CheckpointInfo",
    "EpochRow",
    "Evaluator",
    "Objective",
    "PruneRecipe",
    "PruneRow",
    "PruneState",
    "Pruner",
    "Recipe",
    "Schedule",
    "TrainResult",
    "TrainState",
    "Trainer",
    "checkpoint_info",
    "cross_entropy",
    "default_apply_eval",
    "default_apply_train",
    "evaluate",
    "evaluate_test",
    "load_checkpoint",
    "mode_of",
    "save_checkpoint",
    "train",
    "train_in",
]
