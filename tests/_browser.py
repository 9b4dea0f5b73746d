"""Pages in a headless browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
ERRORS = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
console.error = (...what) => errors.push(what.join(" "));
</script>"""
FRAME = """<!doctype html><iframe src="page.html" width="400" height="900"></iframe><pre></pre>
<script>addEventListener("message", (event) => {
  document.querySelector("pre").textContent = event.data;
});</script>"""


def browse(url: str, folder: Path, *options: str) -> str:
    """Open a page in a headless browser and return what it prints."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", *options]
    done = subprocess.run([*command, url], capture_output=True, text=True, timeout=300, check=True)
    return done.stdout


def probe_page(path: Path, probe: str, folder: Path) -> dict[str, Any]:
    """Run a probe in a copy of the page, 400 pixels wide, and return what it posts.

    The probe is a script element that runs after the page's own script; `errors` has the messages
    of errors, and ``parent.postMessage`` takes the answer as JSON.
    """
    page = path.read_text(encoding="utf-8")
    page = page.replace("<style>", ERRORS + "<style>", 1).replace("</body>", probe + "</body>")
    (folder / "page.html").write_text(page, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME, encoding="utf-8")
    out = browse((folder / "frame.html").as_uri(), folder, "--dump-dom")
    match = re.search(r"<pre>(\{.*\})</pre>", out, flags=re.DOTALL)
    assert match, out[-500:]
    return dict(json.loads(html.unescape(match[1])))
