"""Sizes of the pieces in which data passes through large matrix products."""

import torch

CHUNK_ELEMENTS = {"cpu": 2**20}
DEVICE_CHUNK_ELEMENTS = 2**26


def chunk_size(width: int, device: torch.device) -> int:
    """Samples of `width` numbers that one chunk may hold: a cache on the CPU, enough parallel work elsewhere."""
    return max(64, CHUNK_ELEMENTS.get(device.type, DEVICE_CHUNK_ELEMENTS) // max(width, 1) // 64 * 64)
