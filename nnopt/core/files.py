"""Files that are complete or not there."""

import os
import pathlib


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes beside the file, then renames: a reader sees the old content or the new, never half.

    Args:
        path: of the file.
        content: text, which is encoded as UTF-8, or bytes.

    Raises:
        OSError: the folder cannot be written to; nothing is left behind.
    """
    target = pathlib.Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
