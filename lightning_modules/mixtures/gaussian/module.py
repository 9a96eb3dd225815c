"""Gaussian mixture as a LightningModule."""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.mixtures.gaussian.density import CovarianceType
from lightning_modules.mixtures.gaussian.em import MixtureParameters
from lightning_modules.mixtures.gaussian.model import GaussianMixtureModel
from lightning_modules.mixtures.initialization import Initialization
from lightning_modules.mixtures.model import Algorithm
from lightning_modules.mixtures.module import MixtureModule

Vector = list[float]
Matrix = list[Vector]


class EllipticalMixture(MixtureModule):
    """Base of the mixtures whose components have a place and a matrix: what was learned, in units of the data."""

    model: GaussianMixtureModel

    @property
    def parameters_in_data_units(self) -> MixtureParameters:
        """The learned mixture, for the functions of `lightning_modules.mixtures`."""
        return self.model.best_parameters()

    @property
    def weights(self) -> Tensor:
        """Weights of the components, `[K]`."""
        return self.model.best_parameters().weights

    @property
    def means(self) -> Tensor:
        """Means in units of the data, `[K, D]`."""
        return self.model.best_parameters().means

    @property
    def covariances(self) -> Tensor:
        """Covariances in units of the data, `[K, D, D]`, `[D, D]`, `[K, D]` or `[K]` by covariance type."""
        return self.model.best_parameters().covariances

    @property
    def precisions(self) -> Tensor:
        """Inverses of the covariances."""
        return self.model.best_parameters().precisions

    def sample(self, num_samples: int = 1, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Draws samples from the mixture, and the components they came from.

        Args:
            num_samples: How many.
            seed: Seed of the draw; the global generator where not given.

        Shape:
            - output: `[num_samples, D]` in units of the data, and `[num_samples]`
        """
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return self.model.sample(num_samples, generator)


class GaussianMixture(EllipticalMixture):
    """A mixture of Gaussians, learned by EM from any DataModule or DataLoader, on any number of processes.

    The E-step is the `training_step` and keeps sums only; the M-step is the end of the epoch, after one reduction over
    the ranks. One epoch is one iteration, the likelihood never falls from one to the next, and the run stops at `tol`.

    Args:
        num_components: Components of the mixture.
        num_features: Width of the data; found out from the first batch where not given.
        covariance_type: `full`, `tied` (one for all components), `diag` or `spherical`.
        tol: The run has converged when the mean log-likelihood changes by no more.
        max_iter: Iterations at most.
        reg_covar: Added to the variances, in units of the data (of the standardised data with `standardize`).
        init: `k-means++` on a random choice of the data, refined there by K-means; `k-means||`, on all of the data in
            six passes; or `random` samples.
        n_init: Restarts, side by side in the same epochs; the best is kept.
        init_size: Samples that the choice for the initialisation may hold; by default 32 MiB of them.
        weights_init: Weights to start from, `[K]`.
        means_init: Means to start from, `[K, D]`.
        precisions_init: Precisions to start from, shaped as the covariance type has it. With weights and means given
            too, the initialisation needs no pass.
        algorithm: `exact` updates once an epoch; `stepwise` once an optimiser step, which takes fewer passes over much
            data (Cappé and Moulines 2009).
        step_exponent: How fast stepwise EM forgets: step t has weight `(t + 2)^-step_exponent`; above 0.5, at most 1.
        standardize: Scale the features to variance 1 inside. Reported parameters are in the units of the data.
        seed: Seed of the restarts.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from torch.utils.data import DataLoader
        >>> samples = torch.cat([torch.randn(100, 2) - 5, torch.randn(100, 2) + 5])
        >>> mixture = GaussianMixture(num_components=2)
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> trainer = Trainer(max_epochs=50, accelerator="cpu", enable_model_summary=False, **quiet)
        >>> trainer.fit(mixture, DataLoader(samples, 64))
        >>> mixture.predict(samples).shape, mixture.weights.shape
        (torch.Size([200]), torch.Size([2]))
    """

    def __init__(
        self,
        num_components: int,
        num_features: int | None = None,
        covariance_type: CovarianceType = "full",
        tol: float = 1e-3,
        max_iter: int = 100,
        reg_covar: float = 1e-6,
        init: Initialization = "k-means++",
        n_init: int = 1,
        init_size: int | None = None,
        weights_init: Vector | None = None,
        means_init: Matrix | None = None,
        precisions_init: Vector | Matrix | list[Matrix] | None = None,
        algorithm: Algorithm = "exact",
        step_exponent: float = 0.7,
        standardize: bool = False,
        seed: int = 0,
    ) -> None:
        # plain lists: checkpoints are loaded with weights_only
        weights_init, means_init, precisions_init = (plain(x) for x in (weights_init, means_init, precisions_init))
        model = GaussianMixtureModel(
            num_components,
            num_features,
            covariance_type=covariance_type,
            tol=tol,
            max_iter=max_iter,
            reg_covar=reg_covar,
            init=init,
            n_init=n_init,
            init_size=init_size,
            weights_init=weights_init,
            means_init=means_init,
            precisions_init=precisions_init,
            algorithm=algorithm,
            step_exponent=step_exponent,
            standardize=standardize,
            seed=seed,
        )
        super().__init__(model)


def plain(value: Any) -> Any:
    """Numbers in lists, of arrays and tensors."""
    return value.tolist() if hasattr(value, "tolist") else value
