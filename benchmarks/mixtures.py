"""Mixtures and K-means beside their peers: speed and likelihood from equal starts, scaling in N, memory.

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python benchmarks/mixtures.py --json mixtures.json

Real patches where CIFAR-10 is at hand (`--data`, by default the folder beside the project), photographs from the
installed packages otherwise. Every comparison runs in this one process on the same threads; read the ratios, not the
seconds. scikit-learn's K-means runs the faster of its algorithms on other rows.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import PROJECT, arguments, write_json
from _peers import failure
from scipy.sparse import issparse, random_array
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits
from torch import Tensor

from datamodules import CIFAR10DataModule, PatchDataModule, PhotoCropsDataModule
from lightning_modules import GaussianMixtureEstimator, KMeansEstimator
from lightning_modules.mixtures.gaussian.em import MixtureParameters, e_step, m_step
from lightning_modules.mixtures.standardizer import StreamMoments

# What chooses OpenBLAS's kernels for it: set, they hold numpy and with it scikit-learn back.
HINDRANCES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


def median_seconds(work: Callable[[], Any], repeats: int = 1) -> float:
    """The median of some runs."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def patches(rows: int, folder: Path) -> Tensor:
    """Rows of 48 numbers: 4×4 patches in colour, float64, in [0, 1]."""
    real = (folder / "cifar-10-batches-py").is_dir()
    images: Any = CIFAR10DataModule(root=str(folder), augment=False) if real else PhotoCropsDataModule(augment=False)
    images.setup("fit")
    count = len(images.train_dataloader().dataset)
    per_image = -(-rows // count) + 1
    data = PatchDataModule(
        images=images, patch_size=4, patches_per_image=per_image, gray=False, remove_mean=False, shuffle=True
    )
    data.setup("fit")
    parts = [data.on_after_batch_transfer(batch, 0)["image"].flatten(1) for batch in data.train_dataloader()]
    return torch.cat(parts)[:rows].double()


def start_of(x: Tensor, components: int) -> dict[str, np.ndarray]:
    """Weights, means and precisions of a few K-means iterations: the start that both sides are given."""
    few = KMeans(components, n_init=1, max_iter=5, random_state=0).fit(x[:20_000].numpy())
    labels = few.predict(x.numpy())
    rows = x.numpy()
    covariances = [np.cov(rows[labels == k].T, bias=True) + 1e-3 * np.eye(x.shape[1]) for k in range(components)]
    return {
        "weights_init": np.bincount(labels, minlength=components) / len(x),
        "means_init": few.cluster_centers_,
        "precisions_init": np.linalg.inv(np.stack(covariances)),
    }


def compare_mixture(x: Tensor, components: int, iterations: int, rounds: int, covariances: str) -> list[dict[str, Any]]:
    """Seconds per iteration and mean log-likelihood after equal iterations from equal starts.

    The machine's speed drifts: every round times each of them once, one after the other, and medians are compared.
    """
    start: dict[str, Any] = start_of(x, components) | {"covariance_type": covariances}
    variances = 1 / np.linalg.inv(start["precisions_init"]).diagonal(axis1=1, axis2=2)
    if covariances != "full":
        start["precisions_init"] = variances if covariances == "diag" else variances.mean(axis=1)
    fits: dict[str, Callable[[int], float]] = {}
    for name, make in (("scikit-learn", GaussianMixture), ("lightning-em", GaussianMixtureEstimator)):
        for dtype in (np.float64, np.float32):
            rows, given = (
                x.numpy().astype(dtype),
                {key: value.astype(dtype) if isinstance(value, np.ndarray) else value for key, value in start.items()},
            )
            if dtype == np.float32:
                given["weights_init"] = given["weights_init"] / given["weights_init"].sum()
            fits[f"{name} {np.dtype(dtype).name}"] = partial(fit_estimator, make, components, rows, given)
    if covariances == "full":
        fits["pomegranate float32"] = partial(fit_pomegranate, x.float(), start)
    least: dict[str, Callable[[], float]] = {
        "the two matrix products": lambda: seconds_of_products(x, components, covariances),
        "reading the rows": lambda: median_seconds(x.sum, 5),
    }

    times: dict[str, list[float]] = {name: [] for name in (*fits, *least)}
    likelihoods: dict[str, float] = {}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for name, fit in fits.items():
            if name in failed:
                continue
            try:
                if number == 0:
                    fit(1)  # imported and warm
                moments = [time.perf_counter()]
                for steps in (1, 1 + iterations):
                    likelihoods[name] = fit(steps)
                    moments.append(time.perf_counter())
            except Exception as error:
                failed[name] = failure(error)
                continue
            once, more = moments[1] - moments[0], moments[2] - moments[1]
            times[name].append((more - once) / iterations)
        for name, work in least.items():
            times[name].append(work())
    common = {"work": f"an iteration of EM, {covariances} covariances", "rows": len(x), "width": x.shape[1]}
    results: list[dict[str, Any]] = []
    ours = statistics.median(times["lightning-em float64"])
    for name, values in times.items():
        row = {**common, "components": components, "library": name}
        if name in failed:
            results.append({**row, "failed": failed[name]})
            continue
        seconds = statistics.median(values)
        results.append(
            row | {"seconds": seconds, "times_ours": seconds / ours, "log_likelihood": likelihoods.get(name)}
        )
    return results


def fit_estimator(make: Any, components: int, rows: np.ndarray, start: dict[str, np.ndarray], steps: int) -> float:
    """Mean log-likelihood after so many iterations of an estimator in scikit-learn's manner."""
    return float(make(components, max_iter=steps, tol=0.0, **start).fit(rows).lower_bound_)


def fit_pomegranate(rows: Tensor, start: dict[str, np.ndarray], steps: int) -> float:
    """The same for pomegranate, float32 as it comes; its likelihood is that after the last M-step, and costs a pass."""
    from pomegranate.distributions import Normal
    from pomegranate.gmm import GeneralMixtureModel

    covariances = np.linalg.inv(start["precisions_init"])
    components = [
        Normal(torch.from_numpy(mean).float(), torch.from_numpy(covariance).float(), covariance_type="full")
        for mean, covariance in zip(start["means_init"], covariances, strict=True)
    ]
    priors = torch.from_numpy(start["weights_init"]).float()
    model = GeneralMixtureModel(components, priors=priors / priors.sum(), max_iter=steps, tol=-1.0)
    return float(model.fit(rows).log_probability(rows).double().mean())


def seconds_of_products(x: Tensor, components: int, covariances: str) -> float:
    """The two matrix products of an iteration on the same shapes, and nothing else."""
    shape = {"full": (x.shape[1],) * 2, "diag": (x.shape[1],), "spherical": ()}[covariances]
    unit = torch.eye(x.shape[1], dtype=torch.float64) if covariances == "full" else torch.ones(shape).double()
    theta = MixtureParameters(
        covariances,
        torch.full((components,), 1 / components, dtype=torch.float64),
        x[:components],
        unit.expand(components, *shape),
    ).components(centered=False)
    assert theta.coefficients is not None
    step = theta.samples_per_chunk
    code = theta.encode(x[:step]).clone()
    responsibilities = torch.rand(components, step, dtype=torch.float64)
    sums = torch.zeros_like(theta.coefficients)

    def products() -> None:
        for _ in range(0, len(x), step):
            torch.mm(theta.coefficients, code)
            sums.addmm_(responsibilities, code.T)

    return median_seconds(products, 5)


def compare_kmeans(rows: Any, components: int, max_iter: int, rounds: int, algorithm: str) -> list[dict[str, Any]]:
    """Seconds and inertia of Lloyd's algorithm from equal starts, to rest or for equal iterations; rounds as above."""
    chosen = torch.randperm(rows.shape[0], generator=torch.Generator().manual_seed(0))[:components].numpy()
    centers, kind = (rows[chosen].toarray(), "sparse ") if issparse(rows) else (rows[chosen], "")
    given = {"init": centers, "n_init": 1, "max_iter": max_iter, "tol": 0.0}
    models = {
        "scikit-learn": KMeans(components, algorithm=algorithm, **given),
        "lightning-em": KMeansEstimator(components, **given),
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            times[name].append(median_seconds(partial(model.fit, rows)))
    each = {name: statistics.median(values) for name, values in times.items()}
    named = {"scikit-learn": f"scikit-learn, {algorithm}", "lightning-em": "lightning-em"}
    return [
        {
            "work": f"{kind}K-means to rest" if max_iter > 100 else f"{kind}K-means, {max_iter} iterations",
            "library": named[name],
            "iterations": int(model.n_iter_),
            "seconds": each[name],
            "times_ours": each[name] / each["lightning-em"],
            "inertia": float(model.inertia_),
        }
        for name, model in models.items()
    ]


def faster_algorithm(x: Tensor, components: int) -> str:
    """Which of scikit-learn's two forms of Lloyd's algorithm, equal in what they find, is faster on these rows."""

    def seconds(algorithm: str) -> float:
        given = {"n_init": 1, "max_iter": 60, "tol": 0.0, "random_state": 0, "init": "random"}
        return median_seconds(partial(KMeans(components, algorithm=algorithm, **given).fit, x.numpy()), 2)

    return min(("lloyd", "elkan"), key=seconds)


def scaling(x: Tensor, components: int, sizes: list[int]) -> list[dict[str, Any]]:
    """Time of one iteration and peak memory over streams of growing length, blocks of 10,000 rows drawn again and
    again.
    """
    standardizer = StreamMoments.of(x).standardizer("feature")
    theta = MixtureParameters(
        "full",
        torch.full((components,), 1 / components, dtype=torch.float64),
        standardizer.transform(x[:components]),
        torch.eye(x.shape[1], dtype=torch.float64).repeat(components, 1, 1),
    ).batched()
    block = 10_000
    rows = []
    for size in sizes:

        def one_pass(size: int = size) -> None:
            prepared = theta.components()
            statistics = None
            for number in range(size // block):
                first = number * block % (len(x) - block + 1)
                part = e_step(prepared, standardizer.transform(x[first : first + block]))
                if statistics is not None:
                    part.add(statistics)
                statistics = part
            assert statistics is not None
            m_step(statistics, torch.full_like(standardizer.scale, 1e-6), theta)

        before = forget_peak()
        taken = median_seconds(one_pass)
        peak = peak_mib() - before
        rows.append(
            {
                "work": "stream",
                "rows": size,
                "seconds": taken,
                "microseconds_per_row": 1e6 * taken / size,
                "peak_mib_above_start": peak,
            }
        )
    return rows


def peak_mib() -> float:
    """Peak resident memory of this process since `forget_peak`."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024


def forget_peak() -> float:
    """Let the peak begin anew at what is resident now; that, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()


def streaming_memory(rows: int, width: int = 64) -> dict[str, Any]:
    """Peak memory of `lightning-em fit` over a file of rows, in a process of its own."""
    script = (
        "import sys; from lightning_modules.cli import main; main(sys.argv[1:]);"
        # of this process alone: ru_maxrss begins at the parent's
        "print('PEAK', next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, width))
        generator = np.random.default_rng(0)
        for first in range(0, rows, 50_000):
            array[first : first + 50_000] = generator.normal(size=array[first : first + 50_000].shape)
        array.flush()
        del array
        words = ["fit", "-c", str(PROJECT / "configs/gaussian_mixture.yaml")]
        words += [f"--data.array={path}", "--trainer.max_epochs=2", "--model.num_components=8"]
        words += ["--trainer.logger=false", "--trainer.callbacks=null", "--trainer.enable_checkpointing=false"]
        words += ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
        begin = time.perf_counter()
        environment = os.environ | {"PYTHONPATH": str(PROJECT)}
        done = subprocess.run(
            [sys.executable, "-c", script, *words],
            capture_output=True,
            text=True,
            check=True,
            cwd=folder,
            env=environment,
        )
        taken = time.perf_counter() - begin
    return {
        "work": "lightning-em fit",
        "rows": rows,
        "width": width,
        "peak_mib": int(done.stdout.split("PEAK")[1].split()[0]) / 1024,
        "seconds": taken,
    }


def main() -> None:
    parser = arguments("Mixtures and K-means beside their peers.")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--components", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--largest", type=int, default=3_000_000, help="rows of the longest stream")
    parser.add_argument("--stream", type=int, default=1_000_000, help="rows of the file on disk")
    given = parser.parse_args()
    if hindrances := [name for name in HINDRANCES if name in os.environ]:
        parser.error(f"{' and '.join(hindrances)} would hold numpy back: env -u {' -u '.join(hindrances)} python …")
    warnings.simplefilter("ignore", ConvergenceWarning)
    torch.set_num_threads(given.threads)
    both = patches(given.rows + given.rows // 2, given.data)
    x, others = both[: given.rows], both[given.rows :]
    rows: list[dict[str, Any]] = []

    def report(*found: dict[str, Any]) -> None:
        rows.extend(found)
        write_json(given.json, rows)
        for row in found:
            print(
                "  ".join(f"{value:.4g}" if isinstance(value, float) else f"{value}" for value in row.values()),
                flush=True,
            )

    with threadpool_limits(given.threads):
        for covariances in ("full", "diag", "spherical"):
            report(*compare_mixture(x, given.components, given.iterations, given.rounds, covariances))
        algorithm = faster_algorithm(others, given.components)
        for length in (300, 60, 20, 4, 1):
            report(*compare_kmeans(x.numpy(), given.components, length, given.rounds, algorithm))
        counts = random_array((3 * given.rows, 100), density=0.1, format="csr", rng=np.random.default_rng(0))
        for length in (300, 4):
            report(*compare_kmeans(counts, 50, length, given.rounds, "lloyd"))
    report(*scaling(x, given.components, [n for n in (10_000, 100_000, 1_000_000, 3_000_000) if n <= given.largest]))
    report(streaming_memory(given.stream))


if __name__ == "__main__":
    main()
