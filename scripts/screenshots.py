"""The screenshots of docs/inspect.md: trains on the bundled model, writes the pages, opens them in the machine's Chromium.

python scripts/screenshots.py            # into docs/images, about three minutes
"""

from __future__ import annotations

import argparse
import base64
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

import weftlora
from weftlora.report.inspection.page import write_page

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
LARGEST = 150_000
"""Bytes that an image may have."""
RUNS: dict[str, list[str]] = {
    "hydralora": ["train.steps=300", "adapter.r=8"],
    "alora": ["train.steps=150", "adapter.r=8"],
    "lora_dash": ["train.steps=150", "adapter.after=50"],
}
SHOTS = (  # image, page, colour scheme, width, height, the section to scroll to
    ("inspect-summary", "hydralora", "light", 1000, 880, None),
    ("inspect-routers", "hydralora", "dark", 1000, 1000, "routers"),
    ("inspect-ranks", "alora", "light", 1000, 820, "ranks"),
    ("inspect-directions", "lora_dash", "light", 1000, 520, "directions"),
    ("inspect-phone", "hydralora", "dark", 390, 1100, "update"),
)


def shoot(browser: Any, page_file: Path, image: Path, scheme: str, size: tuple[int, int], section: str | None) -> None:
    """Write what a window of this size shows, as WebP; raises ValueError if it is too large for the repository."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page = context.new_page()
    page.goto(page_file.as_uri())
    page.wait_for_selector("html[data-charts=drawn]")
    if section is not None:
        page.evaluate("key => document.getElementById(key).scrollIntoView({behavior: 'instant'})", section)
    page.wait_for_timeout(200)
    shown = context.new_cdp_session(page).send("Page.captureScreenshot", {"format": "webp", "quality": 80})
    context.close()
    content = base64.b64decode(shown["data"])
    if len(content) > LARGEST:
        raise ValueError(f"{image.name} has {len(content):,} bytes, more than {LARGEST:,}: show less")
    image.write_bytes(content)
    print(f"{image.name}: {len(content):,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, help="a folder with runs of an earlier call, or for those of this one")
    given = parser.parse_args()
    folder = (given.runs or Path(tempfile.mkdtemp(prefix="weft-shots-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # so that pages name runs/…, not a place on this machine
    IMAGES.mkdir(exist_ok=True)
    for name, overrides in RUNS.items():
        if not (folder / "runs" / name / "adapter").is_dir():
            weftlora.train(name, *overrides, f"out=runs/{name}", overwrite=True)
        write_page(weftlora.inspect(f"runs/{name}"), folder / f"{name}.html")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for image, name, scheme, width, height, section in SHOTS:
            shoot(browser, folder / f"{name}.html", IMAGES / f"{image}.webp", scheme, (width, height), section)
        browser.close()


if __name__ == "__main__":
    main()
