"""A Gaussian mixture over image patches that restores whole images."""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.mixtures.gaussian.module import GaussianMixture
from lightning_modules.mixtures.model import Algorithm
from lightning_modules.networks.patch_prior import PatchPrior


class PatchMixture(GaussianMixture):
    """A `GaussianMixture` learned on patches, whose `predict` restores images by expected patch log-likelihood.

    It learns as its base class does, from patches without their mean (`PatchDataModule`); the covariances are full.

    Args:
        num_components: Components of the mixture.
        noise_std: Standard deviation of the noise to remove, where white is 1; for data without their own.
        stride: Distance between the patches of an image that is restored; 1 takes all, and restores best.
        tol: The run has converged when the mean log-likelihood changes by no more.
        max_iter: Iterations at most.
        reg_covar: Added to the variances.
        init_size: Samples that the choice for the initialisation may hold; by default 32 MiB of them.
        algorithm: `exact` updates once an epoch, `stepwise` once an optimiser step.
        step_exponent: How fast stepwise EM forgets.
        seed: Seed of the start.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from datamodules import PatchDataModule, PhotoCropsDataModule
        >>> mixture = PatchMixture(num_components=2, max_iter=2)
        >>> data = PatchDataModule(images=PhotoCropsDataModule(train_crops=20), patches_per_image=10)
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **quiet).fit(mixture, data)
        >>> mixture.restore(torch.rand(1, 3, 20, 24)).shape
        torch.Size([1, 3, 20, 24])
    """

    def __init__(
        self,
        num_components: int = 200,
        noise_std: float = 25 / 255,
        stride: int = 1,
        tol: float = 1e-3,
        max_iter: int = 100,
        reg_covar: float = 1e-6,
        init_size: int | None = None,
        algorithm: Algorithm = "exact",
        step_exponent: float = 0.7,
        seed: int = 0,
    ) -> None:
        super().__init__(
            num_components,
            tol=tol,
            max_iter=max_iter,
            reg_covar=reg_covar,
            init_size=init_size,
            algorithm=algorithm,
            step_exponent=step_exponent,
            seed=seed,
        )
        self.noise_std, self.stride = noise_std, stride

    def prior(self) -> PatchPrior:
        """Returns the learned prior, a plain `nn.Module` and a backbone for `GraphDiffusionReconstruction`."""
        theta = self.model.best_parameters()
        prior = PatchPrior(theta.weights, theta.means, theta.covariances, noise_std=self.noise_std, stride=self.stride)
        return prior.to(self.device)

    @torch.no_grad()
    def restore(self, images: Tensor, noise_std: Tensor | float | None = None) -> Tensor:
        """Returns the restored images.

        Args:
            images: Noisy images.
            noise_std: Their noise, a number or one for each image.

        Shape:
            - images: `[B, C, H, W]` in [0, 1]
            - noise_std: `[B]`, where a tensor
            - output: `[B, C, H, W]` in [0, 1]
        """
        return self.prior()(images, noise_std).clamp(0.0, 1.0)

    def on_predict_start(self) -> None:
        """Factorises the covariances once."""
        self._prior = self.prior()

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Returns `restored` and `noisy` `[B, C, H, W]`, `name`, `noise_std` `[B]` and, empty, `parameters`."""
        noisy = batch["image"]
        levels = batch.get("noise_std")
        if levels is None:
            levels = noisy.new_full((len(noisy),), self.noise_std)
        restored = self._prior(noisy, levels).clamp(0.0, 1.0)
        return {"restored": restored, "noisy": noisy, "name": batch["name"], "noise_std": levels, "parameters": {}}
