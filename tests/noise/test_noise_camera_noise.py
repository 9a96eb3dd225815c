"""Simulated cameras: reproducible by key, of the noise that they say, and what networks train on."""

import pytest
import torch

from lightning_modules import Reconstruction
from lightning_modules.noise import CameraNoise
from lightning_modules.noise.camera_noise import _PLAIN, _SHARP, _blurred, _demosaicked, level_map
from lightning_modules.operators import TotalVariation


def crops(count: int, height: int = 33, width: int = 46) -> torch.Tensor:
    ramp = torch.linspace(0.1, 0.9, width).expand(count, 3, height, width)
    return ramp * torch.linspace(0.6, 1, height)[:, None]


def test_a_camera_is_a_function_of_the_key() -> None:
    clean, key = crops(6), torch.arange(6)
    whole = CameraNoise()(clean, key)
    for part in (slice(0, 2), slice(2, 6)):
        for both, one in zip(whole, CameraNoise()(clean[part], key[part]), strict=True):
            torch.testing.assert_close(both[part], one, atol=1e-5, rtol=1e-4)
    other = CameraNoise()(clean, key + 6)
    assert not torch.equal(whole.noisy, other.noisy)
    assert [each.shape for each in whole] == [clean.shape, clean.shape, (6, 1, 33, 46)]


def test_levels_cover_the_range_and_are_told_with_a_doubt() -> None:
    clean, key = crops(200, 32, 32), torch.arange(200)
    shown = CameraNoise(doubt=0)(clean, key)
    true = (shown.noisy - shown.clean).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(shown.level.square().mean((1, 2, 3)).sqrt(), true, rtol=1e-3, atol=1e-4)
    assert 255 * true.quantile(0.05) < 2.5
    assert 12 < 255 * true.quantile(0.95) < 60
    doubted = CameraNoise(doubt=0.3)(clean, key)
    assert torch.equal(doubted.noisy, shown.noisy)
    factor = (doubted.level / shown.level).mean((1, 2, 3)).log()
    assert factor.std() == pytest.approx(0.3, rel=0.2)


def test_light_has_more_noise_where_it_is_photons_and_neighbors_share_it() -> None:
    shown = CameraNoise(raw=1.0, shot=(0.005, 0.005), doubt=0)(crops(60, 48, 48), torch.arange(60))
    noise = shown.noisy - shown.clean
    neighbors = (noise[..., 1:] * noise[..., :-1]).mean() / noise.square().mean()
    assert 0.25 < neighbors < 0.95  # a mosaic leaves none of it white
    red, green = noise[:, 0], noise[:, 1]
    assert (red * green).mean() > 0.02 * (red.square().mean() * green.square().mean()).sqrt()


def test_a_mosaic_of_a_plane_is_the_plane() -> None:
    """Both filters are exact on images that are linear; the five-tap one is Malvar's, whose rows sum to 1."""
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(14.0), indexing="ij")
    plane = (0.2 + 0.02 * rows + 0.03 * columns)[None, None]
    for filters in (_PLAIN, _SHARP):
        inside = _demosaicked(plane, filters)[..., 2:-2, 2:-2]
        torch.testing.assert_close(inside, plane[..., 2:-2, 2:-2].expand(1, 3, -1, -1))


def test_each_image_is_blurred_by_its_own_width() -> None:
    impulse = torch.zeros(2, 1, 21, 25)
    impulse[..., 10, 12] = 1
    narrow, wide = _blurred(impulse, torch.tensor([0.0, 1.5]).view(2, 1, 1, 1))
    torch.testing.assert_close(narrow, impulse[0])
    distance = (torch.arange(21.0) - 10).square()
    assert (wide[0].sum(1) * distance).sum() == pytest.approx(1.5**2, rel=0.02)


def test_the_level_map_is_the_line_that_was_sampled() -> None:
    clean = crops(1, 300, 300)
    noisy = clean + (0.01 * clean + 0.001).sqrt() * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    ratio = level_map(noisy, clean) / (0.01 * noisy.mean(1, keepdim=True) + 0.001).sqrt()
    assert (ratio - 1).abs().max() < 0.15
    assert (ratio - 1).abs().mean() < 0.04  # noise in the brightness itself leans it a little


def test_what_cameras_do_not_take_is_named() -> None:
    with pytest.raises(ValueError, match="3 channels"):
        CameraNoise()(torch.rand(1, 1, 32, 32), torch.tensor([0]))
    with pytest.raises(ValueError, match="8×8"):
        CameraNoise()(torch.rand(1, 3, 4, 32), torch.tensor([0]))
    for wrong in ({"raw": 2.0}, {"level": (0.2, 0.1)}, {"shot": (0.0, 0.1)}, {"doubt": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CameraNoise(**wrong)  # type: ignore[arg-type]


def test_a_reconstruction_trains_on_cameras() -> None:
    module = Reconstruction(TotalVariation(5), camera_noise=CameraNoise())
    batch = {
        "image": crops(3),
        "label": torch.full((3,), -1),
        "weight": torch.ones(3),
        "key": torch.arange(3),
        "index": torch.arange(3),
    }
    shown = CameraNoise()(batch["image"], batch["key"])
    output = module._checked_batch(batch, 0, "val")
    assert torch.equal(output["noisy"], shown.noisy)
    assert torch.equal(output["image"], shown.clean)
    noisy, level = module._observe(output)
    assert torch.equal(noisy, shown.noisy)
    assert torch.equal(level, shown.level)
    assert torch.equal(batch["image"], crops(3))  # the data's own batch stays
    for options in ({"objective": "sure"}, {"add_noise": False, "objective": "sure"}):
        with pytest.raises(ValueError, match="camera_noise"):
            Reconstruction(TotalVariation(5), camera_noise=CameraNoise(), **options)  # type: ignore[arg-type]
