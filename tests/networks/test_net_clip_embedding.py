"""The CLIP adapter on a small tower with random weights."""

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.em import SimilarityAssignment
from lightning_modules.networks import ClipEmbedding

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def tiny(tmp_path: Path) -> ClipEmbedding:
    open_clip = pytest.importorskip("open_clip", reason="the extra [clip] is not installed")
    (tmp_path / "tiny-tower.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    return ClipEmbedding("tiny-tower", pretrained=None)


def test_vectors_are_those_of_the_tower_on_its_own_preprocessing(tiny: ClipEmbedding) -> None:
    from torchvision.transforms import v2

    images = torch.rand(3, 3, 45, 37)
    transform = v2.Compose(
        [
            v2.Resize((32, 32), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.Lambda(lambda x: x.clamp(0, 1)),
            v2.Normalize(tiny.tower.image_mean, tiny.tower.image_std),
        ]
    )
    tiny.eval()
    with torch.no_grad():
        torch.testing.assert_close(tiny(images), tiny.tower(transform(images)), rtol=1e-4, atol=1e-5)
        grey = tiny(images[:, :1])
        torch.testing.assert_close(grey, tiny(images[:, :1].expand(-1, 3, -1, -1)))
    assert grey.shape == (3, tiny.embedding_size) == (3, 24)
    with pytest.raises(ValueError, match="3 channels, or 1 for grey; got 4"):
        tiny(torch.rand(1, 4, 32, 32))


def test_it_serves_as_an_embedding_of_classes(tiny: ClipEmbedding) -> None:
    assignment = SimilarityAssignment(tiny, tiny.embedding_size, num_classes=2, temperature=0.01).train()
    dark, light = torch.rand(4, 3, 32, 32) * 0.2, torch.rand(4, 3, 32, 32) * 0.2 + 0.8
    images, labels, noise = torch.cat([dark, light]), torch.tensor([0] * 4 + [1] * 4), torch.zeros(8)
    r = assignment(images, labels, noise, 2)
    assignment.m_step(assignment.e_step(images, labels, noise, r).sum(0), torch.tensor(True))
    assert assignment(images, torch.full((8,), -1), noise, 2).argmax(1).tolist() == labels.tolist()
    assert not any(parameter.requires_grad for parameter in assignment.parameters())


def test_without_open_clip_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "open_clip":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r'pip install "lightning-em\[clip\]"'):
        ClipEmbedding()
