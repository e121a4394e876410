"""Small networks, one for each way in which channels may hang together."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from nnopt.layers import Conv


class Plain(nn.Module):
    """Convolution, batch norm, ReLU, convolution."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="first")(x)
        x = nn.relu(nn.BatchNorm(not train, name="norm")(x))
        x = nn.Conv(6, (3, 3), name="second")(x)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Residual(nn.Module):
    """Two blocks on one stream."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        for i in range(2):
            y = nn.relu(nn.BatchNorm(not train, name=f"norm{i}")(x))
            y = nn.relu(nn.Conv(12, (3, 3), name=f"up{i}")(y))
            x = x + nn.Conv(8, (3, 3), name=f"down{i}")(y)
        return nn.Dense(5, name="head")(x.max((1, 2)))


class Block(nn.Module):
    """Decides by its own field whether it needs a projection."""

    features: int

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Conv(self.features, (3, 3), name="first")(x)
        y = nn.relu(nn.BatchNorm(not train, name="norm")(y))
        y = nn.Conv(self.features, (3, 3), name="second")(y)
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), name="project")(x)
        return nn.relu(x + y)


class Blocks(nn.Module):
    """Blocks with and without projections."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        for i, width in enumerate((8, 12, 12)):
            x = Block(width, name=f"block{i}")(x, train)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class DenseConcat(nn.Module):
    """Every layer reads what all before it have made."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        for i in range(3):
            y = nn.relu(nn.BatchNorm(not train, name=f"norm{i}")(x))
            x = jnp.concatenate([x, nn.Conv(4, (3, 3), name=f"layer{i}")(y)], -1)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Grouped(nn.Module):
    """A convolution in two groups."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(12, (3, 3), name="first")(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(x))
        x = nn.Conv(6, (1, 1), name="last")(x)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Depthwise(nn.Module):
    """Depthwise separable, with two filters for each channel."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(8, (1, 1), name="first")(x))
        x = nn.relu(Conv(16, (3, 3), feature_group_count=8, name="depthwise")(x))
        x = nn.relu(Conv(16, (3, 3), feature_group_count=16, name="again")(x))
        x = nn.Conv(6, (1, 1), name="last")(x)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class SqueezeExcite(nn.Module):
    """Channels scaled by what all of them say."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(8, (3, 3), name="first")(x))
        s = nn.relu(nn.Dense(4, name="squeeze")(x.mean((1, 2))))
        x = x * nn.sigmoid(nn.Dense(x.shape[-1], name="excite")(s))[:, None, None]
        return nn.Dense(5, name="head")(nn.Conv(6, (3, 3), name="last")(x).mean((1, 2)))


class Split(nn.Module):
    """A gated linear unit: one half gates the other."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(16, (3, 3), name="first")(x)
        a, b = jnp.split(x, 2, -1)
        x = nn.Conv(6, (1, 1), name="last")(a * nn.sigmoid(b))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Chunk(nn.Module):
    """Quarters by slicing, put together in another order."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(16, (3, 3), name="first")(x)
        n = x.shape[-1] // 4
        parts = [x[..., i * n : (i + 1) * n] for i in (2, 0, 3)]
        x = nn.Conv(6, (1, 1), name="last")(jnp.concatenate(parts, -1))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Flatten(nn.Module):
    """Images flattened into a dense layer."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(6, (3, 3), strides=2, name="first")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(10, name="dense")(x.reshape(x.shape[0], -1)))
        return nn.Dense(5, name="head")(x)


class Shared(nn.Module):
    """One convolution called twice, which ties what it takes to what it makes."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        again = nn.Conv(8, (3, 3), name="again")
        x = nn.relu(again(nn.relu(again(x))))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Attention(nn.Module):
    """Flax's multi-head attention over positions."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(12, (2, 2), strides=2, name="patches")(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=16, name="attention")(x)
        x = x + nn.Dense(12, name="out")(nn.gelu(nn.Dense(24, name="hidden")(x)))
        return nn.Dense(5, name="head")(x.mean(1))


class OwnAttention(nn.Module):
    """Attention written by hand, heads split off by reshaping."""

    heads: int = 2

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (2, 2), strides=2, name="patches")(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        q, k, v = (nn.Dense(8, name=n)(x).reshape(*x.shape[:2], self.heads, -1) for n in "qkv")
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        x = x + nn.Dense(x.shape[-1], name="out")(y.reshape(*y.shape[:2], -1))
        return nn.Dense(5, name="head")(x.mean(1))


class FusedAttention(nn.Module):
    """Queries, keys and values of all heads made by one product."""

    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        made = nn.Dense(24, name="qkv")(x).reshape(*x.shape[:2], 3, 2, -1)
        q, k, v = (made[:, :, i] for i in range(3))
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], -1)
        return nn.Dense(5, name="head")(nn.Dense(6, name="out")(y).mean(1))


class UNet(nn.Module):
    """Down, up, and what was there before put beside it."""

    @nn.compact
    def __call__(self, x, train=False):
        a = nn.relu(nn.Conv(6, (3, 3), name="down")(x))
        b = nn.relu(nn.Conv(10, (3, 3), strides=2, name="lower")(a))
        up = nn.relu(nn.ConvTranspose(6, (2, 2), strides=(2, 2), name="up")(b))
        x = nn.Conv(7, (3, 3), name="join")(jnp.concatenate([a, up], -1))
        return nn.Dense(5, name="head")(nn.relu(x).mean((1, 2)))


class Shuffle(nn.Module):
    """Channels of two groups shuffled between grouped convolutions."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(8, (1, 1), name="first")(x))
        x = nn.Conv(12, (3, 3), feature_group_count=2, name="grouped")(x)
        b, h, w, c = x.shape
        x = x.reshape(b, h, w, 2, c // 2).swapaxes(3, 4).reshape(b, h, w, c)
        x = nn.relu(nn.Conv(8, (1, 1), feature_group_count=2, name="again")(x))
        return nn.Dense(5, name="head")(nn.Conv(6, (1, 1), name="last")(x).mean((1, 2)))


class PaddedShortcut(nn.Module):
    """New channels of the stream are zeros put beside the old ones."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(6, (3, 3), name="stem")(x))
        y = nn.relu(nn.Conv(14, (3, 3), name="inner")(x))
        y = nn.Conv(10, (3, 3), name="wide")(y)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (2, 2))) + y
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Branches(nn.Module):
    """Inception: branches with pooling, put side by side."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        a = nn.Conv(4, (1, 1), name="one")(x)
        b = nn.Conv(6, (3, 3), name="three")(nn.relu(nn.Conv(5, (1, 1), name="before")(x)))
        c = nn.Conv(4, (1, 1), name="pooled")(nn.max_pool(x, (3, 3), padding="SAME"))
        x = nn.relu(jnp.concatenate([a, b, c], -1))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Gating(nn.Module):
    """Two ways multiplied, as a setup-style module with a list."""

    def setup(self):
        self.ways = [nn.Conv(8, (3, 3)) for _ in range(2)]
        self.head = nn.Sequential([nn.Dense(9), nn.tanh, nn.Dense(5)])

    def __call__(self, x, train=False):
        a, b = (way(x) for way in self.ways)
        return self.head((a * nn.silu(b)).mean((1, 2)))


class Sequence(nn.Module):
    """One-dimensional convolutions on what images are flattened to, inside of `nn.remat`."""

    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for i, width in enumerate((6, 10)):
            x = nn.relu(nn.remat(nn.Conv)(width, (3,), strides=2, name=f"conv{i}")(x))
        return nn.DenseGeneral(5, axis=-1, name="head")(x.mean(1))


class Prelu(nn.Module):
    """An activation with a weight for each channel, and a scale that the network holds itself."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="first")(x)
        slope = self.param("slope", nn.initializers.constant(0.2), (x.shape[-1],))
        x = jnp.where(x > 0, x, slope[None, None, None] * x)
        return nn.Dense(5, name="head")(nn.Conv(6, (3, 3), name="last")(x).mean((1, 2)))


class Layer(nn.Module):
    """One of the layers that `nn.scan` stacks."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.relu(nn.Dense(12, name="up")(x))
        return x + nn.Dense(x.shape[-1], name="down")(y), None


class Scanned(nn.Module):
    """Layers whose weights are stacked and that run in a loop."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, name="first")(x.mean((1, 2)))
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(5, name="head")(x)


class Stacked(nn.Module):
    """Two ways stacked beside each other, repeated, and blurred by a kernel that is no weight."""

    @nn.compact
    def __call__(self, x, train=False):
        x = jnp.stack([nn.Conv(8, (3, 3), name=name)(x) for name in ("one", "other")], -1).max(-1)
        blur = jnp.tile(jnp.full((3, 3, 1, 1), 1 / 9), (1, 1, 1, x.shape[-1]))
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, blur, (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=x.shape[-1]
        )
        return nn.Dense(5, name="head")(jnp.tile(nn.relu(x), (1, 1, 1, 2)).mean((1, 2)))


class Halves(nn.Module):
    """A kernel that is cut in two before it is used."""

    features: int

    @nn.compact
    def __call__(self, x):
        draw = nn.initializers.lecun_normal()
        a, b = jnp.split(self.param("w", draw, (x.shape[-1], self.features)), 2, -1)
        return nn.tanh(x @ a) * nn.sigmoid(x @ b)


class SplitKernel(nn.Module):
    """A kernel cut in two."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(5, name="head")(Halves(16, name="halves")(x).mean((1, 2)))


class Linear(nn.Module):
    """A dense layer with another number that is as large as its width."""

    features: int
    temperature: int = 8

    @nn.compact
    def __call__(self, x):
        kernel = self.param("w", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        return x @ kernel / self.temperature


class Gain(nn.Module):
    """A block that needs its width, with another number that is as large."""

    features: int
    gain: int = 8

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Conv(self.features, (3, 3), name="inner")(x))
        y = nn.Conv(self.features, (3, 3), name="outer")(y)
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), name="project")(x)
        return x + y * self.gain


class Numbers(nn.Module):
    """Fields that are as large as a width by chance."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(Linear(8, name="linear")(x))
        return nn.Dense(5, name="head")(nn.relu(Gain(8, name="block")(x)).mean((1, 2)))


class Kernels(nn.Module):
    """Kernels computed of weights that are zero for a channel that goes, and an output scaled by the one element of a variable."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.sigmoid(nn.Conv(8, (3, 3), name="first")(x))
        made = [
            x @ KERNELS[name](self, x.shape[-1]) for name, exact in KERNELS_EXACT.items() if exact
        ]
        x = jnp.concatenate(made, -1) * self.param("scale", nn.initializers.ones, (1,))[0]
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Kernel(nn.Module):
    """One of these kernels, or one that is not zero where weights are."""

    kernel: str

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.sigmoid(nn.Conv(8, (3, 3), name="first")(x))
        return nn.Dense(5, name="head")((x @ KERNELS[self.kernel](self, x.shape[-1])).mean((1, 2)))


def _weights(net, name, *shape):
    return net.param(name, nn.initializers.lecun_normal(), shape)


def _in_a_loop(net, n):
    def step(kernel, _):
        return kernel + jnp.ones((n, 4)), None

    return jax.lax.scan(step, jnp.zeros((n, 4)), None, length=2)[0]


# name -> (of a module and the number of channels the kernel `[channels, 4]`, whether it is zero for a channel that goes)
_KERNELS = {
    "product": (lambda net, n: _weights(net, "a", n, 4) * _weights(net, "b", 1, 4), True),
    "product with ones": (lambda net, n: 2 * _weights(net, "c", n, 4) * jnp.ones((n, 4)), True),
    "sum": (lambda net, n: _weights(net, "d", n, 4) + _weights(net, "e", n, 1) * jnp.ones((1, 4)), True),
    "beside": (lambda net, n: jnp.concatenate([_weights(net, "f", n, 2), _weights(net, "g", n, 2)], -1), True),
    "moved": (lambda net, n: _weights(net, "h", n, 2, 2).transpose(2, 0, 1).reshape(2, n, 2)[1], True),
    "ones": (lambda net, n: jnp.ones((n, 1)), False),
    "repeated": (lambda net, n: jnp.broadcast_to(_weights(net, "w", 1, 4), (n, 4)), False),
    "ones added": (lambda net, n: _weights(net, "w", n, 4) + jnp.ones((n, 4)), False),
    "row added": (lambda net, n: _weights(net, "w", n, 4) + _weights(net, "b", 1, 4), False),
    "number subtracted": (lambda net, n: _weights(net, "w", n, 4) - _weights(net, "b", 1, 1), False),
    "beside ones": (lambda net, n: jnp.concatenate([_weights(net, "w", n, 4), jnp.ones((n, 2))], -1), False),
    "stacked on ones": (lambda net, n: jnp.stack([_weights(net, "w", n, 4), jnp.ones((n, 4))]).sum(0), False),
    "ones in a loop": (_in_a_loop, False),
}  # fmt: skip
KERNELS = {name: kernel for name, (kernel, _) in _KERNELS.items()}
KERNELS_EXACT = {name: exact for name, (_, exact) in _KERNELS.items()}


EXACT = (
    Plain(), Residual(), Blocks(), DenseConcat(), Grouped(), Depthwise(), SqueezeExcite(), Split(), Chunk(), Flatten(), Shared(),
    Attention(), OwnAttention(), UNet(), Shuffle(), PaddedShortcut(), Branches(), Gating(), Sequence(), Prelu(),
    Scanned(), Stacked(), SplitKernel(), Numbers(),
)  # fmt: skip


class Norms(nn.Module):
    """Means over channels: exact pruning must leave those alone, and can prune what is inside."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.LayerNorm(name="layer")(nn.Conv(8, (3, 3), name="first")(x))
        x = nn.Conv(8, (3, 3), name="second")(nn.relu(x))
        x = nn.GroupNorm(2, name="group")(x)
        x = nn.Conv(6, (3, 3), name="third")(nn.relu(x))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class ByNumber(nn.Module):
    """Takes channels by number, sorts them, and keeps a Fourier transform: what no rule can follow."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="first")(x)
        x = x[..., jnp.array([0, 3, 5])]
        x = nn.Conv(6, (3, 3), name="second")(x)
        x = jnp.sort(x, -1)
        x = nn.Conv(8, (3, 3), name="third")(x)
        x = jnp.abs(jnp.fft.fft(x, axis=-1)).astype(jnp.float32)
        x = nn.relu(nn.Conv(7, (3, 3), name="fourth")(x))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Fixed(nn.Module):
    """Numbers of channels written into the code."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="first")(x)
        x = x.reshape(*x.shape[:3], 2, 4).mean(-1)
        return nn.Dense(5, name="head")(nn.Conv(6, (3, 3), name="last")(x).mean((1, 2)))


def _width(x):
    return x * x.shape[-1] ** -0.5


def _size(x):
    return x / x.size


def _roll(x):
    return x + 2 * jnp.roll(x, 4, -1)


def _shuffle(x):
    return x.reshape(*x.shape[:3], -1, 4).swapaxes(3, 4).reshape(x.shape)


def _swap(x):
    return x + 2 * jnp.concatenate([x[..., 4:], x[..., :4]], -1)


def _ones(x):
    return x * jnp.ones(x.shape[-1]).sum()


def _power(x):
    return nn.sigmoid(x) ** x.shape[-1]


def _loop(x):
    return jax.lax.scan(lambda y, _: (y * y.shape[-1], None), x, None, length=2)[0]


def _partial_convolution(x):
    return x / _convolved(jnp.ones_like(x), jnp.ones((3, 3, x.shape[-1], 1)))


def _convolved(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)


def _ones_in_a_loop(x):
    def step(y, _):
        return y / (jnp.ones_like(y) * jnp.ones(y.shape[-1]).sum()), None

    return jax.lax.scan(step, x, None, length=2)[0]


def _ones_multiplied_in_a_loop(x):
    ones = jnp.ones(x.shape[-1])
    return jax.lax.scan(lambda y, _: (y / (ones @ ones), None), x, None, length=2)[0]


def _ones_multiplied(x):
    ones = jnp.ones_like(x)
    return x / jnp.einsum("bhwc,bhwc->bhw", ones, ones)[..., None]


def _window(x):
    return nn.max_pool(x, (x.shape[-1] // 2 + 1,) * 2, padding="SAME")


def _row(x):
    return x[:, x.shape[-1] - 1 : x.shape[-1]]


def _padding(x):
    return jnp.pad(x, ((0, 0), (x.shape[-1] // 4, 4 - x.shape[-1] // 4), (0, 0), (0, 0)))[:, 1:9]


def _way(x):
    return jnp.flip(x, 1 if x.shape[-1] == 8 else 2)


def _reduced(x):
    return x.max(1 if x.shape[-1] == 8 else 2)


def _contracted(x):
    return jnp.einsum("bhwc,bkwc->bhkc" if x.shape[-1] == 8 else "bhwc,bhkc->bwkc", x, x)


CODE = {f.__name__: f for f in (
    _width, _size, _roll, _shuffle, _swap, _ones, _power, _loop, _partial_convolution, _ones_multiplied, _ones_in_a_loop,
    _ones_multiplied_in_a_loop, _window, _row, _padding, _way, _reduced, _contracted,
)}  # fmt: skip


class InCode(nn.Module):
    """A function with a number of channels in it: each is another function when there are fewer."""

    name_of_code: str

    @nn.compact
    def __call__(self, x, train=False):
        x = CODE[self.name_of_code](nn.relu(nn.Conv(8, (3, 3), name="first")(x)))
        return nn.Dense(5, name="head")(x.reshape(x.shape[0], -1))


class Division(nn.Module):
    """Divides by weights, in one of several ways."""

    way: str

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), name="first")(x)
        s = self.param("s", nn.initializers.ones, (x.shape[-1],))
        s = s[None, None, None]
        ways = {
            "div": lambda: x / s,
            "power": lambda: x * s**-1,
            "root": lambda: x * jax.lax.rsqrt(s),
            "log": lambda: x * jnp.log(s),
            "norm": lambda: x / jnp.sqrt((s**2).sum((0, 1, 2), keepdims=True)),
            "safe": lambda: x / (s + 1),
        }
        x = ways[self.way]()
        return nn.Dense(5, name="head")(nn.relu(x).mean((1, 2)))


class Frozen(nn.Module):
    """Channels beside a fixed number of numbers."""

    way: str

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="first")(x)
        numbers = jnp.arange(8.0)[None, None, None]
        ways = {
            "where": lambda: jnp.where(numbers < 4, x, 0),
            "add": lambda: x + numbers,
            "counted": lambda: x + jnp.cumsum(jnp.ones(x.shape[-1]))[None, None, None],
            "rolled": lambda: x + jnp.roll(x, 1, -1),
        }
        x = ways[self.way]()
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Dropped(nn.Module):
    """Draws random numbers."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(0.5, deterministic=not train)(nn.Conv(4, (3, 3), name="first")(x))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Recurrent(nn.Module):
    """A recurrent cell over positions."""

    cell: type

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(7, name="first")(x.reshape(x.shape[0], -1, x.shape[-1]))
        return nn.Dense(5, name="head")(nn.RNN(self.cell(8), name="cell")(x)[:, -1])


class Tokens(nn.Module):
    """Looks words up in a table, and scores them by it."""

    @nn.compact
    def __call__(self, tokens, train=False):
        table = nn.Embed(11, 8, name="table")
        x = table(tokens)
        return table.attend(x + nn.Dense(8, name="down")(nn.relu(nn.Dense(12, name="up")(x))))


class TwoKernels(nn.Module):
    """A module with two kernels of its own."""

    @nn.compact
    def __call__(self, x, train=False):
        draw = nn.initializers.lecun_normal()
        x = nn.relu(x @ self.param("one", draw, (x.shape[-1], 8)))
        x = nn.relu(x @ self.param("two", draw, (x.shape[-1], 6)))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
