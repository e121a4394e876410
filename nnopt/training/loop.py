"""Train any linen image classifier.

The whole of it: 8-bit images lie on the device; each epoch draws a permutation; one jitted step
gathers a minibatch, normalises and augments it, and updates a `TrainState`. All randomness is a
function of the run's key and of the number of the epoch or step, so a run that is resumed from a
saved state ends bit for bit as one that never stopped.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from nnopt.data import Dataset
from nnopt.errors import DataError
from nnopt.training.apply import ApplyEval, ApplyTrain, default_apply_eval, default_apply_train
from nnopt.training.evaluation import Evaluator
from nnopt.training.recipe import Recipe
from nnopt.training.state import EpochRow, TrainResult, TrainState
from nnopt.typing import Variables

Objective = Callable[[Variables, Array, Array, Array], tuple[Array, tuple[Array, Variables]]]
"""`(variables, images, labels, dropout_key) -> (loss, (logits, updated collections))`."""


def cross_entropy(logits: Array, labels: Array, smoothing: float = 0.0) -> Array:
    """Softmax cross entropy, mean over the minibatch.

    Args:
        logits: `[batch, classes]`.
        labels: `[batch]`, int32.
        smoothing: the target is `1 - smoothing` on the label plus `smoothing / classes` on every
            class.

    Returns:
        `[]`, float32, in nats.
    """
    logits = logits.astype(jnp.float32)
    target = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(target, smoothing)).mean()


class Trainer:
    """A network, a data set and a recipe, compiled into one step; callers hold the states.

    Args:
        net: a linen network; not used where the hooks below say how to run it.
        dataset: what to train and test on.
        recipe: how to train.
        apply_train: how to run the network for training, if not as `default_apply_train` does.
        apply_eval: how to run it for the test accuracy, if not as `default_apply_eval` does.
        objective: what to minimise, in place of the cross entropy of `apply_train`'s logits; for
            distillation.

    Attributes:
        recipe: the recipe as it is run: without flips where `dataset.flip_ok` is false.
        steps_per_epoch: whole minibatches in the training set.

    Raises:
        DataError: the training set holds not one whole minibatch, or the recipe does not fit it.

    Example:
        Checkpoint after every epoch::

            trainer = Trainer(net, dataset, recipe)
            state = trainer.start(variables, jax.random.key(0))
            while trainer.epoch(state) < recipe.epochs:
                state, row = trainer.run_epoch(state)
                save_checkpoint(folder, net, state)
    """

    def __init__(
        self,
        net: Any,
        dataset: Dataset,
        recipe: Recipe,
        *,
        apply_train: ApplyTrain | None = None,
        apply_eval: ApplyEval | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.steps_per_epoch = len(dataset.train_images) // recipe.batch
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{dataset.name}: {len(dataset.train_images):,} training images make no minibatch "
                f"of {recipe.batch:,}; give a smaller batch"
            )
        augmentation = recipe.augmentation
        if augmentation.flip and not dataset.flip_ok:
            augmentation = dataclasses.replace(augmentation, flip=False)
        self.dataset = dataset
        self.recipe = dataclasses.replace(recipe, augmentation=augmentation)
        self.optimizer = recipe.optimizer(self.steps_per_epoch)
        self._apply_eval = apply_eval or default_apply_eval(net)
        if objective is None:
            objective = _classification(apply_train or default_apply_train(net), recipe)
        self._evaluator = Evaluator(
            net, dataset.mean, dataset.std, batch=256, apply_eval=self._apply_eval
        )
        self._train_images = jnp.asarray(dataset.train_images)
        self._train_labels = jnp.asarray(dataset.train_labels)
        step = _make_step(objective, self.optimizer, self._minibatch)
        self._step = jax.jit(step, donate_argnames=("state", "sums"))
        self._order = jax.jit(_order, static_argnames=("images", "batch"))

    def start(self, variables: Variables, key: Array) -> TrainState:
        """The state before the first step.

        Args:
            variables: the network's variables with `params`; they are copied, and stay the
                caller's.
            key: the run's random key, as `jax.random.key(seed)` gives it.

        Returns:
            A state for `run_epoch`.

        Raises:
            DataError: the network has another number of outputs than the data set has classes.
        """
        dataset = self.dataset
        image = jax.ShapeDtypeStruct((1, *dataset.image_shape), jnp.float32)
        logits = jax.eval_shape(self._apply_eval, variables, image)
        if logits.shape != (1, len(dataset.classes)):
            raise DataError(
                f"the network answers one {dataset.name} image with {list(logits.shape)} instead "
                f"of [1, {len(dataset.classes)}]; build it for {len(dataset.classes)} classes"
            )
        # Steps donate their state: the caller's arrays would be gone after the first one.
        collections = jax.tree.map(jnp.array, flax.core.unfreeze(dict(variables)))
        params = collections.pop("params")
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=collections.pop("batch_stats", {}),
            constants=collections,
            opt_state=self.optimizer.init(params),
            key=jnp.array(key),
        )

    def order(self, key: Array, epoch: int) -> Array:
        """The training images of an epoch of the run with this key: `[steps, batch]`, int32."""
        return self._order(
            key, np.int32(epoch), images=len(self._train_images), batch=self.recipe.batch
        )

    def minibatch(self, state: TrainState, order: Array) -> tuple[Array, Array]:
        """The images, normalised and augmented, and labels of the step that comes next; traceable.

        Args:
            state: before the step.
            order: of the step's epoch.
        """
        return self._minibatch(state, self._train_images, self._train_labels, order)[:2]

    def _minibatch(
        self, state: TrainState, images: Array, labels: Array, order: Array
    ) -> tuple[Array, Array, Array]:
        _, step_key = jax.random.split(state.key)
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(step_key, state.step))
        chosen = order[state.step % self.steps_per_epoch]
        black = self.dataset.normalize(jnp.zeros((1, 1, 1, 3), jnp.uint8)).reshape(3)
        augmentation = self.recipe.augmentation
        batch = augmentation(augment_key, self.dataset.normalize(images[chosen]), black)
        return batch, labels[chosen], dropout_key

    def epoch(self, state: TrainState) -> int:
        """Whole epochs that `state` has behind it."""
        return int(state.step) // self.steps_per_epoch

    def run_epoch(self, state: TrainState) -> tuple[TrainState, EpochRow]:
        """Train for one epoch and measure the test accuracy.

        Args:
            state: from `start`, from here, or restored from a checkpoint written between epochs.
                Its arrays are donated: use the returned state instead.

        Returns:
            The new state and the epoch's row.
        """
        began = time.perf_counter()
        epoch = self.epoch(state)
        order = self.order(state.key, epoch)
        sums = {"loss": jnp.zeros((), jnp.float32), "right": jnp.zeros((), jnp.int32)}
        for _ in range(self.steps_per_epoch):
            state, sums = self._step(
                state=state,
                sums=sums,
                images=self._train_images,
                labels=self._train_labels,
                order=order,
            )
        loss = float(sums["loss"]) / self.steps_per_epoch
        train_accuracy = int(sums["right"]) / (self.steps_per_epoch * self.recipe.batch)
        test_accuracy = self._evaluator(
            state.variables, self.dataset.test_images, self.dataset.test_labels
        )
        seconds = time.perf_counter() - began
        return state, EpochRow(epoch + 1, loss, train_accuracy, test_accuracy, seconds)

    def run(
        self, state: TrainState, on_epoch: Callable[[EpochRow], None] | None = None
    ) -> TrainResult:
        """Train from `state` to the end of the recipe.

        Args:
            state: as for `run_epoch`.
            on_epoch: called with each epoch's row, such as to advance a progress bar.

        Returns:
            The result, with the history of the epochs run here.

        Raises:
            DataError: the state has the whole recipe behind it.
        """
        if self.epoch(state) >= self.recipe.epochs:
            raise DataError(
                f"this run has {self.epoch(state)} of {self.recipe.epochs} epochs behind it; "
                "give more epochs"
            )
        history = []
        while self.epoch(state) < self.recipe.epochs:
            state, row = self.run_epoch(state)
            history.append(row)
            if on_epoch is not None:
                on_epoch(row)
        return TrainResult(
            variables=state.variables,
            history=tuple(history),
            state=state,
            recipe=self.recipe,
            split_note=self.dataset.split_note,
        )


def train(
    net: Any,
    variables: Variables,
    dataset: Dataset,
    recipe: Recipe,
    key: Array,
    on_epoch: Callable[[EpochRow], None] | None = None,
    *,
    apply_train: ApplyTrain | None = None,
    apply_eval: ApplyEval | None = None,
    objective: Objective | None = None,
) -> TrainResult:
    """Train a network; `Trainer` gives the same epoch by epoch.

    Args:
        net: a linen network whose `__call__` maps `[batch, height, width, 3]` to `[batch,
            classes]`.
        variables: its variables; they are copied, and stay the caller's.
        dataset: what to train and test on.
        recipe: how to train.
        key: decides every shuffle, augmentation and dropout of the run.
        on_epoch: called with each epoch's row.
        apply_train: how to run the network for training, if not as `default_apply_train` does.
        apply_eval: how to run it for the test accuracy, if not as `default_apply_eval` does.
        objective: what to minimise, in place of the cross entropy; for distillation.

    Returns:
        The trained variables and the history.

    Raises:
        DataError: the training set holds not one whole minibatch, or the network's outputs are not
            its classes.
    """
    trainer = Trainer(
        net,
        dataset,
        recipe,
        apply_train=apply_train,
        apply_eval=apply_eval,
        objective=objective,
    )
    return trainer.run(trainer.start(variables, key), on_epoch)


def _classification(apply_train: ApplyTrain, recipe: Recipe) -> Objective:
    def objective(
        variables: Variables, images: Array, labels: Array, key: Array
    ) -> tuple[Array, tuple[Array, Variables]]:
        logits, updates = apply_train(variables, images, key)
        return cross_entropy(logits, labels, recipe.label_smoothing), (logits, updates)

    return objective


def _order(key: Array, epoch: Array, *, images: int, batch: int) -> Array:
    """The epoch's training images, `[steps, batch]`, int32."""
    shuffle_key, _ = jax.random.split(key)
    permuted = jax.random.permutation(jax.random.fold_in(shuffle_key, epoch), images)
    return permuted[: images // batch * batch].reshape(-1, batch)


def _make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    minibatch: Callable[..., tuple[Array, Array, Array]],
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    def step(
        state: TrainState, sums: dict[str, Array], images: Array, labels: Array, order: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        batch_images, batch_labels, dropout_key = minibatch(state, images, labels, order)

        def loss_of(params: Any) -> tuple[Array, tuple[Array, Variables]]:
            variables = {**state.variables, "params": params}
            return objective(variables, batch_images, batch_labels, dropout_key)

        (loss, (logits, updates)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            state.params
        )
        changes, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        answers = jnp.argmax(logits, axis=-1).astype(batch_labels.dtype)
        new_state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, changes),
            batch_stats=updates.get("batch_stats", state.batch_stats),
            opt_state=opt_state,
        )
        new_sums = {
            "loss": sums["loss"] + loss.astype(jnp.float32),
            "right": sums["right"] + jnp.sum(answers == batch_labels, dtype=jnp.int32),
        }
        return new_state, new_sums

    return step
