"""C sources as shared libraries: prebuilt in a wheel, or compiled at first use by the compiler at hand, and cached."""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_logger = logging.getLogger(__name__)

# A switch for users whose compiler is broken, and for comparisons: "0" keeps to torch.
SWITCH = "LIGHTNING_EM_COMPILE"

# No -ffast-math: it would lose NaNs, and linked into a library it changes the arithmetic of the whole process.
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-fno-math-errno")
# The first that the compiler takes: the machine's own vector instructions, if it can name them.
_MACHINE_FLAGS = ("-march=native", "-mcpu=native", "")
# Levels of x86-64 that a wheel has a library for, by their suffix; one for all elsewhere.
_LEVELS = {"-v4": "-march=x86-64-v4", "-v3": "-march=x86-64-v3", "-v2": "-march=x86-64-v2"}
_PREBUILT = "prebuilt"  # folder beside the sources, in a wheel
_LEVEL_SOURCE = Path(__file__).with_name("level.c")
_SECONDS_TO_COMPILE = 120
_SECONDS_TO_ANSWER = 30
_SECONDS_OF_A_FAILURE = 24 * 3600  # for so long it is not tried again
_DIGEST_BYTES = 32  # of SHA-256

_warned = False


def load_library(
    source: Path, includes: tuple[Path, ...], defines: tuple[str, ...], symbols: tuple[str, ...] = ()
) -> ctypes.CDLL | None:
    """The library of a C source, or None where it cannot be had; one warning gives the reason and what it costs.

    A wheel brings it for every processor of its platform. Elsewhere it is compiled once for each user, machine,
    compiler and version of the source. Processes may do so at the same time: each writes a file of its own and renames
    it. What could not be compiled is not tried again for a day, nor warned of, unless the compiler or the source has
    changed.

    Args:
        source: The C file.
        includes: Files next to it that it includes; their contents count for the cache.
        defines: Macros to define.
        symbols: Names that the library must have.
    """
    if os.environ.get(SWITCH) == "0":
        _logger.info("%s=0: %s is not compiled, torch is used instead", SWITCH, source.name)
        return None
    failure = None
    try:
        contents = _contents(source, includes, defines)
        found = _prebuilt(source, contents, symbols)
        if found is not None:
            return found
        if not hasattr(os, "getuid"):
            _give_up(source, "it is compiled on POSIX systems only", None)
            return None
        compiler, folder = _compiler(), _cache()
        parts = [*contents, _processor()]
        failure = None if folder is None else folder / f"{source.stem}-{_key([_identity(compiler), *parts])}.failed"
        if failure is not None and _is_recent(failure):
            _logger.info("%s is not compiled, torch is used instead: %s", source.name, failure.read_text())
            return None
        if compiler is None:
            _give_up(source, "there is no C compiler (cc, gcc, clang, $CC)", failure)
            return None
        version = check_output([*compiler, "--version"], _SECONDS_TO_ANSWER)
        name = f"{source.stem}-{_key([*compiler, version, *parts])}.so"
        return _cached(source, compiler, [f"-D{name}" for name in defines], symbols, folder, name)
    # ValueError: a $CC that is not a shell word; AttributeError: a library without the symbols.
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        complaints = (getattr(error, "stderr", "") or "")[-2000:]
        _give_up(source, f"it cannot be compiled: {error}\n{complaints}".rstrip(), failure)
        return None


def prebuild(sources: Iterable[tuple[Path, tuple[Path, ...], tuple[str, ...]]], folder: Path) -> list[Path]:
    """Compiles libraries for every processor of the compiler's platform, for a wheel; `load_library` finds them there.

    Args:
        sources: Arguments of `load_library`: each C file, what it includes, and macros.
        folder: Where to put them: `prebuilt`, beside the sources.

    Returns:
        The libraries; none where there is no compiler, or it is not one for POSIX systems.

    Raises:
        subprocess.CalledProcessError: If the compiler refuses a source.
    """
    compiler = _compiler()
    machine = "" if compiler is None else check_output([*compiler, "-dumpmachine"], _SECONDS_TO_ANSWER).strip()
    if compiler is None or os.environ.get(SWITCH) == "0" or re.search("mingw|windows|msvc", machine):
        return []
    levels = _LEVELS if machine.startswith("x86_64") else {"": ""}
    jobs = [
        (source, defines, flag, folder / f"{source.stem}-{_key(_contents(source, includes, defines))}{suffix}.so")
        for source, includes, defines in sources
        for suffix, flag in levels.items()
    ]
    if levels is _LEVELS:
        jobs.append((_LEVEL_SOURCE, (), "", folder / f"{_LEVEL_SOURCE.stem}.so"))
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: _prebuild(compiler, *job), jobs))


def _prebuild(compiler: list[str], source: Path, defines: tuple[str, ...], flag: str, target: Path) -> Path:
    _compile(source, compiler, [f"-D{name}" for name in defines], target, (flag,))
    _seal(target)
    return target


def _prebuilt(source: Path, contents: list[str], symbols: tuple[str, ...]) -> ctypes.CDLL | None:
    """What a wheel has of these sources for this processor; None in a source tree, or where they were changed."""
    folder = source.parent / _PREBUILT
    for suffix in (*_levels(folder), ""):
        path = folder / f"{source.stem}-{_key(contents)}{suffix}.so"
        try:
            if path.is_file() and _is_intact(path):
                return _open(path, symbols)
            reason = "is damaged" if path.is_file() else ""
        except (OSError, AttributeError) as error:
            reason = f"cannot be loaded: {error}"
        if reason:
            _logger.info("%s %s: install the package again", path, reason)
    return None


def _levels(folder: Path) -> list[str]:
    """Suffixes of the libraries that this processor can run, the fastest first."""
    path = folder / f"{_LEVEL_SOURCE.stem}.so"
    try:
        highest = int(_open(path, ("level",)).level()) if path.is_file() and _is_intact(path) else 0
    except (OSError, AttributeError):
        highest = 0
    return [suffix for suffix in _LEVELS if int(suffix[-1]) <= highest]


def _contents(source: Path, includes: tuple[Path, ...], defines: tuple[str, ...]) -> list[str]:
    """All that a library is made of but the machine."""
    return [*_FLAGS, *defines, *(path.read_text(encoding="utf-8") for path in (source, *includes))]


def _give_up(source: Path, reason: str, failure: Path | None) -> None:
    """Warn, once for each process, and leave a note to the others."""
    global _warned
    advice = f"install one, or set {SWITCH}=0 to keep to torch without this warning"
    if failure is not None:
        with contextlib.suppress(OSError):
            failure.write_text(reason)
        advice += f"; it is tried again tomorrow, or when {failure} is gone"
    _logger.log(
        logging.INFO if _warned else logging.WARNING,
        "%s is not compiled, torch is used instead and takes several times as long on this CPU: %s (%s)",
        source.name,
        reason,
        advice,
    )
    _warned = True


def _is_recent(failure: Path) -> bool:
    try:
        return time.time() - failure.stat().st_mtime < _SECONDS_OF_A_FAILURE
    except OSError:
        return False


def _key(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _identity(compiler: list[str] | None) -> str:
    """What tells a compiler from another without asking it."""
    if compiler is None:
        return "none"
    path = Path(shutil.which(compiler[0]) or compiler[0]).resolve()
    found = path.stat()
    return f"{compiler} {path} {found.st_mtime_ns} {found.st_size}"


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


def _cached(
    source: Path, compiler: list[str], defines: list[str], symbols: tuple[str, ...], folder: Path | None, name: str
) -> ctypes.CDLL:
    kept = None if folder is None else folder / name
    if kept is not None and kept.exists():
        try:
            if _is_intact(kept):
                return _open(kept, symbols)
            _logger.info("%s is damaged and is compiled again", kept)
        except (OSError, AttributeError):
            _logger.info("%s cannot be loaded and is compiled again", kept)
    if folder is not None:
        _clear(folder)
    # Nowhere to keep it, or nothing there may be executed: once for each process, then. A library that is loaded needs
    # its file no longer.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = _compile(source, compiler, defines, Path(scratch) / f"new-{name}")
        if kept is not None:
            _seal(built)
            built = built.replace(kept)
        try:
            return _open(built, symbols)
        except OSError:
            if kept is None:
                raise
            with tempfile.TemporaryDirectory() as elsewhere:
                return _open(shutil.copy(built, elsewhere), symbols)


def _open(path: Path | str, symbols: tuple[str, ...]) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    for symbol in symbols:
        getattr(found, symbol)
    return found


def _clear(folder: Path) -> None:
    """Remove what processes that were ended while they compiled have left."""
    for scratch in folder.glob("tmp*"):
        with contextlib.suppress(OSError):
            if time.time() - scratch.stat().st_mtime > 60 * _SECONDS_TO_COMPILE:
                shutil.rmtree(scratch, ignore_errors=True)


def _seal(library: Path) -> None:
    """Append the digest of a library, which a loader does not look at, and wait until all of it is on the disk."""
    with library.open("r+b") as file:
        digest = hashlib.sha256(file.read()).digest()
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def _is_intact(library: Path) -> bool:
    """Whether a kept library is as it was written: running a truncated one would end the process."""
    content = library.read_bytes()
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _cache() -> Path | None:
    """This user's folder of libraries; None where there is none, or where somebody else could put libraries into it."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-em"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        _logger.info("others may write to %s: no library is kept there", folder)
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def _compile(
    source: Path, compiler: list[str], defines: list[str], target: Path, machines: tuple[str, ...] = _MACHINE_FLAGS
) -> Path:
    for index, machine in enumerate(machines):
        command = [*compiler, *_FLAGS, *([machine] if machine else []), *defines, str(source), "-o", str(target), "-lm"]
        try:
            check_output(command, _SECONDS_TO_COMPILE)
            return target
        except subprocess.CalledProcessError:
            if index == len(machines) - 1:
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")


def check_output(command: list[str], seconds: float) -> str:
    """Standard output of a command, which is ended, with all that it has started, where it takes too long.

    `subprocess.check_output` would end the command only, and leave what a compiler's driver has started running.
    """
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    with process:
        try:
            output, complaints = process.communicate(timeout=seconds)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output, complaints)
    return output
