"""The command `lightning-em`: `fit`, `validate`, `test` and `predict` by Lightning; `restore`, `adapt` and `detect`."""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.cli.training import EMCommand, build

__all__ = ["EMCommand", "build", "main"]

# What each does, for `--help`, which is answered without loading anything.
_PHOTOGRAPHS = {
    "restore": "restore photographs, and folders of them",
    "adapt": "learn the noise of a folder's photographs, and a denoiser for it",
    "detect": "say which images were generated, or unsure",
}
_TRAINING = {
    "fit": "train the module of a configuration",
    "validate": "evaluate it on its validation data",
    "test": "evaluate it on its test data; --leave_one_source_out for a detector",
    "predict": "restore, cluster or judge images by it",
}


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Words after the command's name; those of the process by default.
    """
    words = sys.argv[1:] if args is None else args
    first = words[0] if words else ""
    if first in ("", "-h", "--help"):
        print(_help())
        raise SystemExit(0 if first else 2)
    if first == "--version":
        from lightning_modules._version import __version__

        print(__version__)
    elif first in _PHOTOGRAPHS:
        run: Callable[[list[str]], int] = import_module(f"{__name__}.{first}").run
        _exit(run(words[1:]))
    elif first not in _TRAINING and not first.startswith("-"):
        from lightning_modules.cli.words import suggestion

        known = {**_TRAINING, **_PHOTOGRAPHS}
        meant = suggestion(first, known)
        print(f"lightning-em: no command {first}: there are {', '.join(known)}{meant}", file=sys.stderr)
        _exit(2)
    else:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # before Lightning is loaded, which takes seconds
            from lightning_modules.cli.processes import end_with_parent

            end_with_parent()
        from lightning_modules.cli.training import build

        build(args, run=True)


def _help() -> str:
    from textwrap import fill

    from lightning_modules.cli.configs import config_names

    lines = ["usage: lightning-em COMMAND ...", "", "photographs, without training:"]
    lines += [f"  {name:<10}{what}" for name, what in _PHOTOGRAPHS.items()]
    lines += ["", "training, by Lightning's command line, of a configuration (-c NAME or -c FILE.yaml):"]
    lines += [f"  {name:<10}{what}" for name, what in _TRAINING.items()]
    lines += ["", "configurations:"]
    lines += [fill(", ".join(config_names()), 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)]
    return "\n".join([*lines, "", "`lightning-em COMMAND --help` has the options of each; --version the version."])


def _exit(code: int) -> None:
    if code:
        raise SystemExit(code)


def __getattr__(name: str) -> Any:
    """What trains loads Lightning, and is imported when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_modules.cli import training

    return getattr(training, name)
