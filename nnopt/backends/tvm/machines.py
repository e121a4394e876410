"""Where an executable runs: in this process on the CPU, on a GPU of this machine, or nowhere yet; and how it becomes a file."""

import os
import pathlib
from collections.abc import Callable, Sequence
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
        kind = pathlib.Path(path).suffix
        try:
            if kind == ".cu":
                pathlib.Path(path).write_text(_cuda_source(executable))
            elif kind in (".so", ".tar"):
                executable.export_library(os.fspath(path))
            else:
                raise BackendError(
                    f"tvm: cannot export to {os.fspath(path)!r}; give a file that ends in .so, .tar (objects, to be linked where "
                    "they run) or .cu (source, of code for a GPU)"
                )
        except (OSError, RuntimeError) as error:  # such as no linker for another architecture
            last = str(error).strip().splitlines()[-1:]
            raise BackendError(
                f"tvm: cannot write {os.fspath(path)}: {''.join(last):.200}; a .tar needs no linker"
            ) from error

    return export


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
