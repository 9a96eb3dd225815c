"""PerceptualLoss: a frozen yardstick that leaves no trace in parameters, checkpoints or modes."""

import copy
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import skimage.data
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.networks import PerceptualLoss


@pytest.fixture
def loss() -> PerceptualLoss:
    return PerceptualLoss("squeezenet1_0", weights=None)


@pytest.fixture
def squeezenet_weights(shared_data: Path) -> str:
    path = shared_data / "weights" / "squeezenet1_0-imagenet-pruned.pth"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return str(path)


@pytest.fixture
def photograph() -> Tensor:
    pixels = np.asarray(Image.fromarray(skimage.data.astronaut()).resize((192, 192)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def test_equals_the_features_of_the_whole_network(squeezenet_weights: str) -> None:
    loss = PerceptualLoss("squeezenet1_0", "fire5", squeezenet_weights)
    whole = torchvision.models.squeezenet1_0()
    whole.load_state_dict(torch.load(squeezenet_weights, weights_only=True))
    restored, clean = torch.rand(2, 2, 3, 47, 61)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    first, second = (whole.features[:8]((image - mean) / std) for image in (restored, clean))
    torch.testing.assert_close(loss(restored, clean), (first - second).square().mean((1, 2, 3)))


def test_grows_with_noise_and_with_blur_on_a_photograph(squeezenet_weights: str, photograph: Tensor) -> None:
    loss = PerceptualLoss("squeezenet1_0", weights=squeezenet_weights)
    noise = torch.randn(photograph.shape, generator=torch.Generator().manual_seed(0))
    noisy = [loss(photograph + level / 255 * noise, photograph).item() for level in (0, 5, 15, 25, 50)]
    blurred = [
        loss(torchvision.transforms.functional.gaussian_blur(photograph, [21, 21], [sigma]), photograph).item()
        for sigma in (0.4, 0.8, 1.6, 3.2)
    ]
    assert noisy[0] == 0
    assert noisy == sorted(set(noisy))
    assert blurred == sorted(set(blurred))


def test_sees_structure_that_the_squared_error_does_not(squeezenet_weights: str, photograph: Tensor) -> None:
    """At one and the same mean squared error, noise is a greater change to look at than a shift of brightness."""
    loss = PerceptualLoss("squeezenet1_0", weights=squeezenet_weights)
    noise = torch.randn(photograph.shape, generator=torch.Generator().manual_seed(0))
    amount = 0.1
    noisy, brighter = photograph + amount * noise / noise.square().mean().sqrt(), photograph + amount
    torch.testing.assert_close(F.mse_loss(noisy, photograph), F.mse_loss(brighter, photograph))
    assert loss(noisy, photograph) > 2 * loss(brighter, photograph)


def test_gradient_reaches_the_restored_image_alone(loss: PerceptualLoss) -> None:
    restored, clean = torch.rand(2, 2, 3, 37, 31).unbind()
    restored.requires_grad_()
    clean.requires_grad_()
    value = loss(restored, clean)
    assert value.shape == (2,)
    value.sum().backward()
    assert restored.grad is not None
    assert restored.grad.abs().sum() > 0
    assert clean.grad is None
    hidden = loss._hidden[0]
    assert all(weight.grad is None and not weight.requires_grad for weight in hidden.parameters())


def test_each_image_is_measured_by_itself(loss: PerceptualLoss) -> None:
    restored, clean = torch.rand(2, 3, 3, 37, 31)
    alone = torch.cat([loss(restored[i : i + 1], clean[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(loss(restored, clean), alone)


def test_leaves_no_trace_in_the_module_that_holds_it(loss: PerceptualLoss) -> None:
    holder = nn.ModuleDict({"perceptual": loss, "backbone": nn.Conv2d(3, 3, 1)})
    assert all(name.startswith("backbone") for name in holder.state_dict())
    assert all(name.startswith("backbone") for name, _ in [*holder.named_parameters(), *holder.named_buffers()])
    holder.load_state_dict(copy.deepcopy(holder.state_dict()), strict=True)
    holder.train()
    assert not loss._hidden[0].training


def test_moves_with_the_module_that_holds_it(loss: PerceptualLoss) -> None:
    holder = nn.Sequential(loss).double()
    assert all(value.dtype == torch.float64 for value in loss._hidden[0].state_dict().values())
    holder.to("meta")
    assert all(value.device.type == "meta" for value in loss._hidden[0].state_dict().values())


def test_random_features_are_the_same_in_every_process() -> None:
    clean, restored = torch.rand(2, 1, 3, 37, 31)
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        values.append(PerceptualLoss("squeezenet1_1", weights=None)(restored, clean))
        assert torch.equal(before, torch.get_rng_state()), "building it draws nothing from the global generator"
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)


def test_vgg_ends_at_its_layer() -> None:
    loss = PerceptualLoss(weights=None)
    layers = loss._hidden[0].layers
    assert sum(isinstance(layer, nn.Conv2d) for layer in layers) == 7
    assert isinstance(layers[-1], nn.ReLU)
    assert loss.features(torch.rand(1, 3, 32, 32)).shape == (1, 256, 8, 8)


def test_grey_is_three_equal_channels(loss: PerceptualLoss) -> None:
    grey, clean = torch.rand(2, 2, 1, 37, 31)
    expected = loss(grey.repeat(1, 3, 1, 1), clean.repeat(1, 3, 1, 1))
    torch.testing.assert_close(loss(grey, clean), expected)


def test_without_the_internet_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="could not be downloaded") as caught:
        PerceptualLoss()
    for advice in ("vgg16-397923af.pth", f"{tmp_path}/hub/checkpoints/", "weights: /path/to/", "perceptual: null"):
        assert advice in str(caught.value)


def test_weights_of_another_network_are_named(squeezenet_weights: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"another network: features\.0\.weight"):
        PerceptualLoss("vgg16", weights=squeezenet_weights)
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="holds a Tensor"):
        PerceptualLoss("squeezenet1_0", weights=str(tmp_path / "tensor.pth"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "alexnet"}, "network must be one of vgg16, .*got 'alexnet'"),
        ({"network": "squeezenet1_0", "layer": "relu3_3"}, "layer of squeezenet1_0 must be one of .*fire4"),
        ({"weights": "IMAGENET9"}, "existing file or one of IMAGENET1K_V1, .*got 'IMAGENET9'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerceptualLoss(**arguments)


def test_bad_images_are_named(loss: PerceptualLoss) -> None:
    with pytest.raises(ValueError, match="one shape"):
        loss(torch.rand(1, 3, 37, 31), torch.rand(1, 3, 31, 37))
    with pytest.raises(ValueError, match=r"1 or 3, H, W\], got \[1, 2, 37, 31\]"):
        loss(*torch.rand(2, 1, 2, 37, 31))
