"""A small network twice: in linen, and in NumPy float64 with derivatives by complex steps.

The NumPy side shares nothing with the scores: its derivatives come from evaluating it with an imaginary part of 1e-30 in one
parameter at a time, which is exact to the last digits and knows no chain rule.
"""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

BATCH, SIZE, CLASSES = 6, 5, 3
STEP = 1e-30  # the imaginary part whose square vanishes
QUICK = {
    "xla_backend_optimization_level": 0
}  # these programs run once: compiling them well takes longer than running them badly


class Block(nn.Module):
    """A residual block: a grouped convolution, one with a bias, and a shortcut."""

    @nn.compact
    def __call__(self, x, train):
        y = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        y = nn.Conv(4, (3, 3), padding=1, feature_group_count=2, use_bias=False, name="first")(y)
        y = nn.Conv(4, (3, 3), padding=1, name="last")(jnp.maximum(y, 0))
        return x + y


class Small(nn.Module):
    """Convolutions with and without bias, groups and stride, two batch norms, three kinds of ReLU, two dense layers."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), padding=1, use_bias=False, name="stem")(x)
        x = Block(name="block")(x, train)
        x = nn.Conv(3, (3, 3), strides=2, padding=1, name="down")(x)
        x = nn.relu6(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.relu(nn.Dense(5, name="hidden")(x.mean(axis=(1, 2))))
        return nn.Dense(CLASSES, name="head")(x)


@contextlib.contextmanager
def doubles():
    """Float64, which batch norm promotes its float32 constants to."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def conv(x, kernel, stride=1, groups=1):
    """`[n, h, w, in]`, padded by one on each side, `[3, 3, in / groups, out]` -> `[n, h', w', out]`."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out_h, out_w = ((n - 3) // stride + 1 for n in x.shape[1:3])
    width_in, width_out = x.shape[-1] // groups, kernel.shape[-1] // groups
    y = np.zeros((len(x), out_h, out_w, kernel.shape[-1]), np.result_type(x, kernel))
    for a in range(3):
        for b in range(3):
            seen = x[:, a : a + stride * out_h : stride, b : b + stride * out_w : stride][
                :, :out_h, :out_w
            ]
            for g in range(groups):
                inputs = slice(g * width_in, (g + 1) * width_in)
                outputs = slice(g * width_out, (g + 1) * width_out)
                y[..., outputs] += seen[..., inputs] @ kernel[a, b, :, outputs]
    return y


def relu(x):
    return np.where(x.real > 0, x, 0)


class Oracle:
    """The NumPy network on one minibatch.

    Attributes:
        params: "site/name" -> array.
    """

    def __init__(self, params, images, labels):
        self.params, self.images, self.labels = params, images, labels

    def norm(self, x, name, keep):
        mean = x.mean(axis=(0, 1, 2))
        variance = ((x - mean) ** 2).mean(axis=(0, 1, 2))
        keep[f"variance {name}"] = variance
        return (x - mean) / np.sqrt(variance + 1e-5) * self.p[f"{name}/scale"] + self.p[
            f"{name}/bias"
        ]

    def forward(self, params=None, images=None, gates=None, residual=True):
        """Logits, and everything on the way: values before ReLU as `relu 0`, ..., probes by site."""
        self.p = p = params or self.params
        x = self.images if images is None else images
        keep = {}

        def probed(name, value):
            keep[name] = value
            if gates and name in gates:
                gate = gates[name]
                value = value * gate.reshape(len(gate), *(1,) * (value.ndim - 2), -1)
            return value

        def active(value, cap=np.inf):
            keep[f"relu {sum(k.startswith('relu') for k in keep)}"] = value
            return np.where(value.real < cap, relu(value), cap)

        x = probed("stem", conv(x, p["stem/kernel"]))
        y = active(self.norm(x, "block/norm", keep))
        y = probed("block/first", conv(y, p["block/first/kernel"], groups=2))
        y = probed("block/last", conv(active(y), p["block/last/kernel"]) + p["block/last/bias"])
        x = x + y if residual else y
        x = probed("down", conv(x, p["down/kernel"], stride=2) + p["down/bias"])
        x = keep["features"] = active(self.norm(x, "norm", keep), 6.0)
        x = probed("hidden", x.mean(axis=(1, 2)) @ p["hidden/kernel"] + p["hidden/bias"])
        return probed("head", active(x) @ p["head/kernel"] + p["head/bias"]), keep

    def loss(self, params=None, gates=None):
        logits, _ = self.forward(params, gates=gates)
        total = np.log(np.exp(logits).sum(axis=1))
        chosen = logits[np.arange(len(logits)), self.labels]
        return (total - chosen).mean()

    def kernels(self):
        return [name for name in self.params if name.endswith("kernel")]

    def gradient(self, name, function=None, params=None):
        """Of a function of the parameters (the loss) in one of them; a leading axis for each output."""
        function = self.loss if function is None else function
        params = dict(self.params if params is None else params)
        start = params[name].astype(complex)
        slopes = []
        for index in np.ndindex(start.shape):
            moved = start.copy()
            moved[index] += 1j * STEP
            slopes.append(np.imag(function({**params, name: moved})) / STEP)
        return np.moveaxis(np.asarray(slopes), 0, -1).reshape(*np.shape(slopes[0]), *start.shape)

    def part(self, here):
        """The same network on a part of the minibatch."""
        return Oracle(self.params, self.images[here], self.labels[here])


@functools.cache
def problem(seed=0):
    """An oracle, and the variables, images and labels of the linen network, float64 as NumPy arrays."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(BATCH, SIZE, SIZE, 2))
    labels = np.asarray([0, 2, 1, 1, 0, 2])
    specs = jax.eval_shape(
        Small().init, jax.random.key(0), jax.ShapeDtypeStruct((1, SIZE, SIZE, 2), jnp.float32)
    )
    flat = {}
    for path, spec in flatten_dict(specs).items():
        draw = rng.normal(0, 0.6, spec.shape)
        flat[path] = draw + 1.2 if path[-1] in ("scale", "var") else draw
    params = {"/".join(path[1:]): v for path, v in flat.items() if path[0] == "params"}
    return Oracle(params, images, labels), unflatten_dict(flat), images, labels
