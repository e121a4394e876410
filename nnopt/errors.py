"""Errors that a user can act on: one class for each kind of failure.

Every message is one line that says what is wrong, where, and what to do next. The command line prints
that line and exits with `exit_code`; anything that is not an `NnoptError` is a bug and keeps its traceback.
"""


class NnoptError(Exception):
    """Base of all failures that a user can act on."""

    exit_code = 2


class SelectionError(NnoptError):
    """A selector or a path names nothing in the network, or not as many sites as promised."""


class RewriteError(NnoptError):
    """A rewrite cannot be applied: an edit is never reached, or what stands around it no longer fits."""


class UnsupportedNetworkError(NnoptError):
    """The network is built in a way that cannot be rewritten faithfully (such as `nn.jit` inside it)."""


class RecordError(NnoptError):
    """A network record is not valid JSON, or does not describe a network and its steps."""


class CheckpointError(NnoptError):
    """A checkpoint is missing, damaged, or belongs to a network of another structure."""


class CarryError(NnoptError):
    """Weights of one network cannot be carried into another."""


class UnknownNetworkError(NnoptError):
    """No reference network has this name."""


class ChoiceError(NnoptError):
    """A block choice is unknown, or not possible at the place it is asked for."""


class GenotypeError(NnoptError):
    """A genotype file cannot be read, or does not fit the network."""


class BudgetError(NnoptError):
    """A budget is malformed, or no candidate of the space lies within it."""


class DataError(NnoptError):
    """A data set is missing, truncated, or not what it claims to be."""


class RecipeError(NnoptError):
    """A training recipe holds a value that no training can be run with."""


class SearchError(NnoptError):
    """A search cannot be run as asked: too few samples, or a scoring batch of one."""


class ResultFolderError(NnoptError):
    """A result folder cannot be written, or belongs to another run."""


class ScoreError(NnoptError):
    """A score is not defined for this network or minibatch: no ReLU, a batch of one, labels out of range."""


class PruneError(NnoptError):
    """A network cannot be made smaller as asked."""


class NestError(NnoptError):
    """A loop nest cannot be built, or a transformation is not possible on it."""


class BackendError(NnoptError):
    """A backend is not installed, not reachable, or cannot compile what it is given."""


class MeasurementError(BackendError):
    """Latencies of different set-ups are mixed, a latency table is damaged or lacks something, or a measurement cannot be done."""


class UnsupportedPrimitiveError(BackendError):
    """A function has a JAX primitive that a backend has no rule for."""
