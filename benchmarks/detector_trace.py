"""How soon a network learns the trace of a decoder, by what the images go through before it sees them.

    python benchmarks/detector_trace.py --json docs/results/detector_trace.json --work logs/detector_sources

Photographs beside their twins by a published autoencoder, one source alone, without any other: what a detector can
know of it at the best. The same network learns from batches drawn at random and from pairs, a photograph and its twin
at one place; from crops as they are, with the later part of a history, with a whole one, and with that after it has
learned from crops as they are. It is tested on photographs that it was not trained on, whose crops go through the
same; they belong to the training part of `detector_sources.py`, so that nothing it reports is looked at here.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _common import arguments, write_json
from _taef2 import TAEF2
from detector_sources import PHOTOGRAPHS, write_table
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc

from datamodules import AutoencoderTwins
from datamodules._detector_crops import RandomCrop, RandomHistory
from lightning_modules import NeighborDifferences, RestorationResidual, TraceNetwork
from lightning_modules.imaging import read_image

SIDE, BATCH = 64, 32
TRAIN_CROPS, TEST_CROPS = 12, 9
AFTER = (100, 200, 300)
# Rescaling and qualities, and how often an image is blurred.
HISTORIES: dict[str, RandomHistory | None] = {
    "none": None,
    "light": RandomHistory((0.8, 1.0), 0.0, (0.0, 0.0), (80, 95)),
    "whole": RandomHistory((0.5, 1.0), 0.1, (0.3, 1.5), (50, 95)),
}


def load_crops(paths: list[Path], history: RandomHistory | None) -> tuple[list[Tensor], list[Tensor]]:
    """What the network sees of each image to train on and, of every fourth, to be tested on.

    Shape:
        - output: `[V, 6, S, S]` each
    """
    inputs = [RestorationResidual(), NeighborDifferences()]
    seen: tuple[list[Tensor], list[Tensor]] = ([], [])
    for number, path in enumerate(paths):
        image, tested = read_image(path), number % 4 == 3
        count = TEST_CROPS if tested else TRAIN_CROPS
        keys = [1000 * number + crop for crop in range(count)]
        if history is None:
            crops = torch.stack([_cut(image, key) for key in keys])
        else:
            crops = torch.cat([RandomCrop(SIDE, history)(image, key) for key in keys])
        seen[tested].append(torch.cat([part(crops / 255) for part in inputs], dim=1).detach())
    return seen


def _cut(image: Tensor, key: int) -> Tensor:
    generator = torch.Generator().manual_seed(key)
    top, left = (int(torch.randint(length - SIDE + 1, (), generator=generator)) for length in image.shape[1:])
    return image[:, top : top + SIDE, left : left + SIDE]


def learn(
    network: nn.Module, crops: list[tuple[list[Tensor], list[Tensor]]], pairs: bool, rate: float
) -> dict[str, float]:
    """Trains, and returns loss and area under the ROC curve of whole images after so many steps.

    Args:
        network: From what is seen to a logit.
        crops: Of the photographs, and of their twins, in one order.
        pairs: Whether a batch has photographs and their own twins.
        rate: The highest learning rate.
    """
    images = torch.cat([image for train, _ in crops for image in train])
    labels = torch.cat([torch.full((sum(map(len, train)),), float(k)) for k, (train, _) in enumerate(crops)])
    tested = [(image, label) for label, (_, test) in enumerate(crops) for image in test]
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, AFTER[-1])
    losses: list[float] = []
    found: dict[str, float] = {}
    while len(losses) < AFTER[-1]:
        if pairs:
            half = torch.randint(len(images) // 2, (BATCH // 2,))
            chosen = torch.cat([half, half + len(images) // 2])
        else:
            chosen = torch.randint(len(images), (BATCH,))
        loss = F.binary_cross_entropy_with_logits(network(images[chosen])[:, 0], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if len(losses) in AFTER:
            network.eval()
            with torch.no_grad():
                logits = torch.stack([network(image).mean() for image, _ in tested])
            network.train()
            area = binary_auroc(logits.sigmoid(), torch.tensor([label for _, label in tested]))
            found |= {f"auroc {len(losses)}": float(area), f"loss {len(losses)}": fmean(losses[-50:])}
    return {**found, "images": len(tested)}


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("logs/detector_sources"), help="twins")
    parser.add_argument("--twins", type=int, default=80, metavar="N", help="photographs, those tested on included")
    parser.add_argument("--rate", type=float, default=3e-3, help="the highest learning rate")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    write_table(options.data, options.work, None)
    twins = AutoencoderTwins(
        "taef2",
        TAEF2(options.data / "twins"),
        str(options.work / "twins"),
        photographs=str(options.work / PHOTOGRAPHS),
        max_images=options.twins,
        side=256,
    )
    files = twins.make(twins.take("train", {"val": 0.1, "test": 0.2}, 0), "train")
    large = [path for path in files.paths if min(read_image(path).shape[1:]) >= SIDE]
    classes = [[path for path in large if path.parent.name == kind] for kind in ("photographic", "generated")]
    rows: list[dict[str, Any]] = []
    after_none: dict[str, Any] = {}
    for name, pairs, first in (
        ("none", False, False),
        ("none", True, False),
        ("light", True, False),
        ("whole", True, False),
        ("whole", True, True),
    ):
        torch.manual_seed(0)
        network = nn.Sequential(TraceNetwork(6), nn.Linear(96, 1))
        if first:
            network.load_state_dict(after_none)
        crops = [load_crops(paths, HISTORIES[name]) for paths in classes]
        found = learn(network, crops, pairs, options.rate)
        if name == "none":
            after_none = {key: value.clone() for key, value in network.state_dict().items()}
        setting = {"source": "taef2", "history": name, "pairs": pairs, "after none": first}
        rows.append({**setting, **found})
        write_json(options.json, rows)
        print(" ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)


if __name__ == "__main__":
    main()
