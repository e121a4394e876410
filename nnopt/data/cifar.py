"""CIFAR-10 and CIFAR-100 from their original Python pickles.

A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009; the file format is
described at https://www.cs.toronto.edu/~kriz/cifar.html. A pickle can run any code as it is read,
so these are read by an unpickler that knows nothing but byte arrays.
"""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nnopt.data.dataset import Dataset, Triple, channel_statistics
from nnopt.errors import DataError

BATCH_IMAGES = 10_000
CIFAR100_TRAIN_IMAGES = 50_000
TEST_IMAGES = 10_000
VALIDATION_IMAGES = 10_000

CIFAR10_STATISTICS: tuple[Triple, Triple] = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
"""Mean and standard deviation over the 50,000 training images."""

CIFAR10_BLOCKSWAP: tuple[Triple, Triple] = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
"""Normalisation that BlockSwap's networks were trained with; the deviations are means over single
images."""

CIFAR10_CLOSER_LOOK: tuple[Triple, Triple] = (
    (125.3 / 255, 123.0 / 255, 113.9 / 255),
    (63.0 / 255, 62.1 / 255, 66.7 / 255),
)
"""Normalisation that the base networks of "A Closer Look at Structured Pruning" were trained
with."""

# fmt: off
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)
CIFAR100_CLASSES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle",
    "bottle", "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle",
    "caterpillar", "cattle", "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch",
    "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest", "fox",
    "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom",
    "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree",
    "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road",
    "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake",
    "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle",
    "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
)
# fmt: on

_AGAIN = "fetch the data set again with nnopt.data.download_cifar"


class _NdarrayName:
    """Stands for the name `numpy.ndarray`: it can be passed to `_reconstruct`, but not called."""


def _reconstruct(kind: Any, shape: Any, typecode: Any) -> np.ndarray:
    if not isinstance(kind, _NdarrayName) or shape != (0,):
        raise pickle.UnpicklingError("an array is rebuilt in an unknown way")
    return np.ndarray((0,), np.uint8)


def _dtype(name: Any, align: Any = False, copy: Any = False) -> np.dtype[np.uint8]:
    # Python 2 wrote `align` and `copy` as 0 and 1, which NumPy deprecates.
    if name not in ("u1", b"u1", "uint8", b"uint8"):
        raise pickle.UnpicklingError(f"an array of {name!r} instead of 'u1'")
    return np.dtype(np.uint8, align=False, copy=True)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r} instead of 'latin1'")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NdarrayName(),
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    # Python 3 writes bytes as encoded text where the reader may be Python 2.
    ("_codecs", "encode"): _encode,
}


class _ByteArrayUnpickler(pickle.Unpickler):
    """Admits byte arrays and built-in containers; nothing else is imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which no CIFAR file holds"
            ) from None


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _ByteArrayUnpickler(file, encoding="bytes").load()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {_AGAIN}") from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} is damaged or no CIFAR file: {reason}; {_AGAIN}") from None
    if not isinstance(content, dict):
        raise DataError(
            f"{path} is no CIFAR file: it holds a {type(content).__name__} instead of a dict; "
            f"{_AGAIN}"
        )
    return {
        key.decode("latin1") if isinstance(key, bytes) else str(key): value
        for key, value in content.items()
    }


def _read_batch(
    path: Path, label_key: str, classes: int, images: range
) -> tuple[np.ndarray, np.ndarray]:
    """Images `[n, 32, 32, 3]`, uint8, and labels `[n]`, int32, of one file, with `n in images`."""
    content = _read_pickle(path)
    for key in ("data", label_key):
        if key not in content:
            raise DataError(
                f"{path} has no entry {key!r} but {sorted(content)}; "
                "check that it is the right data set"
            )
    data = content["data"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2:
        raise DataError(f"{path}: 'data' is not a uint8 matrix [n, 3072]; {_AGAIN}")
    if data.shape[1] != 3072:
        raise DataError(
            f"{path}: a row of 'data' holds {data.shape[1]:,} bytes instead of 3,072; {_AGAIN}"
        )
    if len(data) not in images:
        expected = f"{images.start:,}" if len(images) == 1 else f"1 to {images.stop - 1:,}"
        raise DataError(f"{path} holds {len(data):,} images instead of {expected}; {_AGAIN}")
    labels = content[label_key]
    if isinstance(labels, np.ndarray):
        labels = labels.ravel().tolist()
    if not isinstance(labels, list) or len(labels) != len(data):
        raise DataError(f"{path}: {label_key!r} is not a list of {len(data):,} labels; {_AGAIN}")
    if not all(type(label) is int and 0 <= label < classes for label in labels):
        raise DataError(
            f"{path}: {label_key!r} holds other values than integers 0 to {classes - 1}; {_AGAIN}"
        )
    pixels = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels), np.asarray(labels, np.int32)


def _find_folder(path: str | os.PathLike[str], folder: str, first_file: str) -> Path:
    root = Path(path).expanduser()
    for candidate in (root, root / folder):
        if (candidate / first_file).is_file():
            return candidate
    if not root.is_dir():
        raise DataError(
            f"{root} is not a folder; give the path of {folder} or of the folder around it"
        )
    raise DataError(
        f"{root} holds neither {first_file} nor {folder}/{first_file}; give the path of {folder}, "
        "or fetch it with nnopt.data.download_cifar"
    )


def _test_note(images: int) -> str:
    if images == TEST_IMAGES:
        return f"the {TEST_IMAGES:,} official test images"
    return f"only {images:,} of the {TEST_IMAGES:,} official test images (incomplete test file)"


def cifar10(path: str | os.PathLike[str], validation: bool = False) -> Dataset:
    """Load CIFAR-10.

    Args:
        path: the folder `cifar-10-batches-py`, or the folder around it.
        validation: hold out the last 10,000 training images (`data_batch_5`) as the test split and
            train on the other 40,000. The official test images are then neither needed nor touched.

    Returns:
        50,000 (40,000) training images and 10,000 test images, `[n, 32, 32, 3]`. A test file with
        fewer images is accepted; `split_note` then says how many there are.

    Raises:
        DataError: a file is missing, truncated, or not what it claims to be.
    """
    folder = _find_folder(path, "cifar-10-batches-py", "data_batch_1")
    whole = range(BATCH_IMAGES, BATCH_IMAGES + 1)
    batches = [_read_batch(folder / f"data_batch_{i}", "labels", 10, whole) for i in range(1, 6)]
    if validation:
        test_images, test_labels = batches.pop()
        note = (
            f"the last {BATCH_IMAGES:,} training images (data_batch_5), held out; trained on the "
            f"other {4 * BATCH_IMAGES:,}"
        )
    else:
        test_images, test_labels = _read_batch(
            folder / "test_batch", "labels", 10, range(1, TEST_IMAGES + 1)
        )
        note = _test_note(len(test_images))
    mean, std = CIFAR10_STATISTICS
    return Dataset(
        name="cifar10",
        train_images=np.concatenate([images for images, _ in batches]),
        train_labels=np.concatenate([labels for _, labels in batches]),
        test_images=test_images,
        test_labels=test_labels,
        mean=mean,
        std=std,
        classes=CIFAR10_CLASSES,
        split_note=note,
    )


def cifar100(path: str | os.PathLike[str], validation: bool = False) -> Dataset:
    """Load CIFAR-100 with its 100 fine labels.

    Mean and standard deviation are computed from the training images.

    Args:
        path: the folder `cifar-100-python`, or the folder around it.
        validation: hold out the last 10,000 training images as the test split and train on the
            other 40,000.

    Returns:
        50,000 (40,000) training images and 10,000 test images, `[n, 32, 32, 3]`. A test file with
        fewer images is accepted; `split_note` then says how many there are.

    Raises:
        DataError: a file is missing, truncated, or not what it claims to be.
    """
    folder = _find_folder(path, "cifar-100-python", "train")
    whole = range(CIFAR100_TRAIN_IMAGES, CIFAR100_TRAIN_IMAGES + 1)
    images, labels = _read_batch(folder / "train", "fine_labels", 100, whole)
    if validation:
        held_out = len(images) - VALIDATION_IMAGES
        test_images, test_labels = images[held_out:], labels[held_out:]
        images, labels = images[:held_out], labels[:held_out]
        note = (
            f"the last {VALIDATION_IMAGES:,} training images, held out; trained on the "
            f"other {held_out:,}"
        )
    else:
        test_images, test_labels = _read_batch(
            folder / "test", "fine_labels", 100, range(1, TEST_IMAGES + 1)
        )
        note = _test_note(len(test_images))
    mean, std = channel_statistics(images)
    return Dataset(
        name="cifar100",
        train_images=images,
        train_labels=labels,
        test_images=test_images,
        test_labels=test_labels,
        mean=mean,
        std=std,
        classes=CIFAR100_CLASSES,
        split_note=note,
    )


CIFAR: dict[str, Callable[..., Dataset]] = {"cifar10": cifar10, "cifar100": cifar100}
"""The loaders by the name of their data set."""
