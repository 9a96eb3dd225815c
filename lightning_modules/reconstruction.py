"""Restoration of images by an operator whose parameters are learned by expectation-maximisation."""

import os
import warnings
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from lightning_modules.checkpoints.module import CheckpointedModule
from lightning_modules.em import Assignment, EStep, GlobalAssignment, ParameterTable
from lightning_modules.em.objectives import (
    hide_pixels,
    j_invariant_error,
    log_squared_error,
    probe_step,
    squared_error,
    stein_risk,
)
from lightning_modules.graph import GraphDiffusion
from lightning_modules.imaging import (
    SPLIT_STREAMS,
    ImageBatch,
    as_batch,
    check_batch,
    check_noise_std,
    seeded_normal,
    seeded_uniform,
)
from lightning_modules.noise import CameraNoise, estimate_noise_std
from lightning_modules.operators import RestorationOperator, Smoothness
from lightning_modules.operators.operator import Noise, ParameterSpec, check_images, image_level, noise_level
from lightning_modules.optimizers import optimizer_config

Parameters = dict[str, Tensor | int]

# Sets the draw of a noise level apart from the draws of the noise itself, which start from the same key.
_LEVEL_STREAM = 0x5DEE_CE66
# The same for the probe of the risk estimate.
_PROBE_STREAM = 0x2545_F491
# The same for the pixels that are hidden.
_HIDDEN_STREAM = 0x1F83_D9AB
_SMALL = 16  # pixels; below, an operator or the estimate of the noise may have no patch to work on


class Reconstruction(CheckpointedModule):
    """Restores noisy images by any operator, with or without a network; its `training_step` is the E-step.

    Trained under `callbacks.EMParameterCallback`, the parameters of the operator are learned along with the network.
    Without the callback the network trains and the parameters stay. Noise is a function of each sample's key, so
    validation sees the same noise in every epoch and any number of processes see the noise of one. What a batch holds
    is written down in `lightning_modules.imaging.ImageBatch`.

    Args:
        operator: The restoration operator, which declares the parameters.
        em_parameters: Their table; by default one without rows that learns all of them between the declared bounds.
        backbone: Network; None restores by the operator only. A plain network maps noisy images to estimates, which
            the operator then restores as free of noise. One with the attribute `accepts_operator = True` is called as
            `backbone(noisy, restore)`, where `restore(signal, guide)` applies the operator, and has the last word.
        assignment: Which row of the table speaks for an image; the global set by default.
        perceptual: Maps restored and clean images to a loss for each image, added to the squared error; None for none.
        add_noise: Whether the images are clean and noise is added to them. False for images that come with noise of
            their own, at the level of the batch's `noise_std` or else estimated. A batch of pairs, which has `noisy`
            beside `image`, is taken as it is.
        noise_std: Standard deviation of the noise to restore from, where white is 1: a number, or a range from which
            the level of each image is drawn (blind restoration).
        noise_levels: Levels of which each image is given one at random, in place of `noise_std`.
        estimate_noise: Estimate each image's noise level instead of telling the operator the true one, as it must be
            done in blind restoration.
        camera_noise: Takes the clean images by simulated cameras, in place of adding white noise; what the camera would
            show without noise is then restored, under a map of the noise's level.
        data_range: Width of the scale on which the loss is measured: 1 for [0, 1], 2 for [−1, 1].
        objective: What the restoration learns from: `"supervised"` by the clean images, `"sure"` by the noisy ones
            only, through Stein's unbiased risk estimate at the level known or estimated. It costs a second restoration
            a step, and moves the parameters and the network alike; freeze the one that is to stay. `"j_invariant"` by
            the noisy ones too, whatever the distribution of the noise, if only it is independent from pixel to pixel:
            pixels are hidden from the restoration, which has to guess them.
        loss: What is supervised: `"mse"`, the squared error, or `"log_mse"`, its logarithm for each image (on a scale
            of `data_range` 1), so that every noise level of a range counts alike.
        perceptual_weight: Factor of the perceptual loss. Distances of pretrained features are 10⁴ to 10⁶ times the
            squared error: begin with 1e-6 for `PerceptualLoss`, and look at `em/perceptual` beside `em/reconstruction`.
        smoothness_weight: α, the weight of the smoothness bonus in the loss proxy. It moves the table only. 0.1
            belongs to losses of order 0.5; beside a squared error of 0.002 it drowns everything.
        optimizer: Makes the optimizer of the network.
        lr_scheduler: Makes the learning-rate schedule; None for a constant rate.
        lr_interval: Whether the schedule counts steps or epochs.

    Raises:
        ValueError: If an argument is impossible, or the operator cannot work under the bounds of the table.

    Example:
        >>> from lightning_modules import TotalVariation
        >>> module = Reconstruction(TotalVariation())
        >>> module(torch.rand(1, 3, 24, 16), noise_std=0.1).shape
        torch.Size([1, 3, 24, 16])
    """

    noise_levels: Tensor | None

    def __init__(
        self,
        operator: RestorationOperator,
        em_parameters: ParameterTable | None = None,
        backbone: nn.Module | None = None,
        assignment: Assignment | None = None,
        perceptual: nn.Module | None = None,
        add_noise: bool = True,
        noise_std: float | tuple[float, float] = 25 / 255,
        noise_levels: list[float] | None = None,
        estimate_noise: bool = False,
        camera_noise: CameraNoise | None = None,
        objective: Literal["supervised", "sure", "j_invariant"] = "supervised",
        loss: Literal["mse", "log_mse"] = "mse",
        data_range: float = 1.0,
        perceptual_weight: float = 1.0,
        smoothness_weight: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["step", "epoch"] = "epoch",
    ) -> None:
        super().__init__()
        levels = noise_std if isinstance(noise_std, tuple | list) else (noise_std, noise_std)
        _check_arguments(levels, noise_levels, data_range, perceptual_weight, smoothness_weight)
        _check_objective(objective, loss, perceptual, add_noise, max(noise_levels or levels))
        if camera_noise is not None and (objective != "supervised" or not add_noise):
            raise ValueError(
                f"camera_noise is correlated noise on clean images, got add_noise={add_noise} and "
                f"objective={objective!r}: leave both at their defaults, or leave out camera_noise"
            )
        _check_operator(operator, backbone, smoothness_weight)
        injected = ("operator", "diffusion", "em_parameters", "backbone", "assignment", "perceptual", "optimizer")
        self.save_hyperparameters(ignore=[*injected, "lr_scheduler"])
        if "_instantiator" in self.hparams:
            # Built from the command line, where injected parts are plain configuration: keep them, so that
            # `load_from_checkpoint` can build the whole module from the checkpoint only.
            self.save_hyperparameters()
        self.operator = operator
        self.em_parameters = (ParameterTable() if em_parameters is None else em_parameters).declare(
            operator.parameter_specs
        )
        self._set_bounds()
        self.backbone = backbone
        self.assignment = GlobalAssignment() if assignment is None else assignment
        self.perceptual = perceptual
        self.add_noise = add_noise
        self.noise_range = (float(levels[0]), float(levels[1]))
        choices = None if noise_levels is None else torch.tensor(noise_levels, dtype=torch.float32)
        self.register_buffer("noise_levels", choices, persistent=False)
        self.estimate_noise = estimate_noise
        self.camera_noise = camera_noise
        if camera_noise is not None and hasattr(operator, "knows_correlation"):
            operator.knows_correlation = True  # type: ignore[assignment]  # which its weights remember
        self.objective = objective
        self.loss = loss
        self.data_range = data_range
        self.perceptual_weight = perceptual_weight
        self.smoothness_weight = smoothness_weight
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        #: found by `LearningRateFinder`; None for the optimizer's own
        self.lr: float | None = None
        self._has_noise = add_noise and max(noise_levels or levels) > 0
        # Images that keep the noise they came with have no clean side to be compared with.
        self._compares = objective == "supervised" or self._has_noise
        names = ("loss", "psnr", "psnr_noisy", "psnr_gain", "ssim") if self._compares else ("loss",)
        metrics: dict[str, Metric | MetricCollection] = {name: MeanMetric() for name in names}
        # Groups would take metrics with equal states for the same one.
        self.val_metrics = MetricCollection(metrics, prefix="val/", compute_groups=False)
        self.test_metrics = self.val_metrics.clone(prefix="test/")
        self._checked: set[str] = set()
        self._batch_size = 0

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """As `nn.Module.load_state_dict`; the operator takes the bounds of what was loaded."""
        result = super().load_state_dict(*args, **options)
        self._set_bounds()
        return result

    def _set_bounds(self) -> None:
        table = self.em_parameters
        self.operator.set_bounds({name: (table.lower_bound(name), table.upper_bound(name)) for name in table.names})

    @property
    def reference_noise(self) -> float | None:
        """The noise level in the middle of those that are trained on, by which reports show parameters in units of
        noise; None where the images come with their own.
        """
        if not self.add_noise:
            return None
        levels = list(self.noise_range) if self.noise_levels is None else self.noise_levels.tolist()
        return float(sum(levels) / len(levels))

    def forward(self, noisy: Tensor, noise_std: Noise | None = None, labels: Tensor | None = None) -> Tensor:
        """Restored images.

        Args:
            noisy: Images to restore, in [0, 1] but for the noise.
            noise_std: Their noise level where white is 1, or what else the operator takes as `noise`; estimated from
                each image where it is left out.
            labels: Class labels for an assignment that uses them; −1 for none.

        Shape:
            - noisy: `[B, C, H, W]`
            - noise_std: scalar, `[1]`, `[B]`, `[B, 1, 1, 1]` or a map `[B, 1 or C, H, W]`
            - labels: int64 `[B]`
            - output: `[B, C, H, W]`
        """
        check_images(noisy)
        if labels is None:
            labels = torch.full((len(noisy),), -1, device=noisy.device)
        noise = estimate_noise_std(noisy) if noise_std is None else noise_std
        level = noise_level(noise, noisy)
        parameters = self._theta(noisy, level, labels)
        return self._restore(noisy, level if isinstance(noise, (Tensor, float, int)) else noise, parameters)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Refuse labels without a row while they are on the host, where a look costs an accelerator nothing."""
        label = batch.get("label") if isinstance(batch, dict) else None
        if isinstance(batch, tuple | list) and len(batch) == 2:
            label = batch[1]
        if isinstance(label, Tensor):
            self.assignment.check_labels(label, len(self.em_parameters.row_names))
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """E-step: responsibilities, restoration and losses of each image under the current parameters."""
        batch = self._checked_batch(batch, batch_idx, "train")
        noisy, level = self._observe(batch)
        responsibilities = self._responsibilities(noisy, level, batch["label"])
        if self.em_parameters.pair_distance is None:
            loss, step = self._e_step(batch, noisy, level, responsibilities, self.em_parameters(responsibilities))
        else:  # a rule that needs no gradient
            pair = self.em_parameters.pair(responsibilities, batch["key"])
            with torch.set_grad_enabled(self._has_weights):
                (loss, step), (other_loss, other) = (
                    self._e_step(batch, noisy, level, responsibilities, side) for side in (pair.plus, pair.minus)
                )
            loss, gradient = (loss + other_loss) / 2, pair.gradient(step.proxy, other.proxy)
            step = step.mean(other)._replace(gradient=gradient)
        loss = self.em_parameters.attach(loss)  # a backbone need not call the operator
        self.log("train/loss", loss.detach(), batch_size=len(noisy), prog_bar=True, sync_dist=True)
        latent = self.assignment.e_step(noisy, batch["label"], level, responsibilities)
        return {"loss": loss, "em": step._replace(latent=latent)}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Restore noisy images and compare them with the clean ones; what `callbacks.ImageGrid` draws.

        Shape:
            - output: `clean`, `noisy` and `restored` `[B, C, H, W]`, `label` and `index` `[B]`
        """
        return self._evaluate(self._checked_batch(batch, batch_idx, "val"), self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """As `validation_step`.

        Shape:
            - output: `clean`, `noisy` and `restored` `[B, C, H, W]`, `label` and `index` `[B]`
        """
        return self._evaluate(self._checked_batch(batch, batch_idx, "test"), self.test_metrics)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Restore images as they are; those of a batch that says `clean` are made noisy first.

        Images too small to restore are returned as they are, with no parameters and a warning.
        """
        batch = self._checked_batch(batch, batch_idx, "predict")
        image = batch["image"]
        if not image.isfinite().all():
            raise ValueError(
                f"{', '.join(batch['name'])}: the image has NaN or infinite pixels; replace them or leave the file out"
            )
        clean = bool(batch.get("clean", False)) and self.add_noise
        try:
            noisy, level = self._observe(batch, clean)
            parameters = self._theta(noisy, level, batch["label"])
            restored = self._restore(noisy, level, parameters)
        except ValueError as error:
            names = ", ".join(batch["name"])
            if clean or min(image.shape[-2:]) >= _SMALL:
                raise ValueError(f"{names}: {error}") from error
            warnings.warn(f"{names}: left as it is: {error}", stacklevel=2)
            noisy, level, parameters = image, image.new_zeros(len(image)), {}
            restored = noisy
        used = {name: torch.as_tensor(value, device=level.device) for name, value in parameters.items()}
        used = {name: value.expand(len(level)) if value.ndim == 0 else value for name, value in used.items()}
        output = {
            "restored": restored.clamp(0, 1),
            "noisy": noisy,
            "name": batch["name"],
            "noise_std": image_level(level),
        }
        return {**output, "parameters": used, **({"clean": image} if clean else {})}

    @torch.no_grad()
    def diagnose(self, batch: Any) -> dict[str, Tensor]:
        """The operator's diagnostics of each image of a batch; see `RestorationOperator.diagnostics`.

        Empty where the backbone builds the graph on anything but the noisy patches.

        Shape:
            - output: `[B]` each
        """
        if self.backbone is not None and getattr(self.backbone, "graph_on", None) != "patches":
            return {}
        batch = self._checked_batch(batch, 1, "train")
        noisy, level = self._observe(batch)
        parameters = self._theta(noisy, level, batch["label"])
        return self.operator.diagnostics(noisy, noise=level, **parameters)

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule as injected."""
        return optimizer_config(self.parameters(), self.optimizer, self.lr_scheduler, self.lr_interval, self.lr)

    def setup(self, stage: str) -> None:
        """Look at the first batch of each run."""
        self._checked.clear()
        for metrics in (self.val_metrics, self.test_metrics):
            metrics.reset()  # `validate` leaves inference tensors, which the validation of a `fit` cannot add to

    def _checked_batch(self, batch: Any, batch_idx: int, stage: str) -> ImageBatch:
        """The batch in the form of the contract, which the first of a run is held against."""
        if stage not in self._checked or batch_idx == 0:
            self._batch_size = _size(batch)  # of all but the last, which may be smaller
        batch = as_batch(
            batch,
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),
            epoch=self.current_epoch if stage == "train" else 0,
            rank=self.global_rank,
            world_size=1 if self._trainer is None else self.trainer.world_size,
            position=batch_idx * self._batch_size,
            split_stream=SPLIT_STREAMS[stage],
        )
        if stage == "predict" and "name" not in batch and "index" in batch:
            batch["name"] = [f"{index:05d}.png" for index in batch["index"].tolist()]
        if stage not in self._checked:
            draws = self.objective != "supervised" or self._has_noise or self.em_parameters.pair_distance is not None
            needed = {"image", "name"} if stage == "predict" else {"image", "label", "weight"}
            if stage in ("val", "test"):
                needed.add("index")
            if draws and (stage != "predict" or batch.get("clean", False)):
                needed.add("key")
            check_batch(batch, needed)
            self._checked.add(stage)
        is_clean = "noisy" not in batch and (stage != "predict" or bool(batch.get("clean", False)))
        if self.camera_noise is not None and is_clean:  # the camera sharpens what it shows, noise or not
            shown = self.camera_noise(batch["image"], batch["key"])
            batch = {**batch, "image": shown.clean, "noisy": shown.noisy, "noise_std": shown.level}
        return batch

    def _observe(self, batch: ImageBatch, add_noise: bool | None = None) -> tuple[Tensor, Tensor]:
        """The degraded images of a batch, and the noise level that the operator is told of."""
        image = batch["image"].to(self.dtype)
        has_noise = "noisy" in batch or not (self.add_noise if add_noise is None else add_noise)
        if has_noise:
            noisy, known = batch.get("noisy", image).to(self.dtype), batch.get("noise_std")
            return noisy, estimate_noise_std(noisy) if known is None else noise_level(known, noisy)
        low, high = self.noise_range
        if not self._has_noise:
            return image, estimate_noise_std(image) if self.estimate_noise else image.new_zeros(len(image))
        if self.noise_levels is not None:
            place = (seeded_uniform(batch["key"] ^ _LEVEL_STREAM, 1)[:, 0] * len(self.noise_levels)).long()
            level = self.noise_levels[place].to(image.dtype)
        elif low == high:
            level = image.new_full((len(image),), low)
        else:
            level = (low + (high - low) * seeded_uniform(batch["key"] ^ _LEVEL_STREAM, 1)[:, 0]).to(image.dtype)
        noisy = image + level.view(-1, 1, 1, 1) * seeded_normal(batch["key"], image.shape[1:]).to(image.dtype)
        return noisy, estimate_noise_std(noisy) if self.estimate_noise else level

    def _e_step(
        self, batch: ImageBatch, noisy: Tensor, level: Tensor, responsibilities: Tensor, parameters: Parameters
    ) -> tuple[Tensor, EStep]:
        """Loss of a batch under the given parameters, and the statistics of its images."""
        restored, reconstruction, perceptual = self._objective(batch, noisy, level, parameters)
        smoothness = self._smoothness(restored.detach(), level, parameters)
        weight = batch["weight"]
        loss = (weight * (reconstruction if perceptual is None else reconstruction + perceptual)).mean()
        if self.smoothness_weight and smoothness is not None:
            loss = loss - self.smoothness_weight * (weight * smoothness.score).mean()
        return loss, EStep(
            responsibilities.detach(),
            weight,
            reconstruction.detach(),
            None if perceptual is None else perceptual.detach(),
            None if smoothness is None else smoothness.score.detach(),
            None if smoothness is None else smoothness.similarity.detach(),
            self.smoothness_weight,
        )

    @property
    def _has_weights(self) -> bool:
        """Whether there is anything that only a backward pass can train."""
        return any(p.requires_grad for p in self.parameters() if p is not self.em_parameters.anchor)

    def _responsibilities(self, noisy: Tensor, level: Tensor, labels: Tensor) -> Tensor:
        """Responsibilities of the rows for each image."""
        return self.assignment(noisy, labels, image_level(level), len(self.em_parameters.row_names))

    def _theta(self, noisy: Tensor, level: Tensor, labels: Tensor) -> Parameters:
        """Parameters of each image."""
        return self.em_parameters(self._responsibilities(noisy, level, labels))

    def _restore(self, noisy: Tensor, noise: Noise, parameters: Parameters) -> Tensor:
        restored: Tensor

        def restore(signal: Tensor, guide: Tensor | None = None, noise: Noise = noise) -> Tensor:
            result: Tensor = self.operator(signal, noise=noise, guide=guide, **parameters)
            return result

        if self.backbone is None:
            restored = restore(noisy)
        elif _accepts_operator(self.backbone):
            restored = self.backbone(noisy, restore)
        else:
            restored = restore(self.backbone(noisy), noise=0.0)  # an estimate no longer has the noise of its input
        if not isinstance(restored, Tensor) or restored.shape != noisy.shape:
            maker = type(self.operator if self.backbone is None else self.backbone).__name__
            got = list(restored.shape) if isinstance(restored, Tensor) else type(restored).__name__
            raise ValueError(
                f"{maker} returned {got} for images {list(noisy.shape)}: it must keep the shape of what it restores"
            )
        return restored

    def _objective(
        self, batch: ImageBatch, noisy: Tensor, level: Tensor, parameters: Parameters
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Restored images, and the losses that they are learned by."""
        if self.objective == "j_invariant":
            visible, hidden = hide_pixels(noisy, batch["key"] ^ _HIDDEN_STREAM)
            restored = self._restore(visible, level, parameters)
            return restored, j_invariant_error(restored, noisy, hidden) * self.data_range**2, None
        restored = self._restore(noisy, level, parameters)
        if self.objective == "sure":
            return restored, self._risk(noisy, restored, level, parameters, batch["key"]), None
        return restored, *self._losses(restored, batch["image"].to(self.dtype))

    def _risk(self, noisy: Tensor, restored: Tensor, level: Tensor, parameters: Parameters, key: Tensor) -> Tensor:
        """Estimated risk of each image. Level and responsibilities stay those of the unperturbed image: no one pixel
        moves them.
        """
        probe = seeded_normal(key ^ _PROBE_STREAM, noisy.shape[1:]).to(noisy.dtype)
        step = probe_step(level, learning=self.training)
        perturbed = self._restore(noisy + step.view(-1, 1, 1, 1) * probe, level, parameters)
        return stein_risk(noisy, restored, perturbed, probe, level, learning=self.training) * self.data_range**2

    def _losses(self, restored: Tensor, clean: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.loss == "log_mse":
            reconstruction = log_squared_error(restored, clean)
        else:
            reconstruction = squared_error(restored, clean) * self.data_range**2
        if self.perceptual is None:
            return reconstruction, None
        return reconstruction, self.perceptual_weight * self.perceptual(restored, clean)

    def _smoothness(self, restored: Tensor, level: Tensor, parameters: Parameters) -> Smoothness | None:
        with torch.set_grad_enabled(self.smoothness_weight > 0 and torch.is_grad_enabled()):
            return self.operator.smoothness(restored, noise=level, **parameters)

    def _evaluate(self, batch: ImageBatch, metrics: MetricCollection) -> dict[str, Tensor]:
        clean, weight = batch["image"].to(self.dtype), batch["weight"]
        noisy, level = self._observe(batch)
        parameters = self._theta(noisy, level, batch["label"])
        restored, reconstruction, perceptual = self._objective(batch, noisy, level, parameters)
        if self.objective == "j_invariant":  # what has been restored so far lacks pixels
            restored = self._restore(noisy, level, parameters)
        restored = restored.clamp(0, 1)
        # Padded repeats of an uneven distributed epoch count for nothing.
        counted = (weight > 0).to(clean.dtype)
        values = {"loss": reconstruction if perceptual is None else reconstruction + perceptual}
        if self._compares:
            psnr, psnr_noisy = (_psnr(image, clean) for image in (restored, noisy.clamp(0, 1)))
            values |= {"psnr": psnr, "psnr_noisy": psnr_noisy, "psnr_gain": psnr - psnr_noisy}
            ssim = structural_similarity_index_measure(restored, clean, data_range=1.0, reduction="none")
            assert isinstance(ssim, Tensor)  # the function can return maps as well
            values["ssim"] = ssim
        for name, value in values.items():
            metrics[name].update(value, counted)
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(clean))
        return {"clean": clean, "noisy": noisy, "restored": restored, "label": batch["label"], "index": batch["index"]}


class GraphDiffusionReconstruction(Reconstruction):
    """`Reconstruction` by graph diffusion.

    Args:
        diffusion: The graph diffusion.
        em_parameters: The table of its parameters; see `Reconstruction`, which has all other arguments.
        options: Further arguments of `Reconstruction`, by name.

    Example:
        >>> module = GraphDiffusionReconstruction(GraphDiffusion(patch_size=3), ParameterTable())
        >>> module(torch.rand(1, 3, 24, 16), noise_std=0.1).shape
        torch.Size([1, 3, 24, 16])
    """

    def __init__(self, diffusion: GraphDiffusion, em_parameters: ParameterTable | None = None, **options: Any) -> None:
        super().__init__(diffusion, em_parameters, **options)

    @property
    def diffusion(self) -> GraphDiffusion:
        """The graph diffusion: the module's operator."""
        assert isinstance(self.operator, GraphDiffusion)
        return self.operator


def _size(batch: Any) -> int:
    """Number of images of a batch of any form; 0 where it has none that `as_batch` would take."""
    first = batch.get("image") if isinstance(batch, dict) else batch
    if isinstance(first, tuple | list) and first:
        first = first[0]
    return len(first) if isinstance(first, Tensor) and first.ndim else 0


def _psnr(image: Tensor, clean: Tensor) -> Tensor:
    return peak_signal_noise_ratio(image, clean, data_range=1.0, dim=(1, 2, 3), reduction="none")


def _check_arguments(
    levels: tuple[float, ...] | list[float],
    levels_given: list[float] | None,
    data_range: float,
    perceptual_weight: float,
    smoothness_weight: float,
) -> None:
    if len(levels) != 2 or not 0 <= levels[0] <= levels[1]:
        got = levels[0] if len(set(levels)) == 1 else levels
        raise ValueError(f"noise_std must be a number ≥ 0 or a range (lower, upper), got {got}")
    if levels_given is not None and (not levels_given or min(levels_given) < 0):
        raise ValueError(f"noise_levels must be numbers ≥ 0, at least one, got {levels_given}")
    for level in levels_given or levels:
        check_noise_std(level)
    for name, value in (("perceptual_weight", perceptual_weight), ("smoothness_weight", smoothness_weight)):
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if not data_range > 0:
        raise ValueError(f"data_range must be positive, got {data_range}")


def _check_operator(operator: RestorationOperator, backbone: nn.Module | None, smoothness_weight: float) -> None:
    if not isinstance(operator, RestorationOperator):
        raise TypeError(
            f"operator must be an instance of a lightning_modules.RestorationOperator, got {operator!r:.80}: subclass "
            "it, and give an object, not its class"
        )
    name, specs = type(operator).__name__, operator.parameter_specs
    if not isinstance(specs, tuple | list) or not specs or not all(isinstance(spec, ParameterSpec) for spec in specs):
        raise TypeError(
            f"{name}.parameter_specs must be a property that returns a tuple of ParameterSpec, at least one, got "
            f"{specs!r:.80}"
        )
    plain = backbone is not None and not _accepts_operator(backbone)
    if plain and any(spec.unit == "noise" for spec in operator.parameter_specs):
        raise ValueError(
            f"{name} has parameters in units of the noise, and what a plain backbone estimates has none left, so that "
            "it would change nothing: choose an operator with absolute parameters (widths='absolute'), or a backbone "
            "with accepts_operator = True"
        )
    if smoothness_weight and type(operator).smoothness is RestorationOperator.smoothness:
        raise ValueError(f"{name} has no measure of smoothness: leave smoothness_weight at 0")


def _accepts_operator(backbone: nn.Module) -> bool:
    if getattr(backbone, "accepts_diffusion", False) and not hasattr(backbone, "accepts_operator"):
        warnings.warn("accepts_diffusion of a backbone is now accepts_operator", FutureWarning, stacklevel=4)
        return True
    return bool(getattr(backbone, "accepts_operator", False))


def _check_objective(
    objective: str, loss: str, perceptual: nn.Module | None, add_noise: bool, largest_level: float
) -> None:
    if objective not in ("supervised", "sure", "j_invariant"):
        raise ValueError(f"objective must be 'supervised', 'sure' or 'j_invariant', got {objective!r}")
    if loss not in ("mse", "log_mse"):
        raise ValueError(f"loss must be 'mse' or 'log_mse', got {loss!r}")
    if objective != "supervised" and loss != "mse":
        raise ValueError(
            f"objective={objective!r} estimates the squared error, which may be negative: leave loss at 'mse'"
        )
    if objective == "supervised":
        if not add_noise:
            raise ValueError(
                "add_noise=False keeps the noise that the images came with, and objective='supervised' compares with "
                "clean ones: choose objective='sure', or 'j_invariant' where the noise is not Gaussian"
            )
        return
    if perceptual is not None:
        raise ValueError(
            f"objective={objective!r} has no clean images, and a perceptual loss compares with them: leave perceptual "
            "out"
        )
    if largest_level == 0 and add_noise:
        raise ValueError(
            f"objective={objective!r} needs noise: set noise_std above 0, or add_noise=False where the images come "
            "with noise of their own"
        )
