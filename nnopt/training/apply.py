"""How a network is run in training mode and in evaluation mode."""

import inspect
from collections.abc import Callable
from typing import Any

from jax import Array

from nnopt.typing import Variables

ApplyTrain = Callable[[Variables, Array, Array], tuple[Array, Variables]]
"""`(variables, images, dropout_key) -> (logits, updated collections)`."""

ApplyEval = Callable[[Variables, Array], Array]
"""`(variables, images) -> logits`."""


def mode_of(net: Any, train: bool) -> dict[str, bool]:
    """The keyword that sets the mode of `net`; none for a network that has no modes.

    It is the one that the network's `__call__` has: `train`, `training`, or the negated
    `deterministic` or `use_running_average`; `train` for one that takes any keyword. A rewritten
    network, which passes its arguments on, is asked by its `base`.

    Args:
        net: a linen network, or anything with a `__call__`.
        train: whether it shall run as in training.

    Returns:
        The keyword argument to call it with, such as `{"train": False}`.
    """
    parameters = inspect.signature(net.__call__).parameters
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if passes_on and hasattr(net, "base"):
        return mode_of(net.base, train)
    for name, value in (
        ("train", train),
        ("training", train),
        ("deterministic", not train),
        ("use_running_average", not train),
    ):
        if name in parameters:
            return {name: value}
    return {"train": train} if passes_on else {}


def default_apply_train(net: Any) -> ApplyTrain:
    """How `net` is run in training mode, passed as `mode_of` says."""
    mode = mode_of(net, True)

    def apply_train(variables: Variables, images: Array, key: Array) -> tuple[Array, Variables]:
        logits, updates = net.apply(
            variables, images, **mode, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return logits, updates

    return apply_train


def default_apply_eval(net: Any) -> ApplyEval:
    """How `net` is run in evaluation mode, passed as `mode_of` says."""
    mode = mode_of(net, False)

    def apply_eval(variables: Variables, images: Array) -> Array:
        logits: Array = net.apply(variables, images, **mode)
        return logits

    return apply_eval
