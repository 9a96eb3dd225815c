"""Point clouds: surfaces made from formulas, or a folder of one's own scans and meshes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules._formula_shapes import SHAPES
from datamodules._sampler import SampleBatch
from datamodules._surface_samples import Sampling, sample_surface
from datamodules.image_data_module import BatchDataset, ImageDataModule, Split
from lightning_modules.imaging import draw, mix, permutation
from lightning_modules.point_clouds.files import find_clouds, read_cloud

if TYPE_CHECKING:
    from torch_geometric.data import Data

# Points that stand for the surface itself, for each point of a cloud; and what their draws are set apart by.
_SURFACE = 4
_SURFACE_STREAM = 0x3C6E_F372
_LEAST_POINTS = 16


class PointCloudDataModule(ImageDataModule):
    """Point clouds, as PyG batches.

    Without `root` they are sampled from surfaces that are made from formulas: round and sharp ones to train on, others
    to validate and to test. With it, from the files of a folder and those below it (`.ply`, `.pcd`, `.xyz`, `.npy`,
    `.obj`): meshes are sampled anew for each cloud, of scans a piece of `num_points` neighboring points is taken, at
    another place each time. `predict` takes the points of whole files as they are, but for those that are not finite.

    A batch is a dict: `cloud`, a `torch_geometric.data.Batch` with `pos` [N, 3] about the median of the cloud, `radius`
    [B] of the bounding sphere, and the true `surface` [M, 3], with its normals where it is a mesh; and `index`,
    `weight`, `key` and `name` of each cloud.

    Args:
        root: Folder with the files; by default surfaces from formulas.
        num_points: Points of a cloud to train on or to validate.
        clouds_per_shape: Training clouds of each surface or file in an epoch.
        sampling: `even` keeps a least distance between the points of a surface, as scanners do; `uniform` draws each
            for itself.
        batch_size: Clouds per batch on each device; `predict` takes one at a time.
        num_workers: Worker processes of each loader.
        val_fraction: Part of the files, chosen by seed, that is kept for validation and test.
        noise_std: Standard deviation of the noise that the scans have, in the unit of their coordinates, where it is
            known.
        seed: Seed of the split, the points, the order and the noise keys; by default that of `--seed_everything`.

    Example:
        >>> data = PointCloudDataModule(num_points=500, batch_size=2)
        >>> batch = next(iter(data.val_dataloader()))
        >>> batch["cloud"].pos.shape, batch["name"]
        (torch.Size([1000, 3]), ['pillow', 'ring_of_waves'])
    """

    def __init__(
        self,
        root: str | None = None,
        num_points: int = 4000,
        clouds_per_shape: int = 4,
        sampling: Sampling = "even",
        batch_size: int = 4,
        num_workers: int = 0,
        val_fraction: float = 0.2,
        noise_std: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        for name, value, least in (
            ("num_points", num_points, _LEAST_POINTS),
            ("clouds_per_shape", clouds_per_shape, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if sampling not in ("even", "uniform"):
            raise ValueError(f"sampling must be 'even' or 'uniform', got {sampling!r}")
        if not 0 <= val_fraction <= 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        if noise_std is not None and not 0 <= noise_std < float("inf"):
            raise ValueError(
                f"noise_std must be a length, not negative, in the unit of the coordinates, got {noise_std}"
            )
        self.root = root
        self.num_points = num_points
        self.clouds_per_shape = clouds_per_shape
        self.sampling: Sampling = sampling
        self.val_fraction = val_fraction
        self.noise_std = noise_std

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Leaves the clouds as they are: nothing that turning or mirroring would add is lost on the denoiser."""
        return batch

    def has_split(self, split: Split) -> bool:
        """Tells whether a split has samples; those that are held out are tested on as well."""
        return super().has_split("val" if split == "test" else split)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Returns the validation batches; no loader at all where no file is held out."""
        return super().val_dataloader() if len(self._dataset("val")) else []

    def load_split(self, split: Split) -> BatchDataset:
        """Makes the surfaces of a split, or finds its files.

        Args:
            split: `train`, `val`, `test` or `predict`.
        """
        repeats = self.clouds_per_shape if split == "train" else 1
        if self.root is None:
            shapes = SHAPES["test" if split == "predict" else split]
            sources = [_Source(shape.__name__, *shape()) for shape in shapes]
            return _Clouds(sources, repeats, self.num_points, self.sampling)
        root = Path(self.root).expanduser()
        paths = find_clouds(root)
        names = [path.relative_to(root).as_posix() for path in paths]
        if split == "predict":
            return _WholeClouds(paths, names, self.noise_std)
        chosen = [i for i, out in enumerate(self._held_out(len(paths)).tolist()) if out != (split == "train")]
        if not chosen and split != "val":
            raise ValueError(
                f"val_fraction={self.val_fraction} of the {len(paths)} files in {root} leaves none to "
                f"{split}: give another one, or add files"
            )
        sources = [_source(paths[i], names[i]) for i in chosen]
        return _Clouds(sources, repeats, self.num_points, self.sampling, self.noise_std)

    def _held_out(self, length: int) -> Tensor:
        count = round(self.val_fraction * length)
        if 0 < self.val_fraction < 1:
            count = min(max(count, 1), max(length - 1, 1))  # some file on either side, where there are two
        held_out = torch.zeros(length, dtype=torch.bool)
        held_out[permutation(length, self.seed)[:count]] = True
        return held_out

    def _batch_size(self, split: Split) -> int:
        return 1 if split == "predict" and self.root is not None else self.batch_size


class _Source:
    """What clouds are taken from: a mesh, or the points of a scan where there are no faces."""

    def __init__(self, name: str, points: NDArray[np.float64], faces: NDArray[np.int64] | None = None) -> None:
        self.name, self.faces = name, faces
        center = (points.min(0) + points.max(0)) / 2
        self.radius = float(np.sqrt(np.square(points - center).sum(1).max()))
        self.points = points - np.median(points, 0)  # from where single precision reaches all but far outliers


def _source(path: Path, name: str) -> _Source:
    file = read_cloud(path)
    try:
        return _Source(name, *file.finite_mesh())
    except ValueError as error:
        raise ValueError(f"{path} cannot be taken: {error}") from error


class _Clouds(BatchDataset):
    """Clouds of surfaces and scans, each drawn from the sample's key."""

    def __init__(
        self,
        sources: list[_Source],
        repeats: int,
        num_points: int,
        sampling: Sampling,
        noise_std: float | None = None,
    ) -> None:
        self.sources, self.repeats = sources, repeats
        self.num_points, self.sampling, self.noise_std = num_points, sampling, noise_std

    def __len__(self) -> int:
        return len(self.sources) * self.repeats

    def __getitem__(self, samples: SampleBatch) -> Any:
        sources = [self.sources[i % len(self.sources)] for i in samples.index.tolist()]
        clouds = [self._draw(source, key) for source, key in zip(sources, samples.key, strict=True)]
        return _batch(samples, clouds, [source.name for source in sources], self.noise_std)

    def _draw(self, source: _Source, key: Tensor) -> "Data":
        if source.faces is not None:
            mesh = (source.points, source.faces)
            points, normals = sample_surface(*mesh, self.num_points, key, self.sampling)
            others = sample_surface(*mesh, _SURFACE * self.num_points, mix(key ^ _SURFACE_STREAM))
            surface, surface_normal = (torch.cat(both) for both in zip((points, normals), others, strict=True))
            truth = {"surface": surface.float(), "surface_normal": surface_normal.float()}
        else:
            points = torch.from_numpy(source.points)
            if len(points) > self.num_points:
                place = points[int(draw(key, torch.zeros((), dtype=torch.long))) % len(points)]
                points = points[(points - place).square().sum(1).topk(self.num_points, largest=False).indices]
            truth = {"surface": points.float()}
        from lightning_modules._pyg import Data

        return Data(pos=points.float(), radius=torch.tensor([source.radius]), **truth)


class _WholeClouds(BatchDataset):
    """The finite points of whole files, to which no noise is to be added."""

    def __init__(self, paths: list[Path], names: list[str], noise_std: float | None) -> None:
        self.paths, self.names, self.noise_std = paths, names, noise_std

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, samples: SampleBatch) -> Any:
        from lightning_modules._pyg import Data

        chosen = samples.index.tolist()
        clouds = []
        for path in (self.paths[i] for i in chosen):
            source = _source(path, path.name)
            points = torch.from_numpy(source.points).float()
            clouds.append(Data(pos=points, radius=torch.tensor([source.radius])))
        return {**_batch(samples, clouds, [self.names[i] for i in chosen], self.noise_std), "clean": False}


def _batch(samples: SampleBatch, clouds: "list[Data]", names: list[str], noise_std: float | None) -> dict[str, Any]:
    from lightning_modules._pyg import Batch

    follow = ["surface"] if "surface" in clouds[0] else []
    batch: dict[str, Any] = {
        "cloud": Batch.from_data_list(clouds, follow_batch=follow),
        "index": samples.index,
        "weight": samples.weight,
        "key": samples.key,
        "name": names,
    }
    if noise_std is not None:
        batch["noise_std"] = torch.full(samples.index.shape, noise_std)
    return batch
