"""Training with a checkpoint after each epoch: a killed run takes up where it stopped."""

import dataclasses
import pathlib
from collections.abc import Callable

import flax.linen as nn
from jax import Array

from nnopt.data import Dataset
from nnopt.errors import CheckpointError
from nnopt.training.checkpoint import checkpoint_info, load_checkpoint, save_checkpoint
from nnopt.training.loop import Trainer
from nnopt.training.recipe import Recipe
from nnopt.training.state import EpochRow
from nnopt.typing import Variables


def train_in(
    folder: pathlib.Path,
    net: nn.Module,
    variables: Variables,
    dataset: Dataset,
    recipe: Recipe,
    key: Array,
    *,
    on_start: Callable[[int, int], None] = lambda done, total: None,
    on_epoch: Callable[[EpochRow], None] = lambda row: None,
) -> tuple[Variables, list[EpochRow]]:
    """`train`, from the last checkpoint in `folder` if there is one.

    Args:
        folder: of the checkpoint, renewed after each epoch.
        net: see `train`.
        variables: see `train`.
        dataset: see `train`.
        recipe: see `train`.
        key: see `train`.
        on_start: told how many epochs of how many were done before.
        on_epoch: told of each epoch done here.

    Returns:
        The trained variables, and the history of all epochs.

    Raises:
        CheckpointError: the checkpoint there is damaged, or of something else.
        DataError: see `Trainer`.
    """
    trainer = Trainer(net, dataset, recipe)
    state = trainer.start(variables, key)
    history: list[EpochRow] = []
    try:
        state = load_checkpoint(folder, net, state)
        history = [EpochRow(**row) for row in checkpoint_info(folder).extra["history"]]
    except (CheckpointError, KeyError, TypeError) as e:
        if folder.exists():  # where there is none yet, training starts from the beginning
            raise CheckpointError(
                f"cannot go on from {folder}: {e}; remove that folder to train again"
            ) from e
    on_start(len(history), recipe.epochs)
    while trainer.epoch(state) < recipe.epochs:
        state, row = trainer.run_epoch(state)
        history.append(row)
        kept = {"history": [dataclasses.asdict(r) for r in history]}
        save_checkpoint(folder, net, state, extra=kept)
        on_epoch(row)
    return state.variables, history
