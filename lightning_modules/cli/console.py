"""Console of a command that trains: what its user can act on, and an error as a sentence."""

import linecache
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser
from lightning_utilities.core import rank_zero

from lightning_modules.checkpoints.trust import complaint
from lightning_modules.cli.words import options_of, suggestion, unknown_options

# Lines of Lightning's log that leave nothing to do.
_IDLE = re.compile(
    r"\s*(GPU available: False|TPU available|HPU available|LOCAL_RANK: |💡|Seed set to|Restor(ing|ed) |Loaded model w"
    r"|`Trainer\.fit` stopped: `max_|Detected KeyboardInterrupt)"
)
# Warnings of Lightning, by how they begin, about what is meant here.
_MEANT = (
    r"The number of training batches \(\d+\) is smaller than the logging interval",  # EMHealth counts the steps
    r"Checkpoint directory .* exists and is not empty",  # a run goes on in its folder
    r"Be aware that when using `ckpt_path`, callbacks",  # a module of ours brings one for `fit`
    r"The dirpath has changed from",  # what is evaluated writes into a folder of its own
    r"The `srun` command is available",
    r"The '\w+' does not have many workers",
    r"Total length of `\w+` across ranks is zero",  # nothing is held out; who asks to evaluate it is refused
)
# Packages whose own `raise` says enough.
_PACKAGES = ("lightning_modules", "callbacks", "datamodules", "lightning")


class Parser(LightningArgumentParser):
    """Says what is wrong with the words of a command in a line, without the pages of its usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the command."""
        if _is_debugging():
            super().error(message, ex)
        keys, cause = complaint(message)
        cause = re.sub(r'^Parser key "[^"]*":? *', "", cause)
        if "arguments are required: " in cause and "model" in cause:
            cause += ": name a configuration, -c demo for one"
        where = f"{keys[-1]}: " if keys else ""
        words = self.prog.replace(" [options]", "")
        if " " not in words:  # the parser of a class, which does not know the command
            words = " ".join(["lightning-em", *sys.argv[1:2]])
        said = f"{_plain(cause, message)}{_meant(self, message)}"
        sys.stderr.write(f"lightning-em: {where}{said} (`{words} --help` has the options)\n")
        raise Refusal(message)


class Refusal(SystemExit):
    """End of a command whose words are wrong.

    Args:
        message: The whole of what the parser has to say.
    """

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message


@contextmanager
def calm() -> Iterator[None]:
    """Runs a command so that it prints what its user can act on; an error that says enough is a line on its own.

    The traceback comes with `JSONARGPARSE_DEBUG=true` in the environment.
    """
    former, logs = warnings.formatwarning, (rank_zero.log, logging.getLogger("lightning.fabric.utilities.seed"))
    news = _News()  # one of its own: commands within a command end before it
    for log in logs:
        log.addFilter(news)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            for pattern in _MEANT:
                warnings.filterwarnings("ignore", pattern)
        warnings.formatwarning = _as_line
        try:
            yield
        except Exception as error:
            text = None if _is_debugging() else sentence(error)
            if text is None:
                raise
            raise SystemExit(f"lightning-em: {text}") from error
        finally:
            warnings.formatwarning = former
            for log in logs:
                log.removeFilter(news)


def sentence(error: Exception) -> str | None:
    """What an error says, in a line, where that is all there is to know: a file, or what this package has refused.

    Anything else may be a fault of code, for which there is the traceback: None.
    """
    text = str(error)
    if "Does not validate" in text:
        return _plain(complaint(text)[1], text)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(text.split()) if text and _is_refusal(error) else None


def _is_refusal(error: Exception) -> bool:
    """Whether one of the packages has raised it by a statement of its own."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    frame = trace.tb_frame
    line = linecache.getline(frame.f_code.co_filename, trace.tb_lineno)
    return frame.f_globals.get("__name__", "").partition(".")[0] in _PACKAGES and line.lstrip().startswith("raise ")


def _meant(parser: LightningArgumentParser, message: str) -> str:
    """What an option that is not known may have been meant to be: one of the command's, or of a class that it names."""
    if unknown := unknown_options(message):
        return suggestion(unknown[0], options_of(parser))
    refused = re.search(r"Option '([\w.]+)' is not accepted", message)
    return suggestion(refused[1], [option.lstrip("-") for option in options_of(parser)]) if refused else ""


def _plain(cause: str, message: str) -> str:
    """A cause that jsonargparse names, without its types' long names, and with what was given."""
    cause = re.sub(r"Expected a dot import path string: (.*)", r"there is no class \1", cause)
    wanted = re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.", r"\1", " ".join(cause.split()))
    wanted = wanted.replace("Expected a ", "expected ", 1)
    given = re.findall(r"Given value: ([^\n]{1,40})$", message, re.MULTILINE)
    return f"{wanted}, got {given[-1]}" if given and wanted.startswith("expected ") else wanted


class _News(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return _IDLE.match(record.getMessage()) is None


def _as_line(message: Any, category: type[Warning], *_: Any, **__: Any) -> str:
    return f"warning: {message}\n" if category is UserWarning else f"{category.__name__}: {message}\n"


def _is_debugging() -> bool:
    return os.environ.get("JSONARGPARSE_DEBUG", "").lower() not in ("", "false", "no", "0")
