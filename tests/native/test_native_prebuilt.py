"""Libraries that a wheel brings: without a compiler, for the level of the processor, and of these sources only."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.native import library

SOURCE = """#include "answer.h"
int answer(void) { return ANSWER; }
int width(void) {
#if defined(__AVX512F__)
    return 64;
#elif defined(__AVX2__)
    return 32;
#else
    return 16;
#endif
}
"""
WIDTHS = {"-v4": 64, "-v3": 32, "-v2": 16}

pytestmark = pytest.mark.skipif(library._compiler() is None, reason="no C compiler on this machine")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source with its libraries beside it, as a wheel has them, on a machine that has no compiler any more."""
    monkeypatch.delenv(library.SWITCH, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_warned", False)
    (tmp_path / "answer.h").write_text("#define ANSWER 42\n")
    path = tmp_path / "answer.c"
    path.write_text(SOURCE)
    prebuild(path)
    monkeypatch.setenv("CC", "no-such-compiler")
    return path


def prebuild(source: Path) -> list[Path]:
    return library.prebuild([(source, (source.with_name("answer.h"),), ())], source.parent / "prebuilt")


def load(source: Path, symbols: tuple[str, ...] = ("answer",)) -> Any:
    return library.load_library(source, (source.with_name("answer.h"),), (), symbols)


def suffixes(source: Path) -> set[str]:
    return {path.stem.rpartition("-")[2] for path in (source.parent / "prebuilt").glob("answer-*.so")}


def is_x86() -> bool:
    return os.uname().machine == "x86_64"


def test_it_needs_no_compiler_and_keeps_nothing(source: Path) -> None:
    assert load(source).answer() == 42
    assert not (source.parent / "cache").exists()


@pytest.mark.skipif(not is_x86(), reason="levels are those of x86-64")
def test_the_highest_level_of_this_processor_is_taken(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert suffixes(source) == {"v2", "v3", "v4"}
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    expected = ["-v2"] * ({"sse4_2", "popcnt", "ssse3", "cx16"} <= flags)
    expected += ["-v3"] * ({"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm"} <= flags)
    expected += ["-v4"] * ({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags)
    found = library._levels(source.parent / "prebuilt")
    assert found == expected[::-1]
    for index in range(len(found)):
        monkeypatch.setattr(library, "_levels", lambda folder, below=found[index:]: below)
        assert load(source).width() == WIDTHS[found[index]]


def test_libraries_of_other_sources_are_left_alone(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source.with_name("answer.h").write_text("#define ANSWER 43\n")
    assert load(source) is None
    assert "there is no C compiler" in caplog.text
    monkeypatch.setenv("CC", "cc")
    assert load(source).answer() == 43


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit"])
def test_a_damaged_library_is_not_run(source: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next level takes its place, or the compiler, or torch."""
    for path in sorted((source.parent / "prebuilt").glob("answer-*.so"), reverse=True):
        assert load(source).answer() == 42
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink()  # this process still runs it, and would end by SIGBUS if its pages were cut off
        path.write_bytes({"truncated": content[:2000], "empty": b"", "one bit": bytes(content)}[damage])
    assert load(source) is None
    monkeypatch.setenv("CC", "cc")
    assert load(source).answer() == 42
    assert list((source.parent / "cache" / "lightning-em").glob("*.so"))


@pytest.mark.skipif(not is_x86(), reason="levels are those of x86-64")
def test_where_no_level_is_known_none_is_run(source: Path) -> None:
    level = source.parent / "prebuilt" / "level.so"
    level.unlink()
    level.write_bytes(b"")
    assert library._levels(source.parent / "prebuilt") == []
    assert load(source) is None


def test_a_library_without_the_symbols(source: Path) -> None:
    assert load(source, ("question",)) is None
    assert load(source, ("answer", "width")) is not None


def test_the_switch_holds_for_them_too(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.SWITCH, "0")
    assert load(source) is None


def compiler(path: Path, machine: str) -> str:
    path.write_text(f"#!/bin/sh\n[ $1 = -dumpmachine ] && echo {machine} || exec cc $*\n")
    path.chmod(0o755)
    return str(path)


def test_a_platform_without_levels_has_one_library(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (source.parent / "prebuilt").iterdir():
        path.unlink()
    monkeypatch.setenv("CC", compiler(source.with_name("driver"), "aarch64-linux-gnu"))
    (path,) = prebuild(source)
    assert path.stem.count("-") == 1
    monkeypatch.setenv("CC", "no-such-compiler")
    assert load(source).answer() == 42


@pytest.mark.parametrize("machine", ["x86_64-w64-mingw32", "x86_64-pc-windows-msvc"])
def test_what_needs_posix_is_not_prebuilt(source: Path, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler(source.with_name("driver"), machine))
    assert prebuild(source) == []


def test_without_a_compiler_there_are_none(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prebuild(source) == []
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setenv(library.SWITCH, "0")
    assert prebuild(source) == []


def test_what_the_compiler_refuses_is_an_error(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc")
    source.write_text("int answer(void) { return not_declared; }\n")
    with pytest.raises(subprocess.CalledProcessError, match="answer"):
        prebuild(source)
