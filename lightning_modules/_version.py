"""Version of the installed package."""

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """Returns the version of the distribution."""
    try:
        return version("lightning-em")
    except PackageNotFoundError:  # a checkout on the path, not installed
        return "0+unknown"
