"""The detector's networks: features of any size of image, and what full resolution means."""

import pytest
import torch

from lightning_modules.networks import FullResolutionResNet, TraceNetwork


def test_the_trace_network_is_convolution_normalisation_and_rectification() -> None:
    torch.manual_seed(0)
    network = TraceNetwork(3, widths=(8, 16), strides=(1, 2), normalization="group")
    x = torch.rand(2, 3, 13, 11)
    hidden = x
    for convolution, stride in ((network.layers[0], 1), (network.layers[3], 2)):
        hidden = torch.nn.functional.conv2d(hidden, convolution.weight, stride=stride, padding=1)
        groups = hidden.unflatten(1, (8, -1)).flatten(2)
        hidden = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
        hidden = hidden.view(2, convolution.out_channels, -(-13 // stride), -(-11 // stride)).relu()
    torch.testing.assert_close(network(x), hidden.mean((2, 3)))


def test_the_average_forgets_where_but_not_what() -> None:
    torch.manual_seed(0)
    network = TraceNetwork(3).eval()
    tile = torch.rand(1, 3, 32, 32)
    small, large = (network(tile.repeat(1, 1, n, n)) for n in (4, 8))
    torch.testing.assert_close(small, large, rtol=0.2, atol=0.1)


@pytest.mark.parametrize("normalization", ["batch", "group"])
def test_the_resnet_keeps_every_pixel_until_its_second_stage(normalization) -> None:
    torch.manual_seed(0)
    network = FullResolutionResNet(4, normalization=normalization).eval()
    sizes = {}
    for name in ("conv1", "layer1", "layer2"):
        getattr(network.network, name).register_forward_hook(
            lambda module, args, output, name=name: sizes.update({name: tuple(output.shape[2:])})
        )
    assert network(torch.rand(1, 4, 21, 18)).shape == (1, 512)
    assert sizes == {"conv1": (21, 18), "layer1": (21, 18), "layer2": (11, 9)}
    has_batch = any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    assert has_batch == (normalization == "batch")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TraceNetwork(widths=(8, 12), strides=(1, 1)), "multiples of 8"),
        (lambda: TraceNetwork(widths=(8,), strides=(1, 1)), "of one length, got 1 and 2"),
        (lambda: TraceNetwork(3)(torch.rand(1, 6, 9, 9)), r"expects \[B, 3, H, W\], got \[1, 6, 9, 9\]"),
        (lambda: TraceNetwork(normalization="none"), "must be 'batch' or 'group'"),
        (lambda: FullResolutionResNet(3)(torch.rand(1, 1, 9, 9)), r"expects \[B, 3, H, W\]"),
        (lambda: FullResolutionResNet(network="vgg16"), "must be resnet18"),
        (lambda: FullResolutionResNet(normalization="none"), "must be 'batch' or 'group'"),
    ],
)
def test_impossible_arguments_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
