"""Rows by similarity to the classes' prototypes in an embedding."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.em.assignments.assignment import Assignment


class SimilarityAssignment(Assignment):
    r"""Classes blended by how much an image looks like each: softmax of cosine similarity to class prototypes.

    .. math:: r_{ik} \propto \exp(\cos(e_i, p_k) / T)

    A prototype :math:`p_k` is the running mean of the unit embeddings of the training images with label k (prototypical
    networks; Snell, Swersky & Zemel, NeurIPS 2017). Labels are needed in training only. A class whose images have not
    been seen yet takes no part; before any has been, images use the global set.

    Args:
        embedding: Maps images `[B, C, H, W]` to vectors `[B, E]`; it is used as it is, does not learn, and has no part
            in checkpoints.
        embedding_size: Length E of the vectors.
        num_classes: Classes K, as many as the table has rows.
        temperature: T, the difference of cosines that matters by a factor e.
        decay: How much of a class's running sums an optimiser step with images of it keeps.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> assignment = SimilarityAssignment(nn.Flatten(), embedding_size=12, num_classes=2)
        >>> images, labels = torch.rand(3, 3, 2, 2), torch.tensor([0, 1, 1])
        >>> assignment(images, labels, torch.zeros(3), num_rows=2).sum().item()
        0.0
    """

    #: running sums of each class: how many images, and their unit embeddings, [K, 1 + E]
    totals: Tensor

    def __init__(
        self,
        embedding: nn.Module,
        embedding_size: int,
        num_classes: int,
        temperature: float = 0.1,
        decay: float = 0.99,
    ) -> None:
        super().__init__()
        self._seen: tuple[Tensor, Tensor] | None = None  # what `forward` has worked out and `e_step` asks for
        for name, value in (("embedding_size", embedding_size), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.embedding = embedding.requires_grad_(False).eval()
        self.embedding_size, self.num_classes = embedding_size, num_classes
        self.temperature, self.decay = temperature, decay
        self.register_buffer("totals", torch.zeros(num_classes, 1 + embedding_size, dtype=torch.float64))
        self.register_state_dict_post_hook(_without_embedding)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> "SimilarityAssignment":
        """As `nn.Module.train`, but the embedding stays in evaluation: its batch statistics are not ours to move."""
        super().train(mode)
        self.embedding.eval()
        return self

    def check_labels(self, labels: Tensor, num_rows: int) -> None:
        """Refuse labels outside the table; see `Assignment.check_labels`."""
        outside = (labels < -1) | (labels >= num_rows)
        if outside.any():
            raise ValueError(
                f"label {int(labels[outside][0])} has no row: the parameter table has {num_rows} rows, so labels run "
                f"from 0 to {num_rows - 1}, and −1 means 'no label'. Give the table one row name for each class"
            )

    @torch.no_grad()
    def forward(self, images: Tensor, labels: Tensor, noise_std: Tensor, num_rows: int) -> Tensor:
        """Softmax of the cosines; see `Assignment.forward`."""
        if num_rows != self.num_classes:
            raise ValueError(
                f"the parameter table has {num_rows} rows, the assignment num_classes={self.num_classes}: give the "
                "table one row name for each class (em_parameters.row_names) or change num_classes"
            )
        vectors = self._embed(images)
        if self.training:
            self._seen = (images, vectors)
        cosine = vectors @ F.normalize(self.totals[:, 1:], dim=1).T
        known = self.totals[:, 0] > 0
        share = torch.softmax(torch.where(known, cosine / self.temperature, -torch.inf), dim=1)
        return torch.where(known.any(), share, 0.0)

    @torch.no_grad()
    def e_step(self, images: Tensor, labels: Tensor, noise_std: Tensor, responsibilities: Tensor) -> Tensor:
        """Count and unit embedding under the image's own label; see `Assignment.e_step`."""
        own = F.one_hot(labels + 1, self.num_classes + 1)[:, 1:].double()
        seen, self._seen = self._seen, None
        vector = seen[1] if seen is not None and seen[0] is images else self._embed(images)
        vector = torch.cat([torch.ones_like(vector[:, :1]), vector], dim=1)
        return (own[:, :, None] * vector[:, None, :]).flatten(1)

    @torch.no_grad()
    def m_step(self, sums: Tensor, accepted: Tensor) -> None:
        """Running means; see `Assignment.m_step`. A class without images keeps what it has."""
        sums = sums.view_as(self.totals)
        seen = accepted & (sums[:, :1] > 0)
        self.totals.copy_(torch.where(seen, self.decay * self.totals + sums, self.totals))

    def diagnostics(self) -> dict[str, float]:
        """How many images each prototype is the mean of, older ones counted for less."""
        return {f"images/{k}": count for k, count in enumerate(self.totals[:, 0].tolist())}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, tensor in self.embedding.state_dict().items():
            state_dict.setdefault(f"{prefix}embedding.{name}", tensor)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _embed(self, images: Tensor) -> Tensor:
        vectors = self.embedding(images)
        expected = (len(images), self.embedding_size)
        if vectors.shape != expected:
            raise ValueError(
                f"{type(self.embedding).__name__} returned {list(vectors.shape)} for {len(images)} images; expected "
                f"{list(expected)}: set embedding_size to the length of its vectors, or pool them to one for each image"
            )
        return F.normalize(vectors.double(), dim=1)


def _without_embedding(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """A tower that does not learn would add its whole size to every checkpoint."""
    for name in [name for name in state_dict if name.startswith(f"{prefix}embedding.")]:
        del state_dict[name]
