"""Random keys: each random choice is a pure function of seed, configuration, tag and place.

No generator state is saved in a checkpoint: the permutation of an epoch, the augmentation of a
sample and the noise of an update are drawn from generators seeded with a key (20-trainer 4.5).
"""

from __future__ import annotations

import hashlib
import json


def key(seed: int, *tags: int | str) -> int:
    """A 63-bit hash of seed and tags, such as `key(seed, config_id, "perm", epoch)`.

    Different tags give independent numbers; 1 and "1" are different tags.
    """
    text = json.dumps([int(seed), *tags], separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def key32(seed: int, *tags: int | str) -> int:
    """The low 32 bits of `key`, for generators that take no more (NumPy's global one)."""
    return key(seed, *tags) & 0xFFFF_FFFF
