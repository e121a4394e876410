"""Result folders: each belongs to one job, and says which."""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from nnopt.core.files import write_whole
from nnopt.errors import ResultFolderError


def claim_folder(folder: pathlib.Path, kind: str, settings: dict[str, Any]) -> pathlib.Path:
    """Makes a folder, or opens it again for the same job.

    Args:
        folder: where results go.
        kind: of job, such as `search`; `<kind>.json` in the folder says what determines it.
        settings: what does, as JSON values.

    Returns:
        The folder.

    Raises:
        ResultFolderError: it cannot be written, belongs to another job, or holds something else.
    """
    marker = folder / f"{kind}.json"
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        found = read_json(marker, "remove the folder or give another with --out")
        if found is None:
            # What was half-written when a process was killed is nobody's.
            if any(not p.name.endswith(".partial") for p in folder.iterdir()):
                raise ResultFolderError(
                    f"{folder} is not empty and holds no {kind}; give a new folder with --out"
                )
            write_whole(marker, json.dumps(settings, indent=1) + "\n")
            found = settings
    wanted = json.loads(json.dumps(settings))
    found = json.loads(json.dumps(found))
    if found != wanted:
        keys = {*found, *wanted} if isinstance(found, dict) else set(wanted)
        differing = sorted(
            k for k in keys if not isinstance(found, dict) or found.get(k) != wanted.get(k)
        )
        raise ResultFolderError(
            f"{folder} belongs to another {kind} (it differs in {', '.join(differing)}); give another folder with --out"
        )
    return folder


@contextlib.contextmanager
def claimed(folder: pathlib.Path, kind: str, settings: dict[str, Any]) -> Iterator[pathlib.Path]:
    """`claim_folder` for the length of a job; one that fails before it has written anything leaves the folder as it was.

    So bad input claims nothing: the corrected command finds its folder free.

    Args:
        folder: see `claim_folder`.
        kind: see `claim_folder`.
        settings: see `claim_folder`.

    Yields:
        The folder.

    Raises:
        ResultFolderError: see `claim_folder`.
    """
    marker = folder / f"{kind}.json"
    new_folder, new_marker = not folder.exists(), not marker.exists()
    try:
        yield claim_folder(folder, kind, settings)
    except BaseException:
        # An error on the way must not hide the one that is raised.
        with contextlib.suppress(OSError):
            if new_marker and not any(p != marker for p in folder.iterdir()):
                marker.unlink(missing_ok=True)
                if new_folder:
                    folder.rmdir()
        raise


@contextlib.contextmanager
def writing_to(folder: pathlib.Path) -> Iterator[None]:
    """Turns what the file system refuses into a `ResultFolderError`."""
    try:
        yield
    except OSError as e:
        raise ResultFolderError(
            f"cannot write to the result folder {folder}: {e.strerror or e}; give another with --out"
        ) from e


def read_json(path: pathlib.Path, remedy: str) -> Any:
    """The content of a JSON file, or None where there is no file.

    Raises:
        ResultFolderError: it is not JSON, or `null`.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ResultFolderError(f"cannot read {path}: {e}; {remedy}") from e
    if found is None:
        raise ResultFolderError(f"{path} is damaged: it holds null; {remedy}")
    return found


def read_versioned(
    path: pathlib.Path, format_name: str, version: int, remedy: str
) -> dict[str, Any] | None:
    """The content of a JSON file that says its format and version, or None where there is no file.

    Args:
        path: of it.
        format_name: what its `format` is.
        version: what its `version` is.
        remedy: what to do where it is something else.

    Raises:
        ResultFolderError: it cannot be read, or is something else.
    """
    found = read_json(path, remedy)
    if found is None:
        return None
    if not isinstance(found, dict) or found.get("format") != format_name:
        raise ResultFolderError(f'{path} does not have "format": "{format_name}"; {remedy}')
    if found.get("version") != version:
        raise ResultFolderError(
            f"{path} is of version {found.get('version')!r}, this nnopt reads {version}; {remedy}"
        )
    return found
