"""Imports TVM, when it is first needed, without what its import does to the process."""

import functools
import importlib.metadata
import os
import sys
from typing import Any

from nnopt.errors import BackendError

_HOW = "install it with: pip install 'nnopt[tvm]'"


@functools.cache
def tvm() -> Any:
    """The module `tvm`.

    Its import replaces `sys.excepthook` by one that kills all child processes; it is put back. With several threads TVM would
    widen the affinity of the process to all cores, and by default it takes half of the cores: both are settled here, unless the
    environment says otherwise (`TVM_BIND_THREADS`, `TVM_NUM_THREADS`).

    Raises:
        BackendError: it is not installed, or together with a version of its FFI that crashes.
    """
    try:
        version = importlib.metadata.version("apache-tvm")
        ffi = importlib.metadata.version("apache-tvm-ffi")
    except importlib.metadata.PackageNotFoundError:
        raise BackendError(f"the backend tvm needs TVM, which is not installed; {_HOW}") from None
    if not version.startswith("0.27.") or not ffi.startswith("0.1.14"):
        raise BackendError(
            f"TVM {version} with apache-tvm-ffi {ffi} is not what nnopt has been tested with; {_HOW}"
        )
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_NUM_THREADS", str(cores()))
    hook = sys.excepthook
    try:
        import tvm
    except (ImportError, OSError) as error:
        raise BackendError(f"TVM cannot be loaded: {error}; {_HOW}") from error
    finally:
        sys.excepthook = hook
    return tvm


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS and Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def threads() -> int:
    """Threads that TVM's parallel loops are spread over in this process.

    Raises:
        BackendError: the environment gives no number of them.
    """
    given = os.environ.get("TVM_NUM_THREADS", str(cores()))
    if not given.isdecimal() or int(given) < 1:
        raise BackendError(
            f"TVM_NUM_THREADS is {given!r} in the environment; set it to a whole number from 1 on, or not at all"
        )
    return int(given)
