"""Parameters and multiply-accumulates, counted without running anything."""

import math
from collections import Counter
from typing import Any

import flax.linen as nn
import jax

from nnopt.core import Dataflow, Equation, Example
from nnopt.core.example import rngs
from nnopt.core.sites import count_leaves
from nnopt.typing import Path


def parameters(net: nn.Module, example: Any) -> int:
    """Number of trainable values, those of the `params` collection."""
    example = Example.of(example)
    variables = example.abstractly(
        lambda key, *args, **kwargs: net.init(rngs(key), *args, **kwargs), jax.random.key(0)
    )
    return count_leaves(variables.get("params", {}))


def macs(net: nn.Module, example: Any) -> int:
    """Multiply-accumulates of convolutions and matrix products in one call of the network.

    For a convolution `out positions * window * in channels / groups * out channels`, padding counted; for a matrix product the
    product of all extents. Additions, normalisation and activation functions do not count. Batch of the example included: give a
    batch of one for the usual figure.
    """
    return sum(macs_by_site(net, example).values())


def macs_by_site(net: nn.Module, example: Any) -> dict[Path, int]:
    """`macs` split over the innermost sites that compute them, in the order of execution; sites with none are left out."""
    counts: Counter[Path] = Counter()
    for equation in Dataflow(net, example).equations:
        count = _macs(equation)
        if count:
            counts[equation.path] += count * equation.repeats
    return dict(counts)


def _macs(equation: Equation) -> int:
    if equation.primitive == "conv_general_dilated":
        kernel = equation.inputs[1]
        spec = equation.params["dimension_numbers"].rhs_spec  # (out, in, *window)
        window = math.prod(kernel.shape[i] for i in spec[2:])
        return math.prod(equation.outputs[0].shape) * window * kernel.shape[spec[1]]
    if (
        equation.primitive == "nnopt_conv"
    ):  # that of nnopt.layers.Conv; its kernel is [*window, in / groups, out]
        kernel = equation.inputs[1]
        return math.prod(equation.outputs[0].shape) * math.prod(kernel.shape[:-1])
    if equation.primitive == "dot_general":
        (contracting, _), _ = equation.params["dimension_numbers"]
        depth = math.prod(equation.inputs[0].shape[i] for i in contracting)
        return math.prod(equation.outputs[0].shape) * depth
    return 0
