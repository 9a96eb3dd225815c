"""What the command prints and leaves behind: a sentence for a wrong value, one run a training, and Ctrl-C."""

import os
import re
import signal
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules.cli import main
from lightning_modules.cli.console import calm

SMALL = ["-c", "demo", "--data.train_crops=24", "--data.val_crops=8", "--data.batch_size=4", "--trainer.max_epochs=2"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a run writes, it writes into the test's own folder."""
    monkeypatch.chdir(tmp_path)


WRONG = {
    "--trainer=-0.5": 'trainer: Unable to load config "-0.5"',
    "--trainer.max_epochs=abc": "trainer.max_epochs: expected int, got abc",
    "--trainer.accelerator=abacus": "abacus",
    "--trainer.callbacks=[Foo]": "trainer.callbacks: there is no class Foo",
    "--model.nois_std=1": "Option 'nois_std' is not accepted: did you mean noise_std?",
    "--data.trian_crops=1": "Option 'trian_crops' is not accepted: did you mean train_crops?",
    "--trainer.max_epohcs=1": "did you mean --trainer.max_epochs?",
    "--modle.noise_std=1": "did you mean --model.noise_std?",
    "-c=dmeo": "did you mean demo?",
    "--model.noise_std=-1": "noise_std must be a number ≥ 0 or a range (lower, upper), got -1.0",
    "--data=3": "data: there is no class 3",
    "--data.crop_size=900": "Choose a smaller crop_size",
    "--nothing=1": "--nothing",
    "--ckpt_path=nowhere.ckpt": "Checkpoint file not found: nowhere.ckpt",
}


@pytest.mark.parametrize("word", WRONG)
def test_a_wrong_value_costs_a_line(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *SMALL, word])
    said = capsys.readouterr().err + (stopped.value.code if isinstance(stopped.value.code, str) else "")
    lines = [line for line in said.splitlines() if "LightningCLI's args parameter" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("lightning-em: ")
    assert WRONG[word] in lines[0]
    assert stopped.value.code  # and the code of the process is not 0
    assert not list(Path().rglob("events*")), "what has not begun is no run"


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["retsore", "photo.jpg"], "restore"),
        (["fti"], "fit"),
        (["restore", "--nosie", "0.1", "photo.jpg"], "--noise"),
        (["restore", "--qualty=3", "photo.jpg"], "--quality"),
        (["detect", "--ouput", "out", "-o", "out", "folder"], "--output"),
        (["adapt", "--setps", "3", "--overwrite", "folder"], "--steps"),
        (["restore", "--wholly-else", "photo.jpg"], ""),
    ],
)
def test_a_mistyped_word_is_met_by_what_it_may_have_been(
    words: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f": did you mean {meant}?" in line if meant else "did you mean" not in line


def test_a_fault_of_code_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="of somebody else"), calm():
        raise ValueError("of somebody else")
    with pytest.raises(ZeroDivisionError), calm():
        print(1 / 0)
    with pytest.raises(SystemExit, match=r"lightning-em: nowhere: No such file or directory"), calm():
        Path("nowhere").read_text()


def test_the_whole_error_comes_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(ValueError, match="Choose a smaller crop_size"):
        main(["fit", *SMALL, "--data.crop_size=900"])


def test_warnings_are_lines_without_their_source(capsys: pytest.CaptureFixture[str]) -> None:
    with calm(), warnings.catch_warnings():
        warnings.simplefilter("always")
        said = warnings.formatwarning(UserWarning("look at this"), UserWarning, "file.py", 3)
    assert said == "warning: look at this\n"
    assert "file.py" in warnings.formatwarning(UserWarning("look at this"), UserWarning, "file.py", 3)


class PressControlC(Callback):
    """Sends this process SIGINT in the middle of a step."""

    step = 8

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: object) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def _run(words: list[str]) -> None:
    former = signal.getsignal(signal.SIGINT)
    try:
        main(["fit", *SMALL, *words])
    finally:
        signal.signal(signal.SIGINT, former)


def test_control_c_leaves_what_goes_on_as_if_nothing_had_happened(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert threading.current_thread() is threading.main_thread()
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as stopped:
        _run(["--trainer.callbacks+=test_console.PressControlC"])
    assert stopped.value.code == 128 + signal.SIGINT
    run = Path("logs/demo/version_0")
    assert "Learned parameters after 9 steps" in capsys.readouterr().out
    assert (run / "em_parameters.yaml").is_file()
    (command,) = [line for line in caplog.text.splitlines() if line.startswith("  lightning-em fit")]
    assert command.endswith(f"--ckpt_path {run}/checkpoints/last.ckpt")
    stored = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert stored["global_step"] == 9  # within the second epoch of six steps each
    _run([f"--ckpt_path={run}/checkpoints/last.ckpt"])
    _run(["--trainer.logger.version=7"])
    whole, resumed = (
        torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in (Path("logs/demo/version_7"), run)
    )
    assert whole["global_step"] == resumed["global_step"] == 12
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


def test_what_is_evaluated_is_within_the_run_and_a_table(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        _run([])
    verbs = re.findall(r"^  lightning-em (\w+)", caplog.text.partition("Next:")[2], re.MULTILINE)
    assert verbs == ["validate", "test", "predict", "fit"]
    assert "lightning.pytorch" not in capsys.readouterr().err
    last = Path("logs/demo/version_0/checkpoints/last.ckpt")
    for verb in ("validate", "test", "predict"):
        main([verb, *SMALL[:5], f"--ckpt_path={last}"])
    main(["predict", *SMALL[:5], f"--ckpt_path={last}"])  # what is there already stays
    main(["test", *SMALL[:5]])
    with pytest.raises(SystemExit):
        main(["test", *SMALL[:5], "--data.crop_size=900"])
    assert sorted(path.name for path in Path("logs/demo").iterdir()) == ["test", "version_0"]
    run = last.parents[1]
    for folder in ("predict", "predict_1"):
        assert len(list((run / folder / "restored").glob("*.png"))) == 8
    assert not list((run / "predict").rglob("events*")), "nothing to draw"
    for verb, prefix in (("validate", "val"), ("test", "test")):
        events = EventAccumulator(str(run / verb)).Reload()
        assert events.Tags()["scalars"] == []
        text = events.Tensors("results/text_summary")[-1].tensor_proto.string_val[0].decode()
        assert f"| {prefix}/psnr |" in text
        assert f"| {prefix}/ssim |" in text


def test_next_names_what_has_something_to_do(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    np.save("rows.npy", np.concatenate([np.random.default_rng(0).normal(c, 1, (60, 2)) for c in (-4, 4)]))
    mixture = ["-c", "gaussian_mixture", "--data.array=rows.npy", "--model.num_components=2"]
    with caplog.at_level("INFO"):
        main(["fit", *mixture])
    said = caplog.text.partition("Next:")[2] + capsys.readouterr().err
    assert "lightning-em" not in said, "nothing is held out, nothing restored, and it has converged"
    assert "tensorboard --logdir" in said
    assert "across ranks is zero" not in said
    last = "logs/gaussian_mixture/version_0/checkpoints/last.ckpt"
    for verb in ("validate", "test"):
        with pytest.raises(SystemExit, match=f"there is nothing to {verb} on: hold some data out"):
            main([verb, *mixture, f"--ckpt_path={last}"])
    caplog.clear()
    with caplog.at_level("INFO"):
        main(["fit", *mixture, "--data.val_fraction=0.2", "--trainer.max_epochs=1", "--model.tol=0"])
    verbs = re.findall(r"^  lightning-em (\w+)", caplog.text.partition("Next:")[2], re.MULTILINE)
    assert verbs == ["validate", "test", "fit"]
