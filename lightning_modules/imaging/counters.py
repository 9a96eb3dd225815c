"""Random numbers by counter: a value is a function of what it is drawn for, never of what was drawn before it.

The same key gives the same draws in any batch, process and order, which is what makes two processes equal one and a
resumed run equal an uninterrupted one.
"""

import math

import torch
from torch import Tensor

from lightning_modules._eager import eager

GOLDEN = -7046029254386353131  # 2**64 / golden ratio, odd, as a signed 64-bit number: the increment of SplitMix64


def mix(state: Tensor) -> Tensor:
    """Scrambles 64-bit integers one to one (the finalizer of SplitMix64: Steele, Lea & Flood, OOPSLA 2014).

    Shape:
        - state: `[...]`, int64
        - output: `[...]`, int64
    """
    for shift, multiplier in ((30, -4658895280553007687), (27, -7723592293110705685)):
        state = (state ^ _shift_right(state, shift)) * multiplier
    return state ^ _shift_right(state, 31)


def stream(*parts: int) -> Tensor:
    """The start of a stream of its own for every sequence of integers.

    Neighboring seeds and epochs end far apart, which a sum such as `seed + epoch` would not do: there, epoch 1 of
    seed 0 is epoch 0 of seed 1.

    Shape:
        - output: `[]`, int64
    """
    state = torch.zeros((), dtype=torch.int64)
    for part in parts:
        signed = (part + 2**63) % 2**64 - 2**63
        state = mix(state + signed + GOLDEN)
    return state


def draw(start: Tensor, index: Tensor) -> Tensor:
    """The 62-bit numbers with the given indices of a stream.

    Args:
        start: The stream, from `stream`, or one for each index.
        index: Which of its numbers.

    Shape:
        - start: scalar, or any that broadcasts with `index`; int64
        - index: any, int64
        - output: as both broadcast, int64
    """
    return _shift_right(_number(start, index), 2)


def permutation(length: int, *parts: int) -> Tensor:
    """A random order of `range(length)` that depends on the parts only.

    Shape:
        - output: `[length]`, int64
    """
    return draw(stream(*parts), torch.arange(length)).argsort(stable=True)


@eager  # inductor cannot hold the 64-bit constants of the hash (OverflowError while generating code)
def seeded_uniform(key: Tensor, count: int) -> Tensor:
    """Uniform draws in [0, 1) that are a function of each sample's key only.

    Args:
        key: One integer for each sample.
        count: Number of draws for each sample.

    Shape:
        - key: `[B]`, int64
        - output: `[B, count]`, float64
    """
    index = torch.arange(count, device=key.device)
    return _shift_right(_number(mix(key)[:, None], index), 11).double() * 2.0**-53


def seeded_normal(key: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """Standard normal draws that are a function of each sample's key only (Box-Muller on `seeded_uniform`).

    Args:
        key: One integer for each sample.
        size: Shape of one sample's draws.

    Shape:
        - key: `[B]`, int64
        - output: `[B, *size]`, float32
    """
    count = math.prod(size)
    half = (count + 1) // 2
    uniform = seeded_uniform(key, 2 * half)
    length = (-2 * torch.log1p(-uniform[:, :half])).sqrt()
    angle = (2 * math.pi) * uniform[:, half:]
    normal = torch.cat([length * torch.cos(angle), length * torch.sin(angle)], dim=1)
    return normal[:, :count].float().view(-1, *size)


def _number(start: Tensor, index: Tensor) -> Tensor:
    return mix(start + (index + 1) * GOLDEN)


def _shift_right(state: Tensor, bits: int) -> Tensor:
    # torch has no unsigned 64-bit arithmetic: clear the bits that the arithmetic shift copied from the sign
    return (state >> bits) & ((1 << (64 - bits)) - 1)
