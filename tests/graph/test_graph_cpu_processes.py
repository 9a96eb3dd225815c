"""The compiled kernel: what it takes, and forked processes."""

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_modules.graph import GraphDiffusion
from lightning_modules.graph.cpu import kernel


@pytest.fixture(autouse=True)
def compiled() -> None:
    if kernel.library(torch.float32) is None:
        pytest.skip("no compiled kernel: no C compiler, or LIGHTNING_EM_COMPILE=0")


def test_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(1, 3, 8, 8)
    assert kernel.is_supported(images, images, torch.ones(1))
    assert not kernel.is_supported(images.bfloat16())
    assert not kernel.is_supported(images, images.double())
    assert not kernel.is_supported(images.to("meta"))
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not kernel.is_supported(images)
    with monkeypatch.context() as tracing:
        tracing.setattr(torch.jit, "is_tracing", lambda: True)
        assert not kernel.is_supported(images)


class Restored(Dataset[Tensor]):
    """Images that a worker of a data loader restores."""

    def __init__(self, diffusion: GraphDiffusion, images: Tensor) -> None:
        self.diffusion, self.images = diffusion, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        p = {"sigma": 1.7, "tau": 0.2, "radius": 4.0, "sigma_s": 5.0, "sigma_f": 1.8, "smooth_steps": 3}
        return self.diffusion(self.images[index : index + 1], **p)[0]


@pytest.mark.parametrize("diffusion", [GraphDiffusion(3), GraphDiffusion(4, 3, "patches")], ids=["image", "patches"])
def test_forked_workers_of_a_data_loader(diffusion: GraphDiffusion) -> None:
    data = Restored(diffusion, torch.rand(4, 3, 12, 10, generator=torch.Generator().manual_seed(0)))
    here = torch.stack([data[index] for index in range(4)])  # the parent has used the kernel, and its threads
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat(list(loader)), here)
