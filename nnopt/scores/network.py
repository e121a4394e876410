"""A network as the scores look at it: one flat list of equations, in which kernels, ReLU units and normalisations are found.

Everything is found in the traced program, not by the names or classes of layers, so `nn.relu`, `jnp.maximum(x, 0)` and a
convolution called through `jax.lax` count like any other. Only normalisation and dropout are known by their Flax classes.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
from jax.extend import core as jex

from nnopt.core import Example, sites
from nnopt.core.dataflow import Equation, Reach, reach
from nnopt.core.flatten import Flat, FlatEquation, Value, flatten
from nnopt.core.marks import mark_sites
from nnopt.core.paths import path_text
from nnopt.core.sites import Sites
from nnopt.errors import ScoreError, UnsupportedNetworkError
from nnopt.scores.kernel_uses import (
    PRODUCTS,
    KernelUse,
    kernel_use,
    kernels_inside,
    primitives_inside,
)
from nnopt.scores.rectifiers import is_zero, keeps_zero, relu_input
from nnopt.typing import Path, Variables

Edit: TypeAlias = Callable[[jax.Array, Mapping[Value, jax.Array]], jax.Array]
"""A value, and all those before it -> what stands in its place from there on."""

NORMALISATIONS = (nn.BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm)
"""Flax's layers that divide by a statistic of their input."""

_CONTROL = ("scan", "while", "cond")


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One call of a site: what enters and what leaves."""

    path: Path
    entered: Value
    left: Value


class TracedNetwork:
    """A network traced in train mode for one batch shape.

    Attributes:
        net: the network. example: the minibatch as the network takes it. sites: of the network. batch: number of examples.
        flat: its program: `(variables, images, key) -> outputs, new state`. images: the value of the images. outputs: what the
        network returns, as shapes. parameters: path of each parameter, as `("block", "conv", "kernel")` -> its value. uses:
        where kernels meet data, in order of execution. kernels: the parameters in `uses`, and those inside loops, that have two
        or more axes, each once. loops: sites inside loops and conditionals (`nn.scan`) that hold kernels or maxima of data:
        `uses` and `relus` do not see them. relus: site and input of each ReLU that acts on data. residuals: the sum of each
        residual addition -> the operand that came through more convolutions.
    """

    def __init__(self, found: Sites, variables: Any, images: Any) -> None:
        """Traces.

        Args:
            found: sites of the network.
            variables: arrays or shapes.
            images: array or shape, the network's first argument.
        """
        self.net, self.sites = found.net, found
        self.example = Example(images, *found.example.args[1:], **found.example.kwargs)
        self.batch = int(images.shape[0])
        state = [c for c in found.variables if c not in ("params", "intermediates", "taps")]

        def call(variables: Variables, images: jax.Array, key: jax.Array) -> Any:
            args, kwargs = self.example.args[1:], self.example.kwargs
            rngs = {"dropout": key}
            return found.net.apply(variables, images, *args, **kwargs, mutable=state, rngs=rngs)

        arguments = (variables, images, jax.random.key(0))
        with nn.intercept_methods(mark_sites):
            closed, shapes = jax.make_jaxpr(call, return_shape=True)(*arguments)
        self.flat: Flat = flatten(closed)
        self.outputs = shapes[0]
        self._outputs = len(jax.tree.leaves(shapes[0]))
        paths = jax.tree_util.tree_leaves_with_path(arguments)
        keys = [tuple(str(getattr(k, "key", k)) for k in path[1:]) for path, _ in paths]
        self.images = next(
            v for (path, _), v in zip(paths, self.flat.inputs, strict=True) if path[0].idx == 1
        )
        self.parameters: dict[Path, Value] = {
            key[1:]: v
            for (path, _), key, v in zip(paths, keys, self.flat.inputs, strict=True)
            if path[0].idx == 0 and key[0] == "params"
        }
        self._analyse()

    # --- looking at values ---

    def run(
        self,
        variables: Variables,
        images: jax.Array,
        key: jax.Array,
        edits: Mapping[Value, Edit],
        observed: Collection[Value] = (),
    ) -> tuple[Any, dict[Value, jax.Array]]:
        """The network with other values in some places; traceable.

        Args:
            variables: of the network.
            images: `[batch, ...]`.
            key: PRNG key for dropout.
            edits: what stands in the place of a value.
            observed: values to return.

        Returns:
            Outputs of the network, and the observed values before they are edited.
        """
        known: dict[Value, Any] = dict(self.flat.constants)
        seen = {}

        def learn(value: Value, array: Any) -> None:
            if value in observed:
                seen[value] = array
            known[value] = edits[value](array, known) if value in edits else array

        for value, array in zip(
            self.flat.inputs, jax.tree.leaves((variables, images, key)), strict=True
        ):
            learn(value, array)
        for equation in self.flat.equations:
            inputs = [a.val if isinstance(a, jex.Literal) else known[a] for a in equation.inputs]
            for value, array in zip(equation.outputs, equation.run(inputs), strict=True):
                learn(value, array)
        leaves = [
            a.val if isinstance(a, jex.Literal) else known[a]
            for a in self.flat.outputs[: self._outputs]
        ]
        return jax.tree.unflatten(jax.tree.structure(self.outputs), leaves), seen

    @functools.cached_property
    def named_kernels(self) -> dict[str, Path]:
        """What a kernel's part of a score goes by -> the kernel: the path text of its site, or its own.

        Its own if the site has more kernels than one, or is the network itself.
        """
        owners = [k[:-1] for k in self.kernels]
        return {
            path_text(k[:-1] if k[:-1] and owners.count(k[:-1]) == 1 else k): k
            for k in self.kernels
        }

    @functools.cached_property
    def order(self) -> dict[str, int]:
        """Path texts of sites and kernels -> their place in the order of the network."""
        places = {path_text(path): i for i, path in enumerate(self.sites.paths)}
        of_kernels = {
            name: max(places.get(path_text(k[:n]), 0) for n in range(len(k)))
            for name, k in self.named_kernels.items()
        }
        return of_kernels | places

    def check_loops(self, what: str) -> None:
        """Raises if there are layers inside loops.

        Args:
            what: who would miss them.

        Raises:
            ScoreError: naming the first.
        """
        if self.loops:
            raise ScoreError(
                f"{path_text(self.loops[0])!r} runs inside a loop (nn.scan), where {what} cannot tell one layer from another; "
                "write the layers out"
            )

    def check_uses(self) -> None:
        """Raises if a kernel is used where no axis of the result counts the examples.

        Raises:
            ScoreError: naming the kernel.
        """
        seen = {kernel for use in self.uses for kernel in use.kernels}
        unseen = [name for name, kernel in self.named_kernels.items() if kernel not in seen]
        if unseen:
            raise ScoreError(
                f"{unseen[0]!r} adds up over the examples, so there is no channel of one example to score; choose another score"
            )

    def check_kernels(self) -> None:
        """Raises if there are none.

        Raises:
            ScoreError: no convolution and no matrix product meets parameters.
        """
        if not self.kernels:
            raise ScoreError(
                f"{type(self.net).__name__} has no convolution or matrix product with parameters, so there are no weights to score"
            )

    @functools.cached_property
    def normalisations(self) -> tuple[Layer, ...]:
        """Calls of Flax's normalisation layers, in order of execution."""
        return self.layers(NORMALISATIONS)

    def layers(self, kinds: tuple[type, ...]) -> tuple[Layer, ...]:
        """Calls of the modules of some classes that take one array and return one, in order of execution.

        Raises:
            ScoreError: one of them is out of sight.
        """
        wanted = {s.path for s in self.sites if isinstance(s.module, kinds)}
        made: dict[Value, int] = dict.fromkeys(self.flat.inputs, -1)
        entered: dict[Path, list[tuple[int, Value]]] = {}
        for index, equation in enumerate(self.flat.equations):
            made |= dict.fromkeys(equation.outputs, index)
            if equation.path in wanted:
                entered.setdefault(equation.path, []).extend(
                    (index, a) for a in equation.inputs if isinstance(a, Value) and a in self._data
                )
        found = []
        for path, arrays in self.flat.left.items():
            if path not in wanted:
                continue
            calls = [v for v in arrays if v in made]
            previous = -1
            for left in calls:
                # The first array of data that the call reads and has not made itself.
                inside = [(i, v) for i, v in entered.get(path, ()) if previous < i <= made[left]]
                start = inside[0][0] if inside else 0
                outside = [v for _, v in inside if made[v] < start]
                if outside:
                    found.append((made[left], Layer(path, outside[0], left)))
                previous = made[left]
        unseen = wanted - {layer.path for _, layer in found}
        if unseen:
            raise ScoreError(
                f"{path_text(min(unseen))!r} runs inside a loop (nn.scan), where no score sees it; write the layers out"
            )
        return tuple(layer for _, layer in sorted(found, key=lambda pair: pair[0]))

    @functools.cached_property
    def features(self) -> Value:
        """The last value with positions before the network is down to `[batch, features]`, or else what enters its last kernel.

        For a convolutional network this is what global pooling (or flattening) gets.

        Raises:
            ScoreError: there is neither.
        """
        for equation in reversed(self.flat.equations):
            shapes = [v.aval.shape for v in equation.outputs]
            if equation.path and isinstance(self.sites[equation.path].module, NORMALISATIONS):
                continue
            if any(len(s) != 2 or s[0] != self.batch for s in shapes):
                continue
            for atom in equation.inputs:
                if isinstance(atom, Value) and atom in self._data and atom.aval.ndim > 2:
                    return atom
        self.check_kernels()
        entered = self.uses[-1].data
        assert isinstance(entered, Value)
        return entered

    # --- finding what there is ---

    def _analyse(self) -> None:
        origins: dict[Value, frozenset[Path]] = {
            v: frozenset((path,)) for path, v in self.parameters.items()
        }
        self._data: set[Value] = {self.images}
        reaches: dict[Value, Reach | None] = {self.images: Reach()}
        zeros: set[Value] = set()
        biased = self._bias_additions(origins)
        norms = {s.path for s in self.sites if isinstance(s.module, NORMALISATIONS)}
        self.uses: list[KernelUse] = []
        self.relus: list[tuple[Path, Value]] = []
        self.residuals: dict[Value, Value] = {}
        self.loops: list[Path] = []
        found: list[Path] = []
        for equation in self.flat.equations:
            values = [a if isinstance(a, Value) else None for a in equation.inputs]
            is_data = [v in self._data for v in values]
            origin = [origins.get(v, frozenset()) if v else frozenset() for v in values]
            if not any(is_data):
                origins |= dict.fromkeys(equation.outputs, frozenset().union(*origin))
                if keeps_zero(equation) and is_zero(equation.inputs[0], zeros):
                    zeros.update(equation.outputs)
                continue
            self._data.update(equation.outputs)
            before = [reaches.get(v) if v else None for v in values]
            flows_on, addition = reach(_as_equation(equation), before)
            reaches |= dict.fromkeys(equation.outputs, flows_on)
            if addition is not None:
                depths = [r.depth if r else -1 for r in before]
                branch = values[depths.index(max(depths))]
                assert branch is not None
                self.residuals[equation.outputs[0]] = branch
            found += self._kernels_of(equation, is_data, origin, biased)
            entered = relu_input(equation, zeros)
            if entered in self._data and entered is not None and equation.path not in norms:
                # Of one axis are statistics, and no units of an example.
                self.relus += [(equation.path, entered)] if entered.aval.ndim > 1 else []
        matrices = [k for k in found if self.parameters[k].aval.ndim > 1]
        self.kernels: tuple[Path, ...] = tuple(dict.fromkeys(matrices))

    def _kernels_of(
        self,
        equation: FlatEquation,
        is_data: Sequence[bool],
        origin: Sequence[frozenset[Path]],
        biased: Mapping[Value, Value],
    ) -> list[Path]:
        """The parameters that meet data in an equation; notes where, or that it is out of sight."""
        name = equation.primitive.name
        if name in PRODUCTS and sum(is_data) == 1:
            data = is_data.index(True)
            kernels = tuple(k for k in self.parameters if k in origin[1 - data])
            output = biased.get(equation.outputs[0], equation.outputs[0])
            use = kernel_use(equation, data, kernels, output) if kernels else None
            self.uses += [use] if use else []
            return list(kernels)
        inside = kernels_inside(equation, is_data, origin)
        if inside or (name in _CONTROL and "max" in primitives_inside(equation)):
            self.loops.append(inside[0][:-1] if inside else equation.path)
        return inside

    def _bias_additions(self, parameters: Collection[Value]) -> dict[Value, Value]:
        """The value before a bias is added -> the value after it, where nothing else reads the former."""
        readers: dict[Value, list[FlatEquation]] = {}
        pure: set[Value] = set(parameters)  # made of parameters alone
        for equation in self.flat.equations:
            values = [a for a in equation.inputs if isinstance(a, Value)]
            for value in values:
                readers.setdefault(value, []).append(equation)
            if values and all(v in pure for v in values):
                pure.update(equation.outputs)
        outputs = {a for a in self.flat.outputs if isinstance(a, Value)}
        found = {}
        for value, read_by in readers.items():
            if len(read_by) != 1 or read_by[0].primitive.name != "add" or value in outputs:
                continue
            other = [a for a in read_by[0].inputs if a is not value]
            if other and isinstance(other[0], Value) and other[0] in pure and value not in pure:
                found[value] = read_by[0].outputs[0]
        return found


def trace(found: Sites, batch: int, like: tuple[Any, Any] | None = None) -> TracedNetwork:
    """A network traced for a number of images.

    Args:
        found: its sites.
        batch: number of images.
        like: variables and images whose dtypes to trace with, by default those of the sites.
    """
    variables, images = like if like is not None else (found.variables, found.example.args[0])
    spec = jax.ShapeDtypeStruct((batch, *images.shape[1:]), images.dtype)
    return TracedNetwork(found, jax.tree.map(_spec, variables), spec)


def image_example(example: Any, who: str) -> Example:
    """An example whose first argument, the images, is its only array.

    Raises:
        UnsupportedNetworkError: it has other arrays, or none.
    """
    example = Example.of(example)
    leaves = jax.tree.leaves((example.args, example.kwargs))
    arrays = [x for x in leaves if hasattr(x, "dtype")]
    if len(arrays) != 1 or arrays != list(example.args[:1]):
        raise UnsupportedNetworkError(
            f"{who} scores networks of images alone, not of {example}; give "
            "Example(images, train=True), and put other arrays into the network"
        )
    return example


def trace_sites(net: nn.Module, example: Any) -> Sites:
    """`nnopt.core.sites` of a network of images."""
    return sites(net, image_example(example, "a training-free score"))


def _spec(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _as_equation(equation: FlatEquation) -> Equation:
    inputs, outputs = (
        tuple(a.aval for a in atoms) for atoms in (equation.inputs, equation.outputs)
    )
    name = equation.primitive.name
    return Equation(name, equation.params, inputs, outputs, equation.path, 1)
