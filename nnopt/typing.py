"""Type aliases shared by all rooms."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import flax.linen as nn

Path: TypeAlias = tuple[str, ...]
"""Where a module stands in a network: the names of its scopes from the root, `("stage1_block0", "conv1")`."""

Edits: TypeAlias = Mapping[Path, nn.Module]
"""What a rewrite asks for: at each path, the module that shall stand there."""

Variables: TypeAlias = Mapping[str, Any]
"""A Flax variable dictionary: collection name -> nested dictionary of arrays."""
