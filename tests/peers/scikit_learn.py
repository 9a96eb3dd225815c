"""scikit-learn's own test files over this package's estimators: names are translated, and no assertion is touched."""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state

from lightning_modules import GaussianMixtureEstimator, KMeansEstimator
from lightning_modules.mixtures.gaussian.density import GaussianComponents, precision_factors
from lightning_modules.mixtures.gaussian.em import GaussianStatistics, MixtureParameters, m_step
from lightning_modules.mixtures.gaussian.model import GaussianMixtureModel
from lightning_modules.mixtures.initialization import kmeans_plus_plus, random_samples

#: Whether the test that runs has come to something of ours.
reached: list[str] = []


class GaussianMixture(GaussianMixtureEstimator):
    """Under its name there, with the arguments that have another here."""

    def __init__(self, n_components: int = 1, *, init_params: Any = "kmeans", **options: Any) -> None:
        super().__init__(n_components, init_params=init_params, **options)

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        reached.append("GaussianMixture")
        return super().fit(X, y, sample_weight)

    def _set_parameters(self, params: Any) -> None:
        """scikit-learn's private name for parameters that are given."""
        reached.append("GaussianMixture")
        self.weights_, self.means_, self.covariances_, self.precisions_cholesky_ = params
        self.precisions_ = MixtureParameters(
            self.covariance_type, *(torch.as_tensor(value) for value in params[:3])
        ).precisions.numpy()

    def _initialize(self, X: Any, resp: Any) -> None:
        """scikit-learn's private name for the start from responsibilities."""
        reached.append("GaussianMixture")
        start = {"weights_init": resp.mean(axis=0), "means_init": resp.T @ X / resp.sum(axis=0)[:, None]}
        model = GaussianMixtureModel(
            resp.shape[1], covariance_type=self.covariance_type, precisions_init=self.precisions_init, **start
        )
        model.initialize(lambda: [(torch.from_numpy(X), None, None)])
        self.precisions_cholesky_ = model.best_parameters().precisions_cholesky.numpy()


class KMeans(KMeansEstimator):
    """Under its name there."""

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        reached.append("KMeans")
        return super().fit(X, y, sample_weight)

    def _init_centroids(
        self, X: Any, x_squared_norms: Any, init: str, sample_weight: Any, n_centroids: int, random_state: Any
    ) -> Any:
        """scikit-learn's private name for how centers are chosen."""
        reached.append("KMeans")
        choose = {"k-means++": kmeans_plus_plus, "random": random_samples}[init]
        generator = torch.Generator().manual_seed(int(check_random_state(random_state).randint(2**31 - 1)))
        return choose(torch.from_numpy(X), n_centroids, generator, torch.from_numpy(sample_weight)).numpy()


# ------------------------------------------------------------------------- private functions of the mixture


def _moments(kind: str, resp: Any, X: Any, nk: Any, means: Any, reg_covar: float) -> Any:
    """Covariances about given means by this package's M-step."""
    reached.append("m_step")
    r, x, n, m = (torch.as_tensor(np.asarray(value), dtype=torch.float64) for value in (resp, X, nk, means))
    m = m.expand(len(n), x.shape[1]) if m.ndim < 2 else m
    difference = x[None] - m[:, None]
    if kind in ("diag", "spherical"):
        second = torch.einsum("nk,knd->kd", r, difference.square())
    else:
        second = torch.einsum("nk,knd,kne->kde", r, difference, difference)
        second = second.sum(dim=0) if kind == "tied" else second
    zero = torch.zeros(1, dtype=torch.float64)
    statistics = GaussianStatistics(
        kind,
        n[None],
        torch.zeros_like(m)[None],
        second[None],
        zero,
        zero,
        n.sum(),
        m[None],
        True,  # type: ignore[arg-type]
    )
    theta = m_step(statistics, torch.full((x.shape[1],), reg_covar, dtype=torch.float64))
    return theta.covariances[0].numpy().astype(np.asarray(X).dtype)


def _estimate_gaussian_covariances_full(resp: Any, X: Any, nk: Any, means: Any, reg_covar: float) -> Any:
    return _moments("full", resp, X, nk, means, reg_covar)


def _estimate_gaussian_covariances_tied(resp: Any, X: Any, nk: Any, means: Any, reg_covar: float) -> Any:
    return _moments("tied", resp, X, nk, means, reg_covar)


def _estimate_gaussian_covariances_diag(resp: Any, X: Any, nk: Any, means: Any, reg_covar: float) -> Any:
    return _moments("diag", resp, X, nk, means, reg_covar)


def _estimate_gaussian_covariances_spherical(resp: Any, X: Any, nk: Any, means: Any, reg_covar: float) -> Any:
    return _moments("spherical", resp, X, nk, means, reg_covar)


def _estimate_gaussian_parameters(X: Any, resp: Any, reg_covar: float, covariance_type: str) -> Any:
    nk = resp.sum(axis=0)
    means = resp.T @ X / nk[:, None]
    return nk, means, _moments(covariance_type, resp, X, nk, means, reg_covar)


def _compute_precision_cholesky(covariances: Any, covariance_type: str) -> Any:
    reached.append("precision_factors")
    given = torch.as_tensor(covariances)
    if covariance_type == "spherical":
        return given.rsqrt().numpy()
    return precision_factors(covariance_type, given[None], given.shape[-1])[0].numpy()  # type: ignore[arg-type]


def _components(X: Any, means: Any, factors: Any, covariance_type: str) -> GaussianComponents:
    means, factors = (torch.as_tensor(value, dtype=torch.float64) for value in (means, factors))
    covariances = 1 / factors.square()
    if covariance_type in ("full", "tied"):
        covariances = torch.linalg.inv(factors @ factors.mT)
    equal = torch.full((1, len(means)), 1 / len(means), dtype=torch.float64)
    return GaussianComponents.prepare(covariance_type, equal, means[None], covariances[None])  # type: ignore[arg-type]


def _compute_log_det_cholesky(factors: Any, covariance_type: str, n_features: int) -> Any:
    count = len(factors) if covariance_type != "tied" else 1
    components = _components(None, np.zeros((count, n_features)), factors, covariance_type)
    constant = components.log_constant[0] + np.log(count) + n_features / 2 * np.log(2 * np.pi)
    return constant.numpy().astype(factors.dtype)


def _estimate_log_gaussian_prob(X: Any, means: Any, factors: Any, covariance_type: str) -> Any:
    joint = _components(X, means, factors, covariance_type).log_densities(torch.from_numpy(X))
    return joint[0].T.numpy() + np.log(len(means))


def translated(module: str, *names: str) -> dict[str, Any]:
    """The tests of one of scikit-learn's test modules, in which some names are this package's.

    Args:
        module: Its name, such as `sklearn.mixture.tests.test_mixture`.
        *names: What is imported from here in place of there.
    """
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    translation = _Imports(set(names))
    tree = ast.fix_missing_locations(translation.visit(ast.parse(Path(spec.origin).read_text())))
    assert translation.seen == set(names), f"{module} no longer imports {set(names) - translation.seen}"
    namespace: dict[str, Any] = {"__name__": module, "__file__": spec.origin}
    exec(compile(tree, spec.origin, "exec"), namespace)
    return {name: value for name, value in namespace.items() if name.startswith("test_")}


class _Imports(ast.NodeTransformer):
    """Imports `names` from this module, wherever they were imported from."""

    def __init__(self, names: set[str]) -> None:
        self.names, self.seen = names, set[str]()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        ours = [alias for alias in node.names if alias.name in self.names]
        theirs = [alias for alias in node.names if alias.name not in self.names]
        self.seen |= {alias.name for alias in ours}
        return [
            ast.ImportFrom(module, part, node.level)
            for module, part in ((__name__, ours), (node.module, theirs))
            if part
        ]
