"""The example inputs that a network is traced with."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def spec_of(tree: Any) -> Any:
    """The pytree with each array replaced by its `jax.ShapeDtypeStruct`; other leaves are kept as they are."""

    def spec(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf

    return jax.tree.map(spec, tree)


@dataclasses.dataclass(frozen=True, init=False)
class Example:
    """Positional and keyword arguments of a network's call, arrays reduced to shape and dtype.

    A plain array (or anything else that is not an `Example`) given where an example is expected stands for
    `Example(array)`.

    Example:
        >>> import jax.numpy as jnp
        >>> Example(jnp.zeros((2, 32, 32, 3)), train=False)
        Example(float32[2,32,32,3], train=False)
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        object.__setattr__(self, "args", spec_of(args))
        object.__setattr__(self, "kwargs", spec_of(kwargs))

    @classmethod
    def of(cls, example: Any) -> "Example":
        """`example` itself if it is one, else `Example(example)`."""
        return example if isinstance(example, cls) else cls(example)

    def __repr__(self) -> str:
        parts = [spec_text(a) for a in self.args]
        parts += [f"{k}={spec_text(v)}" for k, v in self.kwargs.items()]
        return f"Example({', '.join(parts)})"

    def abstractly(self, fn: Callable[..., Any], *leading: Any) -> Any:
        """`jax.eval_shape` of `fn(*leading, *args, **kwargs)`, non-array arguments static."""
        call, arrays = self._split(fn)
        return jax.eval_shape(call, arrays, leading)

    def jaxpr(self, fn: Callable[..., Any], *leading: Any) -> tuple[Any, int]:
        """The closed jaxpr of `fn(*leading, *args, **kwargs)`, and how many of its inputs, the first, are this example's."""
        call, arrays = self._split(fn)
        return jax.make_jaxpr(call)(arrays, leading), len(arrays)

    def _split(self, fn: Callable[..., Any]) -> tuple[Callable[..., Any], list[Any]]:
        """`fn` as a function of (arrays of this example, leading arguments), and those arrays."""
        leaves, tree = jax.tree.flatten((self.args, self.kwargs))

        def call(arrays: list[Any], leading: tuple[Any, ...]) -> Any:
            rest = iter(arrays)
            filled = [next(rest) if _is_array(leaf) else leaf for leaf in leaves]
            args, kwargs = jax.tree.unflatten(tree, filled)
            return fn(*leading, *args, **kwargs)

        return call, [leaf for leaf in leaves if _is_array(leaf)]

    def zeros(self) -> "tuple[tuple[Any, ...], dict[str, Any]]":
        """Real arguments of this shape: zeros for arrays, other leaves as they are."""

        def fill(leaf: Any) -> Any:
            return jax.numpy.zeros(leaf.shape, leaf.dtype) if _is_array(leaf) else leaf

        return jax.tree.map(fill, self.args), jax.tree.map(fill, self.kwargs)

    def init(self, net: nn.Module, key: jax.Array) -> Any:
        """Initialises `net` for this example.

        Args:
            net: any linen module.
            key: PRNG key; `dropout` gets a key folded from it.

        Returns:
            The variable dictionary.
        """
        args, kwargs = self.zeros()
        return net.init(rngs(key), *args, **kwargs)


def rngs(key: jax.Array) -> dict[str, jax.Array]:
    """The streams a network is initialised with: `params` is `key` itself, so that values match `net.init(key, x)`."""
    return {"params": key, "dropout": jax.random.fold_in(key, 1)}


def spec_text(tree: Any) -> str:
    """`float32[2,32,32,3]` for an array, a compact form for nested structures."""
    if hasattr(tree, "shape") and hasattr(tree, "dtype"):
        return f"{tree.dtype.name}[{','.join(map(str, tree.shape))}]"
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{k}: {spec_text(v)}" for k, v in tree.items()) + "}"
    if isinstance(tree, tuple | list):
        return "(" + ", ".join(map(spec_text, tree)) + ")"
    return repr(tree)
