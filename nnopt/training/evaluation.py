"""Measure the accuracy of any linen image classifier."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from nnopt.data import Dataset, normalize
from nnopt.errors import DataError
from nnopt.training.apply import ApplyEval, default_apply_eval
from nnopt.typing import Variables


class Evaluator:
    """Counts right answers exactly, in minibatches of one shape.

    A last partial minibatch is filled with images whose label is -1, which no answer equals. Keep
    an evaluator to measure one network with many weights: it compiles once.

    Args:
        net: a linen network; not used if `apply_eval` is given.
        mean: of each channel in 0..1, to normalise 8-bit images with.
        std: of each channel in 0..1.
        batch: images in a minibatch.
        apply_eval: how to run the network, if not as `default_apply_eval` does.
    """

    def __init__(
        self,
        net: Any,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        *,
        batch: int = 256,
        apply_eval: ApplyEval | None = None,
    ) -> None:
        apply = apply_eval or default_apply_eval(net)

        def count(variables: Variables, images: Array, labels: Array) -> Array:
            if images.dtype == jnp.uint8:
                if mean is None or std is None:
                    raise DataError(
                        "evaluate: 8-bit images need the mean and std of their data set; give both"
                    )
                images = normalize(images, mean, std)
            answers = jnp.argmax(apply(variables, images), axis=-1).astype(labels.dtype)
            return jnp.sum(answers == labels, dtype=jnp.int32)

        self.batch = batch
        self._count = jax.jit(count)

    def __call__(
        self, variables: Variables, images: np.ndarray | Array, labels: np.ndarray | Array
    ) -> float:
        """Measure the accuracy.

        Args:
            variables: the network's variables.
            images: `[n, height, width, channels]`, uint8, or float32 and then already normalised.
            labels: `[n]`, int32.

        Returns:
            The share of right answers, 0..1; exact, whatever the minibatch.

        Raises:
            DataError: no images, not as many labels as images, or 8-bit images without mean and
                std.
        """
        n = len(images)
        if n == 0 or len(labels) != n:
            raise DataError(
                f"evaluate: {n:,} images and {len(labels):,} labels; give as many of both, and some"
            )
        right = []
        for first in range(0, n, self.batch):
            chunk, answers = images[first : first + self.batch], labels[first : first + self.batch]
            if missing := self.batch - len(chunk):
                chunk = np.pad(np.asarray(chunk), ((0, missing), (0, 0), (0, 0), (0, 0)))
                answers = np.pad(np.asarray(answers), (0, missing), constant_values=-1)
            right.append(self._count(variables, chunk, answers))
        return sum(int(count) for count in right) / n


def evaluate(
    net: Any,
    variables: Variables,
    images: np.ndarray | Array,
    labels: np.ndarray | Array,
    *,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    batch: int = 256,
    apply_eval: ApplyEval | None = None,
) -> float:
    """Measure a network's accuracy once; keep an `Evaluator` to measure it often.

    Args:
        net: a linen network.
        variables: its variables.
        images: `[n, height, width, channels]`, uint8, or float32 and then already normalised.
        labels: `[n]`, int32.
        mean: of each channel in 0..1, needed for 8-bit images.
        std: of each channel in 0..1, needed for 8-bit images.
        batch: images in a minibatch.
        apply_eval: how to run the network, if not as `default_apply_eval` does.

    Returns:
        The share of right answers, 0..1.

    Raises:
        DataError: no images, not as many labels as images, or 8-bit images without mean and std.
    """
    return Evaluator(net, mean, std, batch=batch, apply_eval=apply_eval)(variables, images, labels)


def evaluate_test(net: Any, variables: Variables, dataset: Dataset, *, batch: int = 256) -> float:
    """Measure a network's accuracy on the test split: see `dataset.split_note` for what that is.

    Args:
        net: a linen network.
        variables: its variables.
        dataset: whose test images, mean and std are used.
        batch: images in a minibatch.

    Returns:
        The share of right answers, 0..1.
    """
    return evaluate(
        net,
        variables,
        dataset.test_images,
        dataset.test_labels,
        mean=dataset.mean,
        std=dataset.std,
        batch=batch,
    )
