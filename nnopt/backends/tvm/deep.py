"""Kernels scheduled by MetaSchedule: an evolutionary search over TVM's own schedules, each of which is built and run.

A trial takes one to three seconds, and a convolution takes some two hundred of them to come near the peak of a core, where our
templates are from the start; so this is for a network that will be deployed, and for odd kernels. What is found is kept in a
folder and used again. A template that is faster than all trials of its kernel is kept as well, and then preferred.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import logging
import math
import pathlib
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nnopt.backends.tvm.gpu import plain
from nnopt.backends.tvm.load import tvm
from nnopt.backends.tvm.schedule import Work
from nnopt.backends.tvm.targets import cpu_of
from nnopt.errors import BackendError

_LEAST_WORK = 1 << 14
"""Products below which a kernel is not worth a trial."""
_NEEDED = ("psutil", "cloudpickle")
_LOGGER = "tvm.s_tir.meta_schedule"


def tuned(
    module: Any,
    works: Mapping[str, Work],
    target: Any,
    threads: int,
    trials: int,
    database: str | None,
    template: Callable[[Any], Any],
) -> tuple[dict[str, Any], str]:
    """Schedules of a module's larger kernels.

    Kernels that the database has records of are not tuned again: delete it, or give another, to begin anew.

    Args:
        module: fused.
        works: what our templates are for; programs with a schedule of their own are left alone.
        target: this machine's CPU.
        threads: to spread a kernel over.
        trials: in all, for the kernels that there are no records of.
        database: folder of records, made if need be; None forgets them. It has a part for each target, and a log of the search.
        template: kernel -> our schedule of it.

    Returns:
        Schedules by the name of the kernel, and in words what was done. Kernels that are not in it are left to templates.

    Raises:
        BackendError: a package is missing, or the database is damaged.
    """
    for name in _NEEDED:
        if not _installed(name):
            raise BackendError(
                f"metaschedule needs {name}, which is not installed; install it with: pip install 'nnopt[tvm]'"
            )
    model = "xgb" if _installed("xgboost") else "random"
    kernels = _kernels(module, works)
    with contextlib.ExitStack() as opened:
        folder = pathlib.Path(database or opened.enter_context(tempfile.TemporaryDirectory()))
        part = folder / _part(target, threads, model)
        opened.enter_context(_alone(part))
        opened.enter_context(_without_intrinsics())
        records = _opened(part)
        new = {name: k for name, k in kernels.items() if not _records_of(records, [k])}
        if new and trials:
            calls = _calls(module)
            _tune(new, calls, records, part, target, threads, trials, model)
            for name, kernel in new.items():
                _keep_template(records, module, name, kernel, target, template)
        found = {}
        for name, kernel in kernels.items():
            record = records.query_tuning_record(_alone_in_module(kernel), target, "main")
            if record is not None and _searched(record.trace):
                found[name] = records.query_schedule(_alone_in_module(kernel), target, "main")
        spent = sum(_searched(r.trace) for r in _records_of(records, list(kernels.values())))
    every = len(_functions(module))
    what = f"metaschedule, {spent} trials ({len(found)} of {every} kernels), others by templates"
    if model == "random":
        what += "; by chance, for xgboost is not installed"
    return found, what


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _part(target: Any, threads: int, model: str) -> str:
    """Records of one target and model of costs: TVM itself would use those of any."""
    digest = hashlib.sha256(f"{target} {threads}".encode()).hexdigest()[:8]
    return f"{cpu_of(target)}-{threads}-threads-{model}-{digest}".replace(" ", "-")


@contextlib.contextmanager
def _alone(part: pathlib.Path) -> Iterator[None]:
    """Two processes that add to one database would mix their workloads up: the second waits."""
    with contextlib.ExitStack() as opened:
        try:
            part.mkdir(parents=True, exist_ok=True)
            lock = opened.enter_context(open(part / "lock", "w"))
        except OSError as error:
            raise BackendError(
                f"metaschedule: no database can be in {part}: {error.strerror}; give another folder"
            ) from error
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _opened(part: pathlib.Path) -> Any:
    from tvm.s_tir import meta_schedule as ms

    try:
        return ms.database.JSONDatabase(work_dir=str(part))
    except Exception as error:
        raise BackendError(
            f"metaschedule: the database in {part} is damaged; delete that folder to tune anew"
        ) from error


def _functions(module: Any) -> dict[str, Any]:
    from tvm import tirx

    return {
        str(variable.name_hint): function
        for variable, function in module.functions_items()
        if isinstance(function, tirx.PrimFunc)
    }


def _kernels(module: Any, works: Mapping[str, Work]) -> dict[str, Any]:
    """Kernels that are tuned, the largest first."""
    found = {}
    for name, function in _functions(module).items():
        kernel, names = plain(function)
        work = _products(kernel)
        if work >= _LEAST_WORK and all(isinstance(works[n], tuple) for n in names):
            found[name] = work, kernel
    return {name: kernel for name, (_, kernel) in sorted(found.items(), key=lambda f: -f[1][0])}


def _products(kernel: Any) -> int:
    """Iterations of the largest reduction."""
    import tvm
    from tvm import s_tir, tirx

    sch = s_tir.Schedule(tvm.IRModule({"main": kernel}), debug_mask="none")
    blocks = [sch.get(b) for b in sch.get_child_blocks(sch.get_sblock("root"))]
    return max(
        (
            math.prod(int(v.dom.extent) for v in block.iter_vars)
            for block in blocks
            if any(v.iter_type == tirx.IterVar.CommReduce for v in block.iter_vars)
        ),
        default=0,
    )


def _calls(module: Any) -> dict[str, int]:
    """How often each kernel is called in a run."""
    from tvm import relax

    counts: dict[str, int] = {}

    def visit(expression: Any) -> None:
        if isinstance(expression, relax.Call) and len(expression.args) > 0:
            called = getattr(expression.args[0], "name_hint", None)
            if called is not None:
                counts[str(called)] = counts.get(str(called), 0) + 1

    relax.analysis.post_order_visit(module["main"], visit)
    return counts


def _alone_in_module(kernel: Any) -> Any:
    """As MetaSchedule looks for it."""
    return tvm().IRModule({"main": kernel.with_attr("global_symbol", "main")})


def _tune(
    kernels: Mapping[str, Any],
    calls: Mapping[str, int],
    records: Any,
    part: pathlib.Path,
    target: Any,
    threads: int,
    trials: int,
    model: str,
) -> None:
    from tvm.s_tir import meta_schedule as ms

    # Every kernel has its turn before the budget is spent, and most of them two.
    each = max(1, min(32, trials // (2 * len(kernels))))
    # A small population: breeding the usual one of 2048 takes longer than its trials take to run.
    population = max(32, 8 * each)
    strategy = ms.search_strategy.EvolutionarySearch(
        population_size=population, init_min_unmeasured=population // 8, genetic_num_iters=3
    )
    space = ms.space_generator.PostOrderApply(
        sch_rules=_rules(threads),
        postprocs=ms.Postproc.create("llvm"),
        mutator_probs=ms.Mutator.create("llvm"),
    )
    with _logged(part / "search.log") as logger:
        tasks = [
            ms.TuneContext(
                mod=_alone_in_module(kernel), target=target, space_generator=space, search_strategy=strategy,
                task_name=name, logger=logger, rand_state=1 + number, num_threads=threads,
            ).clone()
            for number, (name, kernel) in enumerate(kernels.items())
        ]  # fmt: skip
        ms.tune.tune_tasks(
            tasks=tasks,
            task_weights=[float(calls.get(name, 1)) for name in kernels],
            work_dir=str(part),
            max_trials_global=trials,
            num_trials_per_iter=each,
            builder=ms.builder.LocalBuilder(max_workers=1, initializer=_for_workers()),
            runner=ms.runner.LocalRunner(
                timeout_sec=10,
                evaluator_config=ms.runner.EvaluatorConfig(number=3, repeat=1, min_repeat_ms=30),
            ),
            database=records,
            cost_model=model,
        )


def _rules(threads: int) -> list[Any]:
    """Rules that schedules are made by, without loops in parallel where there is to be one thread."""
    from tvm.s_tir import meta_schedule as ms

    rules = list(ms.ScheduleRule.create("llvm"))
    if threads > 1:
        return rules
    parallel = ms.schedule_rule.ParallelizeVectorizeUnroll
    alone = parallel(
        max_jobs_per_core=-1, max_vectorize_extent=64, unroll_max_steps=[0, 16, 64, 512], unroll_explicit=True,
    )  # fmt: skip
    return [alone if isinstance(rule, parallel) else rule for rule in rules]


def _keep_template(
    records: Any, module: Any, name: str, kernel: Any, target: Any, template: Callable[[Any], Any]
) -> None:
    """Adds our template to the records of a kernel, with its time."""
    from tvm import s_tir
    from tvm.s_tir import meta_schedule as ms

    ours = template(_functions(module)[name])
    # Its first step takes away the name that the kernel here is already without.
    steps = [i for i in ours.trace.simplified(True).insts if str(i.kind.name) != "Unannotate"]
    sch = s_tir.Schedule(_alone_in_module(kernel))
    s_tir.schedule.Trace(steps, {}).apply_to_schedule(sch, remove_postproc=False)
    records.commit_tuning_record(
        ms.database.TuningRecord(
            sch.trace,
            records.commit_workload(_alone_in_module(kernel)),
            [_seconds(sch.mod, target)],
            target,
            ms.arg_info.ArgInfo.from_prim_func(kernel),
        )
    )


def _seconds(module: Any, target: Any) -> float:
    """Of a call of a kernel on zeros, as the trials are timed."""
    import numpy as np

    built = tvm().compile(module, target)
    arrays = [
        tvm().runtime.tensor(np.zeros([int(n) for n in p.shape], str(p.dtype)))
        for p in module["main"].params
    ]
    timer = built.mod.time_evaluator("main", tvm().cpu(), number=3, repeat=1, min_repeat_ms=30)
    return float(timer(*arrays).mean)


def _searched(trace: Any) -> bool:
    """Whether a schedule is MetaSchedule's: those have a second part, templates have none."""
    return any(str(step.kind.name) == "EnterPostproc" for step in trace.insts)


def _records_of(records: Any, kernels: list[Any]) -> list[Any]:
    """Of all trials, those that failed too."""
    known = [records.commit_workload(_alone_in_module(k)) for k in kernels]
    return [
        r for r in records.get_all_tuning_records() if any(r.workload.same_as(w) for w in known)
    ]


@contextlib.contextmanager
def _logged(path: pathlib.Path) -> Iterator[logging.Logger]:
    """MetaSchedule's logger, which writes to a file. What TVM has for it closes all handlers that the process has."""
    logger = logging.getLogger(_LOGGER)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield logger
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
        handler.close()


@contextlib.contextmanager
def _without_intrinsics() -> Iterator[None]:
    """MetaSchedule imports the tensor instructions of all accelerators, which takes most of a minute and a CPU has no use for."""
    import tvm.s_tir

    name = "tvm.s_tir.tensor_intrin"
    if name in sys.modules:
        yield
        return
    _stub_intrinsics()
    try:
        yield
    finally:
        del sys.modules[name]
        del tvm.s_tir.tensor_intrin


def _stub_intrinsics() -> None:
    import sys
    import types

    import tvm.s_tir

    empty = types.ModuleType("tvm.s_tir.tensor_intrin")
    empty.__path__ = []
    sys.modules[empty.__name__] = empty
    tvm.s_tir.tensor_intrin = empty


@functools.cache
def _for_workers() -> Callable[[], None]:
    """The same for the processes that build. A function of no module: they would import nnopt, and JAX, to find it."""
    names = {"__builtins__": __builtins__, "__name__": "__main__"}
    return types.FunctionType(_stub_intrinsics.__code__, names, "stub")
