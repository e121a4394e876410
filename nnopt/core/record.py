"""A network and its history <-> JSON."""

import json
import os
import pathlib
from typing import Any

import flax.linen as nn

from nnopt.core.encode import decode, encode
from nnopt.core.example import Example
from nnopt.core.files import write_whole
from nnopt.core.fingerprint import fingerprint
from nnopt.core.paths import path_text
from nnopt.core.rewrite import Rewrite, base_of, history, rewrite
from nnopt.errors import RecordError, RewriteError, SelectionError

FORMAT = "nnopt network"
VERSION = 1
_KEYS = {"format", "version", "base", "steps", "fingerprint"}
_STEP_KEYS = {"rule", "example", "paths", "fingerprint"}


def to_record(net: nn.Module) -> dict[str, Any]:
    """The JSON value of a network: its base, the rules applied to it, and fingerprints.

    Raises:
        RecordError: something in the network has no importable name, such as a lambda or a class inside a function.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "base": encode(base_of(net), strict=True),
        "steps": [
            {
                "rule": encode(step.rule, strict=True),
                "example": {
                    "args": encode(step.example.args, strict=True),
                    "kwargs": encode(step.example.kwargs, strict=True),
                },
                "paths": [path_text(p) for p in step.paths],
                "fingerprint": step.fingerprint,
            }
            for step in history(net)
        ],
        "fingerprint": fingerprint(net),
    }


def from_record(record: Any) -> nn.Module:
    """The network that a record describes: its base, with the recorded rules applied again.

    Read records only from people you trust: classes and functions are imported by name, and a function that the network holds
    runs when the network is traced, which replaying its steps does.

    Raises:
        RecordError: the JSON is not a network record, or replaying it gives another network.
    """
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise RecordError(f'not a network record: expected a JSON object with "format": "{FORMAT}"')
    if record.get("version") != VERSION:
        raise RecordError(
            f"network record of version {record.get('version')!r}, this nnopt reads {VERSION}; install the nnopt that wrote it"
        )
    _check_keys(record, _KEYS, "network record")
    net = decode(record["base"])
    if not isinstance(net, nn.Module):
        raise RecordError(
            f"the base of a network record must be a linen module, got {type(net).__name__}"
        )
    if not isinstance(record["steps"], list):
        raise RecordError("the steps of a network record must be a list")
    for index, step in enumerate(record["steps"]):
        _check_keys(step, _STEP_KEYS, f"step {index} of the network record")
        _check_keys(step["example"], {"args", "kwargs"}, f"the example of step {index}")
        rule = decode(step["rule"])
        args, kwargs = (decode(step["example"][k]) for k in ("args", "kwargs"))
        if not (isinstance(rule, Rewrite) and isinstance(args, tuple) and isinstance(kwargs, dict)):
            raise RecordError(
                f"step {index} of the network record must hold a rule, and a list and a dictionary of arguments"
            )
        try:
            net = rewrite(net, rule, example=Example(*args, **kwargs))
        except (RewriteError, SelectionError) as e:
            raise RecordError(f"step {index} of the network record no longer applies: {e}") from e
        _check_fingerprint(net, step["fingerprint"], f"step {index}")
    _check_fingerprint(net, record["fingerprint"], "the network")
    return net


def save_record(net: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a network record; the file is complete or not there at all."""
    write_whole(path, json.dumps(to_record(net), indent=1) + "\n")


def load_record(path: str | os.PathLike[str]) -> nn.Module:
    """Reads a network record.

    Raises:
        RecordError: the file is missing, not JSON, or not a network record.
    """
    try:
        text = pathlib.Path(path).read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise RecordError(
            f"cannot read network record {path}: {e}; give the path of a JSON file that nnopt wrote"
        ) from e
    try:
        record = json.loads(text)
    except json.JSONDecodeError as e:
        raise RecordError(
            f"{path} is not valid JSON (line {e.lineno}: {e.msg}); it may have been cut off, write it again"
        ) from e
    try:
        return from_record(record)
    except RecordError as e:
        raise RecordError(f"{path}: {e}") from e


def _check_keys(value: Any, keys: set[str], what: str) -> None:
    if not isinstance(value, dict) or set(value) != keys:
        got = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise RecordError(f"{what} must have exactly the keys {sorted(keys)}, got {got}")


def _check_fingerprint(net: nn.Module, expected: Any, what: str) -> None:
    made = fingerprint(net)
    if made != expected:
        raise RecordError(
            f"{what} has fingerprint {made[:12]}, recorded was {str(expected)[:12]}: the code it names has changed, or the "
            "record was edited by hand"
        )
