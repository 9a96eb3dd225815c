"""What setup.cfg cannot declare: `configs/`, kept at the root of the project, ships within the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildPackages(build_py):
    """Copies the configurations; an editable install reads those of the source tree."""

    def run(self) -> None:
        """Builds the packages."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "lightning_modules", "configs")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "configs", target)


setup(cmdclass={"build_py": BuildPackages})
