"""Configurations that come with the package, found by name."""

from pathlib import Path

from lightning_modules.cli.words import suggestion

_SUFFIX = ".yaml"


def config_folder() -> Path:
    """Where they are: within the installed package, or beside it in a source checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """Their names, such as `demo`; those of overlays, such as `trainer/ddp`, last."""
    folder = config_folder()
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob(f"*{_SUFFIX}")]
    return sorted(names, key=lambda name: (name.count("/"), name))


def find_config(word: str) -> str:
    """The path of a configuration: a file's own, or that of the one of this name; YAML text is returned as it is.

    Args:
        word: What follows `-c`.

    Raises:
        FileNotFoundError: If there is neither a file nor a configuration of that name.
    """
    if any(character in word for character in ":{\n") or word == "-" or Path(word).is_file():
        return word
    name = word.removesuffix(_SUFFIX)
    known = config_names()
    if name in known:
        return str(config_folder() / f"{name}{_SUFFIX}")
    choice = ", ".join(known) + suggestion(name, known)
    raise FileNotFoundError(f"no configuration {word}: it is neither a file nor one of {choice}")
