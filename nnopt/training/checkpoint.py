"""Checkpoints: arrays in orbax's format, and beside them a small JSON file that says whose they are.

    folder/
        arrays/      the tree as nested dictionaries; plain orbax reads it as well
        nnopt.json   format, fingerprint of the network, extra, spec of each array, digest of each file

A checkpoint is written into a hidden sibling, `nnopt.json` last, and then renamed: a sibling that holds
that file is complete. A process killed at any moment leaves the old checkpoint or the new one
readable. Two processes must not save to the same folder at the same time.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nnopt.core import fingerprint
from nnopt.core.example import spec_text
from nnopt.core.files import write_whole
from nnopt.errors import CheckpointError

FORMAT = "nnopt checkpoint"
VERSION = 1
_ARRAYS, _RECORD = "arrays", "nnopt.json"
_FIELDS = {"fingerprint": str, "extra": dict, "arrays": dict, "key_impls": dict, "files": dict}


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself.

    Attributes:
        fingerprint: of the network that was saved, 64 hexadecimal digits.
        extra: what the caller gave to be kept with it.
        arrays: path in the tree -> dtype and shape, such as `"params/stem/kernel"` ->
            `"float32[3,3,3,16]"`.
    """

    fingerprint: str
    extra: dict[str, Any]
    arrays: dict[str, str]


def save_checkpoint(
    folder: str | os.PathLike[str],
    net: nn.Module,
    tree: Any,
    *,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Saves arrays of a network; an earlier checkpoint in the folder is replaced.

    Args:
        folder: where to; it and its parents are made.
        net: the network that the arrays belong to, whose fingerprint is kept.
        tree: any pytree of arrays: variables, or a whole `TrainState` with the optimiser's state
            and its typed random key. Arrays must lie on this host.
        extra: JSON values to keep with it, such as a recipe and the history so far.

    Raises:
        CheckpointError: the folder cannot be written or holds something else, a leaf is no array,
            or `extra` is not JSON.
    """
    target = _absolute(folder)
    leaves = _leaves(tree)
    arrays = {path: _host(path, leaf) for path, leaf in leaves.items()}
    try:
        kept = json.loads(json.dumps(dict(extra or {})))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"cannot save {folder}: extra is not JSON ({error}); give plain values"
        ) from error
    if target.exists() and not _replaceable(target):
        raise CheckpointError(
            f"cannot save {folder}: it exists and is no complete checkpoint; give another folder, or "
            "remove it"
        )
    record = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint(net),
        "extra": kept,
        "arrays": {"/".join(path): spec_text(leaf) for path, leaf in leaves.items()},
        "key_impls": {
            "/".join(path): str(jax.random.key_impl(leaf))
            for path, leaf in leaves.items()
            if _is_key(leaf)
        },
    }
    fresh, old = _siblings(target)
    try:
        _finish(target)
        fresh.mkdir(parents=True)
        _write_arrays(fresh / _ARRAYS, arrays)
        record["files"] = _digests(fresh)
        write_whole(fresh / _RECORD, json.dumps(record, indent=1) + "\n")
        if target.exists():
            _rename(target, old)
        _rename(fresh, target)
        _remove(old)
    # Orbax and tensorstore raise errors of many kinds.
    except Exception as error:
        with contextlib.suppress(OSError):
            _finish(target)
        raise CheckpointError(
            f"cannot save {folder}: {_first_line(error)}; check that the disk is writable and has room"
        ) from error


def load_checkpoint(folder: str | os.PathLike[str], net: nn.Module, like: Any) -> Any:
    """Loads what `save_checkpoint` saved.

    Args:
        folder: where it lies.
        net: the network it was saved from, or one of equal structure.
        like: a tree of the same structure, shapes and dtypes: arrays, whose values do not matter,
            or `jax.ShapeDtypeStruct`s as `jax.eval_shape` gives them.

    Returns:
        The tree, bit for bit as it was saved: numpy arrays where `like` has them (or where JAX
        would narrow 64 bits), otherwise JAX arrays, on the default device or sharded as in `like`.

    Raises:
        CheckpointError: nothing is there, it is half-written or damaged, the network has another
            structure, or the arrays are not those of `like`.
    """
    where, record = _open(folder)
    made = fingerprint(net)
    if made != record["fingerprint"]:
        raise CheckpointError(
            f"checkpoint {folder} belongs to a network of another structure (fingerprint "
            f"{record['fingerprint'][:12]}, this one has {made[:12]}); load it into the network that "
            "was saved"
        )
    wanted = _leaves(like)
    _check_specs(folder, record["arrays"], wanted)
    if _digests(where, record["files"]) != record["files"]:
        raise _damaged(folder, "files are missing or have changed")
    try:
        arrays = _read_arrays(where / _ARRAYS, wanted)
        values = [
            _restored(arrays.get(path), leaf, record["key_impls"].get("/".join(path)))
            for path, leaf in wanted.items()
        ]
    # As in saving; the bytes are those that were written, so this takes a faulty version of orbax.
    except Exception as error:
        raise _damaged(folder, _first_line(error)) from error
    return jax.tree.unflatten(jax.tree.structure(like), values)


def checkpoint_info(folder: str | os.PathLike[str]) -> CheckpointInfo:
    """Reads what a checkpoint says of itself, without its arrays.

    Raises:
        CheckpointError: nothing is there, or it is half-written or damaged.
    """
    _, record = _open(folder)
    return CheckpointInfo(record["fingerprint"], record["extra"], record["arrays"])


# --- folders ---


def _absolute(folder: str | os.PathLike[str]) -> pathlib.Path:
    """Orbax takes absolute paths only; links are followed, so that a rename moves what they mean."""
    return pathlib.Path(folder).expanduser().resolve()


def _siblings(target: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Where a new checkpoint is written, and where the old one goes while it is replaced."""
    return (
        target.with_name(f".{target.name}.nnopt-new"),
        target.with_name(f".{target.name}.nnopt-old"),
    )


def _complete(path: pathlib.Path) -> bool:
    return (path / _RECORD).is_file()


def _replaceable(target: pathlib.Path) -> bool:
    return target.is_dir() and (_complete(target) or not any(target.iterdir()))


def _rename(source: pathlib.Path, target: pathlib.Path) -> None:
    source.rename(target)


def _remove(path: pathlib.Path) -> None:
    """Deletes a checkpoint, beginning with what makes it complete."""
    if path.exists():
        (path / _RECORD).unlink(missing_ok=True)
        shutil.rmtree(path)


def _finish(target: pathlib.Path) -> None:
    """Brings a save that was cut off to its end, and clears away what it left."""
    if not target.exists():
        complete = next((p for p in _siblings(target) if _complete(p)), None)
        if complete is not None:
            _rename(complete, target)
    for path in _siblings(target):
        _remove(path)


def _open(folder: str | os.PathLike[str]) -> tuple[pathlib.Path, dict[str, Any]]:
    """The folder that holds the checkpoint, and its record."""
    target = _absolute(folder)
    where = target
    if not target.exists():
        where = next((p for p in _siblings(target) if _complete(p)), target)
    if not where.exists():
        raise CheckpointError(f"no checkpoint at {folder}; give the folder of one that was saved")
    try:
        record = json.loads((where / _RECORD).read_text())
    except OSError as error:
        raise CheckpointError(
            f"{folder} is no complete checkpoint ({_RECORD}: {error.strerror}); give the folder of one "
            "that was saved, or save it again"
        ) from error
    except ValueError as error:  # not JSON, not UTF-8
        raise _damaged(folder, f"{_RECORD} is not JSON") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise _damaged(folder, f'{_RECORD} does not have "format": "{FORMAT}"')
    if record.get("version") != VERSION:
        raise CheckpointError(
            f"checkpoint {folder} is of version {record.get('version')!r}, this nnopt reads {VERSION}; "
            "load it with the nnopt that wrote it"
        )
    for field, kind in _FIELDS.items():
        if not isinstance(record.get(field), kind):
            raise _damaged(folder, f"{_RECORD} has no valid {field!r}")
    return where, record


def _digests(folder: pathlib.Path, paths: Any = None) -> dict[str, str]:
    """SHA-256 of files below `folder`: of all, or of those of `paths` that are there."""
    if paths is None:
        found = sorted(p for p in folder.rglob("*") if p.is_file())
    else:
        found = [p for p in map(folder.joinpath, paths) if p.is_file()]
    digests = {}
    for path in found:
        with path.open("rb") as file:
            digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(
                file, "sha256"
            ).hexdigest()
    return digests


def _damaged(folder: str | os.PathLike[str], what: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {folder} is damaged: {what}; load another one, or save it again"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


# --- arrays ---


def _leaves(tree: Any) -> dict[tuple[str, ...], Any]:
    """The arrays of a tree by their paths, in the order of its leaves."""
    leaves: dict[tuple[str, ...], Any] = {}
    names = set()
    for keys, leaf in jax.tree.leaves_with_path(tree):
        path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        where = f"{'/'.join(path)!r} of the tree"
        if not path or not isinstance(
            leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
        ):
            raise CheckpointError(
                f"{where} is {type(leaf).__name__}; a checkpoint holds a tree of named arrays, give one"
            )
        if ".".join(path) in names:  # orbax's own name for it
            raise CheckpointError(f"{where} has the name of another array there; rename one")
        names.add(".".join(path))
        leaves[path] = leaf
    return leaves


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _check_specs(
    folder: str | os.PathLike[str],
    saved: Mapping[str, str],
    wanted: Mapping[tuple[str, ...], Any],
) -> None:
    specs = {"/".join(path): spec_text(leaf) for path, leaf in wanted.items()}
    differences = [
        f"{path!r} is {saved[path]} there and {spec} here"
        if path in saved
        else f"{path!r} is not in it"
        for path, spec in specs.items()
        if saved.get(path) != spec
    ] + [f"{path!r} is only in it" for path in saved if path not in specs]
    if differences:
        more = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
        raise CheckpointError(
            f"checkpoint {folder} holds other arrays: {differences[0]}{more}; give `like` as it was "
            "saved, variables or a whole TrainState"
        )


def _nested(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Nested dictionaries; arrays without elements, which orbax refuses, are left out."""
    nested: dict[str, Any] = {}
    for path, leaf in leaves.items():
        if 0 not in leaf.shape:
            inner = nested
            for name in path[:-1]:
                inner = inner.setdefault(name, {})
            inner[path[-1]] = leaf
    return nested


def _host(path: tuple[str, ...], leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise CheckpointError(
            f"{'/'.join(path)!r} of the tree is a spec without values; give arrays"
        )
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _write_arrays(folder: pathlib.Path, arrays: Mapping[tuple[str, ...], np.ndarray]) -> None:
    nested = _nested(arrays)
    if nested:
        with _orbax() as ocp, ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(nested))


def _read_arrays(
    folder: pathlib.Path, wanted: Mapping[tuple[str, ...], Any]
) -> dict[tuple[str, ...], np.ndarray]:
    nested = _nested(wanted)
    if not nested:
        return {}
    with _orbax() as ocp, ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        # As numpy arrays: orbax would warn of shardings otherwise, and take those of the machine that saved.
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), nested)
        arrays = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return _leaves(arrays)


def _restored(value: np.ndarray | None, like: Any, key_impl: str | None) -> Any:
    if value is None:
        spec = jax.eval_shape(jax.random.key_data, like) if _is_key(like) else like
        value = np.zeros(spec.shape, spec.dtype)
    narrowed = jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype
    if isinstance(like, np.ndarray | np.generic) or narrowed:
        return value
    array = jnp.asarray(value)
    if key_impl is not None:
        array = jax.random.wrap_key_data(array, impl=key_impl)
    if isinstance(like, jax.Array) and len(like.sharding.device_set) > 1:
        return jax.device_put(array, like.sharding)
    return array


@contextlib.contextmanager
def _orbax() -> Iterator[Any]:
    """Orbax, imported on first use; it gets neither to write to the terminal nor to set up logging."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import orbax.checkpoint as ocp

        absl = logging.getLogger("absl")
        absl_level = absl.level
        absl.setLevel(logging.CRITICAL + 1)
        try:
            yield ocp
        finally:
            absl.setLevel(absl_level)
            root.handlers[:] = handlers
            root.setLevel(level)
