"""C sources as shared libraries: compiled by the machine's own compiler at first use, then cached."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
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
_SECONDS_TO_ANSWER = 30
_DIGEST_BYTES = 32  # of SHA-256


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
        _logger.info("%s=0: %s is not compiled, torch is used instead", SWITCH, source.name)
        return None
    if not hasattr(os, "getuid"):
        _logger.info("%s is compiled on POSIX systems only, torch is used instead", source.name)
        return None
    try:
        compiler = _compiler()
        if compiler is None:
            _logger.info("no C compiler (cc, gcc, clang, $CC): %s is not compiled, torch is used instead", source.name)
            return None
        version = check_output([*compiler, "--version"], _SECONDS_TO_ANSWER)
        texts = [path.read_text(encoding="utf-8") for path in (source, *includes)]
        parts = [*compiler, version, _processor(), *_FLAGS, *defines, *texts]
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
        return _cached(source, compiler, [f"-D{name}" for name in defines], f"{source.stem}-{key}.so")
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # ValueError: a $CC that is not a shell word
        complaints = getattr(error, "stderr", "") or ""
        _logger.info("%s cannot be compiled, torch is used instead: %s\n%s", source.name, error, complaints[-2000:])
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
    folder = _cache()
    kept = None if folder is None else folder / name
    if kept is not None and kept.exists():
        try:
            if _is_intact(kept):
                return ctypes.CDLL(str(kept))
            _logger.info("%s is damaged and is compiled again", kept)
        except OSError:
            _logger.info("%s cannot be loaded and is compiled again", kept)
    # Nowhere to keep it, or nothing there may be executed: once for each process, then. A library that is loaded needs
    # its file no longer.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = _compile(source, compiler, defines, Path(scratch) / f"new-{name}")
        if kept is not None:
            _seal(built)
            built = built.replace(kept)
        try:
            return ctypes.CDLL(str(built))
        except OSError:
            if kept is None:
                raise
            with tempfile.TemporaryDirectory() as elsewhere:
                return ctypes.CDLL(shutil.copy(built, elsewhere))


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


def _compile(source: Path, compiler: list[str], defines: list[str], target: Path) -> Path:
    for index, machine in enumerate(_MACHINE_FLAGS):
        command = [*compiler, *_FLAGS, *([machine] if machine else []), *defines, str(source), "-o", str(target), "-lm"]
        try:
            check_output(command, _SECONDS_TO_COMPILE)
            return target
        except subprocess.CalledProcessError:
            if index == len(_MACHINE_FLAGS) - 1:
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
