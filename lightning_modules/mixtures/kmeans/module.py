"""K-means by streaming passes."""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.mixtures.initialization import Initialization
from lightning_modules.mixtures.kmeans.model import KMeansModel
from lightning_modules.mixtures.model import Algorithm
from lightning_modules.mixtures.module import ClusteringModule


class KMeans(ClusteringModule):
    """K-means (Lloyd's algorithm), learned from any DataModule or DataLoader, on any number of processes.

    The assignment is the `training_step` and keeps sums only; the centres move at the end of the epoch, after one
    reduction over the ranks. A centre that has lost its rows restarts at a row far from all centres.

    Args:
        num_components: Clusters.
        num_features: Width of the data; found out from the first batch where not given.
        tol: The run has converged when the squared movement of the centres, summed, is at most this many mean variances
            of a feature.
        max_iter: Iterations at most.
        init: `k-means++` on a sample of the data; `k-means||`, on all of the data in six passes; or `random` rows.
        n_init: Starts, side by side in the same passes; the best is kept.
        init_size: Rows that the sample for the initialisation may hold; by default 32 MiB of them.
        centers_init: Centres to start from, [K, D].
        algorithm: `exact` moves the centres once an epoch; `stepwise` once an optimiser step (mini-batch K-means,
            Sculley 2010).
        standardize: Scale the features to variance 1 inside. Reported centres are in the units of the data.
        seed: Seed of the starts.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from torch.utils.data import DataLoader
        >>> rows = torch.cat([torch.randn(100, 2) - 5, torch.randn(100, 2) + 5])
        >>> kmeans = KMeans(num_components=2)
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> trainer = Trainer(max_epochs=50, accelerator="cpu", enable_model_summary=False, **quiet)
        >>> trainer.fit(kmeans, DataLoader(rows, 64))
        >>> kmeans.predict(rows).shape, kmeans.centers.shape
        (torch.Size([200]), torch.Size([2, 2]))
    """

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
        standardize: bool = False,
        seed: int = 0,
    ) -> None:
        if centers_init is not None and not isinstance(centers_init, list):
            # plain lists: checkpoints are loaded with weights_only
            centers_init = torch.as_tensor(centers_init).tolist()
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
            standardize=standardize,
            seed=seed,
        )
        super().__init__(model, "inertia")
        self.save_hyperparameters()

    @property
    def centers(self) -> Tensor:
        """Centres in units of the data, `[K, D]`."""
        return self.model.reported()

    @property
    def inertia(self) -> float:
        """Sum of squared distances in the last pass, under the centres before they moved; of standardised rows with
        `standardize`.
        """
        return float(self.model.objective[self.model.best])

    def predict(self, x: Tensor) -> Tensor:
        """Returns the nearest centre of each row.

        Shape:
            - x: [N, D].
            - returns: [N].
        """
        return self.model.assign(self._input(x))[0]

    def transform(self, x: Tensor) -> Tensor:
        """Returns the distance of each row to each centre.

        Shape:
            - x: [N, D].
            - returns: [N, K].
        """
        return self.model.distances(self._input(x))

    def score(self, x: Tensor) -> float:
        """Returns minus the sum of squared distances of the rows `x` `[N, D]` to their centres."""
        return -float(self.model.assign(self._input(x))[1].sum())

    def forward(self, x: Tensor) -> Tensor:
        """Returns the nearest centre of each row, as :meth:`predict` does."""
        return self.predict(x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the mean squared distance of a validation batch."""
        self._log_distance("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the mean squared distance of a test batch."""
        self._log_distance("test", batch)

    def _log_distance(self, stage: str, batch: Any) -> None:
        x, mask, _ = self._rows(batch)
        x = x if mask is None else x[mask]
        if bool(self.model.initialized) and len(x):
            distance = self.model.assign(self._input(x))[1].mean()
            self.log(f"{stage}/squared_distance", distance, batch_size=len(x), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Returns `component` `[B]` and `squared_distance` `[B]`, and `index` where it is known."""
        x, _, index = self._rows(batch)
        labels, squares = self.model.assign(self._input(x))
        result = {"component": labels, "squared_distance": squares}
        return result if index is None else result | {"index": index}
