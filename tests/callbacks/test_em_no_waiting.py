"""The M-step never makes the host wait for the device on steps that do not log."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from em_runs import CLASSES, SmoothImages, make_assignment, make_module, make_rule, make_trainer
from tables import textbook_table

from callbacks import EMParameterCallback
from lightning_modules import EStep
from lightning_modules.em import Assignment

RULES = ["gradient", "sign", "newton", "bayesian"]
LOG_EVERY = 20  # steps; more than the window of SignRule


class Scaler:
    """Like a gradient scaler: its factor is a tensor on the device."""

    def scale(self, value: torch.Tensor) -> torch.Tensor:
        return value * 1024


def trainer_on_paper(scaler: Scaler | None) -> Any:
    return SimpleNamespace(
        strategy=SimpleNamespace(reduce=lambda tensor, reduce_op: tensor),
        precision_plugin=SimpleNamespace(scaler=scaler),
        optimizers=[],
        loggers=[],
        callbacks=[],
        log_every_n_steps=LOG_EVERY,
        accumulate_grad_batches=2,
        global_step=0,
        is_last_batch=False,
    )


def m_steps(rule: str, scaler: Scaler | None, last: int, assignment: Assignment | None = None) -> EMParameterCallback:
    """Steps up to `last` on the meta device: it has no values, so whoever reads one on the host fails."""
    device = torch.device("meta")
    table = textbook_table(per_row=["sigma", "smooth_steps"], row_names=CLASSES).to(device)
    module: Any = SimpleNamespace(
        em_parameters=table, device=device, assignment=assignment, log_dict=lambda *_, **__: None
    )
    callback, trainer = EMParameterCallback(make_rule(rule)), trainer_on_paper(scaler)
    callback.setup(trainer, module, "validate")
    callback.on_train_start(trainer, module)
    for _ in range(last):
        for micro_batch in range(2):
            losses = torch.zeros(4, device=device)
            rows, latent = torch.zeros(4, len(CLASSES), device=device), None
            if assignment is not None:
                images, labels = torch.zeros(4, 3, 8, 8, device=device), torch.zeros(4, device=device, dtype=torch.long)
                rows = assignment(images, labels, losses, len(CLASSES))
                latent = assignment.e_step(images, labels, losses, rows)
            parameters = table(rows)
            (losses + parameters["sigma"]).mean().backward()
            callback.on_after_backward(trainer, module)
            e_step = EStep(rows, torch.ones_like(losses), losses, None, losses, latent=latent)
            trainer.global_step += micro_batch
            callback.on_train_batch_end(trainer, module, {"em": e_step}, None, 0)
    return callback


@pytest.mark.parametrize("scaler", [None, Scaler()])
@pytest.mark.parametrize("rule", RULES)
def test_steps_that_do_not_log_read_nothing(rule: str, scaler: Scaler | None) -> None:
    assert len(m_steps(rule, scaler, last=LOG_EVERY - 1)._proxies) == LOG_EVERY - 1


@pytest.mark.parametrize("name", ["mixture", "similarity"])
def test_assignments_that_learn_read_nothing(name: str) -> None:
    assignment = make_assignment(name).to("meta").train()
    assert len(m_steps("gradient", None, last=LOG_EVERY - 1, assignment=assignment)._proxies) == LOG_EVERY - 1


def test_a_step_that_logs_does_read() -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        m_steps("gradient", None, last=LOG_EVERY)


class Watched(EMParameterCallback):
    """Any wait for the device inside the callback is an error."""

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            super().on_train_batch_end(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", [*RULES, "mixture", "similarity"])
def test_on_an_accelerator(kind: str, tmp_path: Path) -> None:
    callback = Watched(make_rule(kind if kind in RULES else "gradient"))
    trainer = make_trainer(tmp_path, callback, epochs=3, accelerator="cuda", log_every_n_steps=1000)
    trainer.fit(make_module(assignment=kind), SmoothImages(16))
    assert len(callback.loss_history) == 9
