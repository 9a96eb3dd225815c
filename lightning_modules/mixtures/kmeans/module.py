"""K-means as a LightningModule."""

from torch import Tensor

from lightning_modules.mixtures.batches import as_tensor
from lightning_modules.mixtures.initialization import Initialization
from lightning_modules.mixtures.kmeans.model import KMeansModel
from lightning_modules.mixtures.model import Algorithm
from lightning_modules.mixtures.module import ClusteringModule


class KMeans(ClusteringModule):
    """K-means (Lloyd's algorithm), learned from any DataModule or DataLoader, on any number of processes.

    The assignment is the `training_step` and keeps sums only; the centers move at the end of the epoch, after one
    reduction over the ranks. A center that has lost its samples restarts at a sample far from all centers.

    Args:
        num_components: Clusters.
        num_features: Width of the data; found out from the first batch where not given.
        tol: The run has converged when the squared movement of the centers, summed, is at most this many mean variances
            of a feature.
        max_iter: Iterations at most.
        init: `k-means++` on a random choice of the data; `k-means||`, on all of the data in six passes; or `random`
            samples.
        n_init: Restarts, side by side in the same epochs; the best is kept.
        init_size: Samples that the choice for the initialisation may hold; by default 32 MiB of them.
        centers_init: Centers to start from, `[K, D]`.
        algorithm: `exact` moves the centers once an epoch; `stepwise` once an optimiser step (mini-batch K-means,
            Sculley 2010).
        reassignment_ratio: Centers that have seen less than this part of the samples of the largest one start again far
            from all centers, where `stepwise`.
        standardize: Scale the features to variance 1 inside. Reported centers are in the units of the data.
        seed: Seed of the restarts.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from torch.utils.data import DataLoader
        >>> samples = torch.cat([torch.randn(100, 2) - 5, torch.randn(100, 2) + 5])
        >>> kmeans = KMeans(num_components=2)
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> trainer = Trainer(max_epochs=50, accelerator="cpu", enable_model_summary=False, **quiet)
        >>> trainer.fit(kmeans, DataLoader(samples, 64))
        >>> kmeans.predict(samples).shape, kmeans.centers.shape
        (torch.Size([200]), torch.Size([2, 2]))
    """

    objective = "inertia"
    metric = "squared_distance"
    model: KMeansModel

    def __init__(
        self,
        num_components: int,
        num_features: int | None = None,
        tol: float = 1e-4,
        max_iter: int = 300,
        init: Initialization = "k-means++",
        n_init: int = 1,
        init_size: int | None = None,
        centers_init: list[list[float]] | None = None,
        algorithm: Algorithm = "exact",
        reassignment_ratio: float = 0.01,
        standardize: bool = False,
        seed: int = 0,
    ) -> None:
        if centers_init is not None and not isinstance(centers_init, list):
            # plain lists: checkpoints are loaded with weights_only
            centers_init = as_tensor(centers_init).tolist()
        model = KMeansModel(
            num_components,
            num_features,
            tol=tol,
            max_iter=max_iter,
            init=init,
            n_init=n_init,
            init_size=init_size,
            centers_init=centers_init,
            algorithm=algorithm,
            reassignment_ratio=reassignment_ratio,
            standardize=standardize,
            seed=seed,
        )
        super().__init__(model)

    @property
    def centers(self) -> Tensor:
        """Centers in units of the data, `[K, D]`."""
        return self.model.best_parameters().centers

    @property
    def inertia(self) -> float:
        """Sum of squared distances in the last epoch, under the centers before they moved; of standardized samples
        with `standardize`.
        """
        return float(self.model.objective[self.model.best])

    def infer(self, x: Tensor) -> dict[str, Tensor]:
        """Returns the nearest center (`component`) of each sample and the `squared_distance` to it.

        Shape:
            - x: `[N, D]`
            - output: `[N]` each
        """
        labels, squares = self.model.assign(self._input(x))
        return {"component": labels, "squared_distance": squares}

    def transform(self, x: Tensor) -> Tensor:
        """Returns the distance of each sample to each center.

        Shape:
            - x: `[N, D]`
            - output: `[N, K]`
        """
        return self.model.distances(self._input(x))

    def score(self, x: Tensor) -> float:
        """Returns minus the sum of squared distances of the samples to their centers.

        Shape:
            - x: `[N, D]`
        """
        return -float(self.infer(x)["squared_distance"].sum())

    def forward(self, x: Tensor) -> Tensor:
        """Returns the nearest center of each sample.

        Shape:
            - x: `[N, D]`
            - output: `[N]`
        """
        return self.predict(x)
