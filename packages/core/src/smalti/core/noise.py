"""Uniform noise by counter: the value is a function of (seed, sample, step, lane) and of nothing else.

Sampling draws from here instead of from a global generator, so that a sample is the same whatever the batch
size, the number of processes, or a restart. The mixing function is SplitMix64's finaliser (Steele, Lea and
Flood 2014), applied once per coordinate, in wrapping 64-bit integer arithmetic on any device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the lowest 64 bits of `value`."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch shifts int64 arithmetically."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(value: Tensor) -> Tensor:
    value = (value ^ _shifted(value, 30)) * _FIRST
    value = (value ^ _shifted(value, 27)) * _SECOND
    return value ^ _shifted(value, 31)


def uniform(seed: int, samples: Tensor, step: int, lanes: int = 1) -> Tensor:
    """Uniform float64 `(B, lanes)` in [0, 1), with 53 random bits.

    Args:
        seed: of the run; of one beyond 64 bits the lowest 64 count.
        samples: `(B,)` integers that number the samples within the run.
        step: of the sampler; every draw of one sample needs a step or a lane of its own.
        lanes: how many independent values per sample.
    """
    return uniform_steps(seed, samples, range(step, step + 1), lanes)[:, 0]


def uniform_steps(seed: int, samples: Tensor, steps: range, lanes: int = 1) -> Tensor:
    """What `uniform` gives for each of several steps: float64 `(B, steps, lanes)`."""
    device = samples.device
    state = _mixed(torch.full_like(samples, _signed(seed), dtype=torch.int64) + _GAMMA)
    state = _mixed(state ^ (samples.to(torch.int64) + 1) * _GAMMA)
    step = torch.arange(steps.start + 1, steps.stop + 1, device=device) * _FIRST
    state = _mixed(state[:, None] + step)
    lane = torch.arange(1, lanes + 1, device=device) * _GAMMA
    bits = _shifted(_mixed(state[:, :, None] + lane), 11)
    return bits.to(torch.float64) * 2.0**-53


def mixed_seed(*parts: int | str) -> int:
    """One 63-bit seed out of several parts, e.g. `mixed_seed(recipe.seed, "train generator", step, rank)`."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
