"""Where the weights of an operator are kept: an array for each nest, or one for nests that share weights."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnopt.nests.canonical import Canonical, Form, numbered, places


@dataclasses.dataclass(frozen=True)
class Variable:
    """One array of weights.

    Attributes:
        name: in the parameters.
        shape: an axis for each loop that the weights depend on: those of the reduction, then those of the output. `[weights]` where
            nests share some.
        window: extents of the loops that run through windows, among those of the reduction.
        fan_in: products in an element of the output.
        outputs: elements of the output that a weight does not serve together: the last factor of the shape.
        places: of each weight in the kernel that the operator began with, `[*shape, dimensions]`.
    """

    name: str
    shape: tuple[int, ...]
    window: tuple[int, ...]
    fan_in: int
    outputs: int
    places: np.ndarray

    def init(self, initializer: Callable[..., Any], key: jax.Array, dtype: Any) -> jax.Array:
        """Fresh weights, scaled by the fan-in of this operator, not of the convolution that it began with.

        Args:
            initializer: of kernels `[*window, in, out]`, such as `jax.nn.initializers.lecun_normal()`.
            key: PRNG key.
            dtype: of the weights.
        """
        inputs = max(self.fan_in // math.prod(self.window), 1)
        drawn = initializer(key, (*self.window, inputs, self.outputs), dtype)
        count = math.prod(self.shape)
        # Products that share a weight need fewer than are drawn, nests that share some more.
        repeats = -(-count // drawn.size)
        return jnp.tile(drawn.ravel(), repeats)[:count].reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The weights of an operator.

    Attributes:
        variables: their arrays.
        sources: for each nest, number of its variable, and the places in it if that is shared.
    """

    variables: tuple[Variable, ...]
    sources: tuple[tuple[int, np.ndarray | None], ...]

    def kernels(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """The weights of each nest, `[*loops that they depend on]`.

        Args:
            arrays: values of the variables.
        """
        return [arrays[i] if places is None else arrays[i][places] for i, places in self.sources]

    def carried(self, kernel: jax.Array) -> dict[str, jax.Array]:
        """The variables with what their weights were in the kernel that the operator began with; zero for those that are new.

        Args:
            kernel: `[*window, in / groups, out]`.
        """
        found = {}
        for variable in self.variables:
            places = variable.places[..., : kernel.ndim]
            inside = np.all((places >= 0) & (places < np.array(kernel.shape)), axis=-1)
            values = kernel[tuple(np.moveaxis(np.where(inside[..., None], places, 0), -1, 0))]
            found[variable.name] = jnp.where(inside, values, jnp.zeros((), kernel.dtype))
        return found


def layout(canon: Canonical) -> Layout:
    """How the weights of an operator are kept."""
    alone = [f for f in canon.forms if f.shared is None]
    together = [f for f in canon.forms if f.shared is not None]
    count = len(alone) + bool(together)
    variables: list[Variable] = []
    sources: list[tuple[int, np.ndarray | None]] = []
    name = "kernel" if count == 1 else "kernel_{}"
    for form in alone:
        at = places(form)
        variables.append(_variable(name.format(len(variables)), at.shape[:-1], at, [form]))
    shared = [places(f) for f in together]
    if together:
        flat = np.concatenate([p.reshape(-1, p.shape[-1]) for p in shared])
        _, first, inverse = np.unique(numbered(flat), return_index=True, return_inverse=True)
        unique = flat[first]
        variables.append(_variable(name.format(len(variables)), unique.shape[:1], unique, together))
        cuts = np.cumsum([p[..., 0].size for p in shared])[:-1]
        pieces = [
            i.reshape(p.shape[:-1])
            for i, p in zip(np.split(inverse.ravel(), cuts), shared, strict=True)
        ]
    numbers = iter(range(len(alone)))
    for form in canon.forms:
        sources.append(
            (next(numbers), None) if form.shared is None else (len(alone), pieces.pop(0))
        )
    return Layout(tuple(variables), tuple(sources))


def _variable(
    name: str, shape: tuple[int, ...], places: np.ndarray, forms: Sequence[Form]
) -> Variable:
    form = max(forms, key=lambda f: math.prod(b.extent for b in f.bands if not b.writes))
    fan_in = math.prod(b.extent for b in form.bands if not b.writes)
    window = tuple(b.extent for b in form.bands if b.weighs and not b.writes and any(b.x[:-1]))
    outputs = math.prod(b.extent for b in form.bands if b.weighs and b.writes)
    return Variable(name, shape, window, fan_in, outputs, places)
