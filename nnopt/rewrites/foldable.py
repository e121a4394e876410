"""Which batch norms of a network can be folded into which layers, found in its jaxpr."""

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from jax import lax

from nnopt.core import Selector, Site, Sites, base_of, select
from nnopt.core.paths import path_text
from nnopt.core.reads import Reads
from nnopt.errors import RewriteError
from nnopt.layers import LoweredConvolution
from nnopt.layers.scale_shift import feature_axes
from nnopt.nests import Operator
from nnopt.nests.module import ProgramConv, ProgramDense, nest_of, prepared, spatial_rank
from nnopt.typing import Path

Channels = Mapping[str, np.ndarray]
"""Name of an array of weights -> the output channel that each weight serves, of a shape that broadcasts to the array's."""


@dataclasses.dataclass(frozen=True)
class Fold:
    """What becomes of one batch norm.

    Attributes:
        epsilon: of the batch norm.
        layers: path -> output channel of each weight, of the layers that it is folded into; empty if it stays as `ScaleShift`.
    """

    epsilon: float
    layers: Mapping[Path, Channels]


def folds(sites: Sites, where: Selector | str) -> dict[Path, Fold]:
    """What `FoldBatchNorm` does with each batch norm.

    Args:
        sites: all sites of a network that infers.
        where: which batch norms.

    Raises:
        RewriteError: as `FoldBatchNorm`.
    """
    norms = [s for s in select(sites, where) if _is(s.module, nn.BatchNorm)]
    if not norms:
        return {}
    for norm in norms:
        _check_infers(norm, sites)
    reads = Reads(sites)
    for norm in norms:
        _check_own(norm, reads)
        _check_stack(norm)
    channels = {s.path: found for s in sites if (found := _channels(s, reads)) is not None}
    return {
        norm.path: Fold(
            float(norm.module.epsilon),
            {path: channels[path] for path in _feeds(norm, sites, channels, reads)},
        )
        for norm in norms
    }


def _feeds(norm: Site, sites: Sites, layers: Iterable[Path], reads: Reads) -> tuple[Path, ...]:
    """The layers all of whose outputs go into a batch norm and nowhere else, if it takes nothing but them."""
    fed = {
        value: path
        for path in layers
        for value in reads.returned(path)
        if reads.of(value) == {norm.path}
    }
    found = tuple(dict.fromkeys(fed.values()))
    takes_only_them = len(fed) == len(norm.calls)
    goes_nowhere_else = all(
        len(reads.returned(path)) == len(sites[path].calls)
        and fed.keys() >= {*reads.returned(path)}
        for path in found
    )
    before = {_spec(c.outputs) for path in found for c in sites[path].calls}
    after = {_spec(c.outputs) for c in norm.calls}
    over_last = all(
        feature_axes(norm.module.axis, len(shape)) == (len(shape) - 1,) for shape, _ in before
    )
    # A batch norm that also changes the dtype is more than its factor and shift.
    plain = before == after and over_last and len({dtype for _, dtype in before}) == 1
    alone = not _lifting(norm) and norm.variables["batch_stats"]["mean"].ndim == 1
    return found if found and takes_only_them and goes_nowhere_else and plain and alone else ()


def _spec(array: Any) -> tuple[tuple[int, ...], Any]:
    return tuple(array.shape), array.dtype


def _lifting(site: Site) -> set[str]:
    """The Flax transforms a site stands under, without rematerialisation, which changes nothing."""
    return set(site.lifted) - {"remat", "checkpoint"}


def _channels(site: Site, reads: Reads) -> Channels | None:
    """The output channel of each weight of a layer that a batch norm could be folded into; None for any other site."""
    module: Any = site.module
    by_program = type(module) in (ProgramConv, ProgramDense)
    plain = any(_is(module, cls) for cls in (nn.Conv, nn.ConvTranspose, nn.Dense))
    if not (by_program or (plain and _is_linear_in_kernel(module))) or _lifting(site):
        return None
    if set(site.variables) != {"params"} or any(c.method != "__call__" for c in site.calls):
        return None
    arrays = nn.meta.unbox(site.variables["params"])
    # What reads the kernel elsewhere, such as a head with tied weights, would see it change.
    if any(reads.of_variable(("params", *site.path, name)) - {site.path} for name in arrays):
        return None
    if by_program:
        return _program_channels(site)
    axis = -2 if getattr(module, "transpose_kernel", False) else -1
    shape = [1] * arrays["kernel"].ndim
    shape[axis] = module.features
    return {"kernel": np.arange(module.features).reshape(shape)}


def _is(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a module is of a class, or of a subclass that only has other defaults: every method is the class's own."""
    if not isinstance(module, cls):
        return False
    fields = {f.name for f in dataclasses.fields(cls)}
    made = {"__eq__", "__hash__", "__init__", "__repr__"}  # by `dataclasses`, for each class
    names = [n for n in dir(cls) if n not in fields | made]
    return all(
        inspect.getattr_static(type(module), n) is inspect.getattr_static(cls, n)
        for n in names
        if callable(getattr(cls, n, None)) or isinstance(inspect.getattr_static(cls, n), property)
    )


def _is_linear_in_kernel(module: Any) -> bool:
    """Whether what it computes with is JAX's or nnopt's own, and not, say, a quantised product given in a field."""
    own = {
        "conv_general_dilated": (None, lax.conv_general_dilated),
        "conv_general_dilated_cls": (None,),
        "dot_general": (None, lax.dot_general),
        "dot_general_cls": (None,),
        "promote_dtype": (nn.Dense.promote_dtype,),
    }
    for name, known in own.items():
        value = getattr(module, name, known[0])
        if not (isinstance(value, LoweredConvolution) or any(value is k for k in known)):
            return False
    return True


def _program_channels(site: Site) -> Channels | None:
    """The same of what a program made of a convolution or dense layer; None if a weight serves several channels."""
    module: Any = site.module
    shapes = {(*call.args, *call.kwargs.values())[0].shape for call in site.calls}
    images = {shape[len(shape) - spatial_rank(module) - 1 :] for shape in shapes}
    if len(images) != 1:
        return None
    return _operator_channels(module.program(nest_of(module, images.pop())))


def _operator_channels(operator: Operator) -> Channels | None:
    canon, kept = prepared(operator)
    found = {v.name: np.full(v.shape, -1) for v in kept.variables}
    for form, (number, places) in zip(canon.forms, kept.sources, strict=True):
        channel = np.array(form.y[-1])
        for band in form.bands:
            if band.weighs:
                channel = np.add.outer(channel, band.y[-1] * np.arange(band.extent))
            elif band.y[-1]:
                return None
        array = found[kept.variables[number].name]
        at = slice(None) if places is None else places
        if np.any((array[at] != -1) & (array[at] != channel)):
            return None
        array[at] = channel
        if np.any(array[at] != channel):  # one weight at two places of this nest
            return None
    return found


def _check_infers(norm: Site, sites: Sites) -> None:
    for call in norm.calls:
        running = call.kwargs.get("use_running_average", (*call.args, None, None)[1])
        running = norm.module.use_running_average if running is None else running
        if not (isinstance(running, bool | np.bool_) and running):
            raise RewriteError(
                f"FoldBatchNorm: the batch norm at {path_text(norm.path)!r} runs with the statistics of the batch for "
                f"{sites.example} (use_running_average={running}); give an Example with which the network infers, {_flags(sites)}"
            )


def _flags(sites: Sites) -> str:
    """The network's boolean arguments, the other way round: the one that tells training from inference is among them."""
    example = sites.example
    try:
        bound = inspect.signature(base_of(sites.net).__call__).bind(*example.args, **example.kwargs)
    except TypeError:
        return "such as Example(images, train=False)"
    bound.apply_defaults()
    flags = [f"{name}={not v}" for name, v in bound.arguments.items() if isinstance(v, bool)]
    if not flags:
        return "or build the network with use_running_average=True"
    return "such as " + " or ".join(f"Example(images, {flag})" for flag in flags)


def _check_own(norm: Site, reads: Reads) -> None:
    for collection, leaves in norm.variables.items():
        for name in leaves:
            if reads.of_variable((collection, *norm.path, name)) - {norm.path}:
                raise RewriteError(
                    f"FoldBatchNorm: the network also uses the {name!r} of the batch norm at {path_text(norm.path)!r} elsewhere, "
                    "or transforms it before; leave this one out of `where`"
                )


def _check_stack(norm: Site) -> None:
    """Refuses stacks of layers in which the axis of the layers may differ from variable to variable."""
    leaves = {
        f"{collection}/{name}": tuple(array.shape)
        for collection, tree in norm.variables.items()
        for name, array in nn.meta.unbox(tree).items()
    }
    shape = leaves["batch_stats/mean"]
    # Under `nn.scan` a variable stacked along another axis than the first is transposed before, which `_check_own` sees.
    clear = "vmap" not in norm.lifted or len(set(shape)) == len(shape)
    # Without parameters of its own, it does not show how the new ones are stacked.
    if _lifting(norm) and (len(set(leaves.values())) > 1 or len(leaves) < 3 or not clear):
        raise RewriteError(
            f"FoldBatchNorm: the batch norm at {path_text(norm.path)!r} is lifted by nn.{' and nn.'.join(norm.lifted)}, and "
            f"shapes of variables ({leaves}) do not tell which values belong together; leave it out of `where`"
        )
