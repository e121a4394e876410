"""A network as the scores look at it: one flat list of equations, in which kernels, ReLU units and normalisations are found.

Everything is found in the traced program, not by the names or classes of layers, so `nn.relu`, `jnp.maximum(x, 0)` and a
convolution called through `jax.lax` count like any other. Only normalisation and dropout are known by their Flax classes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
from jax.extend import core as jex

from nnopt.core import Example, sites
from nnopt.core.dataflow import CONVOLUTIONS, Equation, Reach, reach
from nnopt.core.flatten import Atom, Flat, FlatEquation, Value, flatten
from nnopt.core.marks import mark_sites
from nnopt.core.paths import path_text
from nnopt.core.sites import Sites
from nnopt.errors import ScoreError, UnsupportedNetworkError
from nnopt.typing import Path, Variables

Edit: TypeAlias = Callable[[jax.Array, Mapping[Value, jax.Array]], jax.Array]
"""A value, and all those before it -> what stands in its place from there on."""

NORMALISATIONS = (nn.BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm)
"""Flax's layers that divide by a statistic of their input."""

_UNCHANGED_ZERO = ("convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "copy")


@dataclasses.dataclass(frozen=True, eq=False)
class KernelUse:
    """A convolution or matrix product of data with parameters.

    Attributes:
        path: the site that computes it.
        kernels: the parameters that its kernel is made of.
        output: what it returns, after the bias if one is added.
        batch_axis: the axis of the output that counts the examples.
        feature_axes: the axes of the output that come from the kernel: channels.
        weights_per_feature: values of the kernel that make one of them, `k^2 in / groups` for a convolution.
        data: its input.
        is_convolution: whether its output has positions.
    """

    path: Path
    kernels: tuple[Path, ...]
    output: Value
    batch_axis: int
    feature_axes: tuple[int, ...]
    weights_per_feature: int
    data: Atom
    is_convolution: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One call of a site: what enters and what leaves."""

    path: Path
    entered: Value
    left: Value


class TracedNetwork:
    """A network traced in train mode for one batch shape.

    Attributes:
        net: the network.
        example: the minibatch as the network takes it.
        sites: of the network.
        batch: number of examples.
        flat: its program: `(variables, images, key) -> outputs, new state`.
        images: the value of the images.
        outputs: what the network returns, as shapes.
        parameters: path of each parameter, as `("block", "conv", "kernel")` -> its value.
        uses: where kernels meet data, in order of execution.
        kernels: the parameters in `uses`, and those inside loops, that have two or more axes, each once.
        loops: sites inside loops and conditionals (`nn.scan`) that hold kernels or maxima of data: `uses` and `relus` do not see them.
        relus: site and input of each ReLU that acts on data.
        residuals: the sum of each residual addition -> the operand that came through more convolutions.
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
        """What a kernel's part of a score goes by -> the kernel: the path text of its site, or its own if the site has more."""
        owners = [k[:-1] for k in self.kernels]
        return {path_text(k[:-1] if owners.count(k[:-1]) == 1 else k): k for k in self.kernels}

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
            what: who cannot look into them.

        Raises:
            ScoreError: naming the loop.
        """
        if self.loops:
            raise ScoreError(
                f"{path_text(self.loops[0])!r} runs inside a loop (nn.scan), where {what} cannot tell one layer from another; "
                "write the layers out"
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
        self.uses: tuple[KernelUse, ...] = ()
        self.relus: list[tuple[Path, Value]] = []
        self.residuals: dict[Value, Value] = {}
        self.loops: list[Path] = []
        hidden: list[Path] = []
        for equation in self.flat.equations:
            inputs = equation.inputs
            is_data = [isinstance(a, Value) and a in self._data for a in inputs]
            origin = frozenset().union(
                *(origins.get(a, frozenset()) for a in inputs if isinstance(a, Value))
            )
            name = equation.primitive.name
            if any(is_data):
                self._data.update(equation.outputs)
                before = [reaches.get(a) if isinstance(a, Value) else None for a in inputs]
                flows_on, addition = reach(_as_equation(equation), before)
                reaches.update(dict.fromkeys(equation.outputs, flows_on))
                if addition is not None:
                    deeper = max(zip(before, inputs, strict=True), key=lambda p: p[0].depth)[1]  # type: ignore[union-attr]
                    self.residuals[equation.outputs[0]] = deeper  # type: ignore[assignment]
                if name in (*CONVOLUTIONS, "dot_general") and sum(is_data) == 1:
                    param = inputs[1 - is_data.index(True)]
                    names = origins.get(param, frozenset()) if isinstance(param, Value) else ()
                    use = self._use(equation, is_data.index(True), names, biased) if names else None
                    self.uses += (use,) if use else ()
                elif any(True for _ in _inner(equation)) and name != "custom_jvp_call":
                    each = [
                        origins.get(a, frozenset()) if isinstance(a, Value) else frozenset()
                        for a in inputs
                    ]
                    inside = _kernels_inside(equation, is_data, each)
                    hidden += inside
                    if inside or "max" in _primitives(equation):
                        self.loops.append(inside[0][:-1] if inside else equation.path)
                if equation.path not in norms:
                    relu = _relu_input(equation, zeros)
                    if relu is not None and relu in self._data and relu.aval.ndim > 1:
                        self.relus.append((equation.path, relu))
            else:
                origins.update(dict.fromkeys(equation.outputs, origin))
                if name in _UNCHANGED_ZERO and _is_zero(inputs[0], zeros):
                    zeros.update(equation.outputs)
        found = [k for use in self.uses for k in use.kernels] + hidden
        matrices = [k for k in found if self.parameters[k].aval.ndim > 1]
        self.kernels: tuple[Path, ...] = tuple(dict.fromkeys(matrices))

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

    def _use(
        self,
        equation: FlatEquation,
        data: int,
        kernels: Iterable[Path],
        biased: Mapping[Value, Value],
    ) -> KernelUse | None:
        output = equation.outputs[0]
        param = equation.inputs[1 - data].aval
        if equation.primitive.name == "dot_general":
            axes = _product_axes(equation, data)
            if axes is None:
                return None
            batch, features, is_convolution = *axes, False
        else:
            numbers = equation.params.get("dimension_numbers")
            spec = (
                numbers.out_spec
                if hasattr(numbers, "out_spec")
                else (0, len(output.aval.shape) - 1)
            )
            batch, features, is_convolution = spec[0], (spec[1],), True
        names = tuple(k for k in self.parameters if k in set(kernels))
        width = math.prod(output.aval.shape[a] for a in features)
        return KernelUse(
            equation.path, names, biased.get(output, output), batch, features,
            param.size // width, equation.inputs[data], is_convolution,
        )  # fmt: skip


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


def _is_zero(atom: Atom, zeros: Collection[Value]) -> bool:
    if isinstance(atom, jex.Literal):
        return bool(getattr(atom.val, "ndim", 0) == 0 and atom.val == 0)
    return atom in zeros


def rectifier(equation: FlatEquation) -> float | None:
    """The value at which a rectifier with a derivative of its own saturates: infinity for `jax.nn.relu`, 6 for `relu6`.

    Returns:
        None if the equation is no such rectifier.
    """
    if equation.primitive.name != "custom_jvp_call" or len(equation.inputs) != 1:
        return None
    body = flatten(equation.params["call_jaxpr"])
    steps = [(e.primitive.name, e.inputs) for e in body.equations]
    if (
        not steps
        or steps[0][0] != "max"
        or _maximum_with_zero(steps[0][1], ()) is not body.inputs[0]
    ):
        return None
    if len(steps) == 1:
        return math.inf
    caps = [a.val for a in steps[1][1] if isinstance(a, jex.Literal)]
    return float(caps[0]) if len(steps) == 2 and steps[1][0] == "min" and caps else None


def _relu_input(equation: FlatEquation, zeros: Collection[Value]) -> Value | None:
    """What enters a ReLU: of `jax.nn.relu` and `relu6`, and of any maximum with zero."""
    if equation.primitive.name == "max":
        return _maximum_with_zero(equation.inputs, zeros)
    entered = equation.inputs[0] if rectifier(equation) is not None else None
    return entered if isinstance(entered, Value) else None


def _maximum_with_zero(inputs: Sequence[Atom], zeros: Collection[Value]) -> Value | None:
    for value, other in (inputs, inputs[::-1]):
        if isinstance(value, Value) and _is_zero(other, zeros):
            return value
    return None


def _product_axes(equation: FlatEquation, data: int) -> tuple[int, tuple[int, ...]] | None:
    """Axes of a `dot_general`'s output that count the examples (the first of the data) and the kernel's features."""
    contracting, batched = equation.params["dimension_numbers"]
    if 0 in contracting[data]:
        return None
    ranks = [len(a.aval.shape) for a in equation.inputs]
    free = [
        [i for i in range(ranks[s]) if i not in contracting[s] and i not in batched[s]]
        for s in (0, 1)
    ]
    # Axes of the output: those of both, then the free ones of the left, then of the right operand.
    order: Sequence[tuple[int, int]] = (
        [(data, i) for i in batched[data]] + [(0, i) for i in free[0]] + [(1, i) for i in free[1]]
    )
    of_data = dict(zip(batched[data], batched[1 - data], strict=True))
    batch = order.index((data, 0))
    features = tuple(
        axis
        for axis, (side, i) in enumerate(order)
        if axis != batch and (side != data or i in of_data)
    )
    return batch, features


def _kernels_inside(
    equation: FlatEquation, is_data: Sequence[bool], origins: Sequence[frozenset[Path]]
) -> list[Path]:
    """Parameters that meet data in a convolution or product inside a loop or conditional."""
    found: list[Path] = []

    def walk(jaxpr: Any, data: Sequence[bool], params: Sequence[frozenset[Path]]) -> list[bool]:
        flows = dict(zip(jaxpr.invars, data, strict=True))
        made = dict(zip(jaxpr.invars, params, strict=True))
        for eqn in jaxpr.eqns:
            values = [None if isinstance(a, jex.Literal) else a for a in eqn.invars]
            here = [v is not None and flows.get(v, False) for v in values]
            origin = [made.get(v, frozenset()) if v is not None else frozenset() for v in values]
            after = [any(here)] * len(eqn.outvars)
            if eqn.primitive.name in (*CONVOLUTIONS, "dot_general") and sum(here) == 1:
                found.extend(sorted(origin[1 - here.index(True)]))
            for inner in _inner(eqn):
                if len(inner.invars) <= len(values):
                    skip = len(values) - len(inner.invars)
                    out = walk(inner, here[skip:], origin[skip:])
                    after = out if len(out) == len(after) else after
            flows.update(zip(eqn.outvars, after, strict=True))
            if not any(here):
                union = frozenset().union(*origin)
                made.update(dict.fromkeys(eqn.outvars, union))
        return [not isinstance(a, jex.Literal) and flows.get(a, False) for a in jaxpr.outvars]

    for inner in _inner(equation):
        skip = len(equation.inputs) - len(inner.invars)
        if skip >= 0:
            walk(inner, is_data[skip:], origins[skip:])
    return found


def _primitives(equation: Any) -> set[str]:
    """Names of all primitives inside an equation."""
    names = set()
    for inner in _inner(equation):
        for eqn in inner.eqns:
            names |= {eqn.primitive.name} | _primitives(eqn)
    return names


def _inner(equation: Any) -> Iterable[Any]:
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, jex.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex.Jaxpr):
                yield item
