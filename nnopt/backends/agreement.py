"""Whether backends compute the same: each against the others, and against JAX in 64 bits.

A backend that is fast and wrong would win every search, so what it says is believed only of networks on which it agrees. Outputs
are those of the network compiled as it is timed. To tell where a difference begins, the outputs of convolutions and dense layers
are asked for as well; that is another program, for a compiler can no longer fuse them into what follows, so it locates and does
not judge.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nnopt.backends.compiled import Backend, as_function
from nnopt.core import Example, sites
from nnopt.core.paths import path_text
from nnopt.errors import BackendError
from nnopt.typing import Path, Variables

TOLERANCE = 1e-4
"""Largest difference of an element of an output, relative to the largest magnitude in that output."""
EXACT = "float64"
"""What the reference is called: JAX on a CPU, all numbers of 64 bits."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far two backends are apart in one array.

    Attributes:
        place: which output, or the path of the layer whose output it is.
        first: name of a backend.
        second: name of the one that it is compared with, or `EXACT`.
        absolute: largest difference of an element; NaN or infinite where one has a number and the other has none, or another one.
        relative: that, relative to the largest finite magnitude in the second's array.
    """

    place: str
    first: str
    second: str
    absolute: float
    relative: float

    def within(self, tolerance: float) -> bool:
        """Whether the relative difference is no larger; NaN is."""
        return self.relative <= tolerance


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What came of a comparison.

    Attributes:
        tolerance: of the relative difference.
        outputs: differences of each output, for each backend from the reference and each pair of backends.
        layers: likewise of each convolution and dense layer, in the order of their calls, if asked for.
    """

    tolerance: float
    outputs: tuple[Difference, ...]
    layers: tuple[Difference, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether all outputs are within the tolerance."""
        return all(d.within(self.tolerance) for d in self.outputs)

    @property
    def worst(self) -> Difference:
        """The output that differs most."""
        return worst(self.outputs)

    @property
    def first_wrong_layer(self) -> Difference | None:
        """The first layer that is not within the tolerance, if layers were asked for."""
        return next((d for d in self.layers if not d.within(self.tolerance)), None)

    def check(self, what: str) -> None:
        """Refuses what a backend gets wrong.

        Args:
            what: the network, for the message.

        Raises:
            BackendError: the outputs disagree.
        """
        if not self.agrees:
            d = self.worst
            raise BackendError(
                f"{what}: {d.first} and {d.second} differ by {d.relative:.1e} of the largest value in {d.place}, "
                f"and {self.tolerance:.0e} is allowed; its results are worth nothing, see where with nnopt check --layers"
            )


def worst(differences: Sequence[Difference]) -> Difference:
    """The one that is relatively largest; NaN is larger than any number."""
    return max(differences, key=lambda d: np.inf if np.isnan(d.relative) else d.relative)


def agrees(
    net: nn.Module,
    variables: Variables,
    example: Any,
    backends: Sequence[Backend],
    *,
    tolerance: float = TOLERANCE,
) -> bool:
    """Whether a network's outputs are the same on all backends: see `agreement`."""
    return agreement(net, variables, example, backends, tolerance=tolerance).agrees


def agreement(
    net: nn.Module,
    variables: Variables,
    example: Any,
    backends: Sequence[Backend],
    *,
    tolerance: float = TOLERANCE,
    layers: bool = False,
) -> Agreement:
    """Runs a network on each backend and on the reference, with the same inputs, and compares.

    Args:
        net: any linen network, rewritten or not.
        variables: its variables.
        example: an array of its input shape, or an `Example`.
        backends: one or more, of different names.
        tolerance: of the relative difference.
        layers: also compare the outputs of convolutions and dense layers. Those inside `nn.scan`, `nn.vmap` and `nn.remat`, whose
            values never leave, are left out.

    Raises:
        BackendError: a backend cannot compile it, or returns another structure than the network.
    """
    function, inputs = as_function(net, variables, example)
    outputs = _compared(function, inputs, (net, variables, example), backends, ())
    found: list[Difference] = []
    if layers:
        paths = _layers(net, example)
        found = _compared(function, inputs, (net, variables, example), backends, paths)
    return Agreement(tolerance, tuple(outputs), tuple(found))


def _compared(
    function: Callable[..., Any],
    inputs: Sequence[jax.Array],
    network: tuple[nn.Module, Variables, Any],
    backends: Sequence[Backend],
    paths: Sequence[Path],
) -> list[Difference]:
    watched = _watched(function, paths) if paths else function
    results = {b.name: watched_outputs(b, watched, inputs) for b in backends}
    exact = in_double(network, inputs, paths)
    structure: Any = jax.tree.structure(exact)
    for name, result in results.items():
        if structure != jax.tree.structure(result):
            raise BackendError(
                f"{name} returns {jax.tree.structure(result)}, and the network {structure}"
            )
    results[EXACT] = exact
    names = list(results)
    pairs = [(a, EXACT) for a in names[:-1]] + [
        (a, b) for i, b in enumerate(names[:-1]) for a in names[i + 1 : -1]
    ]
    places = _places(exact)
    columns = {name: jax.tree.leaves(result) for name, result in results.items()}
    return [
        difference(place, a, b, columns[a][i], columns[b][i])
        for i, place in enumerate(places)
        for a, b in pairs
    ]


def watched_outputs(
    backend: Backend, function: Callable[..., Any], inputs: Sequence[jax.Array]
) -> Any:
    """What a backend makes of a function."""
    return jax.tree.map(np.asarray, backend.compile(function, inputs).outputs())


def _places(tree: Any) -> list[str]:
    paths = [
        jax.tree_util.keystr(p, simple=True, separator="/")
        for p, _ in jax.tree.leaves_with_path(tree)
    ]
    return [path or "output" for path in paths]


def difference(place: str, first: str, second: str, a: Any, b: Any) -> Difference:
    """How far two arrays are apart: see `Difference`."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        return Difference(place, first, second, np.inf, np.inf)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(a - b))
    absolute = float(apart.max(initial=0.0))  # NaN if there is one
    scale = float(np.abs(b[np.isfinite(b)]).max(initial=0.0))
    if absolute == 0:
        return Difference(place, first, second, 0.0, 0.0)
    return Difference(place, first, second, absolute, absolute / scale if scale else np.inf)


def in_double(
    network: tuple[nn.Module, Variables, Any],
    inputs: Sequence[jax.Array],
    paths: Sequence[Path] = (),
) -> Any:
    """A network's outputs with all numbers of 64 bits, by JAX on a CPU.

    Args:
        network: the module, its variables, an example of its inputs.
        inputs: as for `as_function`.
        paths: layers whose outputs are returned as well, see `agreement`.
    """
    net, variables, example = network
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.default_device(jax.devices("cpu")[0]),
    ):
        function, _ = as_function(net, jax.tree.map(_double, variables), example)
        if paths:
            function = _watched(function, paths)
        made = jax.jit(function)(*(_double(x) for x in inputs))
        return jax.tree.map(np.asarray, made)


def _double(array: Any) -> Any:
    if jnp.issubdtype(array.dtype, jnp.floating):
        return jnp.asarray(np.asarray(array, np.float64))
    return array


def _layers(net: nn.Module, example: Any) -> list[Path]:
    """Paths of what has a kernel and returns one array: convolutions and dense layers, whatever their class."""
    return [
        site.path
        for site in sites(net, Example.of(example))
        if "kernel" in site.variables.get("params", {})
        and not site.lifted
        and all(isinstance(call.outputs, jax.ShapeDtypeStruct) for call in site.calls)
    ]


def _watched(
    function: Callable[..., Any], paths: Sequence[Path]
) -> Callable[..., dict[str, jax.Array]]:
    """The function, which returns what layers return, and not what it returned; the second call of a layer is `path 2`."""

    def watched(*arrays: Any) -> dict[str, jax.Array]:
        seen: list[tuple[str, jax.Array]] = []
        count: dict[Path, int] = {}
        running: set[Path] = set()  # what stands in for another module has its path, too

        def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            path = context.module.scope.path if context.module.scope is not None else None
            if (
                path is None
                or path not in paths
                or path in running
                or context.method_name == "setup"
            ):
                return next_fun(*args, **kwargs)
            running.add(path)
            try:
                result = next_fun(*args, **kwargs)
            finally:
                running.remove(path)
            if isinstance(result, jax.Array):
                count[path] = count.get(path, 0) + 1
                again = f" {count[path]}" if count[path] > 1 else ""
                seen.append((path_text(path) + again, result))
            return result

        with nn.intercept_methods(intercept):
            function(*arrays)
        # Numbered, for the leaves of a dictionary come in the order of its keys.
        width = len(str(len(seen)))
        return {f"{i:0{width}} {name}": value for i, (name, value) in enumerate(seen, 1)}

    return watched
