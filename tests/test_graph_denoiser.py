"""The denoiser with a bank of diffusions: as an operator, as files, trained by the command, and as it ships."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from skimage import data
from torch import Tensor

from callbacks import PretrainedWriter
from lightning_modules import GraphDenoiser, GraphDiffusion, Reconstruction, TotalVariation
from lightning_modules.cli import build
from lightning_modules.graph_denoiser import WEIGHTS, has_weights
from lightning_modules.networks import GatedUNet
from lightning_modules.noise import CameraNoise, estimate_noise_std
from lightning_modules.restoration import load_operator

PROJECT = Path(__file__).parents[1]
TINY: dict[str, Any] = {"widths": (4, 8), "depths": (1, 1), "up_depths": (1,)}


def make(seed: int = 0, **options: Any) -> GraphDenoiser:
    """One with weights that matter: those of its blocks start at a scale of 0."""
    torch.manual_seed(seed)
    denoiser = GraphDenoiser(**{**TINY, **options})
    with torch.no_grad():
        for weight in denoiser.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return denoiser.eval().requires_grad_(False)


def noisy_images(size: tuple[int, ...] = (2, 3, 37, 31), level: float = 0.1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.linspace(0.2, 0.8, size[-1]).expand(size) + level * torch.randn(size, generator=generator)


class TestOperator:
    def test_it_is_the_first_diffusion_and_what_the_network_makes_of_all(self) -> None:
        denoiser, noisy = make(), noisy_images()
        diffusion = GraphDiffusion(3, widths="noise")
        bank = [
            diffusion(
                noisy, noise=0.1, radius=3.0, smooth_steps=2, **{name: row[k] for name, row in denoiser.bank.items()}
            )
            for k in range(3)
        ]
        expected = bank[0] + denoiser.network(torch.cat([noisy, *bank], 1), torch.full((2,), 0.1))
        torch.testing.assert_close(denoiser(noisy, noise=0.1), expected)

    def test_images_without_noise_stay_as_they_are(self) -> None:
        noisy = noisy_images()
        restored = make()(noisy, noise=torch.tensor([0.0, 0.1]))
        assert torch.equal(restored[0], noisy[0])
        assert not torch.allclose(restored[1], noisy[1], atol=1e-3)

    def test_a_map_of_one_level_is_the_level_and_a_part_without_noise_stays(self) -> None:
        denoiser, noisy = make(), noisy_images()
        expected = denoiser(noisy, noise=0.1)
        level = torch.full((2, 1, 37, 31), 0.1)
        torch.testing.assert_close(denoiser(noisy, noise=level), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(denoiser(noisy, noise=level.expand(2, 3, 37, 31)), expected, atol=1e-5, rtol=1e-5)
        level[..., 15:] = 0
        half = denoiser(noisy, noise=level)
        assert torch.equal(half[..., 15:], noisy[..., 15:])
        assert not torch.allclose(half[..., :15], noisy[..., :15], atol=1e-3)

    def test_a_bank_for_all_and_one_for_each_image(self) -> None:
        denoiser, noisy = make(), noisy_images()
        first = {name: torch.tensor(values) for name, values in denoiser.bank.items()}
        second = {name: 1.5 * values for name, values in first.items()}
        each = denoiser(noisy, noise=0.1, **{name: torch.stack([first[name], second[name]]) for name in first})
        torch.testing.assert_close(each[:1], denoiser(noisy[:1], noise=0.1, **first))
        torch.testing.assert_close(each[1:], denoiser(noisy[1:], noise=0.1, **second))
        torch.testing.assert_close(each[:1], denoiser(noisy[:1], noise=0.1))
        assert not torch.allclose(each[1:], denoiser(noisy[1:], noise=0.1), atol=1e-4)

    def test_the_bank_is_declared(self) -> None:
        denoiser = GraphDenoiser(bank={name: [0.5, 0.7] for name in ("sigma", "tau", "sigma_s", "sigma_f")}, **TINY)
        specs = denoiser.parameter_specs
        assert [(spec.name, spec.shape, spec.starts) for spec in specs] == [
            (name, (2,), (0.5, 0.7)) for name in ("sigma", "tau", "sigma_s", "sigma_f")
        ]
        assert Reconstruction(denoiser).em_parameters.get_parameters()["tau"] == [0.5, 0.7]

    def test_gradients_reach_network_and_bank(self) -> None:
        denoiser = make().requires_grad_()
        bank = {name: torch.tensor(values, requires_grad=True) for name, values in denoiser.bank.items()}
        restored = denoiser(noisy_images(), noise=torch.tensor([0.0, 0.1]), **bank)
        restored.square().sum().backward()
        for tensor in (*bank.values(), *denoiser.parameters()):
            assert tensor.grad is not None
            assert tensor.grad.isfinite().all()
            assert tensor.grad.abs().sum() > 0

    def test_what_it_does_not_take(self) -> None:
        denoiser = make()
        with pytest.raises(ValueError, match=r"images of 3 channels, got \[1, 1, 8, 8\]: load the gray one"):
            denoiser(torch.rand(1, 1, 8, 8), noise=0.1)
        with pytest.raises(ValueError, match="takes no guide"):
            denoiser(noisy_images(), noise=0.1, guide=noisy_images())
        with pytest.raises(ValueError, match="bank needs sigma, tau, sigma_s, sigma_f"):
            GraphDenoiser(bank={"sigma": [1.0]})
        with pytest.raises(ValueError, match=r"bank needs .*each with one value for each diffusion"):
            GraphDenoiser(bank={"sigma": [1.0], "tau": [0.1, 0.2], "sigma_s": [1.0], "sigma_f": [1.0]})

    @pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 5), (16, 24)], ids=str)
    def test_images_of_any_size(self, size: tuple[int, int]) -> None:
        noisy = noisy_images((1, 3, *size))
        restored = make()(noisy, noise=0.1)
        assert restored.shape == noisy.shape
        assert restored.isfinite().all()

    def test_tiles_with_its_halo_are_the_whole(self) -> None:
        denoiser = make(widths=(8, 16, 24), depths=(2, 2, 3), up_depths=(2, 2))
        noisy = noisy_images((1, 3, 176, 160))
        whole = denoiser(noisy, noise=0.1)
        halo = denoiser.halo
        assert halo % denoiser.network.multiple == 0
        for top, left in ((80, 0), (80, 80), (0, 64)):
            above, before = min(top, halo), min(left, halo)
            part = denoiser(noisy[..., top - above : top + 48 + halo, left - before : left + 48 + halo], noise=0.1)
            inner = part[..., above : above + 48, before : before + 48]
            torch.testing.assert_close(inner, whole[..., top : top + 48, left : left + 48], atol=1e-3, rtol=0)


class TestNetwork:
    def test_lists_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="one number for each scale and up_depths one less"):
            GatedUNet(3, 3, widths=(8, 16), depths=(1, 1), up_depths=(1, 1))
        with pytest.raises(ValueError, match="must be at least 1"):
            GatedUNet(3, 3, widths=(8, 0), depths=(1, 1), up_depths=(1,))

    def test_the_default_is_as_small_as_is_said(self) -> None:
        assert sum(weight.numel() for weight in GraphDenoiser().parameters()) < 350_000

    def test_what_continues_an_image_of_odd_size_is_its_border(self) -> None:
        network, images = make().network, torch.rand(1, 12, 10, 13)
        padded = torch.nn.functional.pad(images, (0, 3, 0, 2), mode="replicate")
        torch.testing.assert_close(
            network(images, torch.tensor([0.1])), network(padded, torch.tensor([0.1]))[..., :10, :13]
        )


class TestFiles:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        return make().save_pretrained(tmp_path / "below" / "tiny")

    def test_what_is_saved_comes_back(self, saved: Path) -> None:
        noisy, denoiser = noisy_images(), make()
        for name in (saved, str(saved), saved.parent):
            loaded = GraphDenoiser.from_pretrained(name)
            assert not loaded.training
            assert not any(weight.requires_grad for weight in loaded.parameters())
            for key, value in denoiser.state_dict().items():
                assert torch.equal(loaded.state_dict()[key], value.half().float())
            torch.testing.assert_close(
                loaded(noisy, noise=0.1), denoiser(noisy, noise=0.1), atol=5e-3, rtol=0
            )  # half precision

    def test_a_learned_bank_and_another_shape_come_back(self, tmp_path: Path) -> None:
        bank = {name: [0.5, 0.7] for name in ("sigma", "tau", "sigma_s", "sigma_f")}
        denoiser = make(channels=1, bank=bank)
        learned = {**bank, "sigma": [0.11, 0.22], "of another module": 3.0}
        loaded = GraphDenoiser.from_pretrained(denoiser.save_pretrained(tmp_path, learned))
        assert loaded.bank == {**dict.fromkeys(bank, (0.5, 0.7)), "sigma": (0.11, 0.22)}
        assert (loaded.channels, loaded.architecture) == (1, denoiser.architecture)

    def test_training_starts_from_them(self, saved: Path) -> None:
        started = GraphDenoiser(weights=str(saved), **TINY)
        loaded = GraphDenoiser.from_pretrained(saved)
        assert all(map(torch.equal, started.state_dict().values(), loaded.state_dict().values()))
        assert all(weight.requires_grad for weight in started.parameters())
        with pytest.raises(
            ValueError, match=r"graph_denoiser\.safetensors has channels, diffusions and network \(3, 3"
        ):
            GraphDenoiser(weights=str(saved))

    @pytest.mark.parametrize("names", [("color", "colour"), ("gray", "grey")], ids=" ".join)
    def test_either_spelling(self, names: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("lightning_modules.graph_denoiser.WEIGHTS", tmp_path)
        with pytest.raises(FileNotFoundError, match=rf"{names[0]}/graph_denoiser\.safetensors does not exist"):
            GraphDenoiser.from_pretrained(names[1])
        make(channels=1).save_pretrained(tmp_path / names[0])
        for name in names:
            assert GraphDenoiser.from_pretrained(name).channels == 1

    def test_damaged_and_foreign_files_are_named(self, saved: Path, tmp_path: Path) -> None:
        config_path = saved.with_suffix(".json")
        whole, config = saved.read_bytes(), config_path.read_text()
        with pytest.raises(FileNotFoundError, match="nowhere does not exist: give 'color' or 'gray'"):
            GraphDenoiser.from_pretrained(tmp_path / "nowhere")
        for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
            saved.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"safetensors is damaged: its checksum differs"):
                GraphDenoiser.from_pretrained(saved)
        saved.write_bytes(whole)
        for text, message in (
            (config[:-20], r"json is damaged \("),
            ("[1]", r"json describes something else, expected 'lightning-em graph denoiser 1'"),
            (json.dumps({"format": "other"}), r"json describes other, expected"),
            (config.replace('"channels": 3', '"channels": 1'), r"safetensors does not fit graph_denoiser\.json"),
            (config.replace('"channels": 3', '"canals": 3'), r"safetensors does not fit graph_denoiser\.json"),
        ):
            config_path.write_text(text)
            with pytest.raises(ValueError, match=message):
                GraphDenoiser.from_pretrained(saved)
        config_path.write_text(config)
        GraphDenoiser.from_pretrained(saved)

    def test_neither_lightning_nor_pyg_is_loaded(self, saved: Path) -> None:
        code = (
            "import sys, torch; from lightning_modules import GraphDenoiser; "
            f"GraphDenoiser.from_pretrained({str(saved)!r})(torch.rand(1, 3, 9, 8), noise=0.1); "
            "print(*sys.modules.keys() & {'lightning', 'pytorch_lightning', 'torch_geometric'})"
        )
        command = [sys.executable, "-W", "ignore", "-c", code]
        result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == ""


class TestTraining:
    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def words(self, root: Path, steps: int) -> list[str]:
        config = yaml.safe_load((PROJECT / "configs" / "photographs.yaml").read_text())
        for entry in config["trainer"]["callbacks"]:
            if "every_n_train_steps" in (options := entry.get("init_args", {})):
                options["every_n_train_steps"] = 2
        Path("often.yaml").write_text(yaml.safe_dump(config))
        return [
            *("-c", "often.yaml", f"--data.root={root}"),
            *("--data.crop_size=16", "--data.batch_size=2", "--data.crops_per_image=2", "--data.val_fraction=0.25"),
            *("--model.operator.widths=[4,8]", "--model.operator.depths=[1,1]", "--model.operator.up_depths=[1]"),
            *("--model.lr_scheduler.total_steps=6", f"--trainer.max_steps={steps}", "--trainer.log_every_n_steps=1"),
            *("--trainer.check_val_every_n_epoch=1", "--trainer.enable_progress_bar=false"),
        ]

    def test_a_resumed_run_is_the_uninterrupted_one(self, fake_photographs: Callable[..., Path]) -> None:
        root = fake_photographs()
        whole = self.fit(root, 6)
        begun = self.fit(root, 4)  # an epoch has 6 batches
        start = torch.tensor(list(GraphDenoiser(**TINY).bank.values()))
        learned = torch.tensor(list(whole.model.em_parameters.get_parameters().values()))
        assert (learned != start).all(), "the whole bank has moved"
        resumed = self.fit(root, 6, "--ckpt_path", str(self.folder(begun) / "checkpoints" / "last.ckpt"))
        for (name, value), (_, expected) in zip(
            resumed.model.state_dict().items(), whole.model.state_dict().items(), strict=True
        ):
            assert torch.equal(value, expected), name
        weights = [
            (self.folder(run) / "pretrained" / "graph_denoiser.safetensors").read_bytes() for run in (whole, resumed)
        ]
        assert weights[0] == weights[1]
        loaded = GraphDenoiser.from_pretrained(self.folder(whole) / "pretrained")
        module = Reconstruction.load_from_checkpoint(self.folder(whole) / "checkpoints" / "last.ckpt").eval()
        noisy = noisy_images((1, 3, 12, 14))
        with torch.inference_mode():
            torch.testing.assert_close(module(noisy, 0.1), loaded(noisy, noise=0.1), atol=1e-3, rtol=0)
        assert {
            name: list(values) for name, values in loaded.bank.items()
        } == whole.model.em_parameters.get_parameters()

    def fit(self, root: Path, steps: int, *more: str) -> Any:
        return build(["fit", *self.words(root, steps), *more], run=True)

    def folder(self, run: Any) -> Path:
        return Path(run.trainer.log_dir)

    def test_an_operator_without_weights_has_nothing_to_write(self) -> None:
        with pytest.raises(Exception, match=r"save_pretrained.*Reconstruction has TotalVariation"):
            PretrainedWriter().setup(None, Reconstruction(TotalVariation()), "fit")  # type: ignore[arg-type]
        PretrainedWriter().setup(None, Reconstruction(GraphDenoiser(**TINY)), "fit")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="output_dir must name a directory"):
            PretrainedWriter(" ")


class TestCameraWeights:
    def test_restore_takes_them_for_a_cameras_noise_where_they_are(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightning_modules.graph_denoiser.WEIGHTS", tmp_path)
        make().save_pretrained(tmp_path / "color")
        (tmp_path / "camera").mkdir()  # a card without weights
        assert not load_operator("auto", 3, camera=True).knows_correlation
        make().save_pretrained(tmp_path / "camera")
        assert load_operator("auto", 3, camera=True).knows_correlation
        assert not load_operator("auto", 3).knows_correlation

    def test_weights_remember_that_they_know_correlation(self, tmp_path: Path) -> None:
        denoiser = make()
        denoiser.knows_correlation = True
        saved = denoiser.save_pretrained(tmp_path / "adapted.safetensors")
        assert saved == tmp_path / "adapted.safetensors"
        assert GraphDenoiser.from_pretrained(saved).knows_correlation
        assert not GraphDenoiser.from_pretrained(make().save_pretrained(tmp_path / "plain")).knows_correlation

    def test_those_that_ship_restore_better_than_white_ones(self) -> None:
        if not has_weights("camera"):
            pytest.skip("no camera weights ship with this version")
        clean = torch.from_numpy(data.chelsea()[None, :128, :128].copy()).movedim(-1, 1).float() / 255
        shown = CameraNoise(level=(8 / 255, 20 / 255), doubt=0)(clean.repeat(6, 1, 1, 1), torch.arange(6))
        errors = []
        for name in ("camera", "color"):
            with torch.inference_mode():
                restored = GraphDenoiser.from_pretrained(name)(shown.noisy, noise=shown.level)
            errors.append(float(((restored - shown.clean).square().mean((1, 2, 3)) + 1e-6).log().mean()))
        assert errors[0] < errors[1]


CARDS = sorted(WEIGHTS.glob("*/README.md"))
ROW = re.compile(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \|", re.MULTILINE)


@pytest.mark.skipif(not CARDS, reason="no weights ship with this version")
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
class TestCard:
    def test_the_figures_are_those_of_the_weights(self, card: Path, shared_data: Path) -> None:
        """Every seventeenth image of CBSD68; the level told and estimated."""
        files = sorted((shared_data / "denoise" / "CBSD68").glob("*.png"))[::17]
        if not files:
            pytest.skip("CBSD68 is not there")
        if card.parent.name == "camera":
            pytest.skip("its figures are those of docs/results/cameras.json")
        denoiser, rows = GraphDenoiser.from_pretrained(card.parent), ROW.findall(card.read_text())
        assert [int(row[0]) for row in rows] == [15, 25, 50]
        for level, *figures in rows:
            found = [subset_psnr(denoiser, files, int(level), told) for told in (True, False)]
            assert found == pytest.approx([float(figure) for figure in figures], abs=0.02)

    def test_the_files_are_small_and_the_card_names_the_data(self, card: Path) -> None:
        assert sum(path.stat().st_size for path in card.parent.glob("graph_denoiser.*")) <= 700_000
        text = card.read_text()
        config = f"fit -c {'cameras' if card.parent.name == 'camera' else 'photographs'}"
        for word in ("google/dreambooth", "CC BY 4.0", "Unsplash", config):
            assert word in text


def subset_psnr(denoiser: GraphDenoiser, files: list[Path], level: int, told: bool) -> float:
    """Mean PSNR over images with white noise, not clipped."""
    values = []
    for number, file in enumerate(files):
        clean = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        generator = torch.Generator().manual_seed(1000 * level + number)
        noisy = clean + level / 255 * torch.randn(clean.shape, generator=generator)
        with torch.inference_mode():
            restored = denoiser(noisy, noise=level / 255 if told else estimate_noise_std(noisy))
        values.append(-10 * float((restored.clamp(0, 1) - clean).square().mean().log10()))
    return sum(values) / len(values)
