"""Jacobian covariance: whether the network tells images apart in how it responds to them.

Mellor, Turner, Storkey, Crowley: "Neural Architecture Search without Training", first version (https://arxiv.org/abs/2006.04647v1);
`jacob_cov` of Abdelfattah et al. (https://arxiv.org/abs/2101.08134).

Definition. Row `n` of the Jacobian `J` is the gradient of the sum of all outputs in image `n`, of one minibatch in train mode
at random initialisation. With the eigenvalues `v` of the correlation matrix of the rows (Pearson, over pixels) and `k = 1e-5`,

    score = -sum_i ( log(v_i + k) + 1 / (v_i + k) )        higher is better

It is greatest where all correlations are zero, then `-N (log(1 + k) + 1 / (1 + k))`. No labels. The score does not split into
sites. An image whose gradient is constant has no correlation: the score is NaN.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from nnopt.scores.forward import InputJacobian
from nnopt.scores.network import TracedNetwork
from nnopt.scores.score import Evidence, Pass, Score, ScoreValue


@dataclasses.dataclass(frozen=True)
class JacobCov(Score):
    """How little the images' input gradients correlate.

    Attributes:
        k: what keeps eigenvalues off zero.
    """

    smallest_batch = 2

    k: float = 1e-5

    @property
    def needs(self) -> tuple[Pass, ...]:
        """See `Score`."""
        return (InputJacobian(),)

    def reduce(self, evidence: Evidence) -> dict[str, jax.Array]:
        """See `Score`."""
        return {"": jacobian_rows(evidence)}

    def value(self, reduced: Mapping[str, np.ndarray], network: TracedNetwork) -> ScoreValue:
        """See `Score`."""
        correlation = correlations(reduced[""])
        if not np.isfinite(correlation).all():
            return ScoreValue(float("nan"))
        with np.errstate(all="ignore"):
            shifted = np.linalg.eigvalsh(correlation) + self.k
            return ScoreValue(float(-np.sum(np.log(shifted) + 1 / shifted)))


def jacobian_rows(evidence: Evidence) -> jax.Array:
    """`[batch, pixels]`."""
    jacobian: jax.Array = evidence[InputJacobian()]
    return jacobian.reshape(jacobian.shape[0], -1)


def correlations(rows: np.ndarray) -> np.ndarray:
    """Pearson correlations of the rows of `[rows, columns]`, in float64, `[rows, rows]`; NaN for a row that is constant."""
    rows = rows.astype(np.float64)
    with np.errstate(all="ignore"):
        rows = rows - rows.mean(axis=1, keepdims=True)
        rows = rows / np.abs(rows).max(axis=1, keepdims=True)  # so that no square vanishes
        rows = rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))
        found = np.clip(rows @ rows.T, -1, 1)
    # A row correlates with itself perfectly, and not but for rounding.
    itself = np.diag_indices_from(found)
    found[itself] = np.where(np.isfinite(found[itself]), 1.0, np.nan)
    return found
