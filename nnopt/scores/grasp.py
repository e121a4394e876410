"""GraSP: whether removing weights would keep the gradient flowing.

Wang, Zhang, Grosse: "Picking Winning Tickets Before Training by Preserving Gradient Flow" (https://arxiv.org/abs/2002.07376),
section 4, with temperature 1; summed to a score by Abdelfattah et al. (https://arxiv.org/abs/2101.08134), section 3.

Definition. `sum -W * (H g)` over all values of the kernels of convolutions and linear layers, where `g = dL/dW` and `H` is the
Hessian of `L` in these kernels: the first-order change of `g.g` when weights are removed, halved. No biases, no normalisation.
`L` is the mean over one minibatch, train mode, random initialisation. Higher is better, as in the zero-cost proxy paper.

`H g` is the derivative of the gradient along the gradient, forward over reverse: no second backward run.
"""

import dataclasses

import jax

from nnopt.scores.passes import HessianGradient, KernelValues
from nnopt.scores.reductions import channel_sums
from nnopt.scores.score import Evidence, Pass, Score

_GRADIENT = HessianGradient()


@dataclasses.dataclass(frozen=True)
class Grasp(Score):
    """Sum over weights of `-weight * (Hessian gradient)`."""

    @property
    def needs(self) -> tuple[Pass, ...]:
        """See `Score`."""
        return (_GRADIENT, KernelValues())

    def reduce(self, evidence: Evidence) -> dict[str, jax.Array]:
        """See `Score`."""
        kernels = evidence[KernelValues()]
        return {path: channel_sums(-kernels[path] * g) for path, g in evidence[_GRADIENT].items()}
