"""The inputs of a detector: against loops, against the diffusion itself, and with parameters from elsewhere."""

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_modules import (
    GeneratedImageDetector,
    GraphDiffusion,
    GraphDiffusionReconstruction,
    ParameterTable,
    TraceNetwork,
)
from lightning_modules.detection import DetectorInputs, NeighborDifferences, RawPixels, RestorationResidual


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 37, 31, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cell", [2, 3])
def test_neighbor_differences_are_those_of_plain_loops(images: Tensor, cell: int) -> None:
    expected = torch.empty_like(images)
    for row in range(37):
        for column in range(31):
            corner = images[:, :, cell * (row // cell), cell * (column // cell)]
            expected[:, :, row, column] = 7 * (images[:, :, row, column] - corner)
    torch.testing.assert_close(NeighborDifferences(cell, scale=7)(images), expected, rtol=0, atol=1e-6)


def test_neighbor_differences_are_those_of_the_paper_where_cells_are_whole(images: Tensor) -> None:
    even = images[..., :36, :30]
    smaller = torch.nn.functional.interpolate(even, scale_factor=0.5, mode="nearest", recompute_scale_factor=True)
    up = torch.nn.functional.interpolate(smaller, scale_factor=2, mode="nearest")
    torch.testing.assert_close(NeighborDifferences(scale=1)(even), even - up, rtol=0, atol=0)


def test_the_residual_is_what_the_diffusion_takes_away(images: Tensor) -> None:
    diffusion = GraphDiffusion(patch_size=3)
    numbers = {"sigma": 0.2, "tau": 0.2, "radius": 2.0, "sigma_s": 1.0, "sigma_f": 0.3, "smooth_steps": 3}
    table = ParameterTable(initial=numbers, bounds={"radius": (1.5, 2.0), "sigma_s": (0.5, 2.0)}, learned=[])
    residual = RestorationResidual(diffusion, table, scale=5.0)
    torch.testing.assert_close(residual.featurize(images), images - diffusion(images, **numbers), rtol=0, atol=1e-6)
    torch.testing.assert_close(residual(images), 5 * residual.featurize(images), rtol=0, atol=0)


@pytest.mark.parametrize("learn", [False, True])
def test_a_gradient_is_computed_only_where_it_is_used(images: Tensor, learn: bool) -> None:
    part = RestorationResidual(learn=learn)
    residual = part(0.5 + 0.02 * (images - 0.5))  # of white noise at full strength no two patches are alike
    assert residual.requires_grad == learn
    if learn:
        residual.square().sum().backward()
        gradient = part.em_parameters.pop_gradient()
        moved = [name for name, column in zip(part.em_parameters.names, gradient.T, strict=True) if column.any()]
        assert moved == ["sigma", "tau", "sigma_s", "sigma_f"]


def test_inputs_stand_side_by_side(images: Tensor) -> None:
    inputs = [RawPixels(), NeighborDifferences(), RestorationResidual()]
    result = DetectorInputs(inputs)(images)
    for number, part in enumerate(inputs):
        torch.testing.assert_close(result[:, 3 * number : 3 * number + 3], part(images))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DetectorInputs([]), "inputs is empty"),
        (lambda: RawPixels(scale=0), "scale must be positive, got 0"),
        (lambda: NeighborDifferences(cell=1), "from 2 pixels on, got cell=1"),
    ],
)
def test_impossible_arguments_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


BOUNDS = {"radius": (1.5, 2.0), "sigma_s": (0.5, 20.0), "sigma_f": (0.02, 1.0), "sigma": (0.02, 1.0)}


class TestParametersOfAReconstruction:
    def saved(self, path: Path, **initial: float) -> str:
        table = ParameterTable({"radius": 2.0, "sigma_s": 3.0, **initial}, BOUNDS, row_names=["cat"])
        module = GraphDiffusionReconstruction(GraphDiffusion(patch_size=3), table)
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(path)
        return str(path)

    def test_they_are_loaded(self, tmp_path: Path, images: Tensor) -> None:
        path = self.saved(tmp_path / "reconstruction.ckpt", sigma=0.37)
        residual = RestorationResidual(checkpoint=path)
        before = residual(images)
        residual.load_from_checkpoint()
        assert residual.em_parameters.get_parameters()["sigma"] == pytest.approx(0.37)
        assert residual.em_parameters.get_parameters()["smooth_steps"] == 5, (
            "an integer that nobody learns is read again"
        )
        assert (residual(images) - before).abs().max() > 0.01

    def test_every_restoration_of_a_detector_loads_its_own(self, tmp_path: Path) -> None:
        paths = [self.saved(tmp_path / f"{sigma}.ckpt", sigma=sigma) for sigma in (0.2, 0.6)]
        detector = GeneratedImageDetector([RestorationResidual(checkpoint=path) for path in paths])
        detector.on_fit_start()
        found = [residual.em_parameters.get_parameters()["sigma"] for residual in detector.inputs]
        assert found == pytest.approx([0.2, 0.6])

    def test_a_fit_that_resumes_needs_no_reconstruction(self, tmp_path: Path) -> None:
        path = self.saved(tmp_path / "reconstruction.ckpt", sigma=0.37)

        def trainer(epochs: int) -> L.Trainer:
            quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
            return L.Trainer(accelerator="cpu", max_epochs=epochs, enable_checkpointing=False, **quiet)

        def detector() -> GeneratedImageDetector:
            torch.manual_seed(0)
            backbone = TraceNetwork(3, (8,), (1,), normalization="group")
            return GeneratedImageDetector([RestorationResidual(checkpoint=path)], backbone)

        batch = {
            "image": torch.rand(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
            "label": torch.tensor([0, 1]),
            "weight": torch.ones(2),
        }
        loader = torch.utils.data.DataLoader([batch], batch_size=None)
        first = trainer(1)
        first.fit(detector(), loader)
        first.save_checkpoint(tmp_path / "detector.ckpt")
        Path(path).unlink()
        resumed = detector()
        trainer(2).fit(resumed, loader, ckpt_path=tmp_path / "detector.ckpt", weights_only=True)
        assert resumed.em_parameters.get_parameters()["sigma"] == pytest.approx(0.37)
        with pytest.raises(FileNotFoundError, match=r"reconstruction\.ckpt does not exist"):
            trainer(1).fit(detector(), loader)

    def test_values_outside_the_bounds_are_refused(self, tmp_path: Path) -> None:
        path = self.saved(tmp_path / "reconstruction.ckpt", sigma=0.5)
        table = ParameterTable({"radius": 2.0, "sigma_s": 3.0}, BOUNDS | {"sigma": (0.1, 0.4)})
        with pytest.raises(ValueError, match=r"values of sigma in .* are outside the bounds"):
            RestorationResidual(em_parameters=table, checkpoint=path).load_from_checkpoint()

    def test_a_file_that_is_missing_or_another_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt does not exist"):
            RestorationResidual(checkpoint=str(tmp_path / "nowhere.ckpt")).load_from_checkpoint()
        torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
        with pytest.raises(ValueError, match=r"other\.ckpt has no parameter table"):
            RestorationResidual(checkpoint=str(tmp_path / "other.ckpt")).load_from_checkpoint()
