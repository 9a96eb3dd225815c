"""Detector of generated images, by the traces that a restoration leaves behind."""

from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.checkpoints.module import CheckpointedModule
from lightning_modules.checkpoints.parts import configuration
from lightning_modules.detection import (
    UNSURE,
    BufferedPredictions,
    Calibration,
    ClassDensities,
    DetectorInput,
    DetectorInputs,
    PredictionBuffer,
    RestorationResidual,
    changed_views,
    cross_fit,
    decide,
    evaluate,
    fixed_crops,
    probability_scores,
    scores,
    to_pixels,
)
from lightning_modules.em import EStep, ParameterTable
from lightning_modules.networks import TraceNetwork
from lightning_modules.optimizers import optimizer_config

Batch = dict[str, Any]

_CLEAN = "clean"
# By which Lightning makes a module of what a checkpoint names, its parts included.
_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
# What predictions keep of a batch.
_PASSED_ON = ("label", "index", "weight", "name", "condition")
# Crops of an image that `predict_image` looks at together: bounds the memory, not the result.
_CROPS_AT_ONCE = 32


class Verdict(NamedTuple):
    """What a detector makes of an image.

    Attributes:
        label: `photographic`, `generated` or `unsure`.
        probability: Calibrated probability of `generated`, whatever the label.
        ood_score: Above 0 for an image that is unlike those of either class; NaN where that is unknown.
        reason: Why it is unsure; empty where it is not.
    """

    label: str
    probability: float
    ood_score: float
    reason: str


class GeneratedImageDetector(CheckpointedModule):
    r"""Distinguishes generated images from photographs by crops at native resolution.

    The inputs of a crop (by default what a restoration takes away from it) go through a network, whose features a
    linear layer turns into a logit. The logit of an image is the mean over its crops: a crop's logit is a
    log-likelihood ratio, ratios of independent parts of one image add up, and the mean is that sum on a scale which
    does not depend on how many crops there are. A maximum would let the oddest crop decide, a mean of probabilities
    forgets how sure each is.

    At the end of every validation in a fit, temperature and threshold are fitted to the validation images of sources
    that are not trained on (`unseen` in the batches; all validation images where there is none), and one Gaussian
    mixture a class, on the features, to all validation images: images of the training set would not do, for the network
    has seen them. `val/` is about the images that temperature and threshold are fitted to. What is logged there as
    `ece`, `accuracy_at_threshold` and `generative_accuracy` is cross-fitted, each half of them evaluated by a fit to
    the other, and is NaN where a half has too few. `test/` uses the fit in the checkpoint.

    A prediction comes with a verdict, which is unsure where the calibrated odds, taken from the threshold, are below
    three to one, where it changes when the image is saved again, rescaled or blurred, or where the mixtures explain the
    image by neither class. A detector that is at chance on the images it is calibrated on is unsure of all.

    Args:
        inputs: What the network sees of a crop, side by side; the restoration's residual by default.
        backbone: Network from the inputs to features `[B, F]`; a small one for CPUs by default.
        label_smoothing: Part of a label's probability that goes to the other class in the loss.
        num_directions: Principal components of the features on which the class densities live.
        inlier_quantile: Share of the validation images that count as in distribution.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule; None for a constant rate.
        lr_interval: Whether the schedule counts steps or epochs.

    Raises:
        ValueError: If an argument is impossible, or the backbone does not fit the inputs.

    Example:
        >>> detector = GeneratedImageDetector()
        >>> 0 < detector.predict_image(torch.rand(3, 120, 100)) < 1
        True
    """

    # Number and side of the crops that validation looked at, int64 [2]: `predict_image` looks at the same.
    crops: Tensor

    def __init__(
        self,
        inputs: list[DetectorInput] | None = None,
        backbone: nn.Module | None = None,
        label_smoothing: float = 0.0,
        num_directions: int = 8,
        inlier_quantile: float = 0.99,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["step", "epoch"] = "epoch",
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        self.save_hyperparameters(ignore=["inputs", "backbone", "optimizer", "lr_scheduler"])
        if "_instantiator" in self.hparams:
            # Built from the command line, where injected parts are plain configuration: keep them, so that
            # `load_from_checkpoint` can build the whole module from the checkpoint alone.
            self.save_hyperparameters()
        else:
            self._keep_parts(inputs, backbone)
        self.inputs = DetectorInputs([RestorationResidual()] if inputs is None else inputs)
        if (learning := sum(residual.learn for residual in self._restorations)) > 1:
            raise ValueError(f"one restoration can learn its parameters, got {learning} inputs with learn=True")
        probe = _probe(self.inputs, "inputs", torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        self.backbone = TraceNetwork(probe.shape[1]) if backbone is None else backbone
        features = _probe(self.backbone, "the backbone", probe)
        if features.ndim != 2:
            raise ValueError(
                f"the backbone must map inputs [B, C, H, W] to features [B, F], got {list(features.shape)}"
            )
        self.head = nn.Linear(features.shape[1], 1)
        self.calibration = Calibration()
        self.densities = ClassDensities(features.shape[1], num_directions, inlier_quantile=inlier_quantile)
        self.register_buffer("crops", torch.tensor([9, 96]))
        self.label_smoothing = label_smoothing
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        #: found by `LearningRateFinder`; None for the optimizer's own
        self.lr: float | None = None
        self._seen = PredictionBuffer()
        self._seen_by_condition: dict[str, PredictionBuffer] = {}
        self._shape = tuple(self.crops.tolist())
        self._fitted: dict[str, Tensor] = {}
        self._has_parameters = False

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and features of images, each given by its crops.

        Shape:
            - images: `[B, V, 3, S, S]` in [0, 1]
            - output: `[B]` and `[B, F]`
        """
        if images.ndim != 5 or images.shape[2] != 3:
            raise ValueError(f"expected images as crops [B, V, 3, S, S], got {list(images.shape)}")
        features = self.backbone(self.inputs(images.flatten(0, 1).to(self.dtype)))
        features = features.unflatten(0, images.shape[:2])
        # the layer is linear: the logit of the mean features is the mean of the crops' logits
        pooled = features.mean(1)
        return self.head(pooled)[:, 0], pooled

    @property
    def em_parameters(self) -> ParameterTable | None:
        """Parameters of the restoration, which `callbacks.EMParameterCallback` moves; None without a restoration."""
        residual = self._restoration
        return None if residual is None else residual.em_parameters

    @property
    def warning(self) -> str | None:
        """What has to be known before its verdicts are used, where they are worth little."""
        if not self.calibration.at_chance:
            return None
        return (
            f"on the images that it was calibrated on this detector has an AUROC of "
            f"{float(self.calibration.auroc):.2f}: it is at chance, and its verdicts mean nothing on other images"
        )

    @property
    def threshold(self) -> float:
        """Probability above which predicting "generated" was most accurate in validation; 0.5 before one."""
        return float(self.calibration.threshold)

    @property
    def _restorations(self) -> list[RestorationResidual]:
        return [part for part in self.inputs if isinstance(part, RestorationResidual)]

    @property
    def _restoration(self) -> RestorationResidual | None:
        """The restoration that learns, or else the first."""
        return min(self._restorations, key=lambda residual: not residual.learn, default=None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the parameters of the restoration that are in the checkpoint."""
        super().on_load_checkpoint(checkpoint)
        self._has_parameters = True

    def on_fit_start(self) -> None:
        """Loads the parameters of a reconstruction where the inputs ask for it, and no checkpoint has brought them.

        Not in `setup`, which comes before a checkpoint is loaded.
        """
        if not self._has_parameters:
            for residual in self._restorations:
                residual.load_from_checkpoint()
        self._has_parameters = True

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Loss under the current parameters; for a restoration that learns, also its E-step."""
        logit, _ = self(batch["image"])
        label = batch["label"]
        target = label.clamp_min(0).to(logit.dtype) * (1 - self.label_smoothing) + self.label_smoothing / 2
        loss = F.binary_cross_entropy_with_logits(logit, target, reduction="none")
        weight = batch["weight"] * (label >= 0)
        mean = (weight * loss).mean()
        self.log("train/loss", mean.detach(), batch_size=len(logit), sync_dist=True)
        table = self.em_parameters
        if table is None:
            return {"loss": mean}
        crops = batch["image"].shape[1]
        step = EStep(
            weight.new_zeros(len(weight) * crops, len(table.row_names)),
            weight.repeat_interleave(crops),
            loss.detach().repeat_interleave(crops),
        )
        return {"loss": table.attach(mean), "em": step}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Evaluates images; their crops are the ones that `predict_image` will look at."""
        self._shape = (batch["image"].shape[1], batch["image"].shape[-1])
        return self._evaluate(batch, self._seen)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Evaluates images under one condition; under the first, with verdicts."""
        if batch_idx == dataloader_idx == 0:
            self._compare_crops(batch["image"])
        buffer = self._seen_by_condition.setdefault(batch["condition"], PredictionBuffer().to(self.device))
        output = self._evaluate(batch, buffer)
        return self._with_verdicts(batch["image"], output) if dataloader_idx == 0 else output

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Predicts images, with verdicts, and scores which are like nothing seen before (`ood_score` above 0)."""
        if batch_idx == 0:
            self._compare_crops(batch["image"])
            if self.warning:
                rank_zero_warn(self.warning)
        output, features = self._predict(batch)
        return self._with_verdicts(batch["image"], {**output, "ood_score": self.densities.ood_score(features)})

    def on_validation_epoch_end(self) -> None:
        """Logs what was seen; in a fit, calibrates by it."""
        seen = self._seen.compute()
        self._seen.reset()
        if self.trainer.sanity_checking:
            return
        calibrating = seen.calibrating
        values = scores(calibrating, cross_fit(calibrating, self.calibration, self.densities))
        if len(calibrating.label) < len(seen.label):
            trained = seen.select(~seen.unseen)
            probability = self.calibration(trained.logit)
            values["auroc_trained_sources"] = probability_scores(probability, trained.label)["auroc"]
        self._log("val", values)
        if undefined := [f"val/{name}" for name, value in values.items() if value.isnan()]:
            rank_zero_warn(
                f"{', '.join(undefined)} are not defined: validation has too few images of a class. A half is scored "
                f"by a fit to the other, which takes {self.densities.images_needed} of each class for the densities"
            )
        if self.trainer.state.fn == "fit":
            self._fit_to(seen)

    def on_test_epoch_end(self) -> None:
        """Logs what was seen under each condition."""
        for condition, buffer in self._seen_by_condition.items():
            seen = buffer.compute()
            prefix = "test" if condition == _CLEAN else f"test/{condition}"
            self._log(prefix, scores(seen, evaluate(seen, self.calibration, self.densities)))
        self._seen_by_condition.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts what was fitted last into the checkpoint: where weights are averaged, the average's copy is older."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"] |= self._fitted

    def on_train_end(self) -> None:
        """Restores what was fitted last, over which a callback that averages weights has copied an older state."""
        self.load_state_dict({**self.state_dict(), **self._fitted})

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule as injected."""
        return optimizer_config(self.parameters(), self.optimizer, self.lr_scheduler, self.lr_interval, self.lr)

    @torch.no_grad()
    def verdict(self, image: Any) -> Verdict:
        """Verdict on an image, by the crops that validation looked at.

        Args:
            image: See `predict_image`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be read or is not an image; the message names it.
        """
        crops = self._fixed_crops(image)[None]
        training = self.training
        self.eval()
        output, features = self._predict({"image": crops})
        output = self._with_verdicts(crops, {**output, "ood_score": self.densities.ood_score(features)})
        self.train(training)
        number = int(output["verdict"])
        label = "unsure" if number == UNSURE else ("photographic", "generated")[number]
        return Verdict(label, float(output["probability"]), float(output["ood_score"]), output["reason"][0])

    @torch.no_grad()
    def predict_image(self, image: Any) -> float:
        """Calibrated probability that an image is generated, by the crops that validation looked at.

        Args:
            image: Path of a file, PIL image, array of bytes `[H, W, 3]`, or tensor `[3, H, W]` of bytes or in [0, 1].

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be read or is not an image; the message names it.
        """
        crops = self._fixed_crops(image)
        training = self.training
        self.eval()
        logits = [self(part[None])[0].double() * len(part) for part in crops.split(_CROPS_AT_ONCE)]
        self.train(training)
        return float(self.calibration(torch.stack(logits).sum() / len(crops)))

    def _fixed_crops(self, image: Any) -> Tensor:
        count, size = self.crops.tolist()
        return fixed_crops(to_pixels(image).to(self.device), size, count)

    @torch.no_grad()
    def residual(self, images: Tensor) -> Tensor:
        """What the restoration takes away from whole images, for pictures; without a restoration, the first input.

        Of an input that has not three channels it is their mean, in grey.

        Shape:
            - images: `[B, 3, H, W]` in [0, 1]
            - output: `[B, 3, H, W]`, in units of the pixels
        """
        shown: Any = self._restoration or self.inputs[0]
        result: Tensor = shown.featurize(images)
        return result if result.shape[1] == 3 else result.mean(1, keepdim=True).expand(-1, 3, -1, -1)

    def _predict(self, batch: Batch) -> tuple[dict[str, Any], Tensor]:
        logit, features = self(batch["image"])
        # in float64: in float32 images that are almost certain would be equal, and their order lost
        output = {"probability": self.calibration(logit.double()), "logit": logit}
        return {**output, **{name: batch[name] for name in _PASSED_ON if name in batch}}, features

    def _compare_crops(self, images: Tensor) -> None:
        """Warns where images are not looked at as they were when the detector was calibrated."""
        now, then = [images.shape[1], images.shape[-1]], self.crops.tolist()
        if self.calibration.fitted and now != then:
            rank_zero_warn(
                f"the detector was calibrated on {then[0]} crops of {then[1]} pixels an image and now sees {now[0]} of "
                f"{now[1]}: its probabilities and threshold need not hold. Set eval_crops and crop_size alike"
            )

    def _evaluate(self, batch: Batch, buffer: PredictionBuffer) -> dict[str, Any]:
        output, features = self._predict(batch)
        columns = (batch["index"], output["logit"], batch["label"], features, batch["weight"], batch.get("unseen"))
        buffer.update(*columns)
        return {**output, "ood_score": self.densities.ood_score(features)}

    def _with_verdicts(self, images: Tensor, output: dict[str, Any]) -> dict[str, Any]:
        """What was predicted, with `verdict`, 0, 1 or `UNSURE`, and `reason`, a list."""
        pixels = (images.float() * 255).round().to(torch.uint8).cpu()
        views = [torch.stack(view) for view in zip(*map(changed_views, pixels), strict=True)]
        logits = [output["logit"], *(self(view.to(images.device) / 255)[0] for view in views)]
        verdict, reasons = decide(torch.stack(logits, dim=1), self.calibration, output["ood_score"])
        return {**output, "verdict": verdict, "reason": reasons}

    def _keep_parts(self, inputs: list[DetectorInput] | None, backbone: nn.Module | None) -> None:
        """Puts parts that were made in Python among the hyperparameters, as those from the command line are."""
        parts: dict[str, Any] = {}
        if inputs is not None:
            parts["inputs"] = [configuration(part) for part in inputs]
        if backbone is not None:
            parts["backbone"] = configuration(backbone)
        if parts and None not in [*parts.get("inputs", ()), parts.get("backbone", ...)]:
            self.hparams.update({**parts, "_instantiator": _INSTANTIATOR})

    def _log(self, prefix: str, values: dict[str, Tensor]) -> None:
        # equal on every process, for all have evaluated the images of all
        self.log_dict({f"{prefix}/{name}": value.float() for name, value in values.items()}, sync_dist=True)

    def _fit_to(self, seen: BufferedPredictions) -> None:
        """Calibrates by validation images, and keeps the result as it is to be in the checkpoint."""
        if not seen.has_both_classes:
            rank_zero_warn("the validation images are all of one class: nothing can be calibrated by them")
            return
        # Not in the steps: a callback that averages weights has other buffers in place during them.
        self.crops.copy_(torch.tensor(self._shape))
        self.calibration.fit(seen.calibrating.logit, seen.calibrating.label)
        self.log("val/temperature", self.calibration.temperature.float(), sync_dist=True)
        self.log("val/threshold", self.calibration.threshold.float(), sync_dist=True)
        if not self.densities.fit(seen.features, seen.label):
            rank_zero_warn(
                f"validation has fewer than {self.densities.images_needed} images of a class: no densities are fitted, "
                "and the ood_score stays unknown. Validate on more images, or lower num_directions"
            )
        names = ("calibration.", "densities.", "crops")
        self._fitted = {name: value.clone() for name, value in self.state_dict().items() if name.startswith(names)}


def _probe(network: nn.Module, name: str, x: Tensor) -> Tensor:
    """What a network makes of a small batch, without a trace in its state."""
    training = network.training
    try:
        with torch.no_grad():
            output: Tensor = network.eval()(x)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{name} cannot process {list(x.shape)}: {error}. Do the numbers of channels agree?"
        ) from error
    network.train(training)
    return output
