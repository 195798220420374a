"""The playground in a real Chromium, in JupyterLab and under Voila: sliders, picture, console and latency.

Run by ``make test-browser``. Servers run with a home of their own, on free ports of the loopback interface.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from statistics import median

import nbformat
import pytest

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent
TOKEN = "token-of-this-test"
BARE = """
import ipywidgets
slider, line = ipywidgets.IntSlider(0, 0, 100), ipywidgets.HTML("0")
slider.observe(lambda change: setattr(line, "value", f"<b class=bare>{change['new']}</b>"), "value")
ipywidgets.VBox([slider, line])
"""
# From the key to the frame in which the new picture (or the new line of the bare slider) is on the screen.
WATCH = """
([slider, target]) => {
  window.seen = []; window.pressed = 0;
  const handle = document.querySelectorAll('.noUi-handle')[slider];
  handle.addEventListener('keydown', () => { window.pressed = performance.now(); }, true);
  const note = () => requestAnimationFrame(() => window.seen.push([performance.now(), window.pressed]));
  const element = document.querySelector(target);
  if (element.tagName === 'IMG') element.addEventListener('load', note);
  else new MutationObserver(note).observe(element, { childList: true, subtree: true });
}
"""


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-browser")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.fail("No browser found: install chromium (Debian: apt-get install chromium).")
    quiet = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync")  # fmt: skip
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(quiet))
        yield browser
        browser.close()


@contextlib.contextmanager
def server(command: list[str], home: Path, ready: str):
    """Run a server with a scratch home until the block ends; its log is in the message if it does not start."""
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR")
    environment = os.environ | {name: str(home / name.lower()) for name in folders}
    environment |= {"HOME": str(home), "JUPYTER_PREFER_ENV_PATH": "1", "JUPYTERLAB_SETTINGS_DIR": str(home / "lab")}
    log = open(home / "log", "w+")
    process = subprocess.Popen([sys.executable, "-m", *command], cwd=home, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(ready, timeout=5).close()
                break
            assert process.poll() is None, (home / "log").read_text()
            time.sleep(0.25)
        else:
            pytest.fail(f"No answer from {ready}:\n{(home / 'log').read_text()}")
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    home, port = tmp_path_factory.mktemp("lab"), free_port()
    (home / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "00_playground.ipynb", home / "notebooks")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(BARE)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, home / "notebooks" / "bare.ipynb")
    quiet = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
    settings = home / "lab" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    url = f"http://127.0.0.1:{port}"
    command = ["jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", f"--ServerApp.root_dir={home}", f"--IdentityProvider.token={TOKEN}",
               "--expose-app-in-browser", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]  # fmt: skip
    with server(command, home, f"{url}/api/status?token={TOKEN}"):
        yield url


@contextlib.contextmanager
def page_of(browser, url: str, complaints: list[str]):
    page = browser.new_page(viewport={"width": 1366, "height": 900})
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    try:
        yield page
    finally:
        page.close()


def run_all(page) -> None:
    page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.context?.isReady", timeout=60_000)
    page.wait_for_function(
        "() => window.jupyterapp.shell.currentWidget.sessionContext?.session?.kernel?.connectionStatus === 'connected'",
        timeout=60_000,
    )
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")


def latencies(page, target: str, keys: int = 30, slider: int = 0) -> list[float]:
    """Milliseconds from a key to the pixels that it changed, key by key."""
    page.evaluate(WATCH, [slider, target])
    page.locator(".noUi-handle").nth(slider).focus()
    found = []
    for i in range(keys):
        before = page.evaluate("() => window.seen.length")
        page.keyboard.press("ArrowRight" if i % 10 < 5 else "ArrowLeft")
        page.wait_for_function("n => window.seen.length > n", arg=before, timeout=20_000)
        time.sleep(0.12)
        shown, pressed = page.evaluate("n => window.seen[n]", before)
        found.append(shown - pressed)
    return found


def held(page, target: str, keys: int = 40) -> tuple[float, float]:
    """A key held for ``keys`` repetitions: pictures a second, and milliseconds from the last key to the last picture."""
    page.locator(".noUi-handle").first.focus()
    page.evaluate("() => { window.seen = []; }")
    start = time.perf_counter()
    for i in range(keys):
        page.keyboard.press("ArrowLeft" if i < keys / 2 else "ArrowRight")
        time.sleep(max(0, start + 0.033 * (i + 1) - time.perf_counter()))
    spent = time.perf_counter() - start
    during = page.evaluate("() => window.seen.length")
    time.sleep(1.5)
    shown, pressed = page.evaluate("() => window.seen.at(-1)")
    return during / spent, shown - pressed


def report(name: str, times: list[float], capsys) -> None:
    with capsys.disabled():
        print(f"\n{name}: median {median(times):.0f} ms, 90th percentile {sorted(times)[int(0.9 * len(times))]:.0f} ms")
