"""A page in headless Chromium, where there is one."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome"
)


def in_browser(page: Path) -> tuple[int, int]:
    """How many pictures headless Chromium decodes, and how many table rows it shows."""
    probe = page.with_name("probe.html")
    script = (
        "<script>onload = () => { document.title = [...document.images].filter(i => i.complete && "
        "i.naturalWidth > 500).length + ' pictures ' + [...document.querySelectorAll('tbody tr')]"
        ".filter(row => row.closest('details') || row.offsetHeight > 10).length + ' rows' }"
        "</script></body>"
    )
    probe.write_text(page.read_text().replace("</body>", script))
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom")
    dom = subprocess.run(
        [
            CHROMIUM or "chromium",
            *options,
            f"--user-data-dir={page.parent / 'profile'}",
            probe.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    title = re.search(r"<title>(\d+) pictures (\d+) rows</title>", dom)
    assert title, dom[:500]
    return int(title[1]), int(title[2])
