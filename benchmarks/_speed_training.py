"""The training section of the speed benchmark."""

import argparse
from collections.abc import Iterator
from typing import Any


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Results of this section, as records of `_timing.record`."""
    yield from ()
