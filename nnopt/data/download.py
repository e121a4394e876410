"""Fetch CIFAR from its author's page."""

import hashlib
import http.client
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from nnopt.errors import DataError

BASE_URL = "https://www.cs.toronto.edu/~kriz/"
_CHUNK_BYTES = 1 << 18
_TIMEOUT_S = 60


@dataclass(frozen=True)
class Archive:
    """A published archive.

    Attributes:
        file: its name below `BASE_URL`.
        md5: its published checksum.
        folder: the one folder it holds.
        members: the files of that folder that the loaders need.
    """

    file: str
    md5: str
    folder: str
    members: tuple[str, ...]


ARCHIVES = {
    "cifar10": Archive(
        file="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        members=("batches.meta", *(f"data_batch_{i}" for i in range(1, 6)), "test_batch"),
    ),
    "cifar100": Archive(
        file="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        members=("meta", "train", "test"),
    ),
}


def _fetch(url: str, target: Path, show_progress: bool) -> str:
    """Write `url` to `target` and return its md5."""
    checksum = hashlib.md5(usedforsecurity=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with (
        urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response,
        target.open("wb") as file,
        Progress(*columns, console=Console(stderr=True), disable=not show_progress) as progress,
    ):
        length = response.headers.get("Content-Length")
        task = progress.add_task(url.rsplit("/", 1)[-1], total=int(length) if length else None)
        while chunk := response.read(_CHUNK_BYTES):
            file.write(chunk)
            checksum.update(chunk)
            progress.advance(task, len(chunk))
    return checksum.hexdigest()


def _unpack(source: Path, target: Path, archive: Archive) -> None:
    """Unpack the members that are needed, and no others, below `target`."""
    with tarfile.open(source, "r:gz") as tar:
        for name in archive.members:
            member = tar.getmember(f"{archive.folder}/{name}")
            if not member.isfile():
                raise tarfile.TarError(f"{member.name} is not a plain file")
            tar.extract(member, target, filter="data")


def download_cifar(
    name: str,
    folder: str | os.PathLike[str],
    *,
    base_url: str = BASE_URL,
    show_progress: bool = True,
) -> Path:
    """Fetch CIFAR-10 (170 MB) or CIFAR-100 (169 MB), check it, and unpack it.

    All is written to a temporary folder beside the target, which is renamed when it is complete: an
    interrupted download leaves nothing that looks like a data set. Files that are already there are
    not fetched again.

    Args:
        name: `cifar10` or `cifar100`.
        folder: where to put the data set's own folder; made if it is missing.
        base_url: where to fetch from, for mirrors of the original page.
        show_progress: draw a progress bar on standard error.

    Returns:
        The path of the unpacked folder, which `nnopt.data.load` takes.

    Raises:
        DataError: no such data set, no network, a wrong checksum, or a folder that cannot be
            written.
    """
    archive = ARCHIVES.get(name.lower().replace("-", ""))
    if archive is None:
        raise DataError(f"download_cifar: {name!r} is not known; give one of {', '.join(ARCHIVES)}")
    root = Path(folder).expanduser()
    target = root / archive.folder
    if all((target / member).is_file() for member in archive.members):
        return target
    if target.exists():
        raise DataError(f"{target} exists but is not complete; remove it and fetch again")
    url = base_url.rstrip("/") + "/" + archive.file
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{archive.folder}-", dir=root)
    except OSError as error:
        raise DataError(
            f"{root} cannot be written ({error.strerror}); give another folder"
        ) from None
    with scratch as scratch_name:
        packed = Path(scratch_name) / archive.file
        try:
            md5 = _fetch(url, packed, show_progress)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it is the open response of the server
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{url} cannot be fetched ({reason}); fetch it by hand elsewhere and unpack it "
                f"so that {target / archive.members[-1]} exists"
            ) from None
        if md5 != archive.md5:
            raise DataError(
                f"{url} has md5 {md5} instead of {archive.md5}: the download is damaged or not the "
                "original; try again"
            )
        try:
            _unpack(packed, Path(scratch_name), archive)
            os.replace(Path(scratch_name) / archive.folder, target)
        except (OSError, EOFError, KeyError, tarfile.TarError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{url} cannot be unpacked to {target} ({reason}); check the free "
                "space and try again"
            ) from None
    return target
