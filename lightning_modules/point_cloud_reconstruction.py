"""Denoising of point clouds by an operator whose parameters are learned by expectation-maximisation."""

from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection

from lightning_modules.checkpoints.module import CheckpointedModule
from lightning_modules.em import EStep, ParameterTable
from lightning_modules.imaging import seeded_normal, seeded_uniform
from lightning_modules.optimizers import optimizer_config
from lightning_modules.point_clouds import (
    PointCloudDiffusion,
    chamfer_distance,
    clouds,
    estimate_cloud_noise,
    halves,
    held_out_error,
    surface_distance,
)

if TYPE_CHECKING:
    from torch_geometric.data import Batch, Data

# Sets the draw of a noise level, and that of the points that are held out, apart from the draws of the noise: all start
# from one key.
_LEVEL_STREAM, _HELD_OUT_STREAM = 0x5DEE_CE66, 0x1F83_D9AB
# Distances are shown as in the literature: squared, in units of the bounding sphere's radius, times this.
_SHOWN = 1e4


class PointCloudReconstruction(CheckpointedModule):
    r"""Moves the points of noisy clouds back to the surface; its `training_step` is the E-step.

    Trained under `callbacks.EMParameterCallback`, the operator's parameters are learned. The loss of a cloud is the
    mean squared distance of its points to the surface over the variance of the noise, so that clouds of any size and
    level count alike: 1 where nothing is gained along the normals. From noisy scans only, it is estimated: a half of
    the points, chosen anew for each batch, is denoised, and the other half compared with it (`held_out_error`).

    A batch is a dict: `cloud`, a PyG `Batch` whose `pos` are the points and, for each cloud, `radius`, that of the
    bounding sphere; `surface` and `surface_normal`, with `surface_batch`, points of the true surface, where it is
    known; and `weight`, `key`, `index` `[B]` and `name` as in `lightning_modules.imaging.ImageBatch`.

    Args:
        operator: The denoiser, which declares the parameters.
        em_parameters: Their table; by default one that learns all of them between the declared bounds.
        add_noise: Whether the clouds are clean and noise is added to them. False for scans, whose noise has the level
            that the batch's `noise_std` says, or else is estimated.
        noise_std: Standard deviation of the noise to add, as a part of the bounding sphere's radius: a number, or a
            range from which that of each cloud is drawn.
        estimate_noise: Estimate each cloud's noise level in place of telling the operator the true one.
        objective: What the parameters are learned from: `"supervised"`, the true surface, or `"held_out"`, the noisy
            points only.
        optimizer: Makes the optimizer, which has nothing to move but in modules that add to this one.

    Raises:
        ValueError: If an argument is impossible.

    Example:
        >>> module = PointCloudReconstruction(PointCloudDiffusion()).eval()
        >>> flat = torch.cat([torch.rand(200, 2), 0.02 * torch.randn(200, 1)], 1)
        >>> module(flat, noise_std=0.02).shape
        torch.Size([200, 3])
    """

    def __init__(
        self,
        operator: PointCloudDiffusion,
        em_parameters: ParameterTable | None = None,
        add_noise: bool = True,
        noise_std: float | tuple[float, float] = (0.01, 0.03),
        estimate_noise: bool = False,
        objective: Literal["supervised", "held_out"] = "supervised",
        optimizer: OptimizerCallable = torch.optim.Adam,
    ) -> None:
        super().__init__()
        levels = noise_std if isinstance(noise_std, tuple | list) else (noise_std, noise_std)
        if len(levels) != 2 or not 0 < levels[0] <= levels[1] < 1:
            raise ValueError(
                "noise_std must be a part of the bounding sphere's radius, between 0 and 1, or a range (lower, upper), "
                f"got {noise_std}"
            )
        if objective not in ("supervised", "held_out"):
            raise ValueError(f"objective must be 'supervised' or 'held_out', got {objective!r}")
        if objective == "supervised" and not add_noise:
            raise ValueError(
                "add_noise=False keeps the noise that the scans came with, and objective='supervised' compares with "
                "the true surface: choose objective='held_out'"
            )
        self.save_hyperparameters(ignore=["operator", "em_parameters", "optimizer"])
        if "_instantiator" in self.hparams:  # from the command line: injected parts are plain configuration, as well
            self.save_hyperparameters()
        self.operator = operator
        self.em_parameters = (ParameterTable() if em_parameters is None else em_parameters).declare(
            operator.parameter_specs
        )
        self.add_noise = add_noise
        self.noise_range = (float(levels[0]), float(levels[1]))
        self.estimate_noise = estimate_noise
        self.objective = objective
        self.optimizer = optimizer
        names = ("loss", "chamfer", "chamfer_noisy", "surface", "surface_noisy") if add_noise else ("loss",)
        metrics: dict[str, Metric | MetricCollection] = {name: MeanMetric() for name in names}
        self.val_metrics = MetricCollection(metrics, prefix="val/", compute_groups=False)
        self.test_metrics = self.val_metrics.clone(prefix="test/")

    def forward(self, cloud: "Data | Tensor", noise_std: Tensor | float | None = None) -> Tensor:
        """Denoised positions.

        Args:
            cloud: Points, or a PyG `Data` or `Batch` with `pos`.
            noise_std: Standard deviation of the noise of each cloud in the unit of the positions; estimated where it is
                left out.

        Shape:
            - cloud: `[N, 3]`
            - noise_std: scalar or `[B]`
            - output: `[N, 3]`
        """
        from lightning_modules._pyg import Data

        cloud = Data(pos=cloud) if isinstance(cloud, Tensor) else cloud
        level = estimate_cloud_noise(cloud) if noise_std is None else noise_std
        return self.operator(cloud, noise=level, **self._theta(len(clouds(cloud))))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """E-step: denoised clouds and the loss of each under the current parameters."""
        noisy, level = self._observe(batch, self.add_noise)
        parameters = self._theta(len(level))
        if self.objective == "held_out":
            error = self._held_out_error(noisy, level, parameters, batch["key"])
        else:
            error = _surface_error(batch["cloud"], self._denoise(noisy, level, parameters)) / level.square()
        weight = batch["weight"].to(error)
        loss = self.em_parameters.attach((weight * error).mean())
        self.log("train/loss", loss.detach(), batch_size=len(error), prog_bar=True, sync_dist=True)
        return {"loss": loss, "em": EStep(error.new_zeros(len(error), 0), weight, error.detach())}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Denoise, and compare with the true surface; what `callbacks.PointCloudView` draws."""
        return self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """As `validation_step`."""
        return self._evaluate(batch, self.test_metrics)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Denoise clouds as they are; noise is added first where the module adds it, unless `batch["clean"]` is
        False.

        Shape:
            - output: `restored` and `noisy`, a list of `[N, 3]` each; `noise_std` and each of `parameters` `[B]`
        """
        noisy, level = self._observe(batch, add_noise=self.add_noise and bool(batch.get("clean", True)))
        parameters = self._theta(len(level))
        restored = self._denoise(noisy, level, parameters)
        used = {name: torch.as_tensor(value).expand(len(level)) for name, value in parameters.items()}
        return {
            "restored": [restored[part] for part in clouds(noisy)],
            "noisy": [noisy.pos[part] for part in clouds(noisy)],
            "name": batch["name"],
            "noise_std": level,
            "parameters": used,
        }

    def configure_optimizers(self) -> Any:
        """Optimizer as injected."""
        return optimizer_config(self.parameters(), self.optimizer, None, "epoch")

    def _theta(self, count: int) -> dict[str, Tensor | int]:
        return self.em_parameters(torch.zeros(count, 0, device=self.em_parameters.shared.device))

    def _denoise(self, noisy: "Batch", level: Tensor, parameters: dict[str, Tensor | int]) -> Tensor:
        restored: Tensor = self.operator(noisy, noise=level, **parameters)
        return restored

    def _held_out_error(
        self, noisy: "Batch", level: Tensor, parameters: dict[str, Tensor | int], key: Tensor
    ) -> Tensor:
        """Estimated error of each cloud, `[B]`; 0 for one without noise, from which nothing can be learned."""
        from lightning_modules._pyg import Batch, Data

        parts = [noisy.pos[part] for part in clouds(noisy)]
        splits = [halves(len(part), own ^ _HELD_OUT_STREAM) for part, own in zip(parts, key, strict=True)]
        taken = Batch.from_data_list([Data(pos=part[own]) for part, (own, _) in zip(parts, splits, strict=True)])
        restored = self._denoise(taken, level, parameters)
        errors = [
            held_out_error(restored[own], part[left], each)
            for own, part, (_, left), each in zip(clouds(taken), parts, splits, level, strict=True)
        ]
        return torch.where(level > 0, torch.stack(errors), 0.0)

    def _observe(self, batch: dict[str, Any], add_noise: bool) -> "tuple[Batch, Tensor]":
        """The noisy clouds of a batch, and the level that the operator is told of."""
        cloud = batch["cloud"].clone()
        cloud.pos = cloud.pos.to(self.dtype)
        if not add_noise:
            known = batch.get("noise_std")
            return cloud, estimate_cloud_noise(cloud) if known is None else known.to(cloud.pos)
        low, high = self.noise_range
        draw = seeded_uniform(batch["key"] ^ _LEVEL_STREAM, 1)[:, 0]
        level = (low + (high - low) * draw).to(cloud.pos) * cloud.radius.to(cloud.pos)
        cloud.pos = cloud.pos + level[cloud.batch][:, None] * _normal(batch["key"], cloud)
        return cloud, estimate_cloud_noise(cloud) if self.estimate_noise else level

    @torch.no_grad()
    def _evaluate(self, batch: dict[str, Any], metrics: MetricCollection) -> dict[str, Any]:
        noisy, level = self._observe(batch, self.add_noise)
        parameters = self._theta(len(level))
        restored = self._denoise(noisy, level, parameters)
        clean = batch["cloud"]
        values: dict[str, Tensor] = {}
        if self.add_noise:
            scale = _SHOWN / clean.radius.square()
            for suffix, points in (("", restored), ("_noisy", noisy.pos)):
                values[f"surface{suffix}"] = scale * _surface_error(clean, points)
                values[f"chamfer{suffix}"] = scale * _chamfer(clean, points)
            values["loss"] = values["surface"] / (scale * level.square())
        if self.objective == "held_out":
            values["loss"] = self._held_out_error(noisy, level, parameters, batch["key"])
        counted = (batch["weight"] > 0).to(level)
        for name, value in values.items():
            metrics[name].update(value, counted)
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(level))
        drawn = {"noisy": noisy.pos, "restored": restored, "cloud_of_point": clean.batch}
        return drawn | ({"clean": clean.pos} if self.add_noise else {})


def _normal(key: Tensor, cloud: "Batch") -> Tensor:
    """Standard normal draws `[N, 3]` that are a function of each cloud's key only."""
    draws = [seeded_normal(own[None], (len(part), 3))[0] for own, part in zip(key, clouds(cloud), strict=True)]
    return torch.cat(draws).to(cloud.pos)


def _surface_error(clean: "Batch", points: Tensor) -> Tensor:
    """Mean squared distance of each cloud's points to its surface, `[B]`."""
    if "surface" not in clean:
        raise ValueError(
            "the batch has no `surface`, points of the true surface that the denoised ones are compared with: add it"
        )
    normals = clean.surface_normal if "surface_normal" in clean else None
    from lightning_modules._pyg import Data

    parts = zip(clouds(clean), clouds(Data(pos=clean.surface, batch=clean.surface_batch)), strict=True)
    return torch.stack(
        [surface_distance(points[own], clean.surface[s], None if normals is None else normals[s]) for own, s in parts]
    )


def _chamfer(clean: "Batch", points: Tensor) -> Tensor:
    return torch.stack([chamfer_distance(points[part], clean.pos[part]) for part in clouds(clean)])
