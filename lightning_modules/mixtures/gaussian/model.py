"""A Gaussian mixture that learns from passes over a stream: state and flow around the pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.mixtures.collectives import Collectives
from lightning_modules.mixtures.gaussian.density import CovarianceType
from lightning_modules.mixtures.gaussian.em import (
    EMPTY_COUNT,
    MixtureParameters,
    MixtureStatistics,
    check_positive_definite,
    expectation,
    expected_log_joint,
    hard_statistics,
    maximisation,
    num_free_parameters,
    statistics_of,
)
from lightning_modules.mixtures.initialization import Initialization, Stream
from lightning_modules.mixtures.kmeans.em import assign
from lightning_modules.mixtures.lloyd import lloyd
from lightning_modules.mixtures.model import ClusteringModel, PassReport
from lightning_modules.mixtures.standardizer import ReferenceFrame

# Lloyd iterations on the sample before the mixture starts.
SAMPLE_ITERATIONS = 20


class GaussianMixtureModel(ClusteringModel):
    """The state of a Gaussian mixture; arguments as :class:`lightning_modules.GaussianMixture` has them."""

    #: [S, K]
    weights: Tensor
    #: in the frame, [S, K, D]
    means: Tensor
    #: in the frame; the shape is that of the covariance type, after S
    covariances: Tensor
    #: mini-batch updates so far
    steps: Tensor
    #: running mean of the statistics, flat (stepwise)
    average: Tensor

    def __init__(
        self,
        num_components: int,
        num_features: int | None = None,
        *,
        covariance_type: CovarianceType = "full",
        reg_covar: float = 1e-6,
        weights_init: Sequence[Any] | Tensor | None = None,
        means_init: Sequence[Any] | Tensor | None = None,
        precisions_init: Sequence[Any] | Tensor | None = None,
        step_exponent: float = 0.7,
        init: Initialization = "k-means++",
        n_init: int = 1,
        **options: Any,
    ) -> None:
        if covariance_type not in ("full", "diag", "tied", "spherical"):
            raise ValueError(f"covariance_type must be 'full', 'diag', 'tied' or 'spherical', got {covariance_type!r}")
        if not reg_covar >= 0:
            raise ValueError(f"reg_covar must be at least 0, got {reg_covar!r}")
        if not 0.5 < step_exponent <= 1:
            raise ValueError(f"step_exponent must be in (0.5, 1] for stepwise EM to converge, got {step_exponent!r}")
        # plain values: nn.Module takes them before its own __init__
        self.covariance_type, self.reg_covar, self.step_exponent = covariance_type, reg_covar, step_exponent
        super().__init__(num_components, num_features, init=init, n_init=n_init, **options)
        if self.standardize is False and covariance_type == "spherical":
            self.scaling = "common"
        self._given = self._check_given(weights_init, means_init, precisions_init, num_features)
        self._statistics: MixtureStatistics | None = None

    def _shapes(self, num_features: int) -> dict[str, tuple[tuple[int, ...], Tensor]]:
        starts, k, d = self.n_init, self.num_components, num_features
        shape = {"full": (k, d, d), "tied": (d, d), "diag": (k, d), "spherical": (k,)}[self.covariance_type]
        zero = torch.tensor(0.0, dtype=torch.float64)
        second = (k, d) if self.covariance_type == "spherical" else shape
        size = starts * (k + k * d + torch.Size(second).numel() + 2) + 1 if self.algorithm == "stepwise" else 0
        return super()._shapes(num_features) | {
            "weights": ((starts, k), torch.tensor(1.0 / k, dtype=torch.float64)),
            "means": ((starts, k, d), zero),
            "covariances": ((starts, *shape), zero),
            "steps": ((), torch.tensor(0, dtype=torch.long)),
            "average": ((size,), zero),
        }

    # -------------------------------------------------------- parameters

    def _theta(self, start: Tensor | int | slice = slice(None)) -> MixtureParameters:
        return MixtureParameters(
            self.covariance_type, self.weights[start], self.means[start], self.covariances[start]
        )  # fmt: skip

    def _reg(self) -> Tensor:
        """``reg_covar`` in units of the frame, ``[D]``."""
        reg = torch.full_like(self.scale, self.reg_covar)
        return reg if self.standardize else reg / self.scale.square()

    def reported(self) -> MixtureParameters:
        """The best start in units of the data, unbatched.

        A spherical mixture of standardised features is diagonal in the data's units, and is reported as such.
        """
        self.require_initialized()
        theta, scale = self._theta(int(self.best)), self.scale
        kind = theta.covariance_type
        if kind == "spherical" and self.standardize:
            covariances = theta.covariances[:, None] * scale.square()
            return MixtureParameters("diag", theta.weights.clone(), self.frame.leave(theta.means), covariances)
        factor = {"diag": scale.square(), "spherical": scale.square().mean()}.get(kind, scale[:, None] * scale)
        return MixtureParameters(kind, theta.weights.clone(), self.frame.leave(theta.means), theta.covariances * factor)

    def _check_given(
        self,
        weights: Any,
        means: Any,
        precisions: Any,
        num_features: int | None,
    ) -> dict[str, Tensor]:
        given = {}
        for name, value in (("weights", weights), ("means", means), ("precisions", precisions)):
            if value is not None:
                given[name] = torch.as_tensor(value, dtype=torch.float64)
                if not bool(torch.isfinite(given[name]).all()):
                    raise ValueError(f"{name}_init must be finite")
        k = self.num_components
        width = num_features or next((given[n].shape[-1] for n in ("means", "precisions") if n in given), 0)
        shapes = {
            "weights": (k,),
            "means": (k, width),
            "precisions": {"full": (k, width, width), "tied": (width, width), "diag": (k, width), "spherical": (k,)}[
                self.covariance_type
            ],
        }
        for name, value in given.items():
            if value.shape != shapes[name]:
                raise ValueError(
                    f"The parameter '{name}_init' should have the shape of {shapes[name]}, but got {tuple(value.shape)}"
                )
        if "weights" in given and (bool((given["weights"] < 0).any()) or abs(float(given["weights"].sum()) - 1) > 1e-6):
            raise ValueError(
                f"weights_init must be non-negative and sum to 1, got sum {float(given['weights'].sum()):.6g}"
            )
        if "precisions" in given:
            self._check_precisions(given["precisions"])
        if "means" in given and self.n_init > 1:
            raise ValueError(f"n_init={self.n_init} starts would all be the given means_init: use n_init=1")
        return given

    def _check_precisions(self, precisions: Tensor) -> None:
        if self.covariance_type in ("diag", "spherical"):
            good = bool((precisions > 0).all())
        else:
            good = bool((precisions - precisions.mT).abs().max() <= 1e-8 * precisions.abs().max())
            good = good and bool((torch.linalg.cholesky_ex(precisions)[1] == 0).all())
        if not good:
            raise ValueError(
                f"precisions_init should be symmetric, positive-definite for covariance_type={self.covariance_type!r}"
            )

    def _given_covariances(self) -> Tensor:
        precisions = self._given["precisions"].to(self.offset.device)
        return torch.linalg.inv(precisions) if self.covariance_type in ("full", "tied") else 1 / precisions

    def _write(self, theta: MixtureParameters, active: Tensor | slice = slice(None)) -> None:
        self.weights[active] = theta.weights
        self.means[active] = theta.means
        self.covariances[active] = theta.covariances

    # ---------------------------------------------------- initialisation

    def _start_without_data(self) -> bool:
        if len(self._given) < 3 or self.standardize:
            return False
        means, weights = self._given["means"].to(self.offset.device), self._given["weights"].to(self.offset.device)
        self._allocate(means.shape[1])
        covariances = self._given_covariances()
        within = {
            "full": lambda: weights @ covariances.diagonal(dim1=-2, dim2=-1),
            "tied": covariances.diagonal,
            "diag": lambda: weights @ covariances,
            "spherical": lambda: (weights @ covariances).expand(means.shape[1]),
        }[self.covariance_type]()
        offset = weights @ means
        scale = (within + weights @ (means - offset).square()).sqrt()
        scale = scale.square().mean().sqrt().expand_as(scale) if self.scaling == "common" else scale
        self._set_frame(ReferenceFrame(offset, scale))
        self._write(MixtureParameters(self.covariance_type, *self._given_in_frame()))
        self._start_average()
        return True

    def _given_in_frame(self) -> tuple[Tensor, Tensor, Tensor]:
        """Given weights, means and covariances in the frame; what is not given is what the buffers hold."""
        weights, means, covariances = self.weights, self.means, self.covariances
        if "weights" in self._given:
            weights = self._given["weights"].to(weights).expand_as(weights)
        if "means" in self._given:
            means = self.frame.enter(self._given["means"].to(means.device)).expand_as(means)
        if "precisions" in self._given:
            scale = self.scale
            factor = {"diag": scale.square(), "spherical": scale.square().mean()}
            covariances = self._given_covariances() / factor.get(self.covariance_type, scale[:, None] * scale)
            covariances = covariances.expand_as(self.covariances)
        return weights, means, covariances

    def _given_centers(self) -> Tensor | None:
        return self.frame.enter(self._given["means"].to(self.offset.device))[None] if "means" in self._given else None

    def _choose_centers(self, sample: Tensor, stream: Stream, collectives: Collectives) -> Tensor:
        centers = super()._choose_centers(sample, stream, collectives)
        if self.init != "k-means++":
            return centers
        return torch.stack([lloyd(sample, start, SAMPLE_ITERATIONS).centers for start in centers])

    def _start_from(self, centers: Tensor, rows: Tensor | None, stream: Stream, collectives: Collectives) -> None:
        """Parameters of the hard assignment to ``centers``: from the sample if it is all the data, else by one more
        pass.
        """
        if rows is not None:
            statistics = hard_statistics(self.covariance_type, centers, assign(centers, rows)[0], rows)
        else:
            total: MixtureStatistics | None = None
            for x, mask, _ in stream():
                z = self.frame.enter(self.check_rows(x))
                part = hard_statistics(self.covariance_type, centers, assign(centers, z)[0], z, mask)
                total = part if total is None else total.with_flat(total.flat() + part.flat())
            assert total is not None
            statistics = total.with_flat(collectives.reduce(total.flat()))
            self.initialization_passes += 1
        theta = maximisation(statistics, self._reg())
        # the centre of a component without rows is where it was put
        empty = (statistics.weight <= EMPTY_COUNT)[..., None]
        theta.means = torch.where(empty, centers, theta.means)
        self._write(theta)
        self._write(MixtureParameters(self.covariance_type, *self._given_in_frame()))
        check_positive_definite(self._theta(), self.reg_covar)
        self._start_average()

    def _start_average(self) -> None:
        if self.algorithm == "stepwise":
            self.average.copy_(statistics_of(self._theta()).flat())

    # ------------------------------------------------------------ passes

    @torch.no_grad()
    def begin_pass(self) -> None:
        """Forget the sums and prepare the densities of the starts that still move."""
        self._active = self._active_starts()
        self._tally = self.weights.new_zeros(int(self._active.sum()) + 2)
        self._prepare()

    def _prepare(self) -> None:
        self._components = self._theta(self._active).components()
        self._statistics = MixtureStatistics.zeros_for(self._components)
        self._invalid = self.weights.new_zeros(())

    @torch.no_grad()
    def accumulate(self, x: Tensor, mask: Tensor | None = None) -> None:
        """E-step: add the sufficient statistics of ``x`` ``[N, D]``."""
        for z, part in self._blocks(x, mask):
            expectation(self._components, z, part, into=self._statistics)

    def _reduced(self, collectives: Collectives | None) -> MixtureStatistics:
        """The sums over all processes: the one reduction."""
        assert self._statistics is not None
        assert self._invalid is not None
        flat = torch.cat([self._invalid.view(1), self._statistics.flat()])
        flat = (collectives or Collectives()).reduce(flat)
        if int(flat[0]):
            self._check_count(self.num_components, int(flat[0]))
        statistics = self._statistics.with_flat(flat[1:])
        if not bool(statistics.count > 0):
            raise ValueError("Found array with 0 sample(s) while a minimum of 1 is required: the data is empty.")
        return statistics

    @torch.no_grad()
    def end_step(self, collectives: Collectives | None = None) -> None:
        r"""Stepwise M-step (Cappé and Moulines 2009): :math:`s \leftarrow (1-\gamma_t) s + \gamma_t \hat s_t`,
        :math:`\gamma_t = (t+2)^{-\alpha}`.
        """
        statistics = self._reduced(collectives)
        self._tally += torch.cat([statistics.log_likelihood, statistics.entropy.sum()[None], statistics.count[None]])
        batch = statistics.about_origin()
        rate = float(self.steps + 2) ** -self.step_exponent
        self.average.mul_(1 - rate).add_(batch.flat() / batch.count, alpha=rate)
        self.steps += 1
        theta = maximisation(batch.with_flat(self.average), self._reg())
        check_positive_definite(theta, self.reg_covar)
        self._write(theta, self._active)
        self._prepare()

    @torch.no_grad()
    def end_pass(self, collectives: Collectives | None = None) -> PassReport:
        """M-step, after one reduction over the processes."""
        if self.algorithm == "stepwise":
            return self._end_stepwise_pass()
        statistics = self._reduced(collectives)
        count = int(statistics.count)
        self._check_count(count, 0)
        previous = self._theta(self._active)
        theta = maximisation(statistics, self._reg(), previous)
        check_positive_definite(theta, self.reg_covar)
        bound = (expected_log_joint(statistics, theta) + statistics.entropy) / count - self.frame.log_volume
        likelihood = statistics.log_likelihood / count - self.frame.log_volume
        change = (likelihood - self.objective[self._active]).abs().nan_to_num(nan=torch.inf)
        self._write(theta, self._active)
        converged, moved = self._settle(likelihood, change, count, self._active)
        report = PassReport(int(self.iterations.max()), float(self.objective[self.best]), moved, converged, count)
        # the best start may have come to rest in an earlier pass; then there is nothing new to say of it
        place = int(self._active[: int(self.best)].sum())
        if bool(self._active[self.best]):
            report.numbers = {"bound": float(bound[place]), "entropy": float(statistics.entropy[place]) / count}
            report.empty = (statistics.weight[place] <= EMPTY_COUNT).nonzero()[:, 0].tolist()
        return report

    def _end_stepwise_pass(self) -> PassReport:
        count = int(self._tally[-1])
        likelihood = self._tally[:-2] / count - self.frame.log_volume
        change = (likelihood - self.objective[self._active]).abs().nan_to_num(nan=torch.inf)
        converged, moved = self._settle(likelihood, change, count, self._active)
        entropy = float(self._tally[-2]) / (count * len(likelihood))
        best = float(self.objective[self.best])
        return PassReport(int(self.iterations.max()), best, moved, converged, count, {"entropy": entropy})

    # --------------------------------------------------------- inference

    @torch.no_grad()
    def log_joint(self, x: Tensor) -> Tensor:
        r""":math:`\log \pi_k + \log N(x_n; \mu_k, \Sigma_k)` under the best start.

        Shape: ``x`` ``[N, D]``; result ``[N, K]`` float64.
        """
        self.require_initialized()
        x = self.check_rows(x)
        components = self._theta(int(self.best)).components()
        result = x.new_empty(x.shape[0], self.num_components, dtype=torch.float64)
        step = components.rows_per_chunk
        for first in range(0, x.shape[0], step):
            z = self.frame.enter(x[first : first + step])
            result[first : first + step] = components.log_joint(components.encode(z))[0].T
        return result - self.frame.log_volume

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Rows drawn from the mixture, in units of the data, and the components they came from.

        Shape: result ``[count, D]`` and ``[count]``.
        """
        self.require_initialized()
        if count < 1:
            raise ValueError(f"Invalid value for 'n_samples': {count}. The sampling requires at least one sample.")
        theta, device = self._theta(int(self.best)), self.offset.device
        labels = (
            torch.multinomial(theta.weights.cpu(), count, replacement=True, generator=generator)
            .sort()
            .values.to(device)
        )
        noise = torch.randn(count, self.num_features, generator=generator, dtype=torch.float64).to(device)
        covariances = theta.covariances
        if self.covariance_type == "full":
            rows = torch.zeros_like(noise)
            for k, factor in enumerate(torch.linalg.cholesky(covariances)):
                rows[labels == k] = noise[labels == k] @ factor.T
        elif self.covariance_type == "tied":
            rows = noise @ torch.linalg.cholesky(covariances).T
        else:
            deviations = covariances.sqrt()
            rows = noise * (deviations[labels] if self.covariance_type == "diag" else deviations[labels, None])
        return self.frame.leave(rows + theta.means[labels]), labels

    def num_free_parameters(self) -> int:
        """Free parameters, as BIC and AIC count them."""
        return num_free_parameters(self.covariance_type, self.num_components, self.num_features)
