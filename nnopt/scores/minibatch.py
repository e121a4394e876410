"""What every score asks of its minibatch and of its loss, checked before anything runs.

A compiled program asks nothing: labels out of range wrap or give a loss of zero, and a single image broadcasts. Values are looked
at on the host, so those of an array that JAX is tracing are not; its shape is.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from nnopt.core.example import spec_text
from nnopt.errors import ScoreError
from nnopt.scores.sources import Loss, mean_cross_entropy

Spec: TypeAlias = Any
"""Anything with a shape and a dtype."""


def check_images(images: Any, expected: Spec, remedy: str, *, exactly: bool = False) -> None:
    """Refuses images of another shape than the network was traced for.

    Args:
        images: `[batch, ...]`.
        expected: shape and dtype that it was traced for.
        remedy: what to do about others.
        exactly: refuse another dtype too.

    Raises:
        ScoreError: they are not of this shape (or dtype).
    """
    same = tuple(images.shape) == tuple(expected.shape)
    if not same or (exactly and images.dtype != expected.dtype):
        raise ScoreError(
            f"images are {spec_text(images)}, and the network was traced for {spec_text(expected)}; {remedy}"
        )


def check_labels(
    labels: Any, batch: int, outputs: Any, loss: Loss, *, classes: bool = False
) -> None:
    """Refuses labels that are not one for each image, or that the network has no class for.

    Of a loss other than `mean_cross_entropy` nothing is known but that it takes one label for each image.

    Args:
        labels: `[batch, ...]`, or for another loss a pytree of such.
        batch: number of images.
        outputs: what the network returns, as shapes.
        loss: of these outputs and labels.
        classes: whether labels must be integer classes `[batch]` whatever the loss is.

    Raises:
        ScoreError: they are of another shape or dtype, or out of range, or cross-entropy is not defined for these outputs.
    """
    if loss is mean_cross_entropy:
        if len(getattr(outputs, "shape", ())) != 2 or outputs.shape[0] != batch:
            raise ScoreError(
                f"the network returns {spec_text(outputs)}, and cross-entropy is of logits [{batch}, classes]; give another loss"
            )
        classes = True
    if not classes:
        for leaf in jax.tree.leaves(labels):
            if jnp.shape(leaf)[:1] != (batch,):
                raise ScoreError(
                    f"labels are {spec_text(labels)}; give one for each image, [{batch}, ...]"
                )
        return
    traced = isinstance(labels, jax.core.Tracer)
    values = labels if traced else np.asarray(labels)
    if values.shape != (batch,) or not jnp.issubdtype(values.dtype, jnp.integer):
        raise ScoreError(f"labels are {spec_text(values)}; give integer classes [{batch}]")
    if loss is not mean_cross_entropy or traced:
        return
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= outputs.shape[1]:
        raise ScoreError(
            f"labels go from {low} to {high}, and the network has {outputs.shape[1]} classes (from 0)"
        )


def guarded(loss: Loss) -> Loss:
    """A loss of which nothing finite is learnt unless it is finite itself.

    The gradient of an infinite loss may be finite: that of cross-entropy with the logit of the right class masked by minus infinity
    is. Here the gradient is NaN wherever the loss is not finite, in forward and reverse mode; else both are as they were, to the
    last bit.

    Args:
        loss: `(outputs, labels) -> scalar`.

    Returns:
        The same, which raises a `ScoreError` when it is traced and the loss is not a scalar of floats.
    """

    def guard(outputs: Any, labels: Any) -> jax.Array:
        value = loss(outputs, labels)
        leaves = jax.tree.leaves(value)
        if len(leaves) != 1 or leaves[0] is not value or jnp.shape(value) != ():
            shapes = ", ".join(spec_text(jnp.asarray(leaf)) for leaf in leaves) or "nothing"
            raise ScoreError(
                f"the loss returns {shapes}, and scores differentiate one number; take the mean over the batch"
            )
        value = jnp.asarray(value)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ScoreError(
                f"the loss returns {spec_text(value)}, which has no gradient; return a floating point number"
            )
        return value * jnp.where(jnp.isfinite(value), 1.0, jnp.nan)

    return guard
