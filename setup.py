"""What setup.cfg cannot declare: a wheel's configurations, from `configs/`, and its kernel, compiled of plain C."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PACKAGE = Path("lightning_modules")
CPU = PACKAGE / "graph" / "cpu"


class BuildPackages(build_py):
    """Adds what is not in the packages' folders; an editable install has that of the source tree."""

    def run(self) -> None:
        """Builds the packages."""
        super().run()
        if not self.editable_mode:
            build = Path(self.build_lib)
            for folder in (build / PACKAGE / "configs", build / CPU / "prebuilt"):
                shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(ROOT / "configs", build / PACKAGE / "configs")
            prebuild(build / CPU / "prebuilt")


class BuildWheel(bdist_wheel):
    """Names the platform of the compiled kernel, and no Python: ctypes loads it, for any torch.

    Where it is not compiled the wheel is for every platform.
    """

    def get_tag(self) -> tuple[str, str, str]:
        """The tag; it is asked for when all is in place."""
        self.root_is_pure = not Path(self.bdist_dir, CPU, "prebuilt").is_dir()
        return "py3", "none", super().get_tag()[2]


def prebuild(folder: Path) -> None:
    """Compiles the kernel, in both precisions and for every processor, where there is a compiler that will."""
    spec = importlib.util.spec_from_file_location("library", ROOT / PACKAGE / "native" / "library.py")
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    source, *includes = (ROOT / CPU / name for name in ("kernel.c", "planes.h", "vectors.h"))
    try:
        library.prebuild([(source, tuple(includes), defines) for defines in ((), ("DOUBLE",))], folder)
    except (OSError, subprocess.SubprocessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"the kernel is compiled at first use: {error}\n{getattr(error, 'stderr', '')}")


setup(cmdclass={"build_py": BuildPackages, "bdist_wheel": BuildWheel})
