"""Random crops, flips and Cutout for minibatches, as pure functions of an explicit key.

All of them keep the shape and dtype of their input, so they can stand inside a jitted training
step. They act on float images that are already normalised: there, 0 is the mean pixel of the data
set.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from nnopt.errors import DataError

PadMode = Literal["reflect", "constant"]


def pad_crop(
    key: Array,
    images: Array,
    pad: int = 4,
    mode: PadMode = "reflect",
    fill: Array | None = None,
) -> Array:
    """Pad every image on each side, then cut a window of the old size at a random place.

    Args:
        key: random key.
        images: `[batch, height, width, channels]`.
        pad: pixels added to each side; 0 returns the images as they are.
        mode: `reflect` mirrors the image at its border (which is not repeated); `constant` adds
            `fill`.
        fill: `[channels]`, the pixel that `constant` adds; zeros if absent. Pipelines that pad
            before they normalise add black, which is `-mean / std` here.

    Returns:
        `[batch, height, width, channels]`; each image draws its own offset, uniformly of `(2 pad +
        1)^2`.

    Raises:
        DataError: reflection by more pixels than the image has beside its border.
    """
    if pad == 0:
        return images
    _, height, width, channels = images.shape
    if mode == "reflect" and pad >= min(height, width):
        raise DataError(
            f"pad_crop: an image of {height}x{width} pixels cannot be reflected by {pad}; "
            f"use a pad below {min(height, width)}"
        )
    margins = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    padded = jnp.pad(images, margins, mode=mode)
    if mode == "constant" and fill is not None:
        inside = np.pad(np.ones((1, height, width, 1), bool), margins)
        padded = jnp.where(inside, padded, fill.astype(images.dtype).reshape(1, 1, 1, channels))
    offsets = jax.random.randint(key, (images.shape[0], 2), 0, 2 * pad + 1)

    def window(image: Array, offset: Array) -> Array:
        start = (offset[0], offset[1], jnp.zeros((), offset.dtype))
        return jax.lax.dynamic_slice(image, start, (height, width, channels))

    return jax.vmap(window)(padded, offsets)


def random_flip(key: Array, images: Array) -> Array:
    """Mirror each image left to right with probability one half.

    Args:
        key: random key.
        images: `[batch, height, width, channels]`.

    Returns:
        `[batch, height, width, channels]`. The same key twice gives the images back.
    """
    flipped = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1, :], images)


def cutout(key: Array, images: Array, size: int = 16) -> Array:
    """Set a square of every image to zero, the mean pixel of normalised images.

    The square's centre is uniform over the pixels, so that part of the square may lie outside the
    image and is clipped there (DeVries and Taylor, arXiv 1708.04552, section 3.2). It covers rows
    `[y - size // 2, y - size // 2 + size)` and the same of the columns.

    Args:
        key: random key.
        images: `[batch, height, width, channels]`.
        size: side of the square in pixels; 0 returns the images as they are.

    Returns:
        `[batch, height, width, channels]`.
    """
    if size == 0:
        return images
    batch, height, width, _ = images.shape
    row_key, column_key = jax.random.split(key)

    def inside(key: Array, extent: int) -> Array:
        first = jax.random.randint(key, (batch, 1), 0, extent) - size // 2
        pixels = jnp.arange(extent, dtype=first.dtype).reshape(1, extent)
        return (pixels >= first) & (pixels < first + size)

    rows = inside(row_key, height).reshape(batch, height, 1, 1)
    columns = inside(column_key, width).reshape(batch, 1, width, 1)
    return jnp.where(rows & columns, jnp.zeros((), images.dtype), images)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is done to a normalised training minibatch: padded crop, flip, Cutout, in this order.

    Attributes:
        pad: pixels of padding before the random crop; 0 for no crop.
        pad_mode: `reflect`, or `constant` for black.
        flip: mirror half of the images left to right.
        cutout: side of Cutout's square in pixels; 0 for none.

    Raises:
        DataError: a negative extent or an unknown `pad_mode`.
    """

    pad: int = 4
    pad_mode: PadMode = "reflect"
    flip: bool = True
    cutout: int = 0

    def __post_init__(self) -> None:
        if self.pad < 0 or self.cutout < 0:
            raise DataError(
                f"Augmentation: pad={self.pad}, cutout={self.cutout}; give 0 or more pixels"
            )
        if self.pad_mode not in ("reflect", "constant"):
            raise DataError(
                f"Augmentation: pad_mode={self.pad_mode!r}; give 'reflect' or 'constant'"
            )

    def __call__(self, key: Array, images: Array, fill: Array | None = None) -> Array:
        """Augment a minibatch.

        Args:
            key: random key.
            images: `[batch, height, width, channels]`, normalised.
            fill: `[channels]`, black in normalised units, for `pad_mode="constant"`; zeros if
                absent.

        Returns:
            `[batch, height, width, channels]`.
        """
        crop_key, flip_key, cutout_key = jax.random.split(key, 3)
        images = pad_crop(crop_key, images, self.pad, self.pad_mode, fill)
        if self.flip:
            images = random_flip(flip_key, images)
        return cutout(cutout_key, images, self.cutout)


NO_AUGMENTATION = Augmentation(pad=0, flip=False)
"""Leaves the images as they are."""
