"""C sources of the package as shared libraries: compiled by the machine's own compiler at first use, then cached."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

_logger = logging.getLogger(__name__)

# A switch for users whose compiler is broken, and for comparisons: "0" keeps to torch.
SWITCH = "LIGHTNING_EM_COMPILE"

# No -ffast-math: it would lose NaNs, and linked into a library it changes the arithmetic of the whole process.
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-fno-math-errno")
# The first that the compiler takes: the machine's own vector instructions, if it can name them.
_MACHINE_FLAGS = ("-march=native", "-mcpu=native", "")
_SECONDS_TO_COMPILE = 120


def load_library(source: Path, includes: tuple[Path, ...], defines: tuple[str, ...]) -> ctypes.CDLL | None:
    """The library of a C source, or None where it cannot be had; the log says why.

    It is compiled once for each user, machine, compiler and version of the source. Processes may do so at the same
    time: each writes a file of its own and renames it.

    Args:
        source: The C file.
        includes: Files next to it that it includes; their contents count for the cache.
        defines: Macros to define.
    """
    if os.environ.get(SWITCH) == "0":
        _logger.info("%s=0: %s is not compiled, torch serves instead", SWITCH, source.name)
        return None
    compiler = _compiler()
    if compiler is None:
        _logger.info("no C compiler (cc, gcc, clang, or $CC): %s is not compiled, torch serves instead", source.name)
        return None
    try:
        asked = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True, timeout=30)
        texts = [path.read_text() for path in (source, *includes)]
        parts = [*compiler, asked.stdout, _processor(), *_FLAGS, *defines, *texts]
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
        return _cached(source, compiler, [f"-D{name}" for name in defines], f"{source.stem}-{key}.so")
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or ""
        _logger.info("%s cannot be compiled, torch serves instead: %s\n%s", source.name, error, said[-2000:])
        return None


def _compiler() -> list[str] | None:
    named = shlex.split(os.environ.get("CC", ""))
    candidates = [named] if named else [["cc"], ["gcc"], ["clang"]]
    return next((words for words in candidates if shutil.which(words[0])), None)


def _processor() -> str:
    """What decides which instructions there are: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features", "CPU part")]
    return "\n".join([platform.platform(), platform.machine(), platform.processor(), *sorted(set(named))])


def _cached(source: Path, compiler: list[str], defines: list[str], name: str) -> ctypes.CDLL:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-em"
    kept = folder / name
    if kept.exists():
        try:
            return ctypes.CDLL(str(kept))
        except OSError:
            _logger.info("%s cannot be loaded and is compiled again", kept)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        scratch, target = tempfile.TemporaryDirectory(dir=folder), kept
    except OSError:
        # Nowhere to keep it: once for each process, then. A library that is loaded needs its file no longer.
        scratch = tempfile.TemporaryDirectory()
        target = Path(scratch.name) / name
    with scratch:
        built = _compile(source, compiler, defines, Path(scratch.name) / f"new-{name}")
        return ctypes.CDLL(str(built.replace(target)))


def _compile(source: Path, compiler: list[str], defines: list[str], target: Path) -> Path:
    for index, machine in enumerate(_MACHINE_FLAGS):
        command = [*compiler, *_FLAGS, *([machine] if machine else []), *defines, str(source), "-o", str(target)]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS_TO_COMPILE)
            return target
        except subprocess.CalledProcessError:
            if index == len(_MACHINE_FLAGS) - 1:
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")
