"""Version of the package, in its one place: setup.cfg and the command read it here."""

__version__ = "0.2.0"
