"""Where an executable runs: in this process on the CPU, on a GPU of this machine, or nowhere yet; and how it becomes a file."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from nnopt.backends.tvm.load import tvm
from nnopt.backends.tvm.targets import cpu_of, hindrance, is_gpu
from nnopt.errors import BackendError


def runner(executable: Any, target: Any, inputs: Sequence[jax.Array]) -> Callable[..., Any]:
    """A function that runs an executable on this machine.

    Args:
        executable: of Relax's virtual machine.
        target: that it was built for.
        inputs: arrays that it will often be called with.

    Returns:
        arrays -> TVM tensors, ready. If this machine cannot run the code, it raises a `BackendError` that says why.
    """
    from tvm import relax

    why = hindrance(target)
    if why is not None:
        built_for = cpu_of(target)

        def refused(*_: Any) -> Any:
            raise BackendError(
                f"tvm: this was compiled for {built_for}, and {why}; export it, or run it on a remote device"
            )

        return refused
    if not is_gpu(target):
        return relax.VirtualMachine(executable, tvm().cpu())["main"]
    device = tvm().runtime.device(str(target.kind.name), 0)
    main = relax.VirtualMachine(executable, [device, tvm().cpu()])["main"]
    there = [tvm().runtime.tensor(np.array(a), device) for a in inputs]

    def run(*arrays: Any) -> Any:
        own = len(arrays) == len(inputs) and all(
            a is b for a, b in zip(arrays, inputs, strict=True)
        )
        result = main(
            *(there if own else [tvm().runtime.tensor(np.array(a), device) for a in arrays])
        )
        device.sync()
        return result

    return run


def exporter(executable: Any) -> Callable[[str | os.PathLike[str]], None]:
    """A function that writes an executable to a file: see `Compiled.export`."""

    def export(path: str | os.PathLike[str]) -> None:
        where = pathlib.Path(path)
        try:
            if where.suffix == ".cu":
                where.write_text(_cuda_source(executable))
            elif where.suffix in (".so", ".tar"):
                where.write_bytes(b"")  # or says why not, which a linker would at length
                with silent():
                    executable.export_library(str(where))
            else:
                raise BackendError(
                    f"tvm: cannot export to {str(where)!r}; give a file that ends in .so, .tar (objects, to be linked where they "
                    "run) or .cu (source, of code for a GPU)"
                )
        except OSError as error:
            raise BackendError(f"tvm: cannot write {where}: {error.strerror}") from error
        except RuntimeError as error:
            where.unlink(missing_ok=True)
            raise BackendError(
                f"tvm: the linker of this machine cannot make {where}; export a .tar, which is linked where it runs"
            ) from error

    return export


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """TVM warns on the terminal of each scope that it saves, whatever that is: nothing is lost."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _cuda_source(executable: Any) -> str:
    """What TVM has generated for a GPU. It is compiled when it is loaded where a GPU is."""
    left, found = [executable.mod], []
    while left:
        module = left.pop()
        left.extend(module.imports)
        if str(module.kind) == "cuda":
            found.append(str(module.inspect_source()))
    if not found:
        raise BackendError("tvm: there is no CUDA source in code for a CPU; export a .so or a .tar")
    return "\n".join(found)
