# SPDX-License-Identifier: Apache-2.0
"""A real browser without a window: what a page says on its console, and what it asks the network for."""

import json
import shutil
import subprocess

import pytest

needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
BROWSER = "not an origin"
"""Who asks where no page does: a browser looks for its own updates and accounts."""


def opened(page, directory):
    """Renders a page into a picture of `directory`.

    Returns:
        Lines of the console (errors of its own policy among them), and addresses that it asked the network for.
    """
    directory.mkdir(exist_ok=True)
    picture, log = directory / f"{page.stem}.png", directory / f"{page.stem}.json"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={directory / 'profile'}", "--no-first-run", "--window-size=1250,1600"]
    command += [f"--log-net-log={log}", f"--screenshot={picture}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=directory)
    assert picture.stat().st_size > 20_000, done.stderr[-1000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    asked = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    of_pages = [params["url"] for params in asked if params.get("initiator", BROWSER) != BROWSER]
    return console, [url for url in of_pages if not url.startswith(("data:", "file:"))]
