"""What setup.cfg cannot declare: a wheel's configurations, from `configs/`, and its libraries, compiled of plain C."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PACKAGE = Path("lightning_modules")
# By folder: a C file, and what it includes. Each is compiled for both precisions.
SOURCES = {PACKAGE / "graph" / "cpu": ("kernel.c", "planes.h", "vectors.h"), PACKAGE / "mixtures": ("passes.c",)}


class BuildPackages(build_py):
    """Adds what is not in the packages' folders; an editable install has that of the source tree."""

    def run(self) -> None:
        """Builds the packages."""
        super().run()
        if not self.editable_mode:
            build = Path(self.build_lib)
            shutil.rmtree(build / PACKAGE / "configs", ignore_errors=True)
            shutil.copytree(ROOT / "configs", build / PACKAGE / "configs")
            prebuild(build)


class BuildWheel(bdist_wheel):
    """Names the platform of the compiled libraries, and no Python: ctypes loads it, for any torch.

    Where they are not compiled the wheel is for every platform.
    """

    def get_tag(self) -> tuple[str, str, str]:
        """The tag; it is asked for when all is in place."""
        self.root_is_pure = not any(Path(self.bdist_dir, folder, "prebuilt").is_dir() for folder in SOURCES)
        return "py3", "none", super().get_tag()[2]


def prebuild(build: Path) -> None:
    """Compiles the sources, in both precisions and for every processor, where there is a compiler that will."""
    spec = importlib.util.spec_from_file_location("library", ROOT / PACKAGE / "native" / "library.py")
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    targets = {folder: build / folder / "prebuilt" for folder in SOURCES}
    for target in targets.values():
        shutil.rmtree(target, ignore_errors=True)
    try:
        for folder, target in targets.items():
            source, *includes = (ROOT / folder / name for name in SOURCES[folder])
            library.prebuild([(source, tuple(includes), defines) for defines in ((), ("DOUBLE",))], target)
    except (OSError, subprocess.SubprocessError) as error:
        for target in targets.values():
            shutil.rmtree(target, ignore_errors=True)
        print(f"libraries are compiled at first use: {error}\n{getattr(error, 'stderr', '')}")


setup(cmdclass={"build_py": BuildPackages, "bdist_wheel": BuildWheel})
