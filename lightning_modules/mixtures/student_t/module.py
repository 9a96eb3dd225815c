"""Mixture of t distributions as a LightningModule."""

from torch import Tensor

from lightning_modules.mixtures.gaussian.density import CovarianceType
from lightning_modules.mixtures.gaussian.module import EllipticalMixture, Matrix, Vector, plain
from lightning_modules.mixtures.initialization import Initialization
from lightning_modules.mixtures.model import Algorithm
from lightning_modules.mixtures.student_t.model import StudentTMixtureModel


class StudentTMixture(EllipticalMixture):
    """A mixture of multivariate t distributions (Peel and McLachlan 2000), which outliers do not pull along.

    Each sample has a hidden precision beside its hidden component: the farther it is, the less it counts in the means
    and the scale matrices. The fewer degrees of freedom, the heavier the tails; with many a component is a Gaussian.
    Everything else is as `GaussianMixture` has it.

    Args:
        num_components: Components of the mixture.
        num_features: Width of the data; found out from the first batch where not given.
        covariance_type: Of the scale matrices: `full`, `tied` (one for all components), `diag` or `spherical`.
        degrees_of_freedom: Of all components, where they are known; by default each component learns its own.
        tol: The run has converged when the mean log-likelihood changes by no more.
        max_iter: Iterations at most.
        reg_covar: Added to the diagonal of the scale matrices, in units of the data (of the standardised data with
            `standardize`).
        init: `k-means++` on a random choice of the data, refined there by K-means; `k-means||`, on all of the data in
            six passes; or `random` samples.
        n_init: Restarts, side by side in the same epochs; the best is kept.
        init_size: Samples that the choice for the initialisation may hold; by default 32 MiB of them.
        weights_init: Weights to start from, `[K]`.
        means_init: Means to start from, `[K, D]`.
        precisions_init: Inverses of the scale matrices to start from, shaped as the covariance type has them.
        algorithm: `exact` updates once an epoch; `stepwise` once an optimiser step.
        step_exponent: How fast stepwise EM forgets: step t has weight `(t + 2)^-step_exponent`; above 0.5, at most 1.
        standardize: Scale the features to variance 1 inside. Reported parameters are in the units of the data.
        seed: Seed of the restarts.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from torch.utils.data import DataLoader
        >>> samples = torch.cat([torch.randn(100, 2) - 5, torch.randn(100, 2) + 5])
        >>> mixture = StudentTMixture(num_components=2)
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> trainer = Trainer(max_epochs=50, accelerator="cpu", enable_model_summary=False, **quiet)
        >>> trainer.fit(mixture, DataLoader(samples, 64))
        >>> mixture.predict(samples).shape, mixture.degrees_of_freedom.shape
        (torch.Size([200]), torch.Size([2]))
    """

    model: StudentTMixtureModel

    def __init__(
        self,
        num_components: int,
        num_features: int | None = None,
        covariance_type: CovarianceType = "full",
        degrees_of_freedom: float | None = None,
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
        model = StudentTMixtureModel(
            num_components,
            num_features,
            covariance_type=covariance_type,
            degrees_of_freedom=degrees_of_freedom,
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

    @property
    def degrees_of_freedom(self) -> Tensor:
        """Degrees of freedom of the components, `[K]`."""
        return self.model.degrees_of_freedom[self.model.best]
