"""Linen modules that compute what a program makes of a convolution or of a dense layer."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from nnopt.errors import NestError
from nnopt.nests.canonical import Canonical, canonical
from nnopt.nests.lower import run
from nnopt.nests.nest import Operator, convolution, dense
from nnopt.nests.program import Program
from nnopt.nests.weights import Layout, layout


@functools.lru_cache(4096)
def prepared(operator: Operator) -> tuple[Canonical, Layout]:
    """Canonical form of an operator, and how its weights are kept."""
    canon = canonical(operator)
    return canon, layout(canon)


class ProgramConv(nn.Conv):
    """What a program makes of `nn.Conv`, with the same fields: `conv -> Program(...)(conv)`.

    Input and output are of the same shape as the convolution's, `[*batch, *spatial, channels]`. Weights are what is left of the
    kernel, an axis for each loop that they depend on, drawn with the fan-in that is left.

    Attributes:
        program: applied to the convolution's nest.
    """

    program: Program = Program()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """See the class.

        Args:
            inputs: `[*batch, *spatial, channels]`.

        Raises:
            NestError: the program is not possible for the shape, or the convolution is none that a nest describes.
        """
        rank = spatial_rank(self)
        batch, image = (
            inputs.shape[: inputs.ndim - rank - 1],
            inputs.shape[inputs.ndim - rank - 1 :],
        )
        operator = self.program(nest_of(self, image))
        x = inputs.reshape(-1, *image)
        return _apply(self, operator, x).reshape(*batch, *operator.output)


class ProgramDense(nn.Dense):
    """What a program makes of `nn.Dense`, with the same fields.

    Attributes:
        program: applied to the layer's nest.
    """

    program: Program = Program()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """See the class.

        Args:
            inputs: `[*batch, channels]`.

        Raises:
            NestError: the program is not possible for the shape.
        """
        operator = self.program(nest_of(self, inputs.shape[-1:]))
        x = inputs.reshape(-1, inputs.shape[-1])
        return _apply(self, operator, x).reshape(*inputs.shape[:-1], *operator.output)


def _apply(module: Any, operator: Operator, x: jax.Array) -> jax.Array:
    canon, kept = prepared(operator)
    arrays = [
        module.param(v.name, lambda key, v=v: v.init(module.kernel_init, key, module.param_dtype))
        for v in kept.variables
    ]
    bias = (
        module.param("bias", module.bias_init, operator.output[-1:], module.param_dtype)
        if module.use_bias
        else None
    )
    x, bias, *arrays = promote_dtype(x, bias, *arrays, dtype=module.dtype)
    y = run(canon, x, kept.kernels(arrays), operator.output)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def spatial_rank(module: nn.Module) -> int:
    """Dimensions of the image that a convolution runs over; 0 for a dense layer."""
    if not isinstance(module, nn.Conv):
        return 0
    return 1 if isinstance(module.kernel_size, int) else len(module.kernel_size)


def nest_of(module: nn.Module, image: tuple[int, ...]) -> Operator:
    """A convolution or dense layer as a nest.

    Args:
        module: an `nn.Conv` or `nn.Dense`.
        image: shape of its input, `[*spatial, channels]`.

    Raises:
        NestError: it is something else, or a convolution of a kind that no nest describes.
    """
    if isinstance(module, nn.Dense):
        return dense(image[-1], module.features)
    if not isinstance(module, nn.Conv):
        raise NestError(f"{type(module).__name__} is no convolution or dense layer")
    rank = len(image) - 1
    window = _each(module.kernel_size, rank)
    if len(window) != rank:
        raise NestError(f"a window of {window} on an image of shape {image}")
    if any(d != 1 for d in _each(module.input_dilation, rank)):
        raise NestError(
            "a convolution with a dilated input (transposed) has no nest with affine indices"
        )
    if module.mask is not None:
        raise NestError("a masked convolution has no nest; leave it as it is")
    padding: Any = module.padding
    if isinstance(padding, str) and padding not in ("SAME", "VALID"):
        raise NestError(
            f"{padding} padding repeats what it reads; nests read zeros outside of the image"
        )
    if not isinstance(padding, str):
        padding = tuple((p, p) if isinstance(p, int) else tuple(p) for p in _each(padding, rank))
    return convolution(
        image[:-1],
        image[-1],
        module.features,
        window,
        strides=_each(module.strides, rank),
        padding=padding,
        dilation=_each(module.kernel_dilation, rank),
        groups=module.feature_group_count,
    )


def _each(value: Any, rank: int) -> tuple[Any, ...]:
    if value is None:
        return (1,) * rank
    return (value,) * rank if isinstance(value, int) else tuple(value)


def carried(operator: Operator, old: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The weights of a convolution or dense layer, as far as an operator made of it has them.

    Args:
        operator: the operator.
        old: `kernel`, and `bias` if there is one.
    """
    found = prepared(operator)[1].carried(jnp.asarray(old["kernel"]))
    return found | {name: old[name] for name in ("bias",) if name in old}
