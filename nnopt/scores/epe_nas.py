"""EPE-NAS: whether images of one class get input gradients that are neither equal nor unrelated.

Lopes, Alirezazadeh, Alexandre: "EPE-NAS: Efficient Performance Estimation Without Training for Neural Architecture Search"
(https://arxiv.org/abs/2102.08099).

Definition. Row `n` of the Jacobian is the gradient of the sum of all outputs in image `n`, as for `JacobCov`. For each class
`c` of the minibatch let `R_c` be the correlation matrix (Pearson) of the rows of its images, and, with `k = 1e-5`,

    e_c   = sum_ij log( |R_c|_ij + k )                     up to 100 classes in the minibatch; beyond, divided by the number of rows
    score = sum_c |e_c|                                    up to 100 classes
          = sum_cd | e_c - e_d | / classes                 beyond                             higher is better

A class with a single image has `R = 1`, which adds `log(1 + k)` whatever the network. A minibatch of such classes alone would give
every network the same score, and is refused. Labels are used, the loss is not. A class is a site: `class 3`.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from nnopt.errors import ScoreError
from nnopt.scores.forward import InputJacobian
from nnopt.scores.jacob_cov import correlations, jacobian_rows
from nnopt.scores.network import TracedNetwork
from nnopt.scores.passes import Labels
from nnopt.scores.score import Evidence, Pass, Score, ScoreValue


@dataclasses.dataclass(frozen=True)
class EpeNas(Score):
    """How images of one class correlate in their input gradients.

    Attributes:
        k: what keeps the logarithm finite.
        many: with more classes than this in the minibatch, classes are compared with each other.
    """

    smallest_batch = 2

    k: float = 1e-5
    many: int = 100

    @property
    def needs(self) -> tuple[Pass, ...]:
        """See `Score`."""
        return (InputJacobian(), Labels())

    def reduce(self, evidence: Evidence) -> dict[str, jax.Array]:
        """See `Score`."""
        return {"rows": jacobian_rows(evidence), "labels": evidence[Labels()]}

    def value(self, reduced: Mapping[str, np.ndarray], network: TracedNetwork) -> ScoreValue:
        """See `Score`.

        Raises:
            ScoreError: no two images of the minibatch are of one class.
        """
        labels = reduced["labels"]
        classes, counts = np.unique(labels, return_counts=True)
        if counts.max() < 2:
            raise ScoreError(
                f"{self} compares images of one class, and each of the {len(labels)} images is alone in its class; "
                "give a larger minibatch, or one with two images of a class"
            )
        each = [reduced["rows"][labels == label] for label in classes]
        energies = [np.log(np.abs(correlations(rows)) + self.k).sum() for rows in each]
        parts = np.abs(energies)
        if len(classes) > self.many:
            means = np.asarray([e / len(rows) for e, rows in zip(energies, each, strict=True)])
            parts = np.abs(means[:, None] - means[None, :]).sum(axis=1) / len(classes)
        sites = {f"class {c}": float(p) for c, p in zip(classes, parts, strict=True)}
        return ScoreValue(float(parts.sum()), sites)
