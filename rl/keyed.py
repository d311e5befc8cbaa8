"""Randomness by key: what is drawn depends on what it is for, not on what was drawn before."""

import hashlib
from collections.abc import Sequence

import torch


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose draws depend on `key` only, not on what was drawn before, on ranks or on batch sizes."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def keyed_noise(
    seed: int, rollout: int | str, samples: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Standard normal noise, one independent draw for each sample index -> (B, *shape) float32.

    Drawn on the CPU whatever the device, so that every machine draws the same.
    """
    draws = [torch.randn(*shape, generator=keyed_generator(seed, rollout, sample)) for sample in samples]
    return torch.stack(draws).to(device)
