"""Checkpoints of others: nothing is imported or built but what this package, torch or the caller brings."""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import nn

from datamodules import PatchDataModule
from lightning_modules import GeneratedImageDetector, GraphDenoiser, GraphDiffusionReconstruction, KMeans
from lightning_modules.checkpoints.trust import UntrustedCheckpointError, building_from
from lightning_modules.cli import build, main
from lightning_modules.graph_denoiser import _FORMAT

DEMO = str(Path(__file__).parents[1] / "configs" / "demo.yaml")
QUIET = ["--trainer.callbacks=[]", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
QUIET += ["--data.train_crops=8", "--data.val_crops=4"]
SMALL = {"class_path": "lightning_modules.ResidualDenoiser", "init_args": {"width": 8, "depth": 4}}

EVIL = """
import builtins, torch
builtins.strangers_code_ran = "at import"

class Evil(torch.nn.Conv2d):
    accepts_diffusion = True
    def __init__(self):
        builtins.strangers_code_ran = "in a class"
        super().__init__(3, 3, 1)

class Data(object):
    pass

def make() -> torch.nn.Module:
    builtins.strangers_code_ran = "in a function"
    return Evil()
"""


@pytest.fixture(autouse=True)
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A downloaded folder: modules beside the checkpoint, and the folder on the path."""
    for name in ("evilmod", "evilpkg/__init__", "evilpkg/inner"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(EVIL)
    (tmp_path / "evilalias.py").write_text("from evilmod import Evil, make")
    (tmp_path / "evil.yaml").write_text(yaml.safe_dump({"class_path": "evilmod.Evil"}))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("evilmod", "evilalias", "evilpkg", "evilpkg.inner"):
        sys.modules.pop(name, None)
    import builtins

    vars(builtins).pop("strangers_code_ran", None)


def ran() -> str | None:
    import builtins

    return getattr(builtins, "strangers_code_ran", None)


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """What a checkpoint of the command holds."""
    words = ["-c", DEMO, *QUIET, f"--model.backbone={yaml.safe_dump(SMALL, default_flow_style=True).strip()}"]
    model = build(words).model
    return {
        "state_dict": model.state_dict(),
        "hyper_parameters": dict(model.hparams),
        "pytorch-lightning_version": L.__version__,
        "epoch": 0,
        "global_step": 0,
    }


def write(path: Path, plain: dict[str, Any], **changes: Any) -> Path:
    checkpoint = plain | {"hyper_parameters": plain["hyper_parameters"] | changes}
    torch.save(checkpoint, path)
    return path


NAMED: dict[str, Any] = {
    "a class": {"class_path": "evilmod.Evil"},
    "a string": "evilmod.Evil",
    "a class that does not exist": {"class_path": "evilmod.Nothing"},
    "a function": {"class_path": "evilmod.make"},
    "a package's module": {"class_path": "evilpkg.inner.Evil"},
    "arguments": {
        "class_path": "lightning_modules.em.SimilarityAssignment",
        "init_args": {"embedding": {"class_path": "evilmod.Evil"}, "embedding_size": 3, "num_classes": 2},
    },
    "text": "{class_path: evilmod.Evil}",
    "text of JSON": '{"class_path": "evilmod.Evil", "init_args": {}}',
    "dict_kwargs": {"class_path": "evilmod.Evil", "dict_kwargs": {"x": 1}},
    "a file": "evil.yaml",
    "a module through torch": {"class_path": "torch.os.system", "init_args": {"command": "true"}},
    "torch.hub": {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": ".", "model": "x", "source": "local"}},
    "torch.load": {"class_path": "torch.serialization.load", "init_args": {"f": "x.ckpt"}},
    "torch.jit": {"class_path": "torch.jit.load", "init_args": {"f": "x.pt"}},
    "a function of torch.nn": {"class_path": "torch.nn.utils.fuse_conv_bn_eval"},
    "a builder of torchvision": {"class_path": "torchvision.models.get_model", "init_args": {"name": "resnet18"}},
    "weights of torchvision": {
        "class_path": "torchvision.models.resnet18",
        "init_args": {"weights": "IMAGENET1K_V1"},
    },
    "timm": {"class_path": "timm.create_model", "init_args": {"model_name": "resnet18", "checkpoint_path": "x.pth"}},
    "the command": {"class_path": "lightning_modules.cli.training.EMCommand"},
    "a module through this package": {"class_path": "lightning_modules.restoration.import_module"},
    "a name with a space": {"class_path": " evilmod.Evil"},
    "a relative name": {"class_path": "..evilmod.Evil"},
    "a path": {"class_path": "./evilmod.Evil"},
    "an odd name": {"class_path": "evilmod.Evil()"},
}


NOT_ADVISED = (
    "a module through torch",
    "torch.hub",
    "torch.load",
    "torch.jit",
    "a name with a space",
    "a relative name",
    "a path",
    "an odd name",
)


@pytest.mark.parametrize("what", NAMED)
def test_a_backbone_of_their_own(what: str, plain: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "x.ckpt", plain, backbone=NAMED[what])
    with pytest.raises(UntrustedCheckpointError) as caught:
        GraphDiffusionReconstruction.load_from_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    # no one is advised to allow what is no class, or runs files
    assert ("allow=['" in message) == (what not in NOT_ADVISED)
    assert "\n" not in message
    if isinstance(NAMED[what], dict):
        name = NAMED[what]["class_path"]
        assert repr(name) in message or "evilmod.Evil" in message
    assert ran() is None
    assert "evilmod" not in sys.modules


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "evilmod.make"},
        {"optimizer": {"class_path": "evilmod.Evil"}},
        {"assignment": NAMED["arguments"]},
        {"_class_path": "evilmod.Evil"},
        {"_class_path": "evilmod.Evil", "_instantiator": "evilmod.make"},
        {"_instantiator": "evilmod.make"},
        {"lr_scheduler": "os.system"},
    ],
    ids=str,
)
def test_other_parts(changes: dict[str, Any], plain: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "x.ckpt", plain, **changes)
    with pytest.raises(UntrustedCheckpointError, match=r"x\.ckpt"):
        GraphDiffusionReconstruction.load_from_checkpoint(path)
    for key in ("hparams", "module_arguments"):  # where older versions kept them
        torch.save(plain | {"hyper_parameters": {}, key: plain["hyper_parameters"] | changes}, path)
        with pytest.raises(UntrustedCheckpointError, match=r"x\.ckpt"):
            GraphDiffusionReconstruction.load_from_checkpoint(path)
    assert ran() is None


def test_every_door_in_python(plain: dict[str, Any], tmp_path: Path) -> None:
    instantiator = "lightning.pytorch.cli.instantiate_module"
    path = tmp_path / "x.ckpt"
    for module, arguments in (
        (GeneratedImageDetector, {"backbone": {"class_path": "evilmod.Evil"}}),
        (KMeans, {"num_components": "evilmod.Evil", "_class_path": "evilmod.Evil"}),
    ):
        torch.save(plain | {"hyper_parameters": arguments | {"_instantiator": instantiator}}, path)
        with pytest.raises(UntrustedCheckpointError, match=r"evilmod.Evil"):
            module.load_from_checkpoint(path)
    arguments = {"_instantiator": instantiator, "_class_path": "datamodules.PatchDataModule"}
    torch.save(plain | {"datamodule_hyper_parameters": arguments | {"images": {"class_path": "evilmod.Data"}}}, path)
    with pytest.raises(UntrustedCheckpointError, match=r"evilmod.Data"):
        PatchDataModule.load_from_checkpoint(path)
    (tmp_path / "hparams.yaml").write_text(yaml.safe_dump({"backbone": "evilmod.Evil", "_instantiator": instantiator}))
    with pytest.raises(UntrustedCheckpointError, match=r"evilmod.Evil"):
        GraphDiffusionReconstruction.load_from_checkpoint(write(path, plain), hparams_file=tmp_path / "hparams.yaml")
    assert ran() is None


def test_what_the_caller_allows_is_built(plain: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "x.ckpt", plain, backbone={"class_path": "evilmod.Evil"})
    for allow in ("evilmod", "evilmod.Evil"):
        loaded = GraphDiffusionReconstruction.load_from_checkpoint(path, allow=[allow], strict=False)
        assert type(loaded.backbone).__name__ == "Evil"
    with pytest.raises(UntrustedCheckpointError):
        GraphDiffusionReconstruction.load_from_checkpoint(path, allow=["evilmod.make", "evil", "evilmod.Ev"])
    with pytest.raises(TypeError, match=r"allow must be a list of names, such as \['evilmod'\]"):
        GraphDiffusionReconstruction.load_from_checkpoint(path, allow="evilmod")
    # an allowed module is no way to what it has imported
    other = write(tmp_path / "y.ckpt", plain, backbone={"class_path": "evilmod.builtins.eval"})
    with pytest.raises(UntrustedCheckpointError, match=r"builtins.eval"):
        GraphDiffusionReconstruction.load_from_checkpoint(other, allow=["evilmod"])
    # what a module has from elsewhere is allowed by its own name, which is what the refusal advises
    other = write(tmp_path / "z.ckpt", plain, backbone={"class_path": "evilalias.make"})
    with pytest.raises(UntrustedCheckpointError, match=r"allow=\['evilalias.make'\]"):
        GraphDiffusionReconstruction.load_from_checkpoint(other, allow=["evilalias"])
    GraphDiffusionReconstruction.load_from_checkpoint(other, allow=["evilalias.make"], strict=False)
    # what the caller gives, the caller has named
    own = GraphDiffusionReconstruction.load_from_checkpoint(
        path, backbone={"class_path": "evilpkg.inner.Evil"}, strict=False
    )
    assert type(own.backbone).__module__ == "evilpkg.inner"


def test_our_own_checkpoints_load_as_before(plain: dict[str, Any], tmp_path: Path) -> None:
    for perceptual in (None, {"class_path": "torch.nn.L1Loss"}, "torch.nn.modules.loss.L1Loss"):
        path = write(tmp_path / "x.ckpt", plain, perceptual=perceptual, optimizer="torch.optim.AdamW")
        loaded = GraphDiffusionReconstruction.load_from_checkpoint(path)
        assert isinstance(loaded.perceptual, nn.L1Loss) == (perceptual is not None)


def test_the_command(plain: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", "-c", DEMO, *QUIET, "--ckpt_path"]
    for changes in (
        {"_class_path": "evilmod.Evil"},
        {"backbone": {"class_path": "evilmod.Evil"}},
        {"backbone": "evilmod.Evil"},
        {"backbone": "evil.yaml"},
        {"optimizer": "evilmod.make"},
        {"_class_path": "lightning_modules.cli.training.EMCommand"},
    ):
        path = write(tmp_path / "x.ckpt", plain, **changes)
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([*words, str(path)])
        refusal = str(caught.value.code)
        if "cli.training" in str(changes):  # known already, and no module
            assert refusal.startswith(f"lightning-em: {path} does not fit the configuration"), changes
        else:
            assert refusal.startswith(f"lightning-em: {path} asks for '"), changes
            assert "name " in refusal
        assert "Parsing" not in capsys.readouterr().err
        assert ran() is None


def test_the_command_builds_what_your_own_yaml_names(plain: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "x.ckpt", plain, backbone={"class_path": "evilmod.Evil"})
    (tmp_path / "own.yaml").write_text(
        yaml.safe_dump({"model": {"init_args": {"backbone": {"class_path": "evilmod.Evil"}}}})
    )
    words = ["validate", "-c", DEMO, "-c", "own.yaml", *QUIET, "--trainer.fast_dev_run=1"]
    words += ["--trainer.enable_progress_bar=false", "--ckpt_path", str(path)]
    with pytest.raises(
        SystemExit, match=r"x\.ckpt does not fit: it lacks backbone"
    ):  # built, and then the weights differ
        main(words)
    assert ran() == "in a class"


def test_weights_name_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"x")
    config = {"format": _FORMAT, "sha256": hashlib.sha256(b"x").hexdigest(), "channels": 3, "weights": "elsewhere"}
    (tmp_path / "x.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"x.json: it names weights of another file"):
        GraphDenoiser.from_pretrained(tmp_path / "x.safetensors")


def test_a_payload_is_not_unpickled(plain: dict[str, Any], tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return exec, ("import evilmod",)

    path = tmp_path / "x.ckpt"
    torch.save(plain | {"payload": Payload()}, path)
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported"):
        GraphDiffusionReconstruction.load_from_checkpoint(path)
    assert ran() is None


def test_names_outside_a_checkpoint_are_nobodys_business() -> None:
    from jsonargparse._util import import_object

    with building_from("x.ckpt"):
        pass
    assert import_object("evilmod.Evil").__module__ == "evilmod"
