"""Photographs and generated images of one or more sources, for a detector that tells them apart."""

import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules._decoded import check_cache_gib, decode_within
from datamodules._detector_crops import FixedCrops, HistoryCrops, RandomCrop, RandomHistory, View
from datamodules._matching import matching_formats, middle, shared_side
from datamodules._readable import OnError, check_on_error, find_readable
from datamodules._sampler import BalancedBatches, FixedBatches, SampleBatch
from datamodules.image_data_module import BatchDataset, ImageDataModule, Split
from datamodules.labels import (
    LabelledFiles,
    Parts,
    find_sources,
    find_unlabelled,
    join,
    require_classes,
    require_disjoint,
    require_files,
    take_part,
)
from datamodules.twins import AutoencoderTwins
from lightning_modules.imaging import Degradation, ImageBatch, degrade, read_image, relive, stream

_HISTORY = "history"
_CONDITIONS = (_HISTORY, "clean", "jpeg 75", "jpeg 50", "rescale 0.75", "rescale 0.5", "blur 1")
_PARTS: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("train", "test")}


class GeneratedImagesDataModule(ImageDataModule):
    """Photographs and generated images of any size and format, as crops at their native resolution.

    The data are one or more *sources*, each with both classes: what one camera, site or generator has brought. `root`
    is a folder `SOURCE/{train,val,test}/{photographic,generated}`, or one source, without the folder that names it and,
    if wanted, without the three parts; or a table (`.csv`) with the columns `path` (relative to the table), `label` (a
    class name, or 0 and 1) and, if wanted, `source` and `split` (train, val or test). A part that a source does not
    have is a stratified part of its training images, held out by seed: what threshold and temperature are fitted to is
    never what is reported. To `predict`, `root` may also be any folder, a table without labels, or one image; labels
    are then not looked at.

    Training batches have equally many images of each source and class; a photograph and its twin come together, and go
    through the same. Before anything is seen, both classes pass the
    same random history: they are rescaled by a random kernel, cropped, and encoded as JPEG or WebP of random quality,
    some of them twice. So neither format nor size nor compression need stand for the label. Validation and the test
    condition `history` draw the same, by seed. Nothing else is resized, and no metadata is read but the orientation.
    Every random number is a function of seed, epoch and image. An image smaller than a crop is continued by its mirror
    image.

    A batch holds `image` [B, V, 3, S, S] with the V crops of each image (1 in training), `label` [B] (0 and 1 in the
    order of `class_names`, −1 where unknown), `index`, `weight` and `key` [B], `name`, a list of paths relative to the
    root, `condition`, what its images went through, and, but to predict, `unseen` [B], whether an image is of a source
    that is not trained on.

    Args:
        root: Folder or table with the images; to predict, also a single image.
        class_names: Names of the folders with photographs and with generated images.
        crop_size: Side of a crop, in pixels.
        batch_size: Images per batch on each device.
        num_workers: Worker processes of each loader, which decode and degrade.
        eval_crops: Crops of each image in evaluation, always at the same places.
        conditions: What to test under, in turn: `history`, `clean`, `jpeg 75`, `rescale 0.5`, `blur 1`.
        val_sources: Sources that are not trained on, but validated on, by which the detector is calibrated.
        test_sources: Sources that are neither trained nor validated on, but tested on; by default all sources are
            tested on, by images that were held out.
        twins: Autoencoders that photographs are passed through; each is one more source, in which content, size and
            history of both classes are equal.
        val_fraction: Part of a source's training images held out where it has no validation part.
        test_fraction: Part held out where it has no test part.
        seed: Seed of the splits, the order, the crops and the histories; by default that of `--seed_everything`.
        augment: Mirror training crops left to right at random.
        rescale: Smallest and largest factor that images are rescaled by.
        blur_probability: Probability that an image is blurred.
        blur_sigma: Smallest and largest standard deviation of the blur, in pixels.
        quality: Lowest and highest quality of JPEG and WebP.
        match_sizes: See no more of an image than its middle square, as large as nineteen in twenty images of its source
            are, and leave smaller ones out: for classes of different size.
        match_formats: Leave images out until both classes of a source have equally many of each file format.
        cache_gib: Memory of each process for decoded training images, in GiB, at 3 bytes a pixel; those for which there
            is no room are decoded for each crop. What is seen does not depend on it.
        on_error: `raise` at a file that cannot be read, or `skip`: decode all files at the start, and leave such files
            out with a warning that counts them.
        cache: The former switch; false is `cache_gib=0`.
        jpeg_quality: The former name of `quality`.
        rescale_probability: Without effect: every image passes a history.
        jpeg_probability: Likewise.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = tempfile.mkdtemp()
        >>> Image.new("L", (40, 30), 51).save(f"{root}/grey.png")
        >>> data = GeneratedImagesDataModule(root, crop_size=32, eval_crops=2)
        >>> batch = data.on_after_batch_transfer(next(iter(data.predict_dataloader())), 0)
        >>> batch["name"], batch["image"].shape, batch["condition"]
        (['grey.png'], torch.Size([1, 2, 3, 32, 32]), 'clean')
    """

    def __init__(
        self,
        root: str,
        class_names: tuple[str, str] = ("photographic", "generated"),
        crop_size: int = 96,
        batch_size: int = 32,
        num_workers: int = 0,
        eval_crops: int = 4,
        conditions: list[str] | None = None,
        val_sources: list[str] | None = None,
        test_sources: list[str] | None = None,
        twins: list[AutoencoderTwins] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int | None = None,
        augment: bool = True,
        rescale: tuple[float, float] = (0.5, 1.0),
        blur_probability: float = 0.1,
        blur_sigma: tuple[float, float] = (0.3, 1.5),
        quality: tuple[int, int] = (50, 95),
        match_sizes: bool = False,
        match_formats: bool = False,
        cache_gib: float = 2.0,
        on_error: OnError = "raise",
        cache: bool | None = None,
        jpeg_quality: tuple[int, int] | None = None,
        rescale_probability: float | None = None,
        jpeg_probability: float | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, augment)
        if jpeg_quality is not None:
            quality = jpeg_quality
            warnings.warn(f"{type(self).__name__}: jpeg_quality is now quality", FutureWarning, stacklevel=2)
        if cache is not None:
            warnings.warn(
                f"{type(self).__name__}: cache is now cache_gib, the memory for decoded images",
                FutureWarning,
                stacklevel=2,
            )
            cache_gib = cache_gib if cache else 0.0
        check_cache_gib(cache_gib)
        for name, probability in (("rescale_probability", rescale_probability), ("jpeg_probability", jpeg_probability)):
            if probability is not None:
                warnings.warn(
                    f"{type(self).__name__}: {name} has no effect any more: every image passes a history",
                    FutureWarning,
                    stacklevel=2,
                )
        for name, value in (("crop_size", crop_size), ("eval_crops", eval_crops)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 < fraction < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {fraction}")
        if val_fraction + test_fraction >= 1:
            raise ValueError(
                f"val_fraction + test_fraction must leave some to train on, got {val_fraction + test_fraction}"
            )
        if len(set(class_names)) != 2:
            raise ValueError(f"class_names must be two different names, got {list(class_names)}")
        check_on_error(on_error)
        self.conditions = list(_CONDITIONS if conditions is None else conditions)
        if not self.conditions or len(set(self.conditions)) < len(self.conditions):
            raise ValueError(f"conditions must be one or more different ones, got {self.conditions}")
        self.val_sources, self.test_sources = val_sources or [], test_sources or []
        if both := set(self.val_sources) & set(self.test_sources):
            raise ValueError(f"a source is for validation or for the test, got {sorted(both)} in both")
        self.twins = twins or []
        self._history = RandomHistory(rescale, blur_probability, blur_sigma, quality)
        self.root = root
        self._class_names = list(class_names)
        self.crop_size = crop_size
        self.eval_crops = eval_crops
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.match_sizes = match_sizes
        self.match_formats = match_formats
        self.cache_gib = cache_gib
        self.on_error = on_error
        self._sources: dict[str, Parts] = {}
        self._files: dict[Split, LabelledFiles] = {}
        self._sides: dict[str, int] = {}
        for condition in self.conditions:
            self._view(condition)

    @property
    def class_names(self) -> list[str]:
        """The two names, that of the photographs first."""
        return self._class_names

    @property
    def source_names(self) -> list[str]:
        """The sources, twins last."""
        return list(self._find_sources())

    @property
    def trained_sources(self) -> list[str]:
        """The sources that are trained on."""
        held_out = {*self.val_sources, *self.test_sources}
        if unknown := sorted(held_out - {*self.source_names}):
            raise ValueError(f"there is no source {unknown[0]} to hold out; there is {', '.join(self.source_names)}")
        if not (found := [name for name in self.source_names if name not in held_out]):
            raise ValueError(
                f"val_sources and test_sources name all sources, {', '.join(held_out)}: none is trained on"
            )
        return found

    def prepare_data(self) -> None:
        """Passes photographs through the autoencoders, where that has not been done."""
        stage = "" if self.trainer is None or self.trainer.state.fn is None else str(self.trainer.state.fn)
        for split in _PARTS.get(stage, ()) if self.twins else ():
            self.files(split)

    def setup(self, stage: str | None = None) -> None:
        """Loads what the stage needs, once, and warns where its figures will not mean much.

        Args:
            stage: `fit`, `validate`, `test` or `predict`; None for all of them.
        """
        super().setup(stage)
        if stage == "fit" and len(self.source_names) == 1:
            rank_zero_warn(
                f"there is one source, {self.source_names[0]}: what is measured on it means nothing for images from "
                "elsewhere. Put sources side by side, in a folder each, or add twins"
            )

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns the training batches, balanced over sources and classes, or fixed under `overfit_batches`."""
        if self.trainer is not None and self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            return super().train_dataloader()
        files = self._dataset("train").files  # type: ignore[attr-defined]
        number = {source: 2 * place for place, source in enumerate(dict.fromkeys(files.sources))}
        groups = torch.tensor([number[source] for source in files.sources]) + files.labels
        made, first = {twins.name for twins in self.twins}, dict[tuple[str, str], int]()
        originals = torch.tensor(
            [
                first.setdefault((source, path.name), place) if source in made else place
                for place, (source, path) in enumerate(zip(files.sources, files.paths, strict=True))
            ]
        )
        return self._training_loader(
            lambda length, size, **options: BalancedBatches(groups, size, originals, **options), True
        )

    def test_dataloader(self) -> list[DataLoader[Any]]:  # type: ignore[override]
        """Returns one loader for each condition, all over the same images."""
        return [
            self._loader("test", DataLoader, FixedBatches, data=self._crops("test", condition))
            for condition in self.conditions
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the seed of the checkpoint, and with the files that it held out."""
        self._files.clear()
        super().load_state_dict(state_dict)

    def files(self, split: Split) -> LabelledFiles:
        """Returns the files of a split: `paths`, `names`, `labels`, `sources`, in the order of the batches' `index`.

        Args:
            split: `train`, `val`, `test` or `predict`.
        """
        if split not in self._files:
            self._files[split] = self._find(split)
        return self._files[split]

    def read(self, path: Path, condition: str = "clean") -> Tensor:
        """Returns a whole image as it is under a condition.

        Args:
            path: The image file.
            condition: `clean`, `history`, or a degradation.

        Shape:
            - output: `[3, H, W]`, uint8
        """
        image = self._read(path)
        if condition == _HISTORY:
            return relive(
                image, self._history.draw(int(stream(self.seed, zlib.crc32(path.name.encode(errors="replace")))))[0]
            )
        return degrade(image, Degradation.parse(condition))

    def mirrors(self, height: int, width: int, condition: str = "clean") -> bool:
        """Tells whether an image of a size is smaller than a crop, and so continued by its mirror image.

        Args:
            height: Height of the image as its file has it, in pixels.
            width: Width, likewise.
            condition: `clean`, `history`, which rescales no image below a crop, or a degradation, which may.
        """
        degradation = Degradation() if condition == _HISTORY else Degradation.parse(condition)
        return min(degradation.size(height, width)) < self.crop_size

    def load_split(self, split: Split) -> BatchDataset:
        """Finds the images of a split, and decodes what is kept of those to train on.

        Args:
            split: `train`, `val`, `test` or `predict`.
        """
        return self._crops(split, {"train": "random", "predict": "clean"}.get(split, _HISTORY))

    def _crops(self, split: Split, condition: str) -> "_Crops":
        files = self.files(split)
        unseen = None
        if split != "predict":
            trained = set(self.trained_sources)
            unseen = torch.tensor([source not in trained for source in files.sources])
        read = partial(_read, sides=dict(self._sides))
        kept = decode_within(files.paths, read, self.cache_gib) if split == "train" else []
        return _Crops(files, self._view(condition), condition, read, unseen, kept)

    def _view(self, condition: str) -> View:
        if condition == "random":
            return RandomCrop(self.crop_size, self._history)
        if condition == _HISTORY:
            return HistoryCrops(self.crop_size, self.eval_crops, self._history)
        return FixedCrops(self.crop_size, self.eval_crops, Degradation.parse(condition))

    def _find_sources(self) -> dict[str, Parts]:
        if not self._sources:
            found = find_sources(Path(self.root).expanduser(), self._class_names)
            require_disjoint(found)
            own = {name: parts for name, parts in found.items() if name not in self.test_sources}
            for twins in self.twins:
                if twins.name in found:
                    raise ValueError(f"two sources are called {twins.name}: give the twins another name")
                found[twins.name] = {
                    part: partial(self._twin_files, twins, own, part) for part in ("train", "val", "test")
                }
            self._sources = found
        return self._sources

    def _twin_files(self, twins: AutoencoderTwins, sources: dict[str, Parts], part: str) -> LabelledFiles:
        """Photographs of a part and their twins: what is held out of a source is held out of its twins."""
        if twins.photographs is None:
            files = join(self._take(parts, source, part) for source, parts in sources.items())
            files = files.select(files.labels == 0)
        else:
            files = twins.take(part, self.fractions, self.seed)
        return twins.make(self._readable(files), part)

    def _take(self, parts: Parts, source: str, part: str) -> LabelledFiles:
        return take_part(parts, source, part, self._class_names, self.fractions, self.seed)

    def _find(self, split: Split) -> LabelledFiles:
        if split == "predict":
            return self._readable(find_unlabelled(Path(self.root).expanduser()))
        trained, sources = self.trained_sources, self._find_sources()
        wanted = {
            "train": trained,
            "val": [*trained, *self.val_sources],
            "test": self.test_sources or [*sources],
        }[split]
        files = self._readable(join(self._take(sources[name], name, split) for name in wanted))
        if self.match_formats:
            files = files.select(matching_formats(files, self.seed))
        if self.match_sizes:
            files = self._matched(files)
        require_classes(files, self._class_names)
        return files

    def _readable(self, files: LabelledFiles) -> LabelledFiles:
        if self.on_error == "skip":
            files = files.select(find_readable(files.paths, files.names, self.num_workers))
        else:
            require_files(files)
        if not len(files):
            raise ValueError(f"{self.root} holds no image that can be read")
        return files

    def _matched(self, files: LabelledFiles) -> LabelledFiles:
        """Those whose middle square is as large as their source asks for, which `read` then cuts out."""
        parts = []
        for source in dict.fromkeys(files.sources):
            own = files.of_source(source)
            sides, large = shared_side(own.paths)
            parts.append(own.select(large))
            self._sides.update(dict.fromkeys(map(str, parts[-1].paths), sides))
        matched = join(parts)
        if lost := len(files) - len(matched):
            rank_zero_warn(f"match_sizes leaves out {lost} of {len(files)} images, the smallest")
        return matched

    def _read(self, path: Path) -> Tensor:
        return _read(path, self._sides)


def _read(path: Path, sides: dict[str, int]) -> Tensor:
    image = read_image(path)
    return middle(image, sides[str(path)]) if str(path) in sides else image


class _Crops(BatchDataset):
    """What is seen of each image of a batch."""

    def __init__(
        self,
        files: LabelledFiles,
        view: View,
        condition: str,
        read: Callable[[Path], Tensor],
        unseen: Tensor | None,
        kept: list[Tensor],
    ) -> None:
        self.files = files
        self.view = view
        self.condition = condition
        self.read = read
        self.unseen = unseen
        self.kept = kept  # the first of them, decoded

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, samples: SampleBatch) -> ImageBatch:
        chosen = samples.index.tolist()
        crops = [self.view(self._image(i), number) for i, number in zip(chosen, samples.key.tolist(), strict=True)]
        batch = samples.batch(torch.stack(crops), self.files.labels.index_select(0, samples.index))
        batch = {**batch, "name": [self.files.names[i] for i in chosen], "condition": self.condition}
        return batch if self.unseen is None else {**batch, "unseen": self.unseen[samples.index]}

    def _image(self, index: int) -> Tensor:
        return self.kept[index] if index < len(self.kept) else self.read(self.files.paths[index])
