"""Which lowering of a convolution to use where: a rule, measured.

On a CPU, for the 3x3 convolutions of wide residual networks' blocks (8 to 128 channels at 32 to 8 pixels, strides of 1 and 2,
batches of 16; spot checks at 4 and 64, and at the 64 to 512 channels of ResNet-34), one thread of a Zen 5 core (AVX-512), jax
0.10.2. `scripts/bench/lowering.py` measures it again.

| channels of a group      | alone                   | within a larger program | alone, as fast as XLA's own |
|--------------------------|-------------------------|-------------------------|-----------------------------|
| 1 (depthwise)            | `ShiftedSum`            | `Fenced(ShiftedSum())`  | 14 to 240 times             |
| 2                        | `ShiftedPlanes`         | `SplitGroups`           | 20                          |
| 4, in 8 groups and more  | `ShiftedPlanes`         | `SplitGroups`           | 7                           |
| the same, strided        | `ShiftedSum` (forward)  | `SplitGroups`           | 5 to 8                      |
| others                   | `SplitGroups`           | `SplitGroups`           | 1.2 to 5; gradients 2 to 45 |
| all, 16 and fewer        | `SplitGroups` in tiles  | the same                | 1.1 to 1.7                  |
| all, more                | `SplitGroups` or native | the same                | 1                           |
| window of one position   | `Pointwise`             | the same                | 1.1 to 1.8                  |
| all, fewer than 12 pixels| `Patches` (forward)     | the same                | 6 to 290                    |

`SplitGroups` is asked for parts of 8 channels, or 16 from 128 on: more slices cost more than the zeros they save. Tiles make
32 columns, two vectors of sixteen numbers; with fewer the matrix product runs at a third of the peak.

Alone, a convolution is a program of its own. Within a larger one XLA fuses what is elementwise with what reads it, and
computes it again in every reader. Depthwise sums are fenced off (a block of batch norm, ReLU and convolutions trains 15 to 20 %
faster so). Fenced planes gain a little in inference and lose in training against dense convolutions, with which XLA
fuses nothing.

Weight gradients: depthwise ones are sums; all others the diagonal blocks of dense ones, in parts of 16 or 32 channels, 25 to 1,400
times as fast as XLA's own, and at most 1.3 times as slow as the dense one.

Not in the table, because measured for grouped 3x3 convolutions and rejected, against the best there: im2col (`Patches` with a
batched product of matrices, one for each group) takes 6 to 20 times as long, nine products of shifted images 4 to 10 times, and the
split form with channels first 1.2 to 1.5 times. So `Patches` has neither groups nor gradients.

Elsewhere (GPU, TPU) the native form: their libraries have grouped convolutions. Nothing was measured there.
"""

from nnopt.layers.conv_shape import ConvShape, Direction
from nnopt.layers.dense_lowerings import Patches, Pointwise, SplitGroups
from nnopt.layers.lowerings import Fenced, Lowering, Native
from nnopt.layers.shifted_lowerings import ShiftedPlanes, ShiftedSum

__all__ = [
    "ConvShape",
    "Direction",
    "Fenced",
    "Lowering",
    "Native",
    "Patches",
    "Pointwise",
    "ShiftedPlanes",
    "ShiftedSum",
    "SplitGroups",
    "choose",
    "explain",
]

_COLUMNS = 32
"""Columns of a matrix product that run near the peak: two vectors of sixteen numbers."""
_SUM_TERMS = 128
"""Terms of a sum that are still worth compiling."""
_FEW_PIXELS = 12
"""Of the result of a dense convolution of many channels: with fewer XLA's own is up to 290 times as slow (2 x 4 of 512)."""
_MANY_CHANNELS = 128
_LOOPED_PARTS = 32
"""More parts than these are compiled as a loop."""


def choose(
    shape: ConvShape, direction: Direction, platform: str, *, alone: bool = False
) -> Lowering:
    """The fastest known lowering of a convolution.

    Args:
        shape: of the convolution.
        direction: which of its products.
        platform: as JAX names it, `"cpu"`, `"gpu"`, ...
        alone: whether it is a program of its own, rather than part of a larger one.
    """
    return _choice(shape, direction, platform, alone)[0]


def explain(shape: ConvShape, direction: Direction, platform: str, *, alone: bool = False) -> str:
    """Why `choose` chooses what it chooses, in one line.

    Example:
        >>> explain(ConvShape((8, 32, 32, 16), (3, 3, 1, 16), groups=16), Direction.FORWARD, "gpu")
        'Native(): nothing else was measured on gpu'
    """
    lowering, reason = _choice(shape, direction, platform, alone)
    return f"{lowering}: {reason}"


def _choice(
    shape: ConvShape, direction: Direction, platform: str, alone: bool
) -> tuple[Lowering, str]:
    if platform != "cpu":
        return Native(), f"nothing else was measured on {platform or 'this platform'}"
    if Pointwise().applies(shape, direction):
        narrowing = shape.kernel[3] < shape.kernel[2]
        if direction is Direction.WEIGHT_GRADIENT and narrowing:
            return Native(), "a matrix product with few columns: XLA's own"
        return Pointwise(), "a window of one position: a matrix product"
    if (
        direction is Direction.FORWARD
        and shape.groups == 1
        and shape.output[1] * shape.output[2] < _FEW_PIXELS
        and min(shape.kernel[2:]) >= _MANY_CHANNELS
    ):
        return Patches(), "few pixels, of which XLA makes a plain loop: a matrix product"
    taps = shape.kernel[0] * shape.kernel[1]
    per_group = max(shape.kernel[2], shape.kernel[3] // shape.groups)
    strided, channels = shape.strides != (1, 1), shape.input[3]
    summable = shape.groups > 1 and taps * per_group <= _SUM_TERMS
    if direction is Direction.WEIGHT_GRADIENT:
        if summable and ShiftedSum().applies(shape, direction):
            return _fenced(ShiftedSum(), alone), "depthwise: a sum of products"
        if shape.groups == 1:
            return Native(), "dense: XLA's own"
        lowering = _split(shape, direction, 32 if strided or channels >= 128 else 16)
        return lowering, "diagonal blocks of dense weight gradients"
    if summable and per_group == 1:
        return _fenced(ShiftedSum(), alone), "depthwise: a sum of shifted images"
    forward = direction is Direction.FORWARD
    if summable and alone and per_group <= 4:
        few = per_group == 2
        if not strided and (few or shape.groups >= 8):
            return ShiftedPlanes(), "few channels in a group: a sum of shifted planes"
        if strided and forward and (few or shape.groups >= 8):
            return ShiftedSum(), "few channels in a group: a sum of shifted images"
    if shape.groups == 1 and strided and not forward and channels >= _COLUMNS:
        return Native(), "dense and strided: XLA's own leaves out zeros"
    if strided and forward:
        width = channels if channels <= _COLUMNS else 16
    else:
        width = min(max(8, channels // (4 if strided else 8)), 16)
    return _split(shape, direction, width), "dense parts, wide enough to run near the peak"


def _fenced(lowering: Lowering, alone: bool) -> Lowering:
    return lowering if alone else Fenced(lowering)


def _split(shape: ConvShape, direction: Direction, width: int) -> SplitGroups:
    """The most parts that are at least so wide, in tiles that fill the columns of a matrix product."""
    channels, groups = shape.input[3], shape.groups
    parts = max(
        (p for p in range(1, groups + 1) if groups % p == 0 and channels // p >= width), default=1
    )
    loop = parts > _LOOPED_PARTS
    if direction is Direction.WEIGHT_GRADIENT:
        return SplitGroups(parts, loop=loop)
    columns = shape.result(direction)[3] // parts
    if direction is Direction.INPUT_GRADIENT:
        columns *= shape.strides[0] * shape.strides[1]
    wide = min(shape.kernel[:2]) > 1 and shape.dilation == (1, 1)
    times = _COLUMNS // columns if wide else 1
    return SplitGroups(parts, (1, 4 if times >= 4 else 2 if times >= 2 else 1), loop)
