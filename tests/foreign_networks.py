"""Networks as other people write them: plain linen, no nnopt import, at module level so that records can name them.

Each shows one habit that a framework working on "any linen module" has to cope with. `CASES` lists them with inputs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from foreign_residual import PartialResNet, Residual, TrainField

IMAGE = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
VECTOR = jax.ShapeDtypeStruct((2, 6), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 5), jnp.int32)
SEQUENCE = jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)


class Compact(nn.Module):
    """Everything inline, unnamed; a grouped convolution among it."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=4, strides=2)(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


class Setup(nn.Module):
    """A list and a dictionary of modules made in `setup`."""

    depth: int = 3

    def setup(self):
        self.layers = [nn.Dense(8) for _ in range(self.depth)]
        self.heads = {"left": nn.Dense(3), "right": nn.Dense(2)}

    def __call__(self, x):
        for layer in self.layers:
            x = nn.relu(layer(x))
        return {side: head(x) for side, head in self.heads.items()}


class SharedTwice(nn.Module):
    """One module called twice."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(6, name="layer")
        return layer(nn.relu(layer(x)))


class TiedAttend(nn.Module):
    """Output weights tied to the embedding through `attend`."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8, name="embed")
        return embed.attend(nn.relu(nn.Dense(8)(embed(tokens))))


class TiedDirect(nn.Module):
    """Output weights tied to the embedding by reading its parameter."""

    def setup(self):
        self.embed = nn.Embed(11, 8)
        self.hidden = nn.Dense(8)

    def __call__(self, tokens):
        return self.hidden(self.embed(tokens)) @ self.embed.embedding.T


class InlineSequential(nn.Module):
    """`nn.Sequential` inside a compact method: its children belong to the caller."""

    @nn.compact
    def __call__(self, x):
        x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(6)])(x)
        return nn.Sequential([nn.Dense(4), nn.relu])(x)


class NormDropout(nn.Module):
    """Batch norm and dropout under a `train` argument."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(8, (3, 3), use_bias=False, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train, name="drop")(nn.relu(x))
        return nn.Dense(4, name="head")(x.mean(axis=(1, 2)))


class Encoder(nn.Module):
    """A transformer layer that is told `deterministic`."""

    @nn.compact
    def __call__(self, x, *, deterministic: bool):
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.1)(
            y, y, deterministic=deterministic
        )
        x = x + nn.Dropout(0.1)(y, deterministic=deterministic)
        y = nn.Dense(16)(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(y))


class Transformer(nn.Module):
    """Two such layers on embedded tokens."""

    @nn.compact
    def __call__(self, tokens, deterministic: bool = True):
        x = nn.Embed(11, 8)(tokens)
        position = self.param("position", nn.initializers.normal(0.02), (1, 5, 8))
        x = x + jnp.broadcast_to(position, x.shape)
        for i in range(2):
            x = Encoder(name=f"layer{i}")(x, deterministic=deterministic)
        return nn.Dense(11)(nn.LayerNorm()(x))


class Mlp(nn.Module):
    """A small residual layer, to be lifted."""

    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(x.shape[-1], name="out")(nn.relu(nn.Dense(12, name="hidden")(x)))


class RematClass(nn.Module):
    """Layers under `nn.remat`, lifted as a class."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nn.remat(Mlp)(name=f"layer{i}")(x)
        return nn.Dense(3, name="head")(x)


class RematMethod(nn.Module):
    """A method under the `nn.remat` decorator."""

    @nn.remat
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(8, name="hidden")(x)))


class ScanLayer(nn.Module):
    """A layer with the carry signature of `nn.scan`."""

    @nn.compact
    def __call__(self, x, _):
        return Mlp(name="mlp")(x), None


class Scanned(nn.Module):
    """Stacked layers: one module, parameters with a leading axis."""

    length: int = 3
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(ScanLayer, prevent_cse=False) if self.remat else ScanLayer
        stack = nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.length
        )
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(3, name="head")(x)


class Ensemble(nn.Module):
    """Members under `nn.vmap`, each with its own parameters."""

    members: int = 3

    @nn.compact
    def __call__(self, x):
        lifted = nn.vmap(
            Mlp,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=self.members,
        )
        return nn.Dense(3, name="head")(lifted(name="members")(x).mean(axis=0))


class StandardizedConv(nn.Conv):
    """A subclass of `nn.Conv` that standardises its kernel."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        if name != "kernel":
            return value
        mean = value.mean(axis=(0, 1, 2), keepdims=True)
        return value - jnp.broadcast_to(mean, value.shape)


class WithStandardizedConv(nn.Module):
    """Uses it, grouped."""

    @nn.compact
    def __call__(self, x):
        x = StandardizedConv(8, (3, 3), name="stem")(x)
        x = StandardizedConv(8, (3, 3), feature_group_count=2, name="grouped")(nn.relu(x))
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


class OwnedField(nn.Module):
    """A module given in a field belongs to the network."""

    backbone: nn.Module
    classes: int = 3

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.classes, name="head")(nn.relu(self.backbone(x)))


class Nested(nn.Module):
    """Modules in fields of modules in fields, with names that a wrapper might use itself."""

    base: nn.Module
    after: tuple[nn.Module, ...] = ()

    @nn.compact
    def __call__(self, x):
        x = self.base(x)
        for module in self.after:
            x = module(x)
        return nn.Dense(3, name="module")(x)


class Borrower(nn.Module):
    """Calls a module that its caller owns."""

    lent: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="own")(nn.relu(self.lent(x)))


class PassedAround(nn.Module):
    """One module handed to two others."""

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(6, name="shared")
        return Borrower(shared, name="second")(Borrower(shared, name="first")(x))


class AutoEncoder(nn.Module):
    """Methods other than `__call__`."""

    def setup(self):
        self.down = nn.Dense(4)
        self.up = nn.Dense(6)

    def encode(self, x):
        return nn.relu(self.down(x))

    def decode(self, z):
        return self.up(z)

    def __call__(self, x):
        return self.decode(self.encode(x))


class Codec(nn.Module):
    """Calls a submodule by methods other than `__call__`."""

    def setup(self):
        self.inner = AutoEncoder()

    def __call__(self, x):
        return self.inner.decode(self.inner.encode(x))


class SqueezeExcite(nn.Module):
    """Channels weighted by a gate computed from their mean."""

    @nn.compact
    def __call__(self, x):
        gate = nn.relu(nn.Dense(2, name="reduce")(x.mean(axis=(1, 2), keepdims=True)))
        gate = nn.sigmoid(nn.Dense(x.shape[-1], name="expand")(gate))
        return x * jnp.broadcast_to(gate, x.shape)


class WithSqueezeExcite(nn.Module):
    """A convolution, weighted."""

    @nn.compact
    def __call__(self, x):
        x = SqueezeExcite(name="se")(nn.Conv(8, (3, 3), name="stem")(x))
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


class UNet(nn.Module):
    """A skip from the way down to the way up, and a transposed convolution."""

    @nn.compact
    def __call__(self, x):
        skip = nn.relu(nn.Conv(4, (3, 3), name="down")(x))
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="middle")(skip))
        x = nn.ConvTranspose(4, (2, 2), strides=(2, 2), name="up")(x)
        return nn.Conv(3, (3, 3), name="out")(jnp.concatenate([x, skip], axis=-1))


class Recurrent(nn.Module):
    """A recurrent layer, which Flax runs as a scan inside."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.RNN(nn.GRUCell(6), name="rnn")(x)[:, -1])


# Networks with `nn.jit` inside, which cannot be rewritten.


class JitClass(nn.Module):
    """A submodule lifted by `nn.jit`."""

    @nn.compact
    def __call__(self, x):
        return nn.jit(Mlp)(name="layer")(x)


class JitMethod(nn.Module):
    """A method under the `nn.jit` decorator."""

    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(x)


class JitInside(nn.Module):
    """Such a module further down."""

    @nn.compact
    def __call__(self, x):
        return JitMethod(name="inner")(nn.Dense(4, name="outer")(x))


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and what to call it with.

    Attributes:
        net: the network.
        inputs: specs of its positional arguments.
        train: keyword arguments that make it train; empty if it does not distinguish.
    """

    net: nn.Module
    inputs: tuple[Any, ...]
    train: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def eval(self) -> dict[str, Any]:
        """Keyword arguments that make it infer."""
        return {name: not value for name, value in self.train.items()}

    def arrays(self) -> tuple[jax.Array, ...]:
        """Real inputs."""
        keys = jax.random.split(jax.random.key(7), len(self.inputs))
        return tuple(
            jax.random.randint(key, spec.shape, 0, 5)
            if jnp.issubdtype(spec.dtype, jnp.integer)
            else jax.random.normal(key, spec.shape, spec.dtype)
            for key, spec in zip(keys, self.inputs, strict=True)
        )


TRAIN = {"train": True}
CASES: dict[str, Case] = {
    "compact": Case(Compact(), (IMAGE,)),
    "setup": Case(Setup(), (VECTOR,)),
    "shared_twice": Case(SharedTwice(), (VECTOR,)),
    "tied_attend": Case(TiedAttend(), (TOKENS,)),
    "tied_direct": Case(TiedDirect(), (TOKENS,)),
    "inline_sequential": Case(InlineSequential(), (VECTOR,)),
    "sequential": Case(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(4)]), (VECTOR,)),
    "norm_dropout": Case(NormDropout(), (IMAGE,), TRAIN),
    "partial_resnet": Case(PartialResNet(), (IMAGE,), TRAIN),
    "transformer": Case(Transformer(), (TOKENS,), {"deterministic": False}),
    "train_field": Case(TrainField(), (IMAGE,), TRAIN),
    "remat_class": Case(RematClass(), (VECTOR,)),
    "remat_method": Case(RematMethod(), (VECTOR,)),
    "scanned": Case(Scanned(), (VECTOR,)),
    "scanned_remat": Case(Scanned(remat=True), (VECTOR,)),
    "ensemble": Case(Ensemble(), (VECTOR,)),
    "conv_subclass": Case(WithStandardizedConv(), (IMAGE,)),
    "owned_field": Case(OwnedField(Mlp()), (VECTOR,)),
    "nested_fields": Case(
        Nested(OwnedField(nn.Dense(4)), (OwnedField(Mlp(), 5), nn.Dense(4))), (VECTOR,)
    ),
    "passed_around": Case(PassedAround(), (VECTOR,)),
    "auto_encoder": Case(AutoEncoder(), (VECTOR,)),
    "codec": Case(Codec(), (VECTOR,)),
    "squeeze_excite": Case(WithSqueezeExcite(), (IMAGE,)),
    "u_net": Case(UNet(), (IMAGE,)),
    "recurrent": Case(Recurrent(), (SEQUENCE,)),
    "residual_positional": Case(Residual("positional"), (IMAGE,), TRAIN),
    "residual_keyword": Case(Residual("keyword"), (IMAGE,), TRAIN),
    "residual_deterministic": Case(Residual("deterministic"), (IMAGE,), TRAIN),
    "residual_field": Case(Residual("field"), (IMAGE,), TRAIN),
}
RESIDUAL = {
    "residual_positional": ("block0", "block1"),
    "residual_keyword": ("block0", "block1"),
    "residual_deterministic": ("block0", "block1"),
    "residual_field": ("block0", "block1"),
    "train_field": ("block0", "block1"),
    "partial_resnet": ("PartialBlock_0", "PartialBlock_1", "PartialBlock_2"),
}
JITTED: dict[str, nn.Module] = {
    "class": JitClass(),
    "method": JitMethod(),
    "inside": JitInside(),
}
