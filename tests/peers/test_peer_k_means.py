"""scikit-learn's `test_k_means.py`."""

from tests.peers.scikit_learn import translated

globals().update(translated("sklearn.cluster.tests.test_k_means", "KMeans"))
