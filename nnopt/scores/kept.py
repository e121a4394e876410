"""What an engine keeps for each PRNG key: weights, ready to be run with."""

import collections
from typing import Any


class KeptByKey:
    """What was made for each key, of the keys that were used last.

    A key whose turn comes again after too many others is made again: whoever goes through `n` keys in turn keeps `n`.

    Attributes:
        most: of how many keys.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._by_key: collections.OrderedDict[bytes, dict[Any, Any]] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._by_key)

    def of(self, key: bytes) -> dict[Any, Any]:
        """What is kept for a key, to read and to add to."""
        if key not in self._by_key:
            while len(self._by_key) >= max(self.most, 1):
                self._by_key.popitem(last=False)
            self._by_key[key] = {}
        self._by_key.move_to_end(key)
        return self._by_key[key]
