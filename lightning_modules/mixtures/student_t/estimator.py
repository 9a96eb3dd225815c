"""Mixture of t distributions for data in memory, with scikit-learn's interface."""

from numbers import Real
from typing import Any

from sklearn.utils._param_validation import Interval

from lightning_modules.mixtures.gaussian.estimator import GaussianMixtureEstimator
from lightning_modules.mixtures.student_t.em import DEGREES_OF_FREEDOM
from lightning_modules.mixtures.student_t.model import StudentTMixtureModel


class StudentTMixtureEstimator(GaussianMixtureEstimator):
    """`lightning_modules.StudentTMixture` for data in memory, with scikit-learn's interface.

    Args:
        n_components: Components of the mixture.
        degrees_of_freedom: Of all components, where they are known; by default each component learns its own, which are
            `degrees_of_freedom_` after a fit.
        **options: Those of `GaussianMixtureEstimator`, which describes them.

    Example:
        >>> import numpy as np
        >>> X = np.concatenate([np.linspace(-1, 1, 50), np.linspace(9, 11, 50), [1e4]])[:, None]
        >>> mixture = StudentTMixtureEstimator(n_components=2, degrees_of_freedom=3, means_init=[[0], [10]]).fit(X)
        >>> mixture.means_[:, 0].round().astype(int).tolist()
        [0, 10]
    """

    model_class = StudentTMixtureModel
    _parameter_constraints = {  # noqa: RUF012  (scikit-learn's protocol)
        **GaussianMixtureEstimator._parameter_constraints,
        "degrees_of_freedom": [Interval(Real, *DEGREES_OF_FREEDOM, closed="both"), None],
    }

    def __init__(self, n_components: int = 1, *, degrees_of_freedom: float | None = None, **options: Any) -> None:
        super().__init__(n_components, **options)
        self.degrees_of_freedom = degrees_of_freedom
