"""The command `lightning-em`: `fit`, `validate`, `test` and `predict` by Lightning; `restore`, `adapt` and `detect`."""

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.cli.training import EMCommand, build

__all__ = ["EMCommand", "build", "main"]


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Words after the command's name; those of the process by default.
    """
    words = sys.argv[1:] if args is None else args
    if words[:1] == ["--version"]:
        from lightning_modules._version import __version__

        print(__version__)
    elif words[:1] == ["restore"]:
        from lightning_modules.cli.restore import run as restore

        _exit(restore(words[1:]))
    elif words[:1] == ["adapt"]:
        from lightning_modules.cli.adapt import run as adapt

        _exit(adapt(words[1:]))
    elif words[:1] == ["detect"]:
        from lightning_modules.cli.detect import run as detect

        _exit(detect(words[1:]))
    else:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # before Lightning is loaded, which takes seconds
            from lightning_modules.cli.processes import end_with_parent

            end_with_parent()
        from lightning_modules.cli.training import build

        build(args, run=True)


def _exit(code: int) -> None:
    if code:
        raise SystemExit(code)


def __getattr__(name: str) -> Any:
    """What trains loads Lightning, and is imported when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_modules.cli import training

    return getattr(training, name)
