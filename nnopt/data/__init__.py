"""Image data sets in memory, their normalisation, and augmentation on the device.

`load("digits")` always works; CIFAR is read from a folder that the user names.
"""

import os

from nnopt.data.augment import (
    NO_AUGMENTATION,
    Augmentation,
    cutout,
    pad_crop,
    random_flip,
)
from nnopt.data.cifar import (
    CIFAR,
    CIFAR10_BLOCKSWAP,
    CIFAR10_CLOSER_LOOK,
    CIFAR10_STATISTICS,
    cifar10,
    cifar100,
)
from nnopt.data.dataset import Dataset, minibatch, normalize
from nnopt.data.digits import digits
from nnopt.data.download import download_cifar
from nnopt.errors import DataError

__all__ = [
    "CIFAR10_BLOCKSWAP",
    "CIFAR10_CLOSER_LOOK",
    "CIFAR10_STATISTICS",
    "NAMES",
    "NO_AUGMENTATION",
    "Augmentation",
    "Dataset",
    "canonical_name",
    "cifar10",
    "cifar100",
    "cutout",
    "digits",
    "download_cifar",
    "load",
    "minibatch",
    "normalize",
    "pad_crop",
    "random_flip",
]

NAMES = ("digits", *CIFAR)
"""What `load` knows."""


def canonical_name(name: str) -> str:
    """The name in `NAMES` that another spelling means, such as `CIFAR-10`.

    Raises:
        DataError: it means none of them.
    """
    plain = name.lower().replace("-", "")
    if plain not in NAMES:
        raise DataError(f"no data set is called {name!r}; the known ones are {', '.join(NAMES)}")
    return plain


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    validation: bool = False,
) -> Dataset:
    """Load a data set by its name.

    Args:
        name: `digits`, `cifar10` or `cifar100` (also written `cifar-10`, `CIFAR10`).
        data_dir: where CIFAR lies; the environment's `NNOPT_DATA` if absent. Not used by `digits`.
        validation: for CIFAR, hold out the last 10,000 training images as the test split. The test
            split of `digits` is held out in any case.

    Returns:
        The data set.

    Raises:
        DataError: an unknown name, no folder given, or files that are missing or damaged.

    Example:
        >>> dataset = load("digits")
        >>> dataset.train_images.shape, dataset.test_images.shape
        ((1437, 32, 32, 3), (360, 32, 32, 3))
    """
    plain = canonical_name(name)
    if plain == "digits":
        return digits()
    where = data_dir if data_dir is not None else os.environ.get("NNOPT_DATA")
    if not where:
        raise DataError(
            f"{plain} needs a folder: give --data-dir or set NNOPT_DATA; "
            "nnopt.data.download_cifar fetches it"
        )
    return CIFAR[plain](where, validation=validation)
