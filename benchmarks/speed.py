"""Speed beside what one would use instead, and beside the machine's limit.

Prints each work's time beside its peer's with the ratio (how many times faster ours is), and the floor: the bytes that
must move over the measured copy bandwidth, or the operations over the measured matrix rate, whichever is larger.
Medians over at least five runs in one process; every peer has as many threads as ours and the best of its settings,
found on other images. The peers need the extra `[benchmark]`.

    OMP_NUM_THREADS=1 python benchmarks/speed.py --json speed.json
"""

import platform
from typing import Any

import _photograph
import _speed_image
import _speed_patches
import _speed_training
import torch
from _common import arguments, write_json
from _timing import copy_bandwidth, matrix_rate

SECTIONS = {"image": _speed_image, "photograph": _photograph, "patches": _speed_patches, "training": _speed_training}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument(
        "--no-unrolled",
        dest="unrolled",
        action="store_false",
        help="not beside torch.compile of the plain image operator, which takes minutes to compile",
    )
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"--only takes {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(options.threads)
    print(
        f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}: copy "
        f"{copy_bandwidth() / 1e9:.1f} GB/s, matrix products {matrix_rate() / 1e9:.0f} GFLOP/s"
    )
    records = []
    for name in names:
        print(f"\n{name}")
        for row in SECTIONS[name].rows(options):
            records.append(row)
            print(_line(row), flush=True)
            write_json(options.json, records)


def _line(row: dict[str, Any]) -> str:
    """One result, for reading."""
    text = f"{row['work']}: {row['ours_ms']:.4g} ms"
    if "share" in row:
        return f"{text} of {row['peer_ms']:.4g} ms: {row['share']:.2%}"
    if "psnr" in row:
        text += f", {row['psnr']:.2f} dB"
    if "failed" in row:
        text += f"; {row['peer']} failed: {row['failed']}"
    elif "peer" in row:
        text += f"; {row['peer']} {row['peer_ms']:.4g} ms"
        text += f", {row['peer_psnr']:.2f} dB" if "peer_psnr" in row else ""
        text += f": {row['ratio']:.2f} times as fast"
    if "floor_ms" in row:
        text += f"; floor {row['floor_ms']:.3g} ms, {row['ours_ms'] / row['floor_ms']:.1f} times that"
    if "peak_mib" in row:
        text += f"; peak memory {row['peak_mib']:.0f} MiB"
    return text


if __name__ == "__main__":
    main()
