"""A canonical fingerprint of a network's structure.

Hash and equality of foreign modules are unreliable (lists in fields, arrays, closures), so nnopt has its own.
"""

import flax.linen as nn

from nnopt.core.encode import digest, encode


def fingerprint(module: nn.Module) -> str:
    """SHA-256 (64 hexadecimal digits) of what a module is: its classes and their configuration, recursively.

    Fields at their defaults do not count, and neither do names, weights or how a rewritten network came about:
    networks with equal fingerprints compute the same function of the same variables. Lambdas and local functions count by
    their byte code, so a network that holds one keeps its fingerprint only within one Python version.

    Example:
        >>> import flax.linen as nn
        >>> fingerprint(nn.Dense(4)) == fingerprint(nn.Dense(4, use_bias=True))
        True
        >>> fingerprint(nn.Dense(4)) == fingerprint(nn.Dense(5))
        False
    """
    return digest(encode(module, strict=False))
