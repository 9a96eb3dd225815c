"""Image tower of CLIP as an embedding."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ClipEmbedding(nn.Module):
    """Images to CLIP's image vectors, by `open_clip` (Radford et al., "Learning transferable visual models from natural
    language supervision", ICML 2021).

    Made for `SimilarityAssignment`: it takes images in [0, 1] of any size, with one or three channels, and brings them
    to the tower's size and range by itself. `open_clip` comes with the extra `clip`.

    Args:
        model_name: Name of an `open_clip` model.
        pretrained: Name of its weights, or a file with them; None for random ones. Named weights are downloaded once.

    Raises:
        ImportError: If `open_clip` is not installed.

    Example:
        >>> embedding = ClipEmbedding("ViT-B-32", pretrained="laion2b_s34b_b79k")  # doctest: +SKIP
        >>> embedding(torch.rand(2, 3, 32, 32)).shape  # doctest: +SKIP
        torch.Size([2, 512])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model_name: str = "ViT-B-32", pretrained: str | None = "laion2b_s34b_b79k") -> None:
        super().__init__()
        try:
            import open_clip
        except ImportError as error:
            raise ImportError(
                'ClipEmbedding needs open_clip, which is not installed: pip install "lightning-em[clip]"'
            ) from error
        self.tower = open_clip.create_model(model_name, pretrained=pretrained).visual
        size = self.tower.image_size
        self.image_size: tuple[int, int] = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.embedding_size = int(self.tower.output_dim)
        for name, values in (("mean", self.tower.image_mean), ("std", self.tower.image_std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Image vectors.

        Args:
            images: Images in [0, 1].

        Shape:
            - images: `[B, C, H, W]`, C 1 or 3
            - output: `[B, E]`

        Raises:
            ValueError: If the images have neither one nor three channels.
        """
        if images.shape[1] not in (1, 3):
            raise ValueError(f"CLIP looks at images of 3 channels, or 1 for grey; got {images.shape[1]}")
        images = F.interpolate(images, self.image_size, mode="bicubic", antialias=True, align_corners=False)
        images = (images.expand(-1, 3, -1, -1).clamp(0, 1) - self.mean) / self.std
        vectors: Tensor = self.tower(images.to(next(self.tower.parameters()).dtype))
        return vectors
