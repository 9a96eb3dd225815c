"""Augmentation: a function of the key, in step with plain slicing."""

import pytest
import torch

from datamodules._augmentation import flip_and_shift, turn
from lightning_modules.imaging import draw, stream


@pytest.fixture
def images():
    return torch.randint(0, 256, (400, 3, 13, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def keys():
    return draw(stream(1), torch.arange(400))


def test_flip_alone(images, keys):
    result = flip_and_shift(images, keys)
    flipped = (result == images.flip(-1)).flatten(1).all(1)
    kept = (result == images).flatten(1).all(1)
    assert (flipped ^ kept).all()
    assert 150 < int(flipped.sum()) < 250


def test_each_image_depends_on_its_own_key_alone(images, keys):
    order = torch.randperm(400)
    assert torch.equal(flip_and_shift(images[order], keys[order], 2), flip_and_shift(images, keys, 2)[order])


def test_every_shift_occurs_and_equals_padding_and_cropping(images, keys):
    shift = 2
    padded = torch.cat([images[..., :shift, :].flip(-2), images, images[..., -shift:, :].flip(-2)], -2)
    padded = torch.cat([padded[..., :shift].flip(-1), padded, padded[..., -shift:].flip(-1)], -1)
    result, seen = flip_and_shift(images, keys, shift), {}
    for i in range(400):
        for top in range(2 * shift + 1):
            for left in range(2 * shift + 1):
                crop = padded[i, :, top : top + 13, left : left + 11]
                for flip in (False, True):
                    if torch.equal(crop.flip(-1) if flip else crop, result[i]):
                        seen.setdefault(i, []).append((top, left, flip))
    assert sorted(seen) == list(range(400))
    assert {places[0] for places in seen.values()} == {
        (t, left, f) for t in range(5) for left in range(5) for f in (False, True)
    }


def test_every_turn_occurs_as_often(keys):
    images = torch.arange(9).view(1, 1, 3, 3).expand(400, -1, -1, -1)
    turned = turn(images, keys)
    counts = [sum(torch.equal(image, images[0].rot90(k, (1, 2))) for image in turned) for k in range(4)]
    assert sum(counts) == 400
    assert min(counts) > 75
    order = torch.randperm(400)
    assert torch.equal(turn(images, keys[order]), turned[order]), "each by its own key"
