"""The backend: jaxpr -> Relax -> fused kernels -> schedules -> machine code, and calls of it with JAX arrays."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nnopt.backends.compiled import Compiled
from nnopt.backends.tvm.conv import ConvWorkload, Tile
from nnopt.backends.tvm.deep import tuned
from nnopt.backends.tvm.emit import Emitter, load_rules
from nnopt.backends.tvm.gpu import scheduled_for_gpu, whole
from nnopt.backends.tvm.load import cores, threads, tvm
from nnopt.backends.tvm.machines import exporter, runner
from nnopt.backends.tvm.nest import as_given
from nnopt.backends.tvm.remote import Device, Remote, device_of, placed
from nnopt.backends.tvm.schedule import Work, schedule, trace_json
from nnopt.backends.tvm.targets import cpu_of, hindrance, is_gpu, target_of, target_text, vectors
from nnopt.backends.tvm.tiles import tiles
from nnopt.backends.tvm.tune import CANDIDATES, TileCache, default_cache, searched
from nnopt.backends.tvm.values import Value
from nnopt.backends.xla import describe_device
from nnopt.core.marks import mark_sites
from nnopt.errors import BackendError

SCHEDULES = {
    "template": "templates, tiles by a model",
    "search": f"templates, the fastest of {CANDIDATES} tiles",
    "metaschedule": "metaschedule",
    "none": "not scheduled",
}
"""Ways to schedule kernels, and what is said of them beside a latency."""
MEASURING = ("search", "metaschedule")
"""Those that run kernels to choose."""


@dataclasses.dataclass(frozen=True)
class TvmBackend:
    """Compiles with TVM: for this machine's CPU, or for another target, on this machine or on a remote device.

    Attributes:
        threads: that a kernel is spread over: 1, or None for all that TVM has (`TVM_NUM_THREADS`, else the cores of the process).
        scheduled: `template`, a fixed schedule for convolutions and products whose tile a model chooses; `search`, the same with
            the fastest of a dozen tiles, measured; `metaschedule`, TVM's own search of schedules, see `nnopt.backends.tvm.deep`; or
            `none`, plain loops.
        cache: file of the tiles that a search has measured; by default in the user's cache folder.
        trials: schedules that MetaSchedule builds and runs in all, one to three seconds each.
        database: folder of what MetaSchedule has found: kernels that are in it are not tuned again. None forgets it.
        target: what code is made for, as TVM describes it or as JSON text, such as `{"kind": "llvm", "mcpu": "x86-64-v3"}` or
            `{"kind": "cuda", "arch": "sm_90"}`; this machine's CPU if None. What this machine cannot run can still be exported.
        remote: where to run and time; here if None.
    """

    threads: int | None = None
    scheduled: str = "template"
    cache: str | None = None
    trials: int = 64
    database: str | None = None
    target: Mapping[str, Any] | str | None = None
    remote: Remote | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.threads is not None and self.threads < 1:
            raise BackendError(f"tvm: {self.threads} threads; give 1 or more")
        if self.scheduled not in SCHEDULES:
            raise BackendError(
                f"tvm: no schedule is called {self.scheduled!r:.40}; there are {', '.join(SCHEDULES)}"
            )
        if self.trials < 0:
            raise BackendError(f"tvm: {self.trials} trials; give 0 or more")
        if self.remote is not None and self.scheduled in MEASURING:
            raise BackendError(
                f"tvm: {self.scheduled} measures on this machine, not on {self.remote.address}; schedule by template for it"
            )
        if self.target is not None:
            object.__setattr__(self, "target", target_text(self.target))

    @property
    def name(self) -> str:
        """See `Backend`."""
        return "tvm"

    def describe(self) -> dict[str, Any]:
        """See `Backend`."""
        device = device_of(self.remote) if self.remote is not None else None
        return self._described(device, self._target(device))

    def _described(self, device: Device | None, target: Any) -> dict[str, Any]:
        found = {
            "tvm": importlib.metadata.version("apache-tvm"),
            "target": self._target_text(device) or cpu_of(target),
            "threads": self._threads(device),
        }
        if device is not None:
            return device.describe(target) | found
        host = describe_device(jax.devices("cpu")[0])
        if is_gpu(target):
            host |= {"platform": str(target.kind.name), "device_kind": cpu_of(target)}
        return host | found

    def _threads(self, device: Device | None) -> int:
        there = threads() if device is None else device.threads
        return min(there, self.threads or (cores() if device is None else there))

    def _target(self, device: Device | None) -> Any:
        return target_of(self._target_text(device), self._threads(device))

    def _target_text(self, device: Device | None) -> str | None:
        text = self.target
        if device is not None and self.remote is not None:
            text = self.remote.target or text or device.own
        return None if text is None else str(text)

    def compile(self, function: Callable[..., Any], inputs: Sequence[jax.Array]) -> Compiled:
        """See `Backend`.

        Raises:
            BackendError: TVM is not installed.
            UnsupportedPrimitiveError: the function has a primitive that has no rule.
        """
        tvm()
        arrays = jax.device_put(tuple(inputs), jax.devices("cpu")[0])
        began = time.perf_counter()
        device = device_of(self.remote) if self.remote is not None else None
        target = self._target(device)
        module, structure, how, traces = self._kernels(
            function, arrays, target, self._threads(device)
        )
        executable = built(module, target)
        there = None if device is None else placed(executable, device, target, arrays)
        run = there or runner(executable, target, arrays)
        seconds = time.perf_counter() - began

        def to_jax(result: Any) -> Any:
            leaves = there.fetched(result) if there is not None else fetched(result)
            return jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves])

        return Compiled(
            run, arrays, seconds, self._described(device, target), how, to_jax, traces,
            None if there is None else there.seconds, exporter(executable),
        )  # fmt: skip

    def _kernels(
        self, function: Callable[..., Any], arrays: Sequence[jax.Array], target: Any, count: int
    ) -> tuple[Any, Any, str, dict[str, str]]:
        """The scheduled module, what the function returns, how it was scheduled, and the instructions of each schedule."""
        if is_gpu(target):
            if self.scheduled != "template":
                raise BackendError(
                    f"tvm: {self.scheduled} is for a CPU; schedule by template for {cpu_of(target)}"
                )
            module, works, structure = emitted(function, arrays, whole)
            module = scheduled_for_gpu(fused(module), works, target)
            return module, structure, "dlight's schedules for a GPU", {}
        if self.scheduled in MEASURING and (why := hindrance(target)):
            raise BackendError(
                f"tvm: {self.scheduled} runs code for {cpu_of(target)}, and {why}; schedule by template for it"
            )
        lanes, registers = vectors(target)
        with contextlib.ExitStack() as opened:
            tile = self._tile(target, count, lanes, registers, opened)
            module, works, structure = emitted(function, arrays, tile)
        module, how = fused(module), SCHEDULES[self.scheduled]
        if self.scheduled == "none":
            return module, structure, how, {}
        own: dict[str, Any] = {}
        if self.scheduled == "metaschedule":
            own, how = tuned(
                module, works, target, count, self.trials, self.database,
                lambda kernel: schedule(kernel, works, count, lanes),
            )  # fmt: skip
        module, traces = scheduled(module, works, count, lanes, own)
        return module, structure, how, traces

    def _tile(
        self, target: Any, count: int, lanes: int, registers: int, opened: contextlib.ExitStack
    ) -> Callable[[ConvWorkload], Tile]:
        """How a convolution gets its tile, each distinct one once."""
        if self.scheduled != "search":
            return functools.cache(lambda work: tiles(work, lanes, registers)[0])
        cache = TileCache(self.cache or default_cache())
        opened.callback(cache.close)
        return functools.cache(lambda work: searched(work, cache, target, count, lanes, registers))


def fetched(result: Any) -> list[Any]:
    """What a run on this machine returned, as arrays."""
    alone = not isinstance(result, Sequence) and hasattr(result, "numpy")
    return [leaf.numpy() for leaf in ([result] if alone else list(result))]


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
    refused: Exception | None = None
    with builder.function("main", arguments):
        with builder.dataflow():
            try:
                results = [
                    emitter.full(v) for v in emitter.run(closed.jaxpr, closed.consts, values)
                ]
            except Exception as error:
                # Raised once the builder is closed: it complains of blocks that are left open.
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
    module: Any, works: dict[str, Work], count: int, lanes: int, own: Mapping[str, Any]
) -> tuple[Any, dict[str, str]]:
    """Every kernel by its template, or as its program says, if it has no schedule of its own by its name.

    Returns:
        The module, and the instructions of each schedule by the name of the kernel.
    """
    from tvm import tirx

    traces = {}
    for variable, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc):
            made = own.get(str(variable.name_hint)) or schedule(function, works, count, lanes)
            module.update_func(variable, made.mod["main"].without_attr("global_symbol"))
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
