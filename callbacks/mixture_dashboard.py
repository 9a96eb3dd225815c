"""Pictures of a mixture in TensorBoard: weights, components, the data in two dimensions."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor

from callbacks._display import require_positive, tensorboard_loggers
from callbacks.em_dashboard import render


class MixtureDashboard(Callback):
    """Draws a Gaussian mixture or K-means while it learns.

    Scalars `mixture/effective_components` (the exponential of the weights' entropy), `mixture/responsibility_entropy`
    and `mixture/bound_gain` (how far the M-step raised the bound); a histogram of the weights; and pictures: the
    components' means with the leading eigenvectors of their covariances, where the samples are square patches, and the
    samples projected to the two leading directions of the means, coloured by component.

    Args:
        every_n_epochs: Draw the pictures after every n-th epoch and after the last.
        num_components: Components drawn, the heaviest first.
        num_vectors: Eigenvectors drawn of each.
        num_samples: Samples drawn in the projection; the first of each epoch.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MixtureDashboard()], logger=False)
    """

    def __init__(
        self, every_n_epochs: int = 5, num_components: int = 12, num_vectors: int = 6, num_samples: int = 2000
    ) -> None:
        require_positive(
            self,
            every_n_epochs=every_n_epochs,
            num_components=num_components,
            num_vectors=num_vectors,
            num_samples=num_samples,
        )
        self.every_n_epochs, self.num_samples = every_n_epochs, num_samples
        self.num_components, self.num_vectors = num_components, num_vectors
        self._samples: list[Tensor] = []
        self._shape: tuple[int, ...] = ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warns where there is nothing to draw."""
        if stage == "fit" and not hasattr(pl_module, "epoch_result"):
            rank_zero_warn(f"MixtureDashboard draws nothing: {type(pl_module).__name__} is not a mixture.")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to collect samples for the projection."""
        self._samples = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keeps the first samples of the epoch."""
        missing = self.num_samples - sum(len(part) for part in self._samples)
        if missing <= 0 or not trainer.is_global_zero:
            return
        x = batch.get("image") if isinstance(batch, dict) else batch[0] if isinstance(batch, (list, tuple)) else batch
        if isinstance(x, Tensor):
            self._shape = tuple(x.shape[1:])
            self._samples.append(x[:missing].detach().flatten(1).double().cpu())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes scalars, and pictures when it is time. The module's own M-step runs after this hook."""
        if trainer.current_epoch % self.every_n_epochs == 0:
            self._draw(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws what was learned in the end."""
        self._draw(trainer, pl_module)
        self._samples = []

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loggers = tensorboard_loggers(trainer)
        if not loggers or not trainer.is_global_zero or not hasattr(pl_module, "epoch_result"):
            return
        weights, means, covariances = learned(pl_module)
        result: Any = pl_module.epoch_result
        for logger in loggers:
            writer, step = logger.experiment, trainer.global_step
            if weights is not None:
                entropy = -torch.special.xlogy(weights, weights).sum()
                writer.add_scalar("mixture/effective_components", entropy.exp().item(), step)
                writer.add_histogram("mixture/weights", weights.numpy(), step)
            if result is not None and "entropy" in result.numbers:
                writer.add_scalar("mixture/responsibility_entropy", result.numbers["entropy"], step)
            if result is not None and "bound" in result.numbers:
                writer.add_scalar("mixture/bound_gain", result.numbers["bound"] - result.objective, step)
            picture = component_pictures(
                weights, means, covariances, self._shape, self.num_components, self.num_vectors
            )
            if picture is not None:
                writer.add_image("mixture/components", picture, step, dataformats="HW")
            if self._samples:
                samples = torch.cat(self._samples)
                with torch.no_grad():
                    labels = pl_module.predict(samples.to(pl_module.device)).cpu()  # type: ignore[operator]
                picture = render(projection(samples, labels, means))
                writer.add_image("mixture/projection", picture, step, dataformats="HWC")


def learned(module: Any) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Weights `[K]`, means `[K, D]` and covariances `[K, D, D]` of a module, on the CPU; None for what it does not
    have.
    """
    if hasattr(module, "centers"):
        return None, module.centers.cpu(), None
    theta = module.model.best_parameters()
    weights, means, covariances = theta.weights.cpu(), theta.means.cpu(), theta.covariances.cpu()
    if theta.covariance_type == "tied":
        return weights, means, covariances.expand(len(weights), -1, -1)
    return weights, means, covariances if theta.covariance_type == "full" else None


def component_pictures(
    weights: Tensor | None, means: Tensor, covariances: Tensor | None, shape: tuple[int, ...], count: int, vectors: int
) -> np.ndarray | None:
    """Means, and beside each the leading eigenvectors of its covariance, as one grey picture `[H, W]` in [0, 1].

    None where the samples are not square pictures.
    """
    side = shape[-1] if len(shape) == 3 else round(means.shape[1] ** 0.5)
    channels = means.shape[1] // max(side * side, 1)
    if side * side * channels != means.shape[1] or side < 2 or (len(shape) == 3 and shape[-2] != side):
        return None
    order = torch.arange(len(means)) if weights is None else weights.argsort(descending=True)
    lines = []
    for k in order[:count].tolist():
        tiles = [means[k]]
        if covariances is not None:
            directions = torch.linalg.eigh(covariances[k]).eigenvectors.flip(1)
            tiles += [directions[:, i] for i in range(min(vectors, directions.shape[1]))]
        lines.append(torch.cat([_tile(tile.view(channels, side, side).mean(0)) for tile in tiles], dim=1))
    return torch.cat(lines).numpy()


def _tile(picture: Tensor, zoom: int = 4) -> Tensor:
    low, high = picture.min(), picture.max()
    picture = (picture - low) / (high - low) if high > low else torch.full_like(picture, 0.5)
    picture = picture.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    return torch.nn.functional.pad(picture, (1, 1, 1, 1), value=1.0)


def projection(samples: Tensor, labels: Tensor, means: Tensor) -> Figure:
    """Samples and means on the two leading directions of the samples, coloured by component.

    Shape:
        - samples: `[N, D]`
        - labels: `[N]`
        - means: `[K, D]`
    """
    center = samples.mean(dim=0)
    directions = torch.linalg.svd(samples - center, full_matrices=False).Vh[:2]
    flat, middles = (samples - center) @ directions.T, (means - center) @ directions.T
    if flat.shape[1] == 1:
        flat, middles = (torch.nn.functional.pad(part, (0, 1)) for part in (flat, middles))
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(flat[:, 0], flat[:, 1], c=labels, s=4, cmap="tab20", linewidths=0)
    axes.scatter(middles[:, 0], middles[:, 1], marker="x", color="black", s=25)
    axes.set(xlabel="first direction", ylabel="second direction")
    return figure
