"""Networks as they infer: batch norms folded into the layers before them.

A batch norm that runs with stored averages multiplies each channel by a number and adds another (Ioffe, Szegedy: "Batch
Normalization", https://arxiv.org/abs/1502.03167, section 3.1):

    y = scale (x - mean) / sqrt(variance + epsilon) + bias = factor x + shift,
    factor = scale / sqrt(variance + epsilon), shift = bias - factor mean

Where x is what a convolution or dense layer returns, its kernel and bias can do both.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from nnopt.core import All, Keeps, Rewrite, Selector, Sites
from nnopt.layers import Identity, ScaleShift
from nnopt.rewrites.foldable import Channels, Fold, folds
from nnopt.typing import Edits, Path

_ALL = All()


@dataclasses.dataclass(frozen=True)
class FoldBatchNorm(Rewrite):
    """`conv -> batch norm` becomes one convolution; every other batch norm a multiplication and an addition.

    Before -> after: `norm(conv(x))` -> `Identity()(conv'(x))` with `conv'.kernel = conv.kernel * factor` over output channels and
    `conv'.bias = conv.bias * factor + norm.bias - factor * norm.mean`, `factor = norm.scale / sqrt(norm.var + epsilon)`, where the
    network uses what `conv` returns in `norm` alone; it may be `nn.Conv`, `nnopt.layers.Conv`, `nn.ConvTranspose`, `nn.Dense`, or
    what `MutateConv` makes of one. Elsewhere, such as before an activation: `norm(x)` -> `ScaleShift(x)`, which is
    `factor * x + shift`.

    The function that is kept is that of inference: called as in training, the new network still infers. Which layer feeds which
    batch norm is found in the network's jaxpr. Subclasses of `nn.BatchNorm` with methods of their own are left alone. Batch norms
    in layers stacked by `nn.scan` or `nn.vmap` become `ScaleShift`.

    Attributes:
        where: which batch norms; all by default. Sites that are none are left alone.
    """

    keeps = Keeps.FUNCTION

    where: Selector | str = _ALL

    def __call__(self, sites: Sites) -> Edits:
        """See `Rewrite`.

        Raises:
            RewriteError: a batch norm runs with the statistics of the batch, its variables are used elsewhere as well, or layers
                are stacked in a way in which it is not clear which values belong together.
        """
        edits: dict[Path, nn.Module] = {}
        for path, fold in folds(sites, self.where).items():
            norm = sites[path].module
            edits[path] = Identity(parent=None) if fold.layers else _scale_shift(norm)
            for layer in fold.layers:
                module = sites[layer].module
                with_bias = module if module.use_bias else module.clone(parent=None, use_bias=True)
                edits[layer] = with_bias
        return edits

    def written_out(self, sites: Sites) -> Rewrite:
        """See `Rewrite`."""
        return _Carried(folds(sites, self.where))


@dataclasses.dataclass(frozen=True)
class _Carried(Rewrite):
    """What became of each batch norm, by path."""

    folds: Mapping[Path, Fold]

    def __call__(self, sites: Sites) -> Edits:
        """Never called: `FoldBatchNorm` is."""
        raise NotImplementedError

    def carry_all(
        self,
        old: Mapping[Path, Mapping[str, jax.Array]],
        new: Mapping[Path, Mapping[str, jax.ShapeDtypeStruct]],
    ) -> Mapping[Path, Mapping[str, jax.Array]]:
        """Kernels times factors, and biases; or factors and shifts."""

        @jax.jit  # many small operations, compiled together
        def carried(old: Any) -> Any:
            found: dict[Path, dict[str, jax.Array]] = {}
            for path, fold in self.folds.items():
                factor, shift = _factor_and_shift(old[path], fold.epsilon)
                made = {} if fold.layers else {"params/scale": factor, "params/shift": shift}
                found[path] = {name: a.astype(new[path][name].dtype) for name, a in made.items()}
                for layer, channels in fold.layers.items():
                    found[layer] = _folded(old[layer], new[layer], channels, factor, shift)
            return found

        return dict(carried(old))


def _factor_and_shift(norm: Mapping[str, jax.Array], epsilon: float) -> tuple[jax.Array, jax.Array]:
    """What a batch norm multiplies by and adds, `[channels]` (or `[layers, channels]` of a stack), at least in float32."""
    wide = {
        name: jnp.asarray(a).astype(jnp.promote_types(a.dtype, jnp.float32))
        for name, a in norm.items()
    }
    factor = lax.rsqrt(wide["batch_stats/var"] + epsilon)
    if "params/scale" in wide:
        factor = factor * wide["params/scale"]
    shift = -wide["batch_stats/mean"] * factor
    return factor, shift + wide["params/bias"] if "params/bias" in wide else shift


def _folded(
    old: Mapping[str, jax.Array],
    new: Mapping[str, jax.ShapeDtypeStruct],
    channels: Channels,
    factor: jax.Array,
    shift: jax.Array,
) -> dict[str, jax.Array]:
    """The weights of a layer with a batch norm folded into it."""
    found = {
        f"params/{name}": jnp.asarray(old[f"params/{name}"]).astype(factor.dtype) * factor[at]
        for name, at in channels.items()
    }
    bias = old.get("params/bias")
    found["params/bias"] = (
        shift if bias is None else jnp.asarray(bias).astype(factor.dtype) * factor + shift
    )
    return {name: a.astype(new[name].dtype) for name, a in found.items()}


def _scale_shift(norm: Any) -> ScaleShift:
    has_parameters = norm.use_scale or norm.use_bias
    return ScaleShift(
        axis=norm.axis,
        dtype=norm.dtype,
        at_least=norm.param_dtype if has_parameters else None,
        param_dtype=jnp.promote_types(norm.param_dtype, jnp.float32),
        parent=None,
    )
