"""Sources: found, held out, balanced, kept apart, matched, and made of photographs by an autoencoder."""

import csv
import io
import itertools
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage import data as pictures_of
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from callbacks.detector_report.probe_features import color_features, file_features, fit_linear, predict_linear
from datamodules import AutoencoderTwins, GeneratedImagesDataModule
from datamodules._sampler import BalancedBatches
from datamodules.twins import match_colors, match_power
from lightning_modules.imaging import read_image


def write(folder: Path, count: int, seed: int, size: tuple[int, int] = (70, 80), suffix: str = "png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(1000 * seed + number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{suffix}")


def source(root: Path, name: str, counts: tuple[int, int], seed: int, part: str = "train") -> None:
    for label, (kind, count) in enumerate(zip(("photographic", "generated"), counts, strict=True)):
        write(root / name / part / kind, count, 10 * seed + label)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, (name, counts) in enumerate({"camera": (10, 10), "site": (12, 5), "zoo": (6, 6)}.items()):
        source(tmp_path / "data", name, counts, seed)
    return tmp_path / "data"


def module(root: Path, **options) -> GeneratedImagesDataModule:
    return GeneratedImagesDataModule(str(root), **({"crop_size": 16, "batch_size": 6, "eval_crops": 1} | options))


def sources(data: GeneratedImagesDataModule, split: str) -> set[str]:
    return set(data.files(split).sources)  # type: ignore[arg-type]


class TestFound:
    def test_each_folder_is_a_source(self, root: Path) -> None:
        source(root, "site", (3, 3), 7, "test")
        data = module(root)
        assert data.source_names == ["camera", "site", "zoo"]
        assert Counter(data.files("test").sources) == {"camera": 2, "site": 6, "zoo": 2}
        assert data.files("train").of_source("zoo").labels.tolist() == [0] * 4 + [1] * 4

    def test_a_column_of_a_table(self, root: Path) -> None:
        rows = [[p.relative_to(root), p.parent.name, p.relative_to(root).parts[0]] for p in sorted(root.rglob("*.png"))]
        with (root / "all.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["path", "label", "source"], *rows])
        by_table, by_folder = module(root / "all.csv"), module(root)
        assert by_table.source_names == by_folder.source_names
        for split in ("train", "val", "test"):
            assert set(by_table.files(split).names) == set(by_folder.files(split).names)

    def test_what_is_held_out_is_neither_trained_nor_validated_on(self, root: Path) -> None:
        data = module(root, val_sources=["zoo"], test_sources=["camera"])
        assert [sources(data, split) for split in ("train", "val", "test")] == [{"site"}, {"site", "zoo"}, {"camera"}]
        batch = next(iter(data.val_dataloader()))
        unseen = [name.startswith("zoo") for name in batch["name"]]
        assert batch["unseen"].tolist() == unseen
        assert set(unseen) == {True, False}

    def test_one_source_is_a_warning(self, root: Path) -> None:
        with pytest.warns(UserWarning, match="there is one source, zoo: .* means nothing for images from elsewhere"):
            module(root / "zoo").setup("fit")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"test_sources": ["moon"]}, "there is no source moon to hold out; there is camera, site, zoo"),
            ({"val_sources": ["zoo"], "test_sources": ["camera", "site"]}, "none is trained on"),
        ],
    )
    def test_what_cannot_be_held_out(self, root: Path, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            module(root, **options).setup("fit")

    def test_a_source_with_one_class(self, root: Path) -> None:
        os.rename(root / "zoo" / "train" / "generated", root.parent / "aside")
        with pytest.raises(FileNotFoundError, match="zoo/train has no folder generated; images of both classes"):
            module(root).setup("fit")

    def test_a_source_with_one_class_in_a_table(self, root: Path) -> None:
        lines = [f"camera/train/{kind}/{i}.png,{kind},a" for kind in ("photographic", "generated") for i in range(5)]
        lines += [f"zoo/train/photographic/{i}.png,photographic,b" for i in range(5)]
        (root / "all.csv").write_text("path,label,source\n" + "\n".join(lines))
        with pytest.raises(ValueError, match="b has no image of the class generated"):
            module(root / "all.csv").setup("fit")

    def test_other_folders_are_named(self, root: Path) -> None:
        write(root / "notes", 1, 99)
        with pytest.raises(FileNotFoundError, match="is a folder of sources, and notes in it holds none of"):
            module(root).setup("fit")

    def test_a_source_inside_a_source(self, root: Path) -> None:
        source(root, "", (3, 3), 50)
        with pytest.raises(ValueError, match="is a source, with train, and holds another, camera"):
            module(root).setup("fit")

    @pytest.mark.parametrize("part", ["train", "test"])
    def test_sources_that_share_a_file_are_refused(self, root: Path, part: str) -> None:
        target = root / "zoo" / part / "generated" / "other name.png"
        source(root, "zoo", (3, 3), 60, part)
        target.write_bytes((root / "site" / "train" / "photographic" / "3.png").read_bytes())
        with pytest.raises(ValueError, match=r"share 1 files, by their content: .*other name\.png is .*site/train"):
            module(root).setup("fit")

    def test_a_nul_in_a_table(self, root: Path) -> None:
        (root / "all.csv").write_bytes(b"path,label\ncamera/\0.png,generated\n")
        with pytest.raises(ValueError, match=r"all\.csv"):
            module(root / "all.csv").setup("fit")


class TestBalance:
    def seen(self, sampler: BalancedBatches) -> list[tuple[int, int]]:
        return [
            (int(i), int(key))
            for batch in sampler
            for i, key, weight in zip(batch.index, batch.key, batch.weight, strict=True)
            if weight > 0
        ]

    def test_every_batch_has_as_many_of_each_source_and_class(self, root: Path) -> None:
        data = module(root)
        for batch in data.train_dataloader():
            groups = Counter(
                (name.split("/")[0], int(label)) for name, label in zip(batch["name"], batch["label"], strict=True)
            )
            assert groups == {(name, label): 1 for name in ("camera", "site", "zoo") for label in (0, 1)}

    def test_a_small_group_begins_again_with_other_keys(self) -> None:
        groups = torch.tensor([0] * 20 + [1] * 3)
        sampler = BalancedBatches(groups, 4, shuffle=True)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            seen = self.seen(sampler)
            counts = Counter(i for i, _ in seen)
            assert counts.total() == 24
            assert all(counts[i] == 4 for i in range(20, 23)), "all of them equally often"
            assert max(counts[i] for i in range(20)) == 1
            assert len({key for _, key in seen}) == 24

    def test_ranks_see_together_what_one_process_sees(self) -> None:
        groups = torch.tensor([0] * 9 + [1] * 4)
        whole = self.seen(BalancedBatches(groups, 4, shuffle=True, seed=3))
        parts = [self.seen(BalancedBatches(groups, 2, shuffle=True, seed=3, num_replicas=2, rank=r)) for r in range(2)]
        assert sorted(whole) == sorted(parts[0] + parts[1])
        assert all({int(groups[i]) for i, _ in part} == {0, 1} for part in parts)

    def test_a_photograph_and_its_twin_come_together_and_go_through_the_same(self, root: Path, tmp_path: Path) -> None:
        twins = AutoencoderTwins("coarse", Coarse(), str(tmp_path / "cache"))
        data = module(root, twins=[twins], batch_size=8, augment=False)  # a round
        files, rounds = data.files("train"), 0
        for epoch in range(2):
            loader = data.train_dataloader()
            loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
            for batch in loader:
                sources = [files.sources[i] for i in batch["index"]]
                own = [k for k, source in enumerate(sources) if source == "coarse"]
                assert sorted(int(batch["label"][k]) for k in own) == [0, 1]
                assert len({files.paths[int(batch["index"][k])].name for k in own}) == 1
                assert len({int(batch["key"][k]) for k in own}) == 1
                assert len(set(batch["key"].tolist())) == len(sources) - 1, "all others have their own"
                rounds += 1
        assert rounds > 4

    def test_a_group_of_copies_follows_the_order_of_its_originals(self) -> None:
        groups = torch.tensor([0] * 5 + [1] * 5)
        originals = torch.tensor([0, 1, 2, 3, 4, 3, 0, 4, 1, 2])
        sampler = BalancedBatches(groups, 2, originals, shuffle=True, seed=1)
        pairs = list(sampler)
        assert all(int(originals[batch.index].unique().numel()) == 1 for batch in pairs)
        assert all(int(batch.key.unique().numel()) == 1 for batch in pairs)
        assert len({int(batch.key[0]) for batch in pairs}) == len(pairs) == 5


class TestMatching:
    def test_sizes(self, root: Path) -> None:
        write(root / "zoo" / "train" / "generated", 6, 70, (94, 120))
        data = module(root / "zoo", match_sizes=True)
        paths = data.files("train").paths
        assert {tuple(data.read(path).shape) for path in paths} == {(3, 70, 70)}
        described = [file_features(path, data.read(path)) for path in paths]
        assert {one["size"] for one in described} == {"70×70"}
        image = read_image(paths[0])
        assert torch.equal(data.read(paths[0]), image[:, :, 5:75])

    def test_formats(self, root: Path) -> None:
        write(root / "zoo" / "train" / "photographic", 4, 80, suffix="jpg")
        write(root / "zoo" / "train" / "generated", 3, 81, suffix="jpg")
        files = module(root / "zoo", match_formats=True).files("train")
        counts = Counter((path.suffix, int(label)) for path, label in zip(files.paths, files.labels, strict=True))
        assert counts[".jpg", 0] == counts[".jpg", 1] > 0
        assert counts[".png", 0] == counts[".png", 1] > 0

    def test_no_format_in_common(self, root: Path) -> None:
        for path in (root / "zoo" / "train" / "generated").iterdir():
            Image.open(path).convert("RGB").save(path.with_suffix(".jpg"))
            path.unlink()
        with pytest.raises(ValueError, match="classes of zoo have none of their formats, JPEG, PNG, in common"):
            module(root / "zoo", match_formats=True).setup("fit")


class Coarse(nn.Module):
    """An autoencoder that keeps every other pixel."""

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.scale = scale

    def encode(self, images: Tensor) -> Tensor:
        return self.weight * images[..., ::2, ::2]

    def decode(self, codes: Tensor) -> Tensor:
        return codes.repeat_interleave(self.scale, -1).repeat_interleave(self.scale, -2)

    @classmethod
    def tinted(cls, photograph: Tensor, tint: Tensor) -> Tensor:
        """What a decoder that shifts the colours makes of bytes."""
        coarse = cls()
        with torch.no_grad():
            return coarse.decode(coarse.encode(photograph.double())) * tint[:, None, None] + 20


class TestTwins:
    def test_photographs_and_their_twins_differ_in_nothing_else(self, root: Path, tmp_path: Path) -> None:
        data = module(root, twins=[AutoencoderTwins("coarse", Coarse(), str(tmp_path / "cache"))])
        assert data.source_names == ["camera", "site", "zoo", "coarse"]
        held_out = {split: data.files(split).of_source("coarse") for split in ("train", "val", "test")}
        assert sum(map(len, held_out.values())) == 2 * 28, "each photograph, in the part that it is in"
        files = held_out["train"]
        half = len(files) // 2
        assert files.labels.tolist() == [0] * half + [1] * half
        for photograph, twin in zip(files.paths[:half], files.paths[half:], strict=True):
            image, other = read_image(photograph), read_image(twin)
            assert image.shape == other.shape == (3, 32, 32)
            kept = torch.stack([other[..., ::2, ::2].flatten(), image[..., ::2, ::2].flatten()])
            assert torch.corrcoef(kept.float())[0, 1] > 0.99
            assert (other[..., 1::2, :] == other[..., ::2, :]).all(), "what the decoder has made of them"
            assert file_features(photograph, image) == file_features(twin, other)

    def test_a_decoder_is_not_known_by_its_colors(self, tmp_path: Path) -> None:
        """A probe of the colours that is fitted to twins by one decoder knows none by another."""
        pictures = [
            torch.from_numpy(picture).permute(2, 0, 1) for picture in (pictures_of.coffee(), pictures_of.astronaut())
        ]
        photographs = [
            picture[:, 60 * row : 60 * row + 64, 60 * column : 60 * column + 64]
            for picture, row, column in itertools.product(pictures, range(6), range(6))
        ]
        tints = (torch.tensor([0.75, 0.85, 0.8]), torch.tensor([0.8, 0.8, 0.7]))
        decoded = [[Coarse.tinted(photograph, tint) for photograph in photographs] for tint in tints]
        matched = [
            [match_colors(twin, photograph) for twin, photograph in zip(d, photographs, strict=True)] for d in decoded
        ]
        labels = torch.tensor([0, 1]).repeat_interleave(36)

        def area(first: list[Tensor], second: list[Tensor]) -> float:
            columns = [
                [color_features(image) for image in (*photographs[part::2], *twins[part::2])]
                for part, twins in enumerate((first, second))
            ]
            return float(binary_auroc(predict_linear(fit_linear(columns[0], labels), columns[1]), labels))

        assert area(*decoded) > 0.8
        assert area(*matched) < 0.55

    def test_colors_are_matched_by_curves(self) -> None:
        photograph = torch.from_numpy(pictures_of.coffee()[100:164, 200:296]).permute(2, 0, 1)
        twin = Coarse.tinted(photograph, torch.tensor([0.7, 0.9, 0.8]))
        matched = match_colors(twin, photograph)
        for statistic in (lambda x: x.mean(1), torch.cov, lambda x: x.sort(1).values):
            assert statistic(twin.flatten(1).float()).sub(statistic(photograph.flatten(1).float())).abs().max() > 20
        pixels, wanted = matched.flatten(1).float(), photograph.flatten(1).float()
        torch.testing.assert_close(pixels.mean(1), wanted.mean(1), rtol=0, atol=0.5)
        torch.testing.assert_close(torch.cov(pixels), torch.cov(wanted), rtol=0.03, atol=20)
        deciles = torch.linspace(0, 1, 11)
        torch.testing.assert_close(pixels.quantile(deciles, 1), wanted.quantile(deciles, 1), rtol=0, atol=4)
        cells = matched.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)
        assert (cells == cells[..., :1]).all(), "pixels that a decoder has made alike stay alike"

    def test_a_decoder_that_blurs_is_not_known_by_its_blur(self) -> None:
        photograph = torch.from_numpy(pictures_of.coffee()).permute(2, 0, 1)[:, 50:306, 60:380]
        blurred = torch.from_numpy(gaussian_filter(photograph.float().numpy(), (0, 0.6, 0.6)))
        stripes = 2.0 * (-1) ** torch.arange(320)  # the trace: at one frequency, in one direction
        matched = match_power(blurred + stripes, photograph)

        def power(x: Tensor, low: float, high: float) -> float:
            x = x.double() - x.double().mean()
            spectrum = np.fft.fft2(x.numpy() * np.hanning(256)[:, None] * np.hanning(320))
            f = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(320))
            return float((np.abs(spectrum[:, (low <= f) & (f < high)]) ** 2).sum())

        for low, high in itertools.pairwise((0.05, 0.15, 0.25, 0.35, 0.45)):
            assert power(matched, low, high) == pytest.approx(power(photograph, low, high), rel=0.1)
        assert power(blurred, 0.35, 0.45) < 0.3 * power(photograph, 0.35, 0.45)
        assert matched.mean((1, 2)) == pytest.approx(blurred.mean((1, 2)), abs=0.05)
        assert (matched * stripes).mean() > 4 * (photograph * stripes).mean().abs(), "the trace is still there"
        same = match_power(photograph, photograph)
        assert (same - photograph).abs().max() < 0.01

    def test_they_are_made_once(self, root: Path, tmp_path: Path) -> None:
        def paths(network: nn.Module, **options) -> list[Path]:
            twins = AutoencoderTwins("coarse", network, str(tmp_path), max_images=3, **options)
            return module(root / "zoo", twins=[twins]).files("train").of_source("coarse").paths

        first = paths(Coarse())
        assert len(first) == 6
        times = [path.stat().st_mtime_ns for path in first]
        assert [path.stat().st_mtime_ns for path in paths(Coarse())] == times
        other = Coarse()
        other.weight.data += 1
        for network, options in ((other, {}), (Coarse(), {"latent_noise": 0.1})):
            with pytest.raises(ValueError, match=r"holds twins by another .*: name another folder, or remove this one"):
                paths(network, **options)

    def test_photographs_of_a_folder(self, root: Path, tmp_path: Path) -> None:
        write(tmp_path / "photos", 10, 90)
        twins = AutoencoderTwins("coarse", Coarse(), str(tmp_path / "cache"), photographs=str(tmp_path / "photos"))
        data = module(root, twins=[twins], test_sources=["coarse"])
        assert [len(data.files(split).of_source("coarse")) for split in ("train", "val", "test")] == [0, 0, 2]
        every = [
            {Path(p).name[:1] for p in twins.take(part, data.fractions, 0).names} for part in ("train", "val", "test")
        ]
        assert [len(names) for names in every] == [8, 1, 1]
        assert len(set.union(*every)) == 10

    def test_a_source_that_is_left_out_has_no_twins(self, root: Path, tmp_path: Path) -> None:
        twins = AutoencoderTwins("coarse", Coarse(), str(tmp_path / "cache"))
        names = module(root, twins=[twins], test_sources=["site"]).files("train").of_source("coarse").paths
        assert len(names) == 2 * (8 + 4)

    def test_noise_and_scale_of_the_code(self, tmp_path: Path) -> None:
        image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) / 2
        plain = AutoencoderTwins("a", Coarse(), str(tmp_path)).twin(image, 1)
        scaled = AutoencoderTwins("a", Coarse(), str(tmp_path), latent_scale=(1.1, 1.1)).twin(image, 1)
        torch.testing.assert_close(scaled, plain * 1.1)
        noisy = AutoencoderTwins("a", Coarse(), str(tmp_path), latent_noise=0.2)
        assert torch.equal(noisy.twin(image, 1), noisy.twin(image, 1))
        spreads = [float((noisy.twin(image, key) - plain).std() / plain.std()) for key in range(50)]
        assert 0 < min(spreads) < 0.05
        assert 0.1 < max(spreads) < 0.21

    def test_another_range_makes_other_twins(self, root: Path, tmp_path: Path) -> None:
        """Twins of before, whose folder does not name the range, are those of the default."""

        def files(**options) -> object:
            twins = AutoencoderTwins("coarse", Coarse(), str(tmp_path), max_images=3, **options)
            return module(root / "zoo", twins=[twins]).files("train")

        files()
        settings = tmp_path / "coarse" / "twins.json"
        settings.write_text(
            json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "value_range"})
        )
        files()
        with pytest.raises(ValueError, match="holds twins by another value_range"):
            files(value_range=(-1, 1))

    @pytest.mark.parametrize("content", ["nothing", "text", "another", "half"])
    def test_weights_that_do_not_fit(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "decoder.pt"
        torch.save(nn.Linear(2, 1).state_dict() if content == "another" else Coarse().state_dict(), path)
        if content == "nothing":
            path.unlink()
        elif content != "another":
            path.write_bytes(b"text" if content == "text" else path.read_bytes()[:200])
        with pytest.raises((FileNotFoundError, ValueError), match=r"AutoencoderTwins: .*decoder\.pt") as refused:
            AutoencoderTwins("a", Coarse(), str(tmp_path), weights=str(path))
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 400

    def test_codes_as_diffusers_wraps_them(self, tmp_path: Path) -> None:
        class Wrapped(Coarse):
            def encode(self, images: Tensor):
                mode = super().encode(images)
                return type("Output", (), {"latent_dist": type("D", (), {"mode": lambda self: mode})()})()

            def decode(self, codes: Tensor):
                return type("Output", (), {"sample": super(Wrapped, self).decode(codes)})()

        image = torch.rand(3, 32, 32)
        twin = AutoencoderTwins("a", Wrapped(), str(tmp_path), value_range=(-1, 1)).twin(image)
        torch.testing.assert_close(twin, AutoencoderTwins("a", Coarse(), str(tmp_path)).twin(image))

    def test_what_does_not_fit(self, root: Path, tmp_path: Path) -> None:
        large = AutoencoderTwins("large", Coarse(4), str(tmp_path))
        with pytest.raises(ValueError, match=r"large makes \[3, 128, 128\] of an image \[3, 64, 64\]"):
            module(root / "zoo", twins=[large]).setup("fit")
        with pytest.raises(ValueError, match="Linear has no method encode"):
            AutoencoderTwins("a", nn.Linear(1, 1), str(tmp_path))
        gray = nn.Conv2d(1, 1, 1)
        gray.encode = gray.decode = gray.forward  # type: ignore[assignment]
        with pytest.raises(ValueError, match=r"gray cannot process an image \[3, 32, 32\]: .*channels") as refused:
            AutoencoderTwins("gray", gray, str(tmp_path)).twin(torch.rand(3, 32, 32))
        assert "\n" not in str(refused.value)
        broken = Coarse()
        broken.weight.data.fill_(torch.nan)
        with pytest.raises(ValueError, match="broken makes NaN or infinity"):
            AutoencoderTwins("broken", broken, str(tmp_path)).twin(torch.rand(3, 32, 32))
        with pytest.raises(ValueError, match="two sources are called zoo"):
            module(root, twins=[AutoencoderTwins("zoo", Coarse(), str(tmp_path))]).setup("fit")


def test_a_damaged_avif_is_left_out(root: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 99, 9)).save(file, "AVIF")
    content = file.getvalue()
    for number in range(len(content) // 8):
        damaged = bytearray(content)
        damaged[8 * number : 8 * number + 8] = bytes(8)
        (root / "zoo" / "train" / "generated" / f"x{number}.avif").write_bytes(damaged)
    data = module(root / "zoo", on_error="skip")
    with pytest.warns(UserWarning, match="cannot be read and are left out"):
        data.setup("fit")
    assert len(list(data.train_dataloader()))
