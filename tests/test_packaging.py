"""What is installed: the wheel's files and metadata, the public names, and what importing them loads."""

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lightning_modules
from lightning_modules.cli.configs import config_folder, config_names, find_config
from lightning_modules.native import library

PROJECT = Path(__file__).parents[1]
PACKAGES = ("lightning_modules", "callbacks", "datamodules")
PUBLIC = {
    "lightning_modules": [
        "GraphDiffusionReconstruction",
        "GraphDiffusion",
        "GraphDenoiser",
        "ParameterTable",
        "EStep",
        "ResidualDenoiser",
        "ConvAutoencoder",
        "PerceptualLoss",
        "restore",
    ],
    "datamodules": ["CIFAR10DataModule", "PhotoCropsDataModule", "ImageFolderDataModule"],
    "callbacks": [
        "EMParameterCallback",
        "SignRule",
        "GradientRule",
        "EMDashboard",
        "EMReport",
        "ImageGrid",
        "RestoredImageWriter",
    ],
}


def tracked_files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=PROJECT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    return [name for name in listed.stdout.splitlines() if (PROJECT / name).is_file()]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, without what earlier builds have left."""
    tree = tmp_path_factory.mktemp("tree")
    for name in tracked_files():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PROJECT / name, tree / name)
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """The wheel, built from the source distribution."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tree / "dist"), str(tree)]
    built = subprocess.run(command, capture_output=True, text=True, cwd=tree.parent)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (tree / "dist").glob("lightning_em-*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    tree = {name for name in tracked_files() if name.split("/")[0] in PACKAGES}
    configs = {f"lightning_modules/{name}" for name in tracked_files() if name.startswith("configs/")}
    compiled = {name for name in packed if "/prebuilt/" in name}
    assert packed - compiled == tree | configs
    assert "lightning_modules/configs/trainer/ddp.yaml" in packed
    assert {f"{package}/py.typed" for package in PACKAGES} <= packed
    assert "lightning_modules/em/rules/gradient.py" in packed, "sub-packages are there"


def test_the_wheel_brings_the_libraries_for_its_platform(wheel: Path, tmp_path: Path) -> None:
    """In both precisions, found without a compiler and without a cache."""
    if library._compiler() is None:
        assert wheel.name.endswith("-py3-none-any.whl")
        pytest.skip("no C compiler on this machine")
    python, abi, platform = wheel.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none")
    assert platform != "any"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        (described,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: false" in archive.read(described).decode()
    code = """
import torch
from lightning_modules.graph.cpu import kernel
from lightning_modules.graph import GraphDiffusion
from lightning_modules.mixtures import passes
from lightning_modules.mixtures.lloyd import lloyd
for dtype in (torch.float32, torch.float64):
    assert "prebuilt" in kernel.library(dtype)._name
    assert "prebuilt" in passes.library(dtype)._name
    points = torch.tensor([[0.0], [1.0], [10.0], [12.0]], dtype=dtype)
    assert lloyd(points, points[:2]).centers.tolist() == [[0.5], [11.0]]
    noisy = torch.rand(2, 3, 20, 17, dtype=dtype)
    settings = dict(sigma=0.3, tau=0.1, radius=3.0, sigma_s=10.0, sigma_f=0.3, smooth_steps=2, noise=0.1)
    fast, plain = (GraphDiffusion(3, signal="image", implementation=name) for name in ("auto", "message_passing"))
    torch.testing.assert_close(fast(noisy, **settings), plain(noisy, **settings))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "CC": "none", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cache").exists()


def test_a_wheel_without_the_kernel_is_for_every_platform(tree: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(tree)]
    subprocess.run(command, env={**os.environ, library.SWITCH: "0"}, capture_output=True, check=True)
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(path) as archive:
        assert not [name for name in archive.namelist() if "prebuilt" in name], "not even of the build before"


def test_the_wheel_has_the_command_and_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "lightning-em = lightning_modules.cli:main" in archive.read(entry_points).decode()
        assert any(name.endswith("LICENSE") for name in names)


def test_the_malicious_releases_of_lightning_are_excluded(metadata: Message) -> None:
    requirements = {r.name: r for r in map(Requirement, metadata.get_all("Requires-Dist", [])) if r.marker is None}
    lightning = requirements["lightning"].specifier
    assert "2.6.2" not in lightning
    assert "2.6.3" not in lightning
    assert "2.6.1" in lightning
    assert "2.6.4" in lightning
    assert requirements["jsonargparse"].extras == {"signatures"}


def test_the_version_is_one(metadata: Message) -> None:
    assert metadata["Version"] == lightning_modules.__version__


def test_the_wheel_works_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """Without the source tree: configurations by name, and one of them parsed."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "lightning_modules.cli", "fit", "-c", "demo", "-c", "trainer/ddp"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    printed = subprocess.run(
        [*command, "--print_config"], cwd=tmp_path / "empty", env=environment, capture_output=True, text=True
    )
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.startswith(f"# lightning-em=={lightning_modules.__version__}\n")
    assert "strategy: ddp" in printed.stdout
    assert "name: demo" in printed.stdout
    assert not list((tmp_path / "empty").iterdir())


class TestConfigurationsByName:
    def test_all_have_names(self) -> None:
        paths = (PROJECT / "configs").rglob("*.yaml")
        assert set(config_names()) == {
            str(path.relative_to(PROJECT / "configs").with_suffix("").as_posix()) for path in paths
        }
        assert config_folder() == PROJECT / "configs"
        assert config_names()[-1].startswith("trainer/")

    @pytest.mark.parametrize("name", ["demo", "demo.yaml", "trainer/ddp"])
    def test_a_name(self, name: str) -> None:
        assert find_config(name) == str(PROJECT / "configs" / f"{name.removesuffix('.yaml')}.yaml")

    def test_a_file_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "demo").mkdir()
        assert find_config("demo") == str(PROJECT / "configs" / "demo.yaml"), "a folder is no configuration"
        (tmp_path / "demo.yaml").write_text("seed_everything: 1")
        assert find_config("demo.yaml") == "demo.yaml"
        assert find_config(str(tmp_path / "demo.yaml")) == str(tmp_path / "demo.yaml")

    @pytest.mark.parametrize("text", ["seed_everything: 1", "{}", "-"])
    def test_text_is_no_name(self, text: str) -> None:
        assert find_config(text) == text

    @pytest.mark.parametrize("name", ["dmeo", "configs/nothing.yaml", "trainer", "../configs/demo", ""])
    def test_what_is_unknown_names_the_known(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError) as error:
            find_config(name)
        assert str(error.value).startswith(f"no configuration {name}: it is neither a file nor one of blind, ")
        assert "trainer/ddp" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names(package: str) -> None:
    module = importlib.import_module(package)
    for name in PUBLIC[package]:
        assert getattr(module, name).__name__ == name
        assert name in module.__all__
        assert name in dir(module)
    assert all(hasattr(module, name) for name in module.__all__)
    with pytest.raises(AttributeError, match="NoSuchName"):
        module.NoSuchName  # noqa: B018


def test_tensor_mathematics_does_not_load_lightning() -> None:
    assert loaded_by("lightning_modules.graph, lightning_modules.graph_denoiser, lightning_modules.em.rules") == ""


def test_the_look_at_loaded_modules_can_fail() -> None:
    assert loaded_by("lightning_modules.reconstruction") == "lightning"


def loaded_by(modules: str) -> str:
    """Which of Lightning's two names are loaded in a fresh process after an import."""
    code = f"import sys, {modules}; print(*sys.modules.keys() & {{'lightning', 'pytorch_lightning'}})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.strip()
