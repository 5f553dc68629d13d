# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import shutil

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")  # while it lives no other test of this process could run an event loop
def chromium():
    """A headless Chromium of this machine; skips without one, or without its driver."""
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright (the extra dev)")
    pytest.importorskip("bokeh", reason="needs the extra view")
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip("needs Chromium: make browser-test installs Debian's")
    with driver.sync_playwright() as playwright:
        # Root has no sandbox in a container; the pages are our own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=60_000)
        yield browser
        browser.close()
