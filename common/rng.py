"""Random numbers as pure functions of a key, so that N processes equal one and resume needs no saved state.

A key names the purpose of the numbers: `generator(seed, "views", step)`. Draw for the *global* batch, then take the
process's slice; never put the process, the worker or the time into a key.
"""

import hashlib

import torch


def generator(*key: int | str) -> torch.Generator:
    """A fresh CPU generator whose stream depends on `key` alone.

    torch's Mersenne Twister is seeded with 32 bits, so two keys share a stream with probability 2^-32: harmless for
    independent steps, and the reason why one stream serves a whole global batch instead of one per sample.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
