"""Compiling C at first use: the cache, processes at the same time, and machines where it cannot be done."""

import ctypes
import logging
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.native import library

SOURCE = '#include "answer.h"\nint answer(void) { return ANSWER; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(library.SWITCH, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_warned", False)
    (tmp_path / "answer.h").write_text("#ifndef ANSWER\n#define ANSWER 42\n#endif\n")
    path = tmp_path / "answer.c"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def compiler() -> None:
    if library._compiler() is None:
        pytest.skip("no C compiler on this machine")


def answer(source: Path, defines: tuple[str, ...] = ()) -> int | None:
    found = library.load_library(source, (source.with_name("answer.h"),), defines)
    return None if found is None else found.answer()


def cached(source: Path) -> list[Path]:
    return sorted((source.parent / "cache" / "lightning-em").iterdir())


@pytest.mark.usefixtures("compiler")
def test_compiled_once_for_each_content(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    compile_ = library._compile
    monkeypatch.setattr(library, "_compile", lambda *words: (compiled.append(words), compile_(*words))[1])
    assert [answer(source), answer(source)] == [42, 42]
    assert len(compiled) == 1
    assert answer(source, ("ANSWER=7",)) == 7
    source.with_name("answer.h").write_text("#define ANSWER 43\n")
    assert answer(source) == 43
    monkeypatch.setattr(library, "_processor", lambda: "another machine with the same home")
    assert answer(source) == 43
    assert len(compiled) == len(cached(source)) == 4, "and nothing else is left in the cache"


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit"])
def test_a_damaged_file_in_the_cache_is_replaced(source: Path, damage: str) -> None:
    """Mapped into memory, a truncated library would end this process."""
    folder = source.parent / "cache" / "lightning-em"
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:  # elsewhere: what this process has loaded once it does not read again
        assert pool.apply(answer, (source,)) == 42
    (kept,) = folder.iterdir()
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    lengths = range(100, len(content), len(content) // 8) if damage == "truncated" else (0,)
    for damaged in [bytes(content)] if damage == "one bit" else [bytes(content[:length]) for length in lengths]:
        kept.write_bytes(damaged)
        with context.Pool(1) as pool:
            assert pool.apply_async(answer, (source,)).get(timeout=60) == 42
        assert library._is_intact(kept)


def test_a_system_without_users(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("getuid", "killpg"):
        monkeypatch.delattr(os, name)
    assert answer(source) is None
    assert "POSIX systems only" in caplog.text


@pytest.mark.usefixtures("compiler")
def test_processes_may_compile_at_the_same_time(source: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(answer, [source] * 8, chunksize=2) == [42] * 8
    assert len(cached(source)) == 1


@pytest.mark.usefixtures("compiler")
def test_nowhere_to_keep_it(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))  # a file
    assert answer(source) == 42


@pytest.mark.usefixtures("compiler")
def test_a_user_without_a_home(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    assert answer(source) == 42


@pytest.mark.usefixtures("compiler")
def test_a_cache_that_others_may_write_to_is_not_trusted(source: Path) -> None:
    folder = source.parent / "cache" / "lightning-em"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert answer(source) == 42
    assert not list(folder.iterdir())


@pytest.mark.usefixtures("compiler")
def test_a_cache_from_which_nothing_is_executed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, folder = ctypes.CDLL, source.parent / "cache"

    def refuse(path: str) -> ctypes.CDLL:
        if Path(path).is_relative_to(folder):
            raise OSError("failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert answer(source) == 42


def test_a_compiler_that_hangs_is_ended_with_what_it_has_started(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver, survivor = source.with_name("driver"), source.with_name("survivor")
    # As gcc waits for its cc1.
    driver.write_text(f"#!/bin/sh\n[ $1 = --version ] && exit\n(sleep 3; touch {survivor}) &\nwait\n")
    driver.chmod(0o755)
    monkeypatch.setenv("CC", str(driver))
    monkeypatch.setattr(library, "_SECONDS_TO_COMPILE", 0.2)
    assert answer(source) is None
    assert "timed out" in caplog.text
    time.sleep(4)
    assert not survivor.exists()
    # Another process does not wait for it again, nor speak of it; one with another compiler tries.
    monkeypatch.setattr(library, "_warned", False)
    monkeypatch.setattr(library, "_compile", None)
    caplog.clear()
    assert answer(source) is None
    assert not caplog.text
    (failure,) = cached(source)
    os.utime(failure, (0, 0))  # the day after
    monkeypatch.setattr(library, "_compile", lambda *_: (_ for _ in ()).throw(OSError("asked again")))
    assert answer(source) is None
    assert "asked again" in caplog.text


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (library.SWITCH, "0", "LIGHTNING_EM_COMPILE=0: answer.c is not compiled"),
        ("CC", "no-such-compiler", "there is no C compiler"),
        ("CC", "'cc", "it cannot be compiled: No closing quotation"),
        ("CC", "false", "it cannot be compiled"),
        ("CC", "true", "it cannot be compiled"),  # answers, and makes nothing
    ],
)
def test_without_it_one_warning_names_reason_and_cost(
    variable: str,
    value: str,
    message: str,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(variable, value)
    with caplog.at_level(logging.INFO, library.__name__):
        assert answer(source) is None
        assert answer(source, ("OTHER",)) is None
    first, second = caplog.records
    assert message in first.message
    assert "torch is used instead" in first.message
    assert second.levelno == logging.INFO, "of one warning"
    if variable == "CC":
        assert first.levelno == logging.WARNING, "which a program without a logging configuration shows"
        assert "takes several times as long" in first.message
    else:
        assert first.levelno == logging.INFO, "the user has asked for it"


@pytest.mark.usefixtures("compiler")
def test_the_log_has_what_the_compiler_says(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    source.write_text("int answer(void) { return not_declared; }\n")
    assert answer(source) is None
    assert "not_declared" in caplog.text


@pytest.mark.usefixtures("compiler")
def test_a_library_without_the_symbols(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert library.load_library(source, (source.with_name("answer.h"),), (), ("answer", "question")) is None
    assert "question" in caplog.text
    (found,) = [path for path in cached(source) if path.suffix == ".so"]
    assert library._is_intact(found)


@pytest.mark.usefixtures("compiler")
def test_what_ended_processes_left_is_removed(source: Path) -> None:
    folder = source.parent / "cache" / "lightning-em"
    for name in ("tmpold", "tmpnew"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o700)
    os.utime(folder / "tmpold", (0, 0))
    assert answer(source) == 42
    assert [path.name for path in cached(source) if path.is_dir()] == ["tmpnew"]
