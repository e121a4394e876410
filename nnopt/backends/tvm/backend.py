"""The backend: jaxpr -> Relax -> fused kernels -> schedules -> machine code, and calls of it with JAX arrays."""

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nnopt.backends.compiled import Compiled
from nnopt.backends.tvm.conv import ConvWorkload, Tile, tiles
from nnopt.backends.tvm.emit import Emitter, load_rules
from nnopt.backends.tvm.load import cores, threads, tvm
from nnopt.backends.tvm.nest import as_given
from nnopt.backends.tvm.schedule import Work, schedule, trace_json
from nnopt.backends.tvm.values import Value
from nnopt.backends.xla import describe_device
from nnopt.core.marks import mark_sites
from nnopt.errors import BackendError


@dataclasses.dataclass(frozen=True)
class TvmBackend:
    """Compiles with TVM for this machine's CPU.

    Attributes:
        threads: that a kernel is spread over: 1, or None for all that TVM has (`TVM_NUM_THREADS`, else the cores of the process).
        scheduled: `template`, a fixed schedule for convolutions and products whose tile a model chooses; or `none`, plain loops.
    """

    threads: int | None = None
    scheduled: str = "template"

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.threads is not None and self.threads < 1:
            raise BackendError(f"tvm: {self.threads} threads; give 1 or more")
        if self.scheduled not in ("template", "none"):
            raise BackendError(
                f"tvm: no schedule is called {self.scheduled!r:.40}; give template or none"
            )

    @property
    def name(self) -> str:
        """See `Backend`."""
        return "tvm"

    def describe(self) -> dict[str, Any]:
        """See `Backend`."""
        tvm()
        host = describe_device(jax.devices("cpu")[0])
        return host | {
            "tvm": importlib.metadata.version("apache-tvm"),
            "target": host_cpu(),
            "threads": self._threads(),
        }

    def _threads(self) -> int:
        return min(threads(), self.threads or cores())

    def compile(self, function: Callable[..., Any], inputs: Sequence[jax.Array]) -> Compiled:
        """See `Backend`.

        Raises:
            BackendError: TVM is not installed.
            UnsupportedPrimitiveError: the function has a primitive that has no rule.
        """
        tvm()
        from tvm import relax

        arrays = jax.device_put(tuple(inputs), jax.devices("cpu")[0])
        began = time.perf_counter()
        count = self._threads()
        target = target_of_host(count)
        lanes, registers = vectors(target)
        module, works, structure = emitted(
            function, arrays, lambda work: tiles(work, lanes, registers)[0]
        )
        module = fused(module)
        traces: dict[str, str] = {}
        if self.scheduled == "template":
            module, traces = scheduled(module, works, count, lanes)
        executable = built(module, target)
        machine = relax.VirtualMachine(executable, tvm().cpu())
        seconds = time.perf_counter() - began

        def to_jax(result: Any) -> Any:
            leaves = (
                [result]
                if not isinstance(result, Sequence) and hasattr(result, "numpy")
                else list(result)
            )
            return jax.tree.unflatten(structure, [jnp.asarray(leaf.numpy()) for leaf in leaves])

        how = {"template": "templates, tiles by a model", "none": "not scheduled"}[self.scheduled]
        return Compiled(machine["main"], arrays, seconds, self.describe(), how, to_jax, traces)


def target_of_host(count: int) -> Any:
    """This machine's CPU, as a TVM target of so many cores."""
    return tvm().target.Target({"kind": "llvm", "mcpu": host_cpu(), "num-cores": count})


def host_cpu() -> str:
    """This machine's CPU as LLVM calls it, such as `znver4`."""
    tvm()
    from tvm.target import codegen

    return str(codegen.llvm_get_system_cpu())


def vectors(target: Any) -> tuple[int, int]:
    """Elements of 32 bits in a vector register, and number of registers."""
    from tvm.target import codegen

    with target:
        bits = codegen.llvm_get_vector_width(target)
    return max(4, bits // 32), 32 if bits >= 512 else 16


def emitted(
    function: Callable[..., Any], arrays: Sequence[jax.Array], tile: Callable[[ConvWorkload], Tile]
) -> tuple[Any, dict[str, Work], Any]:
    """A function as a Relax module.

    Returns:
        The module, what is to be scheduled in it by the name of its blocks, and the structure of what the function returns.
    """
    load_rules()
    from tvm import relax

    with nn.intercept_methods(mark_sites), nn.intercept_methods(as_given):
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arrays)
    builder = relax.BlockBuilder()
    emitter = Emitter(builder, tile)
    arguments = [
        relax.Var(f"x{i}", relax.TensorType(a.shape, str(a.dtype))) for i, a in enumerate(arrays)
    ]
    values = [
        Value(v, tuple(a.shape), tuple(a.shape), str(a.dtype))
        for v, a in zip(arguments, arrays, strict=True)
    ]
    refused = None
    with builder.function("main", arguments):
        with builder.dataflow():
            try:
                results = [
                    emitter.full(v) for v in emitter.run(closed.jaxpr, closed.consts, values)
                ]
            except (
                BackendError
            ) as error:  # raised when the builder is closed: it complains of open blocks
                refused, results = error, []
            made = [relax.const(v.data, v.dtype) if v.constant else v.data for v in results]
            output = builder.emit_output(made[0] if len(made) == 1 else relax.Tuple(made))
        builder.emit_func_output(output)
    if refused is not None:
        raise refused
    return builder.get(), emitter.works, jax.tree.structure(shapes)


def fused(module: Any) -> Any:
    """Element-wise kernels become parts of those before them."""
    from tvm import relax, transform

    passes = transform.Sequential(
        [
            relax.transform.DeadCodeElimination(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
        ]
    )
    return passes(module)


def scheduled(
    module: Any, works: dict[str, Work], count: int, lanes: int
) -> tuple[Any, dict[str, str]]:
    """Every kernel by its template, or as its program says.

    Returns:
        The module, and the instructions of each schedule by the name of the kernel.
    """
    from tvm import tirx

    traces = {}
    for variable, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc):
            made = schedule(function, works, count, lanes)
            module.update_func(variable, made.mod["main"])
            traces[str(variable.name_hint)] = trace_json(made)
    return module, traces


def built(module: Any, target: Any) -> Any:
    """Machine code."""
    from tvm import relax, transform

    t = relax.transform
    passes = transform.Sequential(
        [
            t.RewriteDataflowReshape(), t.ToNonDataflow(), t.RemovePurityChecking(), t.CallTIRRewrite(), t.StaticPlanBlockMemory(),
            t.LowerAllocTensor(), t.KillAfterLastUse(), t.LowerRuntimeBuiltin(), t.ComputePrimValue(), t.VMShapeLower(),
            t.AttachGlobalSymbol(),
        ]
    )  # fmt: skip
    return tvm().compile(module, target, relax_pipeline=passes)
