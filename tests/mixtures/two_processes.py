"""Fits every kind of mixture under whatever number of processes it is started with; rank 0 saves what was learned."""

import os
import sys
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_modules
from datamodules._sampler import EpochBatches, EpochLoader
from lightning_modules import GaussianMixture, KMeans
from tests.mixtures.student_t import StudentTMixture

SAMPLES = 401  # odd: one rank has a sample less


def samples() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = 4 * torch.randn(4, 3, generator=generator, dtype=torch.float64)
    return centers[torch.arange(SAMPLES) % 4] + torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64)


class Weighted(Dataset[Any]):
    """Whole batches of the form that the project's DataModules yield."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, item: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        index, weight, key = item
        return {"image": self.x[index], "index": index, "weight": weight, "key": key}


def loader(kind: str, x: Tensor, world: int, rank: int) -> DataLoader[Any]:
    if kind == "weights":
        # of a user's own, to whom Lightning gives a sampler that pads
        shares = torch.arange(len(x)) % 4 / 2.0
        own: Any = [{"x": row, "weight": weight} for row, weight in zip(x, shares, strict=True)]
        return DataLoader(own, batch_size=60 // world)
    if kind == "plain":
        return DataLoader(TensorDataset(x), batch_size=60 // world)
    sampler = EpochBatches(len(x), 60 // world, num_replicas=world, rank=rank, shuffle=True, seed=3)
    return EpochLoader(Weighted(x), batch_size=None, sampler=sampler)


CASES: dict[str, tuple[str, type[Any], dict[str, Any]]] = {
    "full": ("plain", GaussianMixture, {"n_init": 2}),
    "sampled start": ("plain", GaussianMixture, {"covariance_type": "tied", "init_size": 40}),
    "weighted": ("weighted", GaussianMixture, {"covariance_type": "diag"}),
    "parallel start": (
        "weighted",
        GaussianMixture,
        {"covariance_type": "spherical", "init": "k-means||", "init_size": 40},
    ),
    # which samples share a batch matters here, and Lightning shuffles a plain loader for several processes
    "stepwise": ("weighted", GaussianMixture, {"algorithm": "stepwise"}),
    "plain parallel start": ("plain", KMeans, {"num_components": 6, "init": "k-means||", "init_size": 40}),
    "weights of one's own": ("weights", GaussianMixture, {"covariance_type": "diag", "init_size": 40}),
    "t distributions": ("plain", lightning_modules.StudentTMixture, {"n_init": 2, "init": "k-means||"}),
    "k-means": ("plain", KMeans, {"num_components": 6, "init": "random", "n_init": 2}),
    "a family of one's own": ("plain", StudentTMixture, {"n_init": 2, "init_size": 40}),
    "its steps": ("weighted", StudentTMixture, {"covariance_type": "diag", "algorithm": "stepwise"}),
    "mini-batch": ("weighted", KMeans, {"algorithm": "stepwise"}),
}


def fit(
    case: str, world: int, rank: int, save_to: str | None = None, resume_from: str | None = None
) -> dict[str, Tensor]:
    kind, module_class, options = CASES[case]
    module = module_class(**{"num_components": 4, "tol": 0.0, **options})
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_epochs=5,
        logger=False,
        enable_checkpointing=save_to is not None,
        callbacks=[ModelCheckpoint(save_to, "{step}", every_n_train_steps=5, save_top_k=-1)] if save_to else [],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(kind, samples(), world, rank), ckpt_path=resume_from)
    return {name: value.clone() for name, value in module.state_dict().items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    results = {case: fit(case, 2, rank) for case in CASES}
    for case in ("weighted", "mini-batch"):
        folder = f"{sys.argv[1]}.{case}"
        fit(case, 2, rank, save_to=folder)
        for step in (10, 35):  # in the middle of an epoch; at the last batch of the last, where a rank has one less
            resumed = fit(case, 2, rank, resume_from=f"{folder}/step={step}.ckpt")
            results[f"{case}, resumed at {step}"] = resumed
    torch.save(results, f"{sys.argv[1]}.{rank}")
