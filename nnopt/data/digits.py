"""Scikit-learn's handwritten digits as a small 32x32 colour data set that is always at hand.

1,797 images of 8x8 pixels with 17 grey levels: the test set of E. Alpaydin and C. Kaynak, "Optical
Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

import numpy as np

from nnopt.data.dataset import Dataset, channel_statistics

SIDE = 32
TEST_STRIDE = 5


def bilinear_weights(source: int, target: int) -> np.ndarray:
    """Weights `[target, source]` of bilinear interpolation along one axis.

    Target pixel `i` samples the source at `(i + 1/2) source / target - 1/2`, clamped to the
    outermost pixel centres (half-pixel centres, "align_corners=False").
    """
    at = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(source)[None, :]))


def digits() -> Dataset:
    """Load the digits: 1,437 training and 360 test images, `[n, 32, 32, 3]`.

    The images are upsampled from 8x8 (bilinear), scaled from 0..16 to 0..255, and repeated over
    three channels. The split is fixed and stratified without a random generator: of the images
    sorted by label (in their original order within a label) every fifth is a test image. Mirrored
    digits are other signs, so `flip_ok` is false.
    """
    # A second of import time that only this function needs.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = bunch.target.astype(np.int32)
    weights = bilinear_weights(8, SIDE)
    grey = np.rint(weights @ bunch.images @ weights.T * (255.0 / 16.0)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)

    is_test = np.zeros(len(labels), bool)
    is_test[np.argsort(labels, kind="stable")[::TEST_STRIDE]] = True
    train_images = images[~is_test]
    mean, std = channel_statistics(train_images)
    return Dataset(
        name="digits",
        train_images=train_images,
        train_labels=labels[~is_test],
        test_images=images[is_test],
        test_labels=labels[is_test],
        mean=mean,
        std=std,
        classes=tuple(str(digit) for digit in range(10)),
        split_note=(
            "360 held-out digits of 1,797 (every fifth of each class); trained on the other 1,437"
        ),
        flip_ok=False,
    )
