"""scikit-learn's `test_gaussian_mixture.py` and `test_mixture.py`."""

from tests.peers.scikit_learn import translated

globals().update(
    translated(
        "sklearn.mixture.tests.test_gaussian_mixture",
        "GaussianMixture",
        "_compute_log_det_cholesky",
        "_compute_precision_cholesky",
        "_estimate_gaussian_covariances_diag",
        "_estimate_gaussian_covariances_full",
        "_estimate_gaussian_covariances_spherical",
        "_estimate_gaussian_covariances_tied",
        "_estimate_gaussian_parameters",
        "_estimate_log_gaussian_prob",
    )
)
globals().update(translated("sklearn.mixture.tests.test_mixture", "GaussianMixture"))
