"""Pictures of a run's TensorBoard, taken in headless Chromium.

    lightning-em fit -c demo
    python docs/picture_tensorboard.py logs/demo/version_0 --output docs/images

Needs Chromium or Chrome (Debian: `apt-get install chromium`).
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image

# name: page, width, height, enlargement (images come as thumbnails)
PAGES = {
    "curves": ("custom_scalars", 1240, 1130, 0.9),
    "images": ("images", 720, 830, 1.6),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run, with its events file")
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="where tensorboard_*.png go")
    options = parser.parse_args()
    if not list(options.run.glob("events.out.tfevents.*")):
        parser.error(f"{options.run} holds no TensorBoard events; give a run's folder, such as logs/demo/version_0")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        parser.error("no Chromium found: apt-get install chromium")
    options.output.mkdir(parents=True, exist_ok=True)
    port = free_port()
    words = ["-m", "tensorboard.main", f"--logdir={options.run}", f"--port={port}"]
    server = subprocess.Popen([sys.executable, *words], stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://localhost:{port}/data/runs", seconds=120)
        for name, (page, width, height, enlargement) in PAGES.items():
            path = options.output / f"tensorboard_{name}.png"
            photograph(browser, f"http://localhost:{port}/?darkMode=false#{page}", path, width, height, enlargement)
            print(f"{path}: {path.stat().st_size // 1024} kB")
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def wait_for(address: str, seconds: float) -> None:
    """Wait until TensorBoard answers, and has found the run."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address) as answer:
                if answer.read().strip() not in (b"", b"[]"):
                    return
        except OSError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"TensorBoard did not answer at {address} within {seconds:.0f} s")


def photograph(browser: str, address: str, path: Path, width: int, height: int, enlargement: float) -> None:
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            "--headless=new",
            "--no-sandbox",  # needed where it runs as root, as in a container
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            f"--force-device-scale-factor={enlargement}",
            "--virtual-time-budget=30000",  # as long as the page waits for data and draws
            f"--screenshot={path.resolve()}",
            address,
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    if not path.is_file():
        raise SystemExit(f"{browser} wrote no picture of {address}")
    with Image.open(path) as picture:  # few colors: a third of the bytes
        few = picture.convert("RGB").quantize(256)
    few.save(path, optimize=True)


if __name__ == "__main__":
    main()
