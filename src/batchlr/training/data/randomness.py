"""Random numbers that depend only on (seed, epoch, sample), not on who asks when.

A counter-based generator: the key and the sample's index are hashed. An order or an augmentation
is therefore the same for any batch size, number of workers, device and point of resumption.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

# The finalizer of SplitMix64 (Steele, Lea & Flood 2014), constants as signed 64-bit integers.
GAMMA = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
MULTIPLIER_2 = 0x94D049BB133111EB - 2**64


class Stream(IntEnum):
    """What a random number is for; equal keys give independent numbers in different streams."""

    ORDER = 0
    CROP_ROW = 1
    CROP_COLUMN = 2
    MIRROR = 3
    TRANSFORM = 4


@dataclass(frozen=True)
class EpochKey:
    """Names one pass over the training data."""

    seed: int
    epoch: int


def random_bits(samples: Tensor, key: EpochKey, stream: Stream) -> Tensor:
    """63 random bits for each of ``samples``: integers in ``[0, 2^63)``, shape and device kept.

    Distinct samples get distinct 64-bit values before the sign is dropped.

    Args:
        samples: Indices of samples, int64.
        key: The pass over the data.
        stream: What the numbers are for.
    """
    state = torch.zeros_like(samples)
    for word in (key.seed, key.epoch, int(stream), samples):
        state = _mix(state + word)
    return _shift_right(state, 1)


def random_integers(samples: Tensor, key: EpochKey, stream: Stream, *, high: int) -> Tensor:
    """Integers in ``[0, high)``, one for each of ``samples``, uniform up to ``high / 2^63``."""
    return random_bits(samples, key, stream) % high


def permutation(num_samples: int, key: EpochKey) -> Tensor:
    """A random order ``(num_samples,)`` of all samples, on the CPU."""
    return torch.argsort(random_bits(torch.arange(num_samples), key, Stream.ORDER), stable=True)


def _mix(state: Tensor) -> Tensor:
    state = state + GAMMA  # int64 arithmetic of torch is modulo 2^64
    state = (state ^ _shift_right(state, 30)) * MULTIPLIER_1
    state = (state ^ _shift_right(state, 27)) * MULTIPLIER_2
    return state ^ _shift_right(state, 31)


def _shift_right(state: Tensor, bits: int) -> Tensor:
    return (state >> bits) & ((1 << (64 - bits)) - 1)  # >> alone would carry the sign along
