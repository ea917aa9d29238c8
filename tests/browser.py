"""Pages as a browser shows them: headless Chromium, where the machine has one."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

LAPTOP, PHONE = (1280, 900), (390, 844)
"""Width and height of a window in pixels."""


def screenshot(page: str, folder: Path, window: tuple[int, int], *, is_dark: bool = False) -> Image.Image:
    """The upper part of a page in a window of this size. The test is skipped where there is no Chromium."""
    program = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    (folder / "page.html").write_text(page)
    options = (
        *("--headless", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}"),
        *(("--no-sandbox",) if os.geteuid() == 0 else ()),
        f"--blink-settings=preferredColorScheme={0 if is_dark else 1}",
        f"--window-size={window[0]},{window[1]}",
        f"--screenshot={folder / 'shot.png'}",
    )
    subprocess.run([program, *options, (folder / "page.html").as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(folder / "shot.png") as image:
        return image.convert("RGB")
