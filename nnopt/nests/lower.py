"""Nests as XLA computes them: convolutions, grouped ones lowered as suits the platform, around them slices and concatenations.

Loops of a canonical nest that a convolution has too become one convolution: rows and columns of the output, a window, groups, input
and output channels. Each iteration of the others is a convolution of its own, whose results are added or stand side by side.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nnopt.layers.conv import LoweredConvolution
from nnopt.nests.canonical import Band, Canonical, Form
from nnopt.nests.gather import gathered

MOST_PIECES = 64
"""Convolutions of one nest; a nest that takes more is lowered to index arrays and `einsum`."""

_LETTERS = "DHW"


@dataclasses.dataclass(frozen=True)
class Roles:
    """What the loops of a nest are to a convolution; numbers are those of its bands.

    Attributes:
        rows: axis -> loop of rows (or columns) of the output along it.
        windows: axis -> loop of the window along it.
        inputs: loops of input channels.
        groups: loops of groups.
        outputs: loops of output channels.
        copies: loops that only write.
        apart: all others: a convolution for each iteration.
    """

    rows: dict[int, int]
    windows: dict[int, int]
    inputs: list[int]
    groups: list[int]
    outputs: list[int]
    copies: list[int]
    apart: list[int]


def roles(form: Form) -> Roles:
    """What the loops of a nest are to a convolution."""
    found = Roles({}, {}, [], [], [], [], [])
    channels = len(form.view) - 1
    for i, band in enumerate(form.bands):
        along = [d for d, step in enumerate(band.x) if step]
        axis = form.view[along[0]][0] if along else -1
        # A dimension that other digits of its axis follow selects a slab.
        plain = (
            len(along) == 1
            and along[0] != channels
            and form.view[along[0] + 1][0] != axis
            and band.x[along[0]] > 0
        )
        if not along:
            (found.outputs if band.weighs else found.copies).append(i)
        elif along == [channels]:
            (found.groups if band.writes else found.inputs).append(i)
        elif plain and not band.writes:
            _largest(form, found.windows, axis, i, found.apart)
        elif plain and not band.weighs:
            _largest(form, found.rows, axis, i, found.apart)
        else:
            found.apart.append(i)
    return found


def _largest(form: Form, chosen: dict[int, int], axis: int, band: int, rest: list[int]) -> None:
    """One loop for each axis: that with the most iterations."""
    if axis not in chosen:
        chosen[axis] = band
    elif form.bands[chosen[axis]].extent < form.bands[band].extent:
        rest.append(chosen[axis])
        chosen[axis] = band
    else:
        rest.append(band)


def pieces(form: Form) -> int:
    """Number of convolutions that a nest is lowered to."""
    return math.prod(form.bands[i].extent for i in roles(form).apart)


def run(
    canon: Canonical, x: jax.Array, kernels: Sequence[jax.Array], output: Sequence[int]
) -> jax.Array:
    """Runs an operator.

    Args:
        canon: its canonical form.
        x: `[batch, *spatial, channels]`.
        kernels: for each nest, `[*loops that the weights depend on]`.
        output: shape of the result, `[*spatial, channels]`.

    Returns:
        `[batch, *output]`.
    """
    parts: list[_Part] = []
    for form, kernel in zip(canon.forms, kernels, strict=True):
        parts.extend(_nest(form, x, kernel))
    return _assembled(parts, x, output)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of the output: values at the places of a grid.

    Attributes:
        places: for each dimension of the output, in the order of the values.
        values: `[batch, *places]`.
    """

    places: tuple[tuple[int, ...], ...]
    values: jax.Array


def _nest(form: Form, x: jax.Array, kernel: jax.Array) -> list[_Part]:
    used = [i for i, b in enumerate(form.bands) if b.writes and (b.weighs or any(b.x))]
    if pieces(form) > MOST_PIECES:
        values, order = gathered(form, x, kernel), used
    else:
        values, order = _convolved(form, x, kernel)
    # Loops along a diagonal of the output are a part for each iteration.
    diagonal = [i for i, b in enumerate(form.bands) if sum(map(bool, b.y)) > 1]
    parts = []
    for at in itertools.product(*(range(form.bands[i].extent) for i in diagonal)):
        here = dict(zip(diagonal, at, strict=True))
        index = tuple(here.get(i, slice(None)) for i in order)
        start = [
            s + sum(form.bands[i].y[d] * n for i, n in here.items()) for d, s in enumerate(form.y)
        ]
        rest = [i for i in order if i not in here]
        parts.append(_placed(form.bands, start, rest, values[(slice(None), *index)], skip=diagonal))
    return parts


def _placed(
    bands: Sequence[Band],
    start: Sequence[int],
    order: list[int],
    values: jax.Array,
    skip: Sequence[int],
) -> _Part:
    """Values with an axis for each loop, as values with an axis for each dimension of the output."""
    batch = values.shape[0]
    target: list[int] = []
    shape: list[int] = []
    places: list[tuple[int, ...]] = []
    for d, at in enumerate(start):
        writing = sorted(
            (i for i, b in enumerate(bands) if b.y[d] and i not in skip),
            key=lambda i: -abs(bands[i].y[d]),
        )
        target += writing
        grid = np.array([at])
        for i in writing:
            grid = (grid[:, None] + bands[i].y[d] * np.arange(bands[i].extent)).ravel()
        places.append(tuple(grid.tolist()))
        shape.append(len(grid))
    copies = [i for i in target if i not in order]
    values = lax.broadcast_in_dim(
        values,
        (batch, *(bands[i].extent for i in (*copies, *order))),
        (0, *range(1 + len(copies), 1 + len(copies) + len(order))),
    )
    have = [*copies, *order]
    values = values.transpose(0, *(1 + have.index(i) for i in target))
    return _Part(tuple(places), values.reshape(batch, *shape))


def _convolved(form: Form, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, list[int]]:
    """A nest by convolutions: the values, and which loop each axis but the batch is of."""
    part = roles(form)
    apart = part.apart
    reduced = [i for i in apart if not form.bands[i].writes]
    written = [i for i in apart if form.bands[i].writes]
    # Axes of the kernel: the window's, input channels, groups, output channels, with size 1 where there is no such loop.
    weighing = [i for i, b in enumerate(form.bands) if b.weighs]
    spatial = sorted({axis for axis, _ in form.view})[:-1]
    window = [part.windows.get(axis) for axis in spatial]
    wanted = [
        *apart,
        *(w for w in window if w is not None),
        *part.inputs,
        *part.groups,
        *part.outputs,
    ]
    missing = [i for i in wanted if i not in weighing]
    have = [*missing, *weighing]
    kernel = jnp.broadcast_to(kernel, tuple(form.bands[i].extent for i in missing) + kernel.shape)
    kernel = kernel.transpose([have.index(i) for i in wanted])

    def size(loops: Sequence[int]) -> int:
        return math.prod(form.bands[i].extent for i in loops)

    inputs, groups, outputs = size(part.inputs), size(part.groups), size(part.outputs)
    ends = [1 if w is None else form.bands[w].extent for w in window]
    kernel = kernel.reshape(*(form.bands[i].extent for i in apart), *ends, inputs, groups * outputs)
    results = []
    for along in itertools.product(*(range(form.bands[i].extent) for i in written)):
        terms = []
        for over in itertools.product(*(range(form.bands[i].extent) for i in reduced)):
            at = dict(zip((*written, *reduced), (*along, *over), strict=True))
            start = [
                s + sum(form.bands[i].x[d] * n for i, n in at.items()) for d, s in enumerate(form.x)
            ]
            terms.append(
                _convolution(form, part, x, kernel[tuple(at[i] for i in apart)], start, groups)
            )
        results.append(_sum(terms))
    values = results[0] if len(results) == 1 else jnp.stack(results, 1)
    rows = [part.rows[axis] for axis in spatial if axis in part.rows]
    order = [*written, *rows, *part.groups, *part.outputs]
    return values.reshape(x.shape[0], *(form.bands[i].extent for i in order)), order


def _sum(terms: Sequence[jax.Array]) -> jax.Array:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _convolution(
    form: Form, part: Roles, x: jax.Array, kernel: jax.Array, start: Sequence[int], groups: int
) -> jax.Array:
    """One convolution: `[batch, *rows, groups * outputs]`."""
    rows, strides, dilation, padding = [], [], [], []
    nothing = False  # is read but zeros outside of the image
    channels = len(form.view) - 1
    inner = {axis: d for d, (axis, _) in enumerate(form.view)}
    for d, (axis, size) in enumerate(form.view[:-1]):
        if inner[axis] != d:  # selects a slab
            if not 0 <= start[d] < size:
                nothing = True
                continue
            length = x.shape[1 + axis] // size
            x = lax.slice_in_dim(x, start[d] * length, (start[d] + 1) * length, axis=1 + axis)
            continue
        row, window = part.rows.get(axis), part.windows.get(axis)
        count, stride = (
            (form.bands[row].extent, form.bands[row].x[d]) if row is not None else (1, 1)
        )
        taps, step = (
            (form.bands[window].extent, form.bands[window].x[d]) if window is not None else (1, 1)
        )
        first, last = start[d], start[d] + (count - 1) * stride + (taps - 1) * step
        rows.append(count)
        if last < 0 or first >= size:
            nothing = True
            continue
        x = lax.slice_in_dim(x, max(first, 0), min(last + 1, size), axis=1 + axis)
        strides.append(stride)
        dilation.append(step)
        padding.append((max(-first, 0), max(last + 1 - size, 0)))
    if nothing:
        return jnp.zeros((x.shape[0], *rows, kernel.shape[-1]), x.dtype)
    x = _channels(form, [*part.groups, *part.inputs], x, start[channels])
    rank = len(strides)
    if rank == 0:
        inputs = x.shape[-1] // groups
        split = kernel.reshape(inputs, groups, -1)
        return jnp.einsum("ngi,igo->ngo", x.reshape(-1, groups, inputs), split).reshape(
            x.shape[0], -1
        )
    letters = _LETTERS[-rank:]
    numbers = lax.conv_dimension_numbers(
        x.shape, kernel.shape, (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    )
    return LoweredConvolution()(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=numbers,
        feature_group_count=groups,
    )


def _channels(form: Form, loops: Sequence[int], x: jax.Array, start: int) -> jax.Array:
    """The channels that loops run through, in their order."""
    d = len(form.view) - 1
    steps = [(form.bands[i].x[d], form.bands[i].extent) for i in loops]
    sizes = sorted(range(len(steps)), key=lambda i: -steps[i][0])
    inside = 1
    digits = True
    for i in reversed(sizes):
        digits &= steps[i][0] == inside
        inside *= steps[i][1]
    if not digits:
        places = np.array([start])
        for step, extent in steps:
            places = (places[:, None] + step * np.arange(extent)).ravel()
        return jnp.take(x, places, axis=-1)
    x = lax.slice_in_dim(x, start, start + inside, axis=x.ndim - 1)
    if sizes == list(range(len(steps))):
        return x
    lead = x.shape[:-1]
    x = x.reshape(*lead, *(steps[i][1] for i in sizes))
    back = [len(lead) + sizes.index(i) for i in range(len(steps))]
    return x.transpose(*range(len(lead)), *back).reshape(*lead, inside)


def _assembled(parts: list[_Part], x: jax.Array, output: Sequence[int]) -> jax.Array:
    """Parts side by side."""
    for d in range(len(output)):
        rows: dict[tuple[tuple[int, ...], ...], list[_Part]] = {}
        for part in parts:
            rows.setdefault(part.places[:d] + part.places[d + 1 :], []).append(part)
        parts = [_side_by_side(row, d) for row in rows.values()]
    whole = tuple(tuple(range(n)) for n in output)
    if len(parts) == 1 and parts[0].places == whole:
        return parts[0].values
    y = jnp.zeros((x.shape[0], *output), parts[0].values.dtype)
    for part in parts:
        grid = np.ix_(*part.places)
        y = y.at[(slice(None), *grid)].set(part.values)
    return y


def _side_by_side(parts: list[_Part], d: int) -> _Part:
    parts = sorted(parts, key=lambda p: p.places[d])
    values = (
        parts[0].values
        if len(parts) == 1
        else jnp.concatenate([p.values for p in parts], axis=1 + d)
    )
    places = tuple(n for p in parts for n in p.places[d])
    order = tuple(sorted(places))
    if places != order:
        values = jnp.take(values, np.argsort(places), axis=1 + d)
    return _Part((*parts[0].places[:d], order, *parts[0].places[d + 1 :]), values)
