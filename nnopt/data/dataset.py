"""A labelled image data set in memory, and how it is normalised and split."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from nnopt.errors import DataError

Triple = tuple[float, float, float]


def normalize(images: ArrayLike, mean: Triple, std: Triple) -> Array:
    """Scale 8-bit images to 0..1, subtract the mean and divide by the standard deviation.

    Args:
        images: `[batch, height, width, 3]`, uint8.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.

    Returns:
        `[batch, height, width, 3]`, float32.
    """
    scaled = jnp.asarray(images).astype(jnp.float32) / 255.0
    centre = jnp.asarray(mean, jnp.float32).reshape(1, 1, 1, 3)
    return (scaled - centre) / jnp.asarray(std, jnp.float32).reshape(1, 1, 1, 3)


def channel_statistics(images: np.ndarray) -> tuple[Triple, Triple]:
    """Mean and standard deviation of each channel over all pixels.

    Args:
        images: `[n, height, width, 3]`, uint8.

    Returns:
        Means and (population) standard deviations in 0..1.
    """
    means, stds = [], []
    for channel in range(3):
        # 256 counts instead of a float copy of the images; the sums are exact.
        counts = np.bincount(images[..., channel].ravel(), minlength=256)
        values = np.arange(256) / 255.0
        mean = float(counts @ values / counts.sum())
        means.append(mean)
        stds.append(float(np.sqrt(counts @ (values - mean) ** 2 / counts.sum())))
    return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test images with their labels.

    Attributes:
        name: such as `cifar10`.
        train_images: `[n_train, height, width, 3]`, uint8.
        train_labels: `[n_train]`, int32, in `0 .. len(classes) - 1`.
        test_images: `[n_test, height, width, 3]`, uint8.
        test_labels: `[n_test]`, int32.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
        classes: names of the labels.
        split_note: what the test accuracy is measured on; belongs beside every figure.
        flip_ok: whether a mirrored image keeps its label.

    Raises:
        DataError: shapes, dtypes or labels that contradict the above.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    mean: Triple
    std: Triple
    classes: tuple[str, ...]
    split_note: str
    flip_ok: bool = True

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images = getattr(self, f"{split}_images")
            labels = getattr(self, f"{split}_labels")
            if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
                raise DataError(
                    f"{self.name}: {split} images are {images.dtype} {list(images.shape)}; "
                    "give uint8 [n, height, width, 3]"
                )
            if labels.shape != images.shape[:1] or labels.dtype != np.int32:
                raise DataError(
                    f"{self.name}: {split} labels are {labels.dtype} {list(labels.shape)}; "
                    f"give int32 [{len(images)}]"
                )
            if len(images) == 0:
                raise DataError(f"{self.name}: no {split} images; give at least one")
            if labels.min() < 0 or labels.max() >= len(self.classes):
                raise DataError(
                    f"{self.name}: {split} labels run from {labels.min()} to {labels.max()}; "
                    f"{len(self.classes)} classes allow 0 to {len(self.classes) - 1}"
                )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(height, width, 3)`."""
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels

    def normalize(self, images: ArrayLike) -> Array:
        """Normalise 8-bit images with this data set's mean and standard deviation.

        Args:
            images: `[batch, height, width, 3]`, uint8.

        Returns:
            `[batch, height, width, 3]`, float32.
        """
        return normalize(images, self.mean, self.std)

    def with_normalization(self, statistics: tuple[Triple, Triple]) -> "Dataset":
        """The same images with another `(mean, std)`, such as `CIFAR10_BLOCKSWAP`."""
        mean, std = statistics
        return dataclasses.replace(self, mean=mean, std=std)

    def subset(self, train: int, test: int | None = None) -> "Dataset":
        """The first `train` training and `test` test images (all of the latter if `None`).

        Mean and standard deviation stay those of the whole set; `split_note` tells of the
        reduction.

        Raises:
            DataError: more images asked for than there are, or none.
        """
        n_test = len(self.test_images) if test is None else test
        for split, wanted, found in (
            ("training", train, len(self.train_images)),
            ("test", n_test, len(self.test_images)),
        ):
            if not 0 < wanted <= found:
                raise DataError(
                    f"{self.name}: a subset of {wanted:,} {split} images was asked for, "
                    f"but there are {found:,}; ask for 1 to {found:,}"
                )
        return dataclasses.replace(
            self,
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:n_test],
            test_labels=self.test_labels[:n_test],
            split_note=(
                f"{self.split_note}; reduced to {train:,} training and {n_test:,} test images"
            ),
        )


def minibatch(dataset: Dataset, batch: int, key: Array) -> tuple[Array, Array]:
    """Draw training images without replacement, normalised but not augmented.

    The draw depends on the key alone, so that every candidate of a search is scored on the same
    images.

    Args:
        dataset: where from.
        batch: how many.
        key: random key.

    Returns:
        Images `[batch, height, width, 3]`, float32, and labels `[batch]`, int32.

    Raises:
        DataError: more images asked for than there are, or none.
    """
    found = len(dataset.train_images)
    if not 0 < batch <= found:
        raise DataError(
            f"{dataset.name}: a minibatch of {batch:,} images was asked for, but there are "
            f"{found:,} training images; ask for 1 to {found:,}"
        )
    drawn = np.asarray(jax.random.permutation(key, found)[:batch])
    images = dataset.normalize(dataset.train_images[drawn])
    return images, jnp.asarray(dataset.train_labels[drawn])
