"""Distance between two images in the features of a pretrained network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

PerceptualNetwork = Literal["vgg16", "vgg19", "squeezenet1_0", "squeezenet1_1"]

_DEFAULT_LAYERS = {"vgg16": "relu3_3", "vgg19": "relu3_3", "squeezenet1_0": "fire4", "squeezenet1_1": "fire4"}


class PerceptualLoss(nn.Module):
    r"""Mean squared difference of a pretrained network's features, for each image.

    .. math:: \ell(x, \hat{x}) = \frac{1}{CHW} \lVert \phi(\hat{x}) - \phi(x) \rVert^2

    with :math:`\phi` the network up to and including `layer` (nothing after it is built or run), on images normalised
    the way torchvision's weights expect. Follows Johnson, Alahi and Fei-Fei, *Perceptual losses for real-time style
    transfer and super-resolution* (2016).

    The network is a constant, not a part of the model that is trained: it is always in evaluation mode, and its weights
    are in no `parameters()`, no optimiser, no checkpoint, and no broadcast of distributed training. They come from
    `weights` again wherever the module is built, as for `validate --ckpt_path`.

    Args:
        network: The torchvision network that supplies the features.
        layer: Its last layer: `relu3_3`, ... for VGG, `fire4`, ... for SqueezeNet. None: `relu3_3` or `fire4`.
        weights: Name of torchvision's weights (`IMAGENET1K_V1`: downloaded once) or path of a local `state_dict` file.
            None: random features, the same in every run; for trying things out where nothing can be downloaded.

    Example:
        >>> import torch
        >>> loss = PerceptualLoss("squeezenet1_0", weights=None)
        >>> clean = torch.rand(2, 3, 37, 31)
        >>> loss(clean, clean)
        tensor([0., 0.])
    """

    def __init__(
        self, network: PerceptualNetwork = "vgg16", layer: str | None = None, weights: str | None = "IMAGENET1K_V1"
    ) -> None:
        super().__init__()
        if network not in _DEFAULT_LAYERS:
            raise ValueError(f"network must be one of {', '.join(_DEFAULT_LAYERS)}, got {network!r}.")
        self.network = network
        self.layer = layer or _DEFAULT_LAYERS[network]
        # In a tuple, so that nn.Module does not register it: parameters, buffers, state_dict and train() pass it by.
        # `_apply` below takes it to the device.
        self._hidden = (_Features(network, self.layer, weights),)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._hidden[0]._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def features(self, image: Tensor) -> Tensor:
        """Computes the features that the loss compares.

        Shape:
            - image: `[B, C, H, W]` in [0, 1], C 1 or 3
            - output: `[B, D, H', W']`
        """
        if image.ndim != 4 or image.shape[1] not in (1, 3):
            raise ValueError(f"PerceptualLoss expects images of shape [B, 1 or 3, H, W], got {list(image.shape)}.")
        return self._hidden[0](image)

    def forward(self, restored: Tensor, clean: Tensor) -> Tensor:
        """Computes the loss of each image; its gradient goes only to `restored`.

        Shape:
            - restored, clean: `[B, C, H, W]` in [0, 1], C 1 or 3
            - output: `[B]`
        """
        if restored.shape != clean.shape:
            raise ValueError(
                f"restored and clean must have one shape, got {list(restored.shape)} and {list(clean.shape)}."
            )
        with torch.no_grad():
            target = self.features(clean).float()
        return (self.features(restored).float() - target).square().mean((1, 2, 3))

    def extra_repr(self) -> str:
        """Names the network and the layer."""
        return f"{self.network}, {self.layer}"


class _Features(nn.Module):
    """A torchvision network from its normalisation up to one layer, frozen."""

    mean: Tensor  # of ImageNet's channels, [1, 3, 1, 1]
    std: Tensor  # of ImageNet's channels, [1, 3, 1, 1]

    def __init__(self, network: PerceptualNetwork, layer: str, weights: str | None) -> None:
        from torchvision import models  # takes as long as torch

        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        # neither memory nor time for the layers that are cut off: VGG16 has 138 million weights
        with torch.device("meta"):
            whole = models.get_model(network, weights=None).features
        names = _layer_names(whole)
        if layer not in names:
            raise ValueError(f"layer of {network} must be one of {', '.join(names)}, got {layer!r}.")
        self.layers = whole[: names.index(layer) + 1]
        self.layers.to_empty(device="cpu")
        if weights is None:
            _draw_weights(self.layers)
        else:
            _load_weights(self.layers, _state_dict(network, weights), weights)
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> Tensor:
        image = image.to(self.mean.dtype).expand(-1, 3, -1, -1)
        return self.layers((image - self.mean) / self.std)


def _layer_names(layers: nn.Sequential) -> list[str]:
    """Names layers as the literature does: `conv3_1`, `relu3_3`, `pool3` in VGG, `fire2` to `fire9` in SqueezeNet."""
    from torchvision.models.squeezenet import Fire

    names, block, index, fire = [], 1, 0, 1
    plain = any(isinstance(layer, Fire) for layer in layers)
    for layer in layers:
        if isinstance(layer, Fire):
            fire += 1
            names.append(f"fire{fire}")
        elif isinstance(layer, nn.MaxPool2d):
            names.append(f"pool{fire if plain else block}")
            block, index = block + 1, 0
        else:
            is_convolution = isinstance(layer, nn.Conv2d)
            index += is_convolution
            names.append(("conv" if is_convolution else "relu") + (f"{block}" if plain else f"{block}_{index}"))
    return names


def _draw_weights(layers: nn.Sequential) -> None:
    """Draws the same weights in every run and process: they are in no checkpoint."""
    generator = torch.Generator().manual_seed(0)
    for module in layers.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _state_dict(network: PerceptualNetwork, weights: str) -> dict[str, Any]:
    """Reads weights from a local file, or from torchvision's cache or server."""
    from torchvision import models

    available = models.get_model_weights(network)
    name = weights.rpartition(".")[2]
    if name in available.__members__:
        return _download(network, available[name])
    if not Path(weights).is_file():
        raise ValueError(
            f"weights must be the path of an existing file or one of {', '.join(available.__members__)} "
            f"(torchvision's names for {network}), got {weights!r}."
        )
    state = torch.load(weights, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"weights must be a state_dict file of {network}; {weights} holds a {type(state).__name__}.")
    return state


def _download(network: PerceptualNetwork, weights: Any) -> dict[str, Any]:
    """Loads torchvision's weights; the error explains what to do where they cannot be downloaded."""
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        file_name = weights.url.rpartition("/")[2]
        raise RuntimeError(
            f"The weights of {network} for PerceptualLoss could not be downloaded from {weights.url}: {error}\n"
            f"Any one of these helps: copy {file_name} from another machine to {torch.hub.get_dir()}/checkpoints/; "
            f"pass its path, as in `weights: /path/to/{file_name}`; "
            "or train without the perceptual loss, with `perceptual: null`."
        ) from error


def _load_weights(layers: nn.Sequential, state: dict[str, Any], source: str) -> None:
    """Loads what the layers need of a whole network's `state_dict`."""
    needed = layers.state_dict()
    missing = [
        f"features.{name}"
        for name, value in needed.items()
        if getattr(state.get(f"features.{name}"), "shape", None) != value.shape
    ]
    if missing:
        raise ValueError(f"weights {source!r} is of another network: {missing[0]} is missing or of another shape.")
    layers.load_state_dict({name: state[f"features.{name}"] for name in needed})
