"""What code is made for: this machine's CPU, another, or a GPU; and whether this machine can run it."""

import json
from collections.abc import Mapping
from typing import Any

from nnopt.backends.tvm.load import tvm
from nnopt.errors import BackendError

KINDS = ("llvm", "cuda")
"""Kinds of targets: CPUs of all makes, and NVIDIA's GPUs."""
_SETS = ("sse", "avx", "fma", "f16c", "bmi", "amx")
"""How the names of instruction sets begin. LLVM's other features tune code, or are of no use to a kernel."""


def target_text(target: Mapping[str, Any] | str) -> str:
    """A target as JSON text with sorted keys: hashable, and equal for equal targets.

    Args:
        target: TVM's description, such as `{"kind": "llvm", "mcpu": "x86-64-v3"}`, or the same as JSON text.

    Raises:
        BackendError: it is none, or of a kind that nnopt makes no code for.
    """
    try:
        values = json.loads(target) if isinstance(target, str) else dict(target)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise BackendError(
            f'tvm: the target {target!r:.80} is no JSON object; give one such as {{"kind": "llvm", "mcpu": "znver4"}}'
        )
    if (kind := values.get("kind")) not in KINDS:
        raise BackendError(f"tvm: no target is of kind {kind!r:.40}; there are {', '.join(KINDS)}")
    if kind == "cuda" and "arch" not in values:
        raise BackendError(
            'tvm: a target of kind cuda needs the GPU\'s architecture; give "arch", such as "sm_90"'
        )
    try:
        return json.dumps(values, sort_keys=True)
    except TypeError as error:
        raise BackendError(
            f"tvm: the target {target!r:.80} holds what is not JSON: {error}"
        ) from error


def target_of(text: str | None, count: int) -> Any:
    """A TVM target.

    Args:
        text: of `target_text`; this machine's CPU if None.
        count: its cores, where the text does not say. A GPU's host is this machine's CPU, where it does not say.

    Raises:
        BackendError: TVM knows no such target.
    """
    module = tvm()
    host = {"kind": "llvm", "mcpu": host_cpu(), "num-cores": count}
    if text is None:
        return module.target.Target(host)
    values = json.loads(text)
    if values["kind"] == "llvm":
        _check_cpu(values)
        values = {"num-cores": count} | values
    else:
        values = {"host": host} | values
    try:
        return module.target.Target(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise BackendError(
            f"tvm: {text:.120} is no target: {str(error).strip().splitlines()[-1]:.200}"
        ) from error


def _check_cpu(values: dict[str, Any]) -> None:
    """LLVM itself would take a CPU that it does not know for the oldest one, and say so on the terminal."""
    from tvm.target import codegen

    cpu, triple = (
        values.get("mcpu"),
        str(values.get("mtriple", codegen.llvm_get_system_triple())),
    )
    if triple.partition("-")[0] not in [str(t) for t in _architectures()]:
        raise BackendError(f"tvm: LLVM knows no architecture {triple!r:.60}; see mtriple")
    if cpu is not None and not codegen.llvm_is_valid_cpu(str(cpu), triple):
        raise BackendError(
            f"tvm: LLVM knows no CPU {cpu!r:.40} of {triple.partition('-')[0]}; see `llc -mcpu=help`, or leave out mcpu"
        )


def _architectures() -> list[Any]:
    from tvm.target import codegen

    return [*codegen.llvm_get_targets(), "amd64", "arm64", "i486", "i586", "i686", "armv7l", "armv7a"]  # fmt: skip


def host_cpu() -> str:
    """This machine's CPU as LLVM calls it, such as `znver4`."""
    tvm()
    from tvm.target import codegen

    return str(codegen.llvm_get_system_cpu())


def cpu_of(target: Any) -> str:
    """What a target is, in a word or two, such as `znver4` or `cuda sm_90`."""
    kind = str(target.kind.name)
    if kind != "llvm":
        return f"{kind} {target.attrs['arch']}"
    triple = str(target.attrs.get("mtriple", ""))
    return str(target.attrs.get("mcpu") or f"generic {triple.partition('-')[0]}".strip())


def is_gpu(target: Any) -> bool:
    """Whether kernels run on threads of a GPU."""
    return str(target.kind.name) != "llvm"


def vectors(target: Any) -> tuple[int, int]:
    """Elements of 32 bits in a vector register of a CPU, and number of registers.

    From its instruction sets: `llvm_get_vector_width` says 512 bits of any x86.
    """
    sets = features(target)
    if "avx512f" in sets:
        return 16, 32
    if "avx" in sets:
        return 8, 16
    return 4, 32 if _architecture(target) in ("aarch64", "arm64") else 16


def features(target: Any) -> set[str]:
    """Instruction sets of a CPU, and what LLVM knows of it besides, by LLVM's names."""
    from tvm.target import codegen

    return {str(name) for name in codegen.llvm_get_cpu_features(target)}


def _architecture(target: Any) -> str:
    from tvm.target import codegen

    triple = target.attrs.get("mtriple") or codegen.llvm_get_system_triple()
    return str(triple).partition("-")[0]


def hindrance(target: Any) -> str | None:
    """Why this machine cannot run a target's code, in words; None if it can."""
    if is_gpu(target):
        kind = str(target.kind.name)
        there = tvm().runtime.device(kind, 0).exist
        return None if there else f"this machine has no {kind} device"
    here = target_of(None, 1)
    if _architecture(target) != _architecture(here):
        return f"this machine is of {_architecture(here)}"
    missing = sorted(
        f for f in features(target) - features(here) if f.startswith(_SETS)
    )  # fmt: skip
    return f"this machine's CPU, {host_cpu()}, lacks {', '.join(missing)}" if missing else None
