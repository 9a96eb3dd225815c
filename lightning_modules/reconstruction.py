"""Reconstruction of images by graph diffusion whose parameters are learned by expectation-maximisation."""

from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from lightning_modules.em import Assignment, EStep, GlobalAssignment, ParameterTable
from lightning_modules.em.objectives import probe_step, squared_error, stein_risk
from lightning_modules.graph import GraphDiffusion, Smoothness, estimate_noise_std, seeded_normal, seeded_uniform
from lightning_modules.optimizers import optimizer_config

Batch = dict[str, Any]
Parameters = dict[str, Tensor | int]

# Sets the draw of a noise level apart from the draws of the noise itself, which start from the same key.
_LEVEL_STREAM = 0x5DEE_CE66
# The same for the probe of the risk estimate.
_PROBE_STREAM = 0x2545_F491


class GraphDiffusionReconstruction(L.LightningModule):
    """Restores noisy images by graph diffusion, with or without a network; its `training_step` is the E-step.

    Trained under `callbacks.EMParameterCallback`, the parameters of the diffusion are learned along with the network.
    Without the callback the network trains and the parameters stay. Noise is a function of each sample's key alone, so
    validation sees the same noise in every epoch and any number of processes see the noise of one.

    Args:
        diffusion: The graph diffusion.
        em_parameters: Its parameters.
        backbone: Network; None restores by diffusion alone. A plain network maps noisy images to estimates, which are
            then diffused. One with the attribute `accepts_diffusion = True` is called as `backbone(noisy, diffuse)`,
            where `diffuse(signal, features)` diffuses a signal over the graph of the features, and has the last word.
        assignment: Which row of the table speaks for an image; the global set by default.
        perceptual: Maps restored and clean images to a loss for each image, added to the squared error; None for none.
        noise_std: Standard deviation of the noise to restore from, where white is 1: a number, or a range from which
            the level of each image is drawn (blind restoration).
        noise_levels: Levels of which each image is given one at random, in place of `noise_std`.
        estimate_noise: Estimate each image's noise level instead of telling the diffusion the true one, as it must be
            done in blind restoration.
        data_range: Width of the scale on which the loss is measured: 1 for [0, 1], 2 for [−1, 1].
        objective: What the restoration learns from: `"supervised"` by the clean images, `"sure"` by the noisy ones
            alone, through Stein's unbiased risk estimate at the level known or estimated. It costs a second restoration
            a step, and moves the parameters and the network alike; freeze the one that is to stay.
        perceptual_weight: Factor of the perceptual loss.
        smoothness_weight: α, the weight of the smoothness bonus in the loss proxy. It moves the table alone. 0.1
            belongs to losses of order 0.5; beside a squared error of 0.002 it drowns everything.
        optimizer: Makes the optimiser of the network.
        lr_scheduler: Makes the learning-rate schedule; None for a constant rate.
        lr_interval: Whether the schedule counts steps or epochs.

    Raises:
        ValueError: If an argument, or the radius together with the patch geometry, is impossible.

    Example:
        >>> module = GraphDiffusionReconstruction(GraphDiffusion(patch_size=3), ParameterTable())
        >>> module(torch.rand(1, 3, 24, 16), noise_std=0.1).shape
        torch.Size([1, 3, 24, 16])
    """

    noise_levels: Tensor | None

    def __init__(
        self,
        diffusion: GraphDiffusion,
        em_parameters: ParameterTable,
        backbone: nn.Module | None = None,
        assignment: Assignment | None = None,
        perceptual: nn.Module | None = None,
        noise_std: float | tuple[float, float] = 25 / 255,
        noise_levels: list[float] | None = None,
        estimate_noise: bool = False,
        objective: Literal["supervised", "sure"] = "supervised",
        data_range: float = 1.0,
        perceptual_weight: float = 1.0,
        smoothness_weight: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["step", "epoch"] = "epoch",
    ) -> None:
        super().__init__()
        levels = noise_std if isinstance(noise_std, tuple | list) else (noise_std, noise_std)
        _check_arguments(
            diffusion, em_parameters, levels, noise_levels, data_range, perceptual_weight, smoothness_weight
        )
        _check_objective(objective, perceptual, max(noise_levels or levels), estimate_noise)
        injected = ("diffusion", "em_parameters", "backbone", "assignment", "perceptual", "optimizer", "lr_scheduler")
        self.save_hyperparameters(ignore=injected)
        if "_instantiator" in self.hparams:
            # Built from the command line, where injected parts are plain configuration: keep them, so that
            # `load_from_checkpoint` can build the whole module from the checkpoint alone.
            self.save_hyperparameters()
        self.diffusion = diffusion
        self.em_parameters = em_parameters
        self.backbone = backbone
        self.assignment = GlobalAssignment() if assignment is None else assignment
        self.perceptual = perceptual
        self.noise_range = (float(levels[0]), float(levels[1]))
        choices = None if noise_levels is None else torch.tensor(noise_levels, dtype=torch.float32)
        self.register_buffer("noise_levels", choices, persistent=False)
        self.estimate_noise = estimate_noise
        self.objective = objective
        self.data_range = data_range
        self.perceptual_weight = perceptual_weight
        self.smoothness_weight = smoothness_weight
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        # Groups would take metrics with equal states for the same one.
        # Images that keep the noise they came with have no clean side to be compared with.
        self.adds_noise = max(noise_levels or levels) > 0
        names = ("loss", "psnr", "psnr_noisy", "gain", "ssim") if self.adds_noise or objective != "sure" else ("loss",)
        self._metric_names = names
        metrics: dict[str, Metric | MetricCollection] = {name: MeanMetric() for name in names}
        self.val_metrics = MetricCollection(metrics, prefix="val/", compute_groups=False)
        self.test_metrics = self.val_metrics.clone(prefix="test/")

    def forward(self, noisy: Tensor, noise_std: Tensor | float | None = None, labels: Tensor | None = None) -> Tensor:
        """Restored images.

        Args:
            noisy: Images to restore, in [0, 1] but for the noise.
            noise_std: Their noise level where white is 1; estimated from each image where it is left out.
            labels: Class labels for an assignment that uses them; −1 for none.

        Shape:
            - noisy: `[B, C, H, W]`
            - noise_std: scalar or `[B]`
            - labels: int64 `[B]`
            - output: `[B, C, H, W]`
        """
        if labels is None:
            labels = torch.full((len(noisy),), -1, device=noisy.device)
        if noise_std is None:
            noise_std = estimate_noise_std(noisy)
        level = torch.as_tensor(noise_std, dtype=noisy.dtype, device=noisy.device).expand(len(noisy))
        _, parameters = self._assign(noisy, level, labels)
        return self._restore(noisy, level, parameters)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Refuse labels without a row while they are on the host, where a look costs an accelerator nothing."""
        if isinstance(batch, dict) and "label" in batch:
            self.assignment.check_labels(batch["label"], len(self.em_parameters.row_names))
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """E-step: responsibilities, restoration and losses of each image under the current parameters."""
        noisy, level = self._observe(batch)
        responsibilities, parameters = self._assign(noisy, level, batch["label"])
        restored = self._restore(noisy, level, parameters)
        perceptual = None
        if self.objective == "sure":
            reconstruction = self._risk(noisy, restored, level, parameters, batch["key"])
        else:
            reconstruction, perceptual = self._losses(restored, batch["image"].to(self.dtype))
        smoothness = self._smoothness(restored.detach(), parameters["sigma"])
        weight = batch["weight"]
        loss = (weight * (reconstruction if perceptual is None else reconstruction + perceptual)).mean()
        if self.smoothness_weight:
            loss = loss - self.smoothness_weight * (weight * smoothness.score).mean()
        loss = self.em_parameters.attach(loss)  # a backbone need not diffuse
        self.log("train/loss", loss.detach(), batch_size=len(noisy))
        step = EStep(
            responsibilities.detach(),
            weight,
            reconstruction.detach(),
            None if perceptual is None else perceptual.detach(),
            smoothness.score.detach(),
            smoothness.similarity.detach(),
            self.smoothness_weight,
            self.assignment.e_step(noisy, batch["label"], level, responsibilities),
        )
        return {"loss": loss, "em": step}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Restore noisy images and compare them with the clean ones."""
        return self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Restore noisy images and compare them with the clean ones."""
        return self._evaluate(batch, self.test_metrics)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Restore images as they are; those that come with a key are clean and are made noisy first."""
        image = batch["image"]
        if not image.isfinite().all():
            raise ValueError(
                f"{', '.join(batch['name'])}: the image has NaN or infinite pixels; replace them or leave the file out"
            )
        noisy, level = self._observe(batch)
        _, parameters = self._assign(noisy, level, batch["label"])
        restored = self._restore(noisy, level, parameters)
        used = {
            name: torch.as_tensor(value, device=level.device).expand(len(level)) for name, value in parameters.items()
        }
        output = {"restored": restored.clamp(0, 1), "noisy": noisy, "name": batch["name"], "noise_std": level}
        return {**output, "parameters": used, **({"clean": image} if "key" in batch else {})}

    def mean_edge_weight(self, batch: Batch) -> Tensor | None:
        """Mean edge weight of each image's graph, `[B]`; see `GraphDiffusion.mean_edge_weight`.

        None where the backbone builds the graph on anything but the noisy patches.
        """
        if self.backbone is not None and getattr(self.backbone, "graph_on", None) != "patches":
            return None
        noisy, level = self._observe(batch)
        _, parameters = self._assign(noisy, level, batch["label"])
        return self.diffusion.mean_edge_weight(noisy, parameters["sigma_f"], level, self._max_radius)

    def configure_optimizers(self) -> Any:
        """Optimiser and schedule as injected."""
        return optimizer_config(self.parameters(), self.optimizer, self.lr_scheduler, self.lr_interval)

    @property
    def _max_radius(self) -> float:
        return self.em_parameters.upper_bound("radius")

    def _observe(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The degraded images of a batch, and the noise level that the diffusion is told of."""
        image = batch["image"].to(self.dtype)
        low, high = self.noise_range
        if "key" not in batch:
            return image, batch["noise_std"] if "noise_std" in batch else estimate_noise_std(image)
        if self.noise_levels is not None:
            place = (seeded_uniform(batch["key"] ^ _LEVEL_STREAM, 1)[:, 0] * len(self.noise_levels)).long()
            level = self.noise_levels[place].to(image.dtype)
        elif low == high:
            level = image.new_full((len(image),), low)
        else:
            level = (low + (high - low) * seeded_uniform(batch["key"] ^ _LEVEL_STREAM, 1)[:, 0]).to(image.dtype)
        noisy = image + level.view(-1, 1, 1, 1) * seeded_normal(batch["key"], image.shape[1:]).to(image.dtype)
        return noisy, estimate_noise_std(noisy) if self.estimate_noise else level

    def _assign(self, noisy: Tensor, noise_std: Tensor, labels: Tensor) -> tuple[Tensor, Parameters]:
        """Responsibilities of the rows for each image, and the parameters that follow."""
        responsibilities = self.assignment(noisy, labels, noise_std, len(self.em_parameters.row_names))
        return responsibilities, self.em_parameters(responsibilities)

    def _restore(self, noisy: Tensor, noise_std: Tensor, parameters: Parameters) -> Tensor:
        def diffuse(signal: Tensor, features: Tensor | None = None, noise: Tensor | float = noise_std) -> Tensor:
            return self.diffusion(signal, **parameters, noise_std=noise, features=features, max_radius=self._max_radius)

        if self.backbone is None:
            return diffuse(noisy)
        if getattr(self.backbone, "accepts_diffusion", False):
            restored: Tensor = self.backbone(noisy, diffuse)
            return restored
        return diffuse(self.backbone(noisy), noise=0.0)  # an estimate no longer has the noise of its input

    def _risk(self, noisy: Tensor, restored: Tensor, noise_std: Tensor, parameters: Parameters, key: Tensor) -> Tensor:
        """Estimated risk of each image. Level and responsibilities stay those of the unperturbed image: no one pixel
        moves them.
        """
        probe = seeded_normal(key ^ _PROBE_STREAM, noisy.shape[1:]).to(noisy.dtype)
        perturbed = self._restore(noisy + probe_step(noise_std).view(-1, 1, 1, 1) * probe, noise_std, parameters)
        return stein_risk(noisy, restored, perturbed, probe, noise_std) * self.data_range**2

    def _losses(self, restored: Tensor, clean: Tensor) -> tuple[Tensor, Tensor | None]:
        reconstruction = squared_error(restored, clean) * self.data_range**2
        if self.perceptual is None:
            return reconstruction, None
        return reconstruction, self.perceptual_weight * self.perceptual(restored, clean)

    def _smoothness(self, restored: Tensor, sigma: Tensor | float | int) -> Smoothness:
        with torch.set_grad_enabled(self.smoothness_weight > 0 and torch.is_grad_enabled()):
            return self.diffusion.smoothness(restored, sigma, self._max_radius)

    def _evaluate(self, batch: Batch, metrics: MetricCollection) -> dict[str, Tensor]:
        clean, weight = batch["image"].to(self.dtype), batch["weight"]
        noisy, level = self._observe(batch)
        _, parameters = self._assign(noisy, level, batch["label"])
        restored = self._restore(noisy, level, parameters)
        if self.objective == "sure":
            reconstruction, perceptual = self._risk(noisy, restored, level, parameters, batch["key"]), None
        else:
            reconstruction, perceptual = self._losses(restored, clean)
        restored = restored.clamp(0, 1)
        psnr, psnr_noisy = (_psnr(image, clean) for image in (restored, noisy.clamp(0, 1)))
        ssim = structural_similarity_index_measure(restored, clean, data_range=1.0, reduction="none")
        # Padded repeats of an uneven distributed epoch count for nothing.
        counted = (weight > 0).to(psnr.dtype)
        values = {
            "loss": reconstruction if perceptual is None else reconstruction + perceptual,
            "psnr": psnr,
            "psnr_noisy": psnr_noisy,
            "gain": psnr - psnr_noisy,
            "ssim": ssim,
        }
        for name in self._metric_names:
            metrics[name].update(values[name], counted)
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(clean))
        return {"clean": clean, "noisy": noisy, "restored": restored, "label": batch["label"], "index": batch["index"]}


def _psnr(image: Tensor, clean: Tensor) -> Tensor:
    return peak_signal_noise_ratio(image, clean, data_range=1.0, dim=(1, 2, 3), reduction="none")


def _check_arguments(
    diffusion: GraphDiffusion,
    table: ParameterTable,
    levels: tuple[float, ...] | list[float],
    levels_given: list[float] | None,
    data_range: float,
    perceptual_weight: float,
    smoothness_weight: float,
) -> None:
    missing = [
        name for name in ("sigma", "tau", "radius", "sigma_s", "sigma_f", "smooth_steps") if name not in table.names
    ]
    if missing:
        raise ValueError(f"em_parameters lacks {', '.join(missing)}: graph diffusion needs all six of its parameters")
    if table.lower_bound("radius") < diffusion.stride:
        raise ValueError(
            f"the lower bound of radius is {table.lower_bound('radius')}, under the stride of {diffusion.stride} pixels: "
            "such a graph has no edge. Raise the bound or lower the stride"
        )
    if len(levels) != 2 or not 0 <= levels[0] <= levels[1]:
        raise ValueError(f"noise_std must be a number ≥ 0 or a range (lower, upper), got {levels}")
    if levels_given is not None and (not levels_given or min(levels_given) < 0):
        raise ValueError(f"noise_levels must be numbers ≥ 0, at least one, got {levels_given}")
    for name, value in (("perceptual_weight", perceptual_weight), ("smoothness_weight", smoothness_weight)):
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if not data_range > 0:
        raise ValueError(f"data_range must be positive, got {data_range}")


def _check_objective(objective: str, perceptual: nn.Module | None, largest_level: float, estimate_noise: bool) -> None:
    if objective not in ("supervised", "sure"):
        raise ValueError(f"objective must be 'supervised' or 'sure', got {objective!r}")
    if objective == "supervised":
        return
    if perceptual is not None:
        raise ValueError(
            "objective='sure' has no clean images, and a perceptual loss compares with them: leave perceptual out"
        )
    if largest_level == 0 and not estimate_noise:
        raise ValueError(
            "objective='sure' needs the noise level: set noise_std above 0, or estimate_noise=True where the images "
            "come with noise of their own"
        )
