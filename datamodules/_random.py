"""Random numbers by counter: a value is a function of what it is drawn for, never of what was drawn before it."""

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2**64 / golden ratio, odd, as a signed 64-bit number
_MASK_62 = (1 << 62) - 1


def mix(state: Tensor) -> Tensor:
    """Scrambles 64-bit integers one to one (the finaliser of SplitMix64: Steele et al., OOPSLA 2014).

    Shape:
        - state: any, int64; the result has the same shape and device.
    """
    for shift, multiplier in ((30, -4658895280553007687), (27, -7723592293110705685)):
        state = (state ^ _shift_right(state, shift)) * multiplier
    return state ^ _shift_right(state, 31)


def stream(*parts: int) -> Tensor:
    """Returns the start of a stream of its own for every sequence of integers, as a scalar int64 tensor.

    Neighbouring seeds and epochs land far apart, which a sum such as ``seed + epoch`` would not do: there, epoch 1 of
    seed 0 is epoch 0 of seed 1.
    """
    state = torch.zeros((), dtype=torch.int64)
    for part in parts:
        signed = (part + 2**63) % 2**64 - 2**63
        state = mix(state + signed + _GOLDEN)
    return state


def draw(start: Tensor, index: Tensor) -> Tensor:
    """Draws the 62-bit numbers with the given indices from a stream.

    Shape:
        - start: scalar int64, from :func:`stream`.
        - index: any, int64; the result has the same shape.
    """
    return _shift_right(mix(start + (index + 1) * _GOLDEN), 2) & _MASK_62


def permutation(length: int, *parts: int) -> Tensor:
    """Returns a random order of ``range(length)`` that depends on the parts alone.

    Shape:
        - result: [N], int64.
    """
    return draw(stream(*parts), torch.arange(length)).argsort(stable=True)


def _shift_right(state: Tensor, bits: int) -> Tensor:
    # torch shifts signed integers arithmetically; the mask takes the copies of the sign bit away again
    return (state >> bits) & ((1 << (64 - bits)) - 1)
