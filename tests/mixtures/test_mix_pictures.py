"""The pictures of docs/site/em.md can be drawn, and show what the page says."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pictures(docs_script: Callable[[str], ModuleType]) -> ModuleType:
    return docs_script("em_pictures")


def test_every_picture_of_the_page_is_drawn(pictures: ModuleType, tmp_path: Path) -> None:
    pictures.main(["--output", str(tmp_path)])
    page = (PROJECT / "docs/site/em.md").read_text()
    for name in pictures.PICTURES:
        assert f"images/{name}.png" in page
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 200


def test_bounds_lie_below_the_likelihood_and_touch_it(pictures: ModuleType) -> None:
    lines = pictures.bound_touches_likelihood().axes[0].get_lines()
    likelihood = lines[0].get_ydata()
    for bound in (lines[1].get_ydata(), lines[4].get_ydata()):
        gap = [float(a - b) for a, b in zip(likelihood, bound, strict=True)]
        assert min(gap) > -1e-9
        assert min(gap) < 0.1
