"""VGG with batch normalisation (Simonyan and Zisserman, https://arxiv.org/abs/1409.1556)."""

from collections.abc import Sequence
from functools import partial

import jax
from flax import linen as nn

HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
TORCH_LINEAR = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# The normalisation cancels a convolution's bias, but the published parameter counts include it.
conv3x3 = partial(nn.Conv, kernel_size=(3, 3), padding=1, kernel_init=HE_FAN_OUT)
batch_norm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)
linear = partial(nn.Dense, kernel_init=TORCH_LINEAR)


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each followed by a 2x2 max-pool.

        (conv -> norm -> relu) x n -> max-pool, five times -> global mean -> head
                                                           -> flatten -> hidden1 -> hidden2 -> head

    The convolutions are named `stage1_conv0`, `stage1_conv1`, ..., their normalisations
    `stage1_norm0`, `stage1_norm1`, ...

    Attributes:
        stage_sizes: number of convolutions in each stage.
        widths: channels of each stage.
        num_classes: number of logits.
        hidden: widths of the classifier's hidden layers. Without any, the last stage is averaged
            over its positions, for any image size; with some it is flattened, which binds the
            parameters to one image size (224 x 224 in the paper).
        dropout: probability of dropping an output of a hidden layer while training (0.5 in the
            paper).
    """

    stage_sizes: Sequence[int] = (2, 2, 3, 3, 3)
    widths: Sequence[int] = (64, 128, 256, 512, 512)
    num_classes: int = 10
    hidden: Sequence[int] = ()
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits `[batch, num_classes]` for images `[batch, height, width, channels]`."""
        stages = zip(self.stage_sizes, self.widths, strict=True)
        for stage, (convs, features) in enumerate(stages, start=1):
            for i in range(convs):
                x = conv3x3(features, name=f"stage{stage}_conv{i}")(x)
                x = batch_norm(use_running_average=not train, name=f"stage{stage}_norm{i}")(x)
                x = nn.relu(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1) if self.hidden else x.mean(axis=(1, 2))
        for i, features in enumerate(self.hidden, start=1):
            x = nn.relu(linear(features, name=f"hidden{i}")(x))
            if self.dropout > 0:
                x = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout{i}")(x)
        return linear(self.num_classes, name="head")(x)


def vgg16(num_classes: int = 10, hidden: Sequence[int] = (), dropout: float = 0.0) -> VGG:
    """VGG-16: 13 convolutions; `hidden=(4096, 4096)` is the paper's classifier for ImageNet."""
    return VGG((2, 2, 3, 3, 3), (64, 128, 256, 512, 512), num_classes, tuple(hidden), dropout)
