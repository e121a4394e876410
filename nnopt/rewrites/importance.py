"""How important each channel is: by its weights alone, or by what the loss would do without it.

All are computed for all groups at once. Higher is more important.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from nnopt.core.channels import ChannelGroups, Member
from nnopt.core.flatten import Value
from nnopt.errors import PruneError, UnsupportedNetworkError
from nnopt.rewrites.prune import Scores, leaves_of, prunable
from nnopt.typing import Variables

Loss = Callable[[jax.Array, jax.Array], jax.Array]
"""`(outputs, labels) -> scalar`, a mean over the batch."""


def magnitude(groups: ChannelGroups, variables: Variables, order: Literal[1, 2] = 1) -> Scores:
    """Norm of the filters that make a channel (sum of absolute weights: Li et al., https://arxiv.org/abs/1608.08710).

    Args:
        groups: of the network.
        variables: its variables.
        order: 1, or 2 for the root of the sum of squares.

    Raises:
        PruneError: the variables are not the network's, or the order is another.
    """
    if order not in (1, 2):
        raise PruneError(f"magnitude: there is no norm of order {order!r}; give 1 or 2")
    flat = leaves_of(groups, variables, (m.leaf for g in groups.values() for m in g.makers))

    def total(member: Member) -> np.ndarray:
        weights = np.abs(np.asarray(flat[member.leaf], np.float64)) ** order
        return weights.sum(tuple(a for a in range(weights.ndim) if a != member.axis))

    found = {}
    for name, group in groups.items():
        score = np.zeros(group.size)
        for member in group.makers:
            np.add.at(score, member.channels, total(member)[member.indices])
        found[name] = score ** (1 / order)
    return found


def batch_norm_scale(groups: ChannelGroups, variables: Variables) -> Scores:
    """Sum of the absolute scales that normalisation gives a channel (network slimming, https://arxiv.org/abs/1708.06519).

    Groups without a scale are left out.

    Raises:
        PruneError: the variables are not the network's.
    """
    scaled = {n: [m for m in g.members if m.leaf[-1] == "scale"] for n, g in groups.items()}
    flat = leaves_of(groups, variables, (m.leaf for scales in scaled.values() for m in scales))
    found = {}
    for name, scales in scaled.items():
        if scales:
            found[name] = score = np.zeros(groups[name].size)
            for member in scales:
                values = np.abs(np.asarray(flat[member.leaf], np.float64))
                np.add.at(score, member.channels, values[member.indices])
    return found


def at_random(groups: ChannelGroups, key: jax.Array) -> Scores:
    """Uniform numbers: the criterion that any other must beat."""
    keys = jax.random.split(key, max(len(groups), 1))
    return {
        name: np.asarray(jax.random.uniform(k, (group.size,)))
        for k, (name, group) in zip(keys, groups.items(), strict=False)
    }


def gated(
    groups: ChannelGroups, arguments: list[jax.Array], variables: Variables, gates: jax.Array
) -> tuple[list[Any], list[Any]]:
    """Runs the network with a factor on each channel of each image where weights read it; traceable.

    The derivative in a factor is `sum_positions a * dL/da`, over all places where the channel is read for good. Where a depthwise
    convolution passes it on it gets no factor, or it would be scaled once for each of them.

    Args:
        groups: of the network, traced with an example of this batch size.
        arguments: the example's arrays, `[batch, ...]` each.
        variables: its variables.
        gates: `[batch, units]`, see `ChannelGroups.units`.

    Returns:
        The leaves of the network's outputs, and those of its updated collections.

    Raises:
        UnsupportedNetworkError: weights read an array whose first axis is not the batch.
        PruneError: the variables are not the network's.
    """
    leaves = leaves_of(groups, variables, groups.leaves)
    inputs = [*arguments, *(jnp.asarray(leaves[leaf]) for leaf in groups.leaves)]
    known: dict[Value, Any] = dict(zip(groups.flat.inputs, inputs, strict=True))
    known |= dict(groups.flat.constants)
    reads: dict[int, list[Any]] = {}
    for read in groups.reads:
        reads.setdefault(read.equation, []).append(read)
    batch = gates.shape[0]
    for number, equation in enumerate(groups.flat.equations):
        before = [a.val if isinstance(a, jex.Literal) else known[a] for a in equation.inputs]
        for read in reads.get(number, ()):
            array = before[read.operand]
            if read.axis == 0 or array.shape[0] % batch:
                raise UnsupportedNetworkError(
                    f"{equation.primitive.name} in {'/'.join(equation.path)!r} reads channels of no particular image"
                )
            factors = jnp.repeat(gates[:, read.units], array.shape[0] // batch, axis=0)
            shape = [1] * array.ndim
            shape[0], shape[read.axis] = array.shape[0], array.shape[read.axis]
            before[read.operand] = array * factors.reshape(shape).astype(array.dtype)
        known.update(zip(equation.outputs, equation.run(before), strict=True))
    outputs = [a.val if isinstance(a, jex.Literal) else known[a] for a in groups.flat.outputs]
    return outputs[: groups.outputs], outputs[groups.outputs :]


def check_derivatives(groups: ChannelGroups, names: Iterable[str]) -> None:
    """Refuses groups of which no derivative tells how important their channels are.

    Raises:
        UnsupportedNetworkError: the channels of a group are read where `gated` puts no factor, so that their scores would be too
            small, or zero.
    """
    for name in names:
        if (why := groups.unread(name)) is not None:
            raise UnsupportedNetworkError(
                f"channels of {name!r} have no Fisher or Taylor score: {why}; judge them by their weights (l1, l2 or batch norm "
                "scale), or leave the group out"
            )


def channel_gradients(
    groups: ChannelGroups,
    arguments: list[jax.Array],
    labels: jax.Array,
    variables: Variables,
    loss: Loss,
    names: Iterable[str] | None = None,
) -> jax.Array:
    """`[batch, units]`: the derivative of the loss in a factor on each channel of each image; traceable.

    Args:
        groups: of the network, traced with an example of this batch size.
        arguments: the example's arrays, `[batch, ...]` each.
        labels: `[batch]`.
        variables: of the network.
        loss: of the network's first output.
        names: the groups that are to be judged, `prunable(groups)` by default. Units of others may be zero for no reason.

    Raises:
        UnsupportedNetworkError, PruneError: see `check_derivatives` and `gated`.
    """
    check_derivatives(groups, prunable(groups) if names is None else names)
    batch = arguments[0].shape[0]

    def value(gates: jax.Array) -> jax.Array:
        outputs, _ = gated(groups, arguments, variables, gates)
        return loss(outputs[0], labels)

    return jax.grad(value)(jnp.ones((batch, groups.units), jnp.float32))


def fisher(gradients: jax.Array) -> jax.Array:
    """Fisher information of a channel, `1/2 mean_n (sum_positions a g)^2` (Theis et al., https://arxiv.org/abs/1801.05787, eq. 9).

    Args:
        gradients: `[batch, units]` from `channel_gradients`.

    Returns:
        `[units]`.
    """
    return 0.5 * jnp.mean(gradients**2, axis=0)


def taylor(gradients: jax.Array) -> jax.Array:
    """First-order Taylor criterion, `|sum_n sum_positions a g|` (Molchanov et al., https://arxiv.org/abs/1611.06440).

    How much the loss of the minibatch changes, to first order, if the channel goes.

    Args:
        gradients: `[batch, units]`.

    Returns:
        `[units]`.
    """
    return jnp.abs(jnp.sum(gradients, axis=0))


def by_group(groups: ChannelGroups, units: Any, names: Iterable[str] | None = None) -> Scores:
    """`[units]` as scores of groups: those named, by default all of which `check_derivatives` has nothing to say."""
    values = np.asarray(units)
    chosen = [n for n in groups if groups.unread(n) is None] if names is None else names
    return {name: values[groups[name].units] for name in chosen}
