"""What a backend is, and what it makes: a function compiled for arrays of one shape, ready to be called and timed."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nnopt.core import Example
from nnopt.errors import BackendError
from nnopt.typing import Variables

BACKENDS = ("xla", "tvm")
"""Names of the backends."""


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
    """A function compiled for one input shape, ready to be called and timed.

    Attributes:
        run: the executable: arrays, in the order of `inputs`, -> what the backend returns for them, perhaps not ready yet.
        inputs: the arrays it is called with unless others are given.
        compile_seconds: wall-clock time of tracing, lowering and compilation.
        device: where it runs, as JSON values: what the backend's `describe` says.
        schedule: how it came by its loops, for people: a latency means little without it.
        to_jax: what `run` returns -> pytree of arrays as the function returns it.
        traces: instructions of each kernel's schedule as JSON, by its name, where the backend is told how to schedule.
        timer: how long a call on `inputs` takes, in seconds, where it runs somewhere that this process's clock says nothing
            about: number of calls, and whether to empty the caches before each -> mean. None if the time of `run` is that.
        export: writes it to a file, for a program without nnopt: a library (`.so`), objects to be linked where they run
            (`.tar`), or the source of code for a GPU (`.cu`). None where the backend cannot.
    """

    run: Callable[..., Any]
    inputs: tuple[jax.Array, ...]
    compile_seconds: float
    device: dict[str, Any]
    schedule: str = "as XLA chose"
    to_jax: Callable[[Any], Any] = lambda result: result
    traces: Mapping[str, str] = dataclasses.field(default_factory=dict)
    timer: Callable[[int, bool], float] | None = None
    export: Callable[[str | os.PathLike[str]], None] | None = None

    def __call__(self, *arrays: Any) -> Any:
        """Runs once, on `inputs` if no arrays are given; the result may not be ready yet."""
        return self.run(*(arrays or self.inputs))

    def outputs(self, *arrays: Any) -> Any:
        """As calling it, but JAX arrays whatever the backend."""
        return self.to_jax(self(*arrays))


class Backend(Protocol):
    """A compiler and a place to run what it makes. A frozen value: equal backends make the same."""

    @property
    def name(self) -> str:
        """One of `BACKENDS`, or another's own."""

    def describe(self) -> dict[str, Any]:
        """What a latency depends on besides the function, as JSON values: device, versions, threads."""

    def compile(self, function: Callable[..., Any], inputs: Sequence[jax.Array]) -> Compiled:
        """Compiles a function of JAX arrays; what it closes over are constants.

        Args:
            function: arrays -> pytree of arrays.
            inputs: their shapes and types are compiled for, their values are kept for timing.

        Raises:
            BackendError: the backend cannot.
        """


def backend(name: str, **options: Any) -> Backend:
    """A backend by its name.

    Args:
        name: `xla` or `tvm`.
        options: of `XlaBackend` or `nnopt.backends.tvm.TvmBackend`.

    Raises:
        BackendError: there is none of this name, or what it needs is not installed.
    """
    if name == "xla":
        from nnopt.backends.xla import XlaBackend

        return XlaBackend(**options)
    if name == "tvm":
        from nnopt.backends.tvm import TvmBackend

        return TvmBackend(**options)
    raise BackendError(f"no backend is called {name!r:.60}; there are {', '.join(BACKENDS)}")


def compile_network(
    net: nn.Module, variables: Variables, example: Any, *, backend: Backend | None = None
) -> Compiled:
    """Compiles a network's inference, with its weights as constants.

    A network is deployed with weights that no longer change, and a compiler makes use of that: it packs
    kernels for the convolution at hand and folds what depends on weights alone. With weights as
    arguments that work is done again in each call, so nnopt never measures it that way.

    Args:
        net: any linen network, rewritten or not.
        variables: its variables; they are copied into the executable.
        example: an array of the network's input shape, or an `Example`. Whatever is no array in it is
            static, such as the mode: `Example(x, train=False)`.
        backend: XLA on JAX's default device if None.

    Returns:
        The compiled network. Its inputs are drawn from a normal distribution with a fixed seed, so
        that two networks compiled for one example can be compared; integers and booleans are zeros.

    Raises:
        BackendError: the backend cannot compile it.
    """
    from nnopt.backends.xla import XlaBackend

    function, inputs = as_function(net, variables, example)
    return (backend or XlaBackend()).compile(function, inputs)


def as_function(
    net: nn.Module, variables: Variables, example: Any
) -> tuple[Callable[..., Any], tuple[jax.Array, ...]]:
    """A network's inference as a function of arrays, and arrays for it: see `compile_network`."""
    example = Example.of(example)
    leaves, tree = jax.tree.flatten((example.args, example.kwargs))
    is_array = [isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves]
    random = np.random.default_rng(0)
    inputs = tuple(
        jnp.asarray(_values(spec, random))
        for spec, array in zip(leaves, is_array, strict=True)
        if array
    )

    def infer(*arrays: jax.Array) -> Any:
        rest = iter(arrays)
        filled = [next(rest) if a else leaf for leaf, a in zip(leaves, is_array, strict=True)]
        args, kwargs = jax.tree.unflatten(tree, filled)
        return net.apply(variables, *args, **kwargs)

    return infer, inputs


def _values(spec: jax.ShapeDtypeStruct, random: np.random.Generator) -> np.ndarray:
    if jnp.issubdtype(spec.dtype, jnp.inexact):
        return random.standard_normal(spec.shape).astype(spec.dtype)
    return np.zeros(spec.shape, spec.dtype)
