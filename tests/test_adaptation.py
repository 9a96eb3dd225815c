"""A denoiser adapted to noisy images: its risk is the error that it cannot see, and what is no better is not kept."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor, nn

from lightning_modules import GraphDenoiser, restore
from lightning_modules import adaptation as module
from lightning_modules.adaptation import adapt
from lightning_modules.cli import main
from lightning_modules.noise import NoiseModel

TINY = {"widths": (8, 16), "depths": (1, 1), "up_depths": (1,)}


@pytest.fixture
def tiny() -> GraphDenoiser:
    torch.manual_seed(0)
    return GraphDenoiser(**TINY).eval()


def photograph(name: str = "chelsea", size: int = 160) -> Tensor:
    return torch.from_numpy(getattr(data, name)()[:size, :size].copy()).permute(2, 0, 1).float() / 255


def noise_of(kind: str) -> NoiseModel:
    white = NoiseModel.white(torch.tensor([0.08]), 3)
    if kind == "white":
        return white
    each = torch.ones(1, 3)
    if kind == "photons":
        return NoiseModel(0.02 * each, 0.001 * each, each / 2, white.kernel)
    line = torch.tensor([0.2, 0.7, 1.0, 0.7, 0.2])
    filtered = white.kernel * (line[:, None] * line / line.square().sum())
    return NoiseModel(0.01 * each, 0.002 * each, each / 2, filtered)


@pytest.mark.parametrize("kind", ["white", "photons", "filtered"])
def test_the_risk_is_the_error_that_is_not_seen(kind: str, tiny: GraphDenoiser) -> None:
    noise, clean = noise_of(kind), photograph()
    bank = nn.ParameterDict({n: nn.Parameter(torch.tensor(v).log()) for n, v in tiny.bank.items()})
    risks, errors = [], []
    with torch.no_grad():
        for key in range(20):
            signal = module._signal(noise.sample(clean[None], torch.tensor([key]))[0], noise, True)
            true = module._signal(clean, noise, True).image
            window = (slice(None), slice(32, 96), slice(32, 96))
            part, level = signal.image[window][None], signal.level[window][None]
            draw = signal.noise(32, 32, 64, torch.tensor(1000 + key))[None]
            variance = (signal.image - true)[window].square().mean()
            risks.append(float(module._risk(tiny, bank, part, level, draw)[0] * variance))
            errors.append(float((tiny(part, noise=level) - true[window]).square().mean()))
    risk, error = torch.tensor(risks), torch.tensor(errors)
    assert abs(risk.mean() - error.mean()) < 4 * (risk - error).std() / 20**0.5 + 0.03 * error.mean()
    assert risk.mean() == pytest.approx(float(error.mean()), rel=0.25)


def test_adaptation_lowers_the_error_without_a_clean_image(tiny: GraphDenoiser) -> None:
    clean = [photograph("chelsea"), photograph("coffee")]
    noisy = [noise_of("white").sample(x[None], torch.tensor([key]))[0] for key, x in enumerate(clean)]

    def error() -> float:
        with torch.no_grad():
            return sum(
                float((tiny(y[None], noise=0.08)[0] - x).square().mean()) for y, x in zip(noisy, clean, strict=True)
            )

    before = error()
    found = adapt(noisy, start=tiny, steps=12)
    assert found.is_better
    assert found.after < found.before
    assert error() < 0.99 * before
    assert found.denoiser is tiny
    assert len(found.risks) == 12
    assert not any(parameter.requires_grad for parameter in tiny.parameters())


def test_what_is_no_better_is_not_kept(tiny: GraphDenoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    first, bank = {n: v.clone() for n, v in tiny.state_dict().items()}, dict(tiny.bank)
    results = iter([0.1, 0.2])
    monkeypatch.setattr(module, "_mean_risk", lambda *_: next(results))
    found = adapt([noise_of("white").sample(photograph()[None], torch.tensor([0]))[0]], start=tiny, steps=2)
    assert not found.is_better
    assert all(torch.equal(value, first[name]) for name, value in tiny.state_dict().items())
    assert dict(tiny.bank) == bank


def test_images_of_which_nothing_is_learned_are_named(tiny: GraphDenoiser) -> None:
    with pytest.raises(ValueError, match="none of 2 images has noise"):
        adapt([torch.full((3, 100, 100), 0.4), torch.rand(3, 40, 90)], start=tiny)


def test_the_command_writes_weights_that_restore_takes(
    tiny: GraphDenoiser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save_pretrained(tmp_path / "start")
    folder, output = tmp_path / "photographs", tmp_path / "adapted.safetensors"
    folder.mkdir()
    for key in range(2):
        noisy = noise_of("white").sample(photograph()[None], torch.tensor([key]))[0].clamp(0, 1)
        pixels = (255 * noisy).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{key}.png")
    (folder / "broken.png").write_bytes(b"no image")
    words = ["adapt", str(folder), "-o", str(output), "--model", str(tmp_path / "start"), "--steps", "3"]
    main(words)
    told = capsys.readouterr().err
    assert "unknown camera: 2 photographs" in told
    assert "risk of held-out crops" in told
    assert "broken.png" in told
    assert output.is_file()
    assert output.with_suffix(".json").is_file()
    assert Image.open(output.with_suffix(".png")).size[0] > 800
    restored = restore(photograph(), noise=0.08, model=output)
    assert restored.shape == (3, 160, 160)
    refuse(words, "exists: name another file", capsys)


def refuse(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 1
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: [str(folder / "nowhere")], "is not a folder"),
        (lambda folder: [str(folder)], "no image"),
        (lambda folder: [str(folder), "-o", str(folder / "weights.pt")], "ends in .safetensors"),
    ],
)
def test_refusals_are_one_line(
    make: Callable[[Path], list[str]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = make(tmp_path)
    refuse(["adapt", *words, *(["-o", str(tmp_path / "a.safetensors")] if "-o" not in words else [])], message, capsys)
