"""The playground in a real Chromium, in JupyterLab and under Voila: sliders, picture, console and latency.

Run by ``make test-browser``. Servers run with a home of their own, on free ports of the loopback interface.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
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
SMALL = """
import kfac_viz as kv
from kfac_viz.studies import pde
from kfac_viz.studies import coarse_space
print("beside it")
kv.panel(kv.studies.coarse_space.run, kv.studies.coarse_space.Plot, widths=(5,), n=40)
"""
NESTED = """
import ipywidgets, kfac_viz as kv
with (out := ipywidgets.Output()):
    display(kv.panel(kv.studies.coarse_space.run, kv.studies.coarse_space.Plot, widths=(5,), n=40))
out
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
            try:
                urllib.request.urlopen(ready, timeout=5).close()
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                pass
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
    for folder in ("notebooks", "figures"):
        shutil.copytree(ROOT / folder, home / folder)
    for name, code in (("bare", BARE), ("small", SMALL), ("nested", NESTED)):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, home / "notebooks" / f"{name}.ipynb")
    quiet = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
    settings = home / "lab" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    url = f"http://127.0.0.1:{port}"
    command = ["jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", f"--ServerApp.root_dir={home}", f"--IdentityProvider.token={TOKEN}",
               "--expose-app-in-browser", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
               ]  # fmt: skip
    with server(command, home, f"{url}/api/status?token={TOKEN}"):
        yield url


@contextlib.contextmanager
def page_of(browser, url: str, complaints: list[str]):
    page = browser.new_page(viewport={"width": 1366, "height": 768})
    elsewhere = ("mathjax", "fontawesome")  # Voila's own page asks other servers for formulas and icons

    def complain(message) -> None:
        if message.type == "error" and not any(name in message.location.get("url", "").lower() for name in elsewhere):
            complaints.append(f"{message.text} ({message.location.get('url')})")

    page.on("console", complain)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url, wait_until="commit", timeout=120_000)
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
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0


def latencies(page, target: str, keys: int = 30, slider: int = 0) -> tuple[list[float], list[float]]:
    """Milliseconds from a key to the first and to the last pixels that it changed, key by key, each at a new place."""
    page.evaluate(WATCH, [slider, target])
    handle = page.locator(".noUi-handle").nth(slider)
    handle.focus()
    now, end = (float(handle.get_attribute(f"aria-value{which}")) for which in ("now", "max"))
    start = float(handle.get_attribute("aria-valuemin"))
    places = int(max(now - start, end - now))
    away = "ArrowRight" if end - now >= now - start else "ArrowLeft"
    first, last = [], []
    for _ in range(min(keys, places)):  # on and on: a picture that was seen before is there at once
        before = page.evaluate("() => window.seen.length")
        page.keyboard.press(away)
        page.wait_for_function("n => window.seen.length > n", arg=before, timeout=20_000)
        time.sleep(0.4)
        seen = page.evaluate("n => window.seen.slice(n)", before)
        for found, (shown, pressed) in ((first, seen[0]), (last, seen[-1])):
            found.append(shown - pressed)
    return first, last


def held(page, target: str, keys: int = 40) -> tuple[float, float]:
    """A key held for ``keys`` repetitions: pictures a second, and ms from the last key to the last picture."""
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


def report(name: str, strokes: tuple[list[float], list[float]]) -> None:
    told = (f"median {median(times):.0f} ms, 90th percentile {sorted(times)[int(0.9 * len(times))]:.0f} ms, at most "
            f"{max(times):.0f} ms" for times in strokes)  # fmt: skip
    print(f"\n{name}: {'; whole picture '.join(told)}", end="")


PICTURE = "img.widget-image"


def drive(page) -> None:
    """Move both sliders by key and by mouse; picture, readout and words follow, and belong to the last value."""
    page.wait_for_selector(PICTURE, timeout=120_000)
    page.wait_for_function("() => document.querySelector('img.widget-image').alt")
    page.locator(PICTURE).scroll_into_view_if_needed()
    height = page.locator(".kfac-panel").bounding_box()["height"]
    for slider in (0, 1):
        handle = page.locator(".kfac-panel .noUi-handle").nth(slider)
        assert handle.get_attribute("aria-label")
        handle.focus()
        moves_the_picture(page, slider, lambda: page.keyboard.press("ArrowRight"))
        box = page.locator(".kfac-panel .noUi-target").nth(slider).bounding_box()

        def drag(box=box, handle=handle):
            at = handle.bounding_box()
            page.mouse.move(at["x"] + at["width"] / 2, at["y"] + at["height"] / 2)
            page.mouse.down()
            page.mouse.move(box["x"] + 0.7 * box["width"], at["y"] + 5, steps=12)
            page.mouse.up()

        moves_the_picture(page, slider, drag)
    assert page.locator(".kfac-error").inner_text() == ""
    assert abs(page.locator(".kfac-panel").bounding_box()["height"] - height) < 1


def moves_the_picture(page, slider: int, move) -> None:
    before = page.locator(PICTURE).get_attribute("src"), page.locator(PICTURE).get_attribute("alt")
    move()
    page.wait_for_function(
        "([src, alt]) => { const i = document.querySelector('img.widget-image');"
        " return i.src !== src && i.alt !== alt && i.complete; }",
        arg=list(before),
        timeout=20_000,
    )
    name, default = (("damping", 0.01), ("per_layer", 4))[slider]

    def settled() -> bool:
        """The readout, the command and the words agree."""
        found = re.search(rf"{name}=([^ ]+)", page.locator(".kfac-panel code").inner_text())
        value = f"{float(found[1]) if found else default:.3g}"
        readout = page.locator(".kfac-panel .widget-readout").nth(slider).inner_text()
        alt = page.locator(PICTURE).get_attribute("alt")
        return float(readout) == float(value) and page.locator(".kfac-words").inner_text() == alt

    deadline = time.monotonic() + 10
    while not settled() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert settled()


def screenshot(page, name: str) -> None:
    """Into the folder that SCREENSHOTS names, to be looked at."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")
        if page.locator(".kfac-panel").count():
            page.locator(".kfac-panel").screenshot(path=f"{folder}/{name}_panel.png")


@pytest.fixture(scope="module")
def voila(tmp_path_factory):
    """Served by the very command of ``make voila-class``."""
    home, port = tmp_path_factory.mktemp("voila"), free_port()
    make = ["make", "-n", "--no-print-directory", "voila-class", f"ARGS=--token={TOKEN} --port={port} --base_url=/"]
    asked = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    words = shlex.split(asked.replace("\\\n", " ").strip().splitlines()[-1])
    command = words[words.index("-m") + 1 :]
    shutil.copytree(ROOT / "notebooks" / "class", home / "notebooks" / "class")  # to see that nothing is written there
    url = f"http://127.0.0.1:{port}"
    with server(command, home, f"{url}/nothing"):
        yield url
        files = [path.name for path in (home / "notebooks").rglob("*") if path.is_file()]
        assert files == ["playground.ipynb"], "a visitor has written something"


def test_jupyterlab(chromium, lab, capsys):
    complaints: list[str] = []
    with page_of(chromium, f"{lab}/doc/tree/notebooks/bare.ipynb?token={TOKEN}&reset", complaints) as page:
        run_all(page)
        page.wait_for_selector(".noUi-handle")
        bare = latencies(page, ".jp-OutputArea .widget-html-content")
    with page_of(chromium, f"{lab}/doc/tree/notebooks/00_playground.ipynb?token={TOKEN}&reset", complaints) as page:
        run_all(page)
        drive(page)
        screenshot(page, "jupyterlab_light")
        damping, size = (latencies(page, PICTURE, slider=slider) for slider in (0, 1))
        rate, last = held(page, PICTURE)
        page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
        page.wait_for_selector("body[data-jp-theme-light=false]", state="attached")
        page.wait_for_selector("#jupyterlab-splash", state="detached")
        screenshot(page, "jupyterlab_dark")
    with capsys.disabled():
        report("JupyterLab, bare slider and one line", bare)
        report("JupyterLab, damping", damping)
        report("JupyterLab, size of the coarse space", size)
        print(f"\nKey held: {rate:.0f} pictures a second, the last one {last:.0f} ms after the last key")
    assert complaints == []


PANELS = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
          if path.stem not in ("14_speed", "16_which_method")]  # measured data without a choice  # fmt: skip


@pytest.mark.parametrize("name", PANELS)
def test_every_control_of_every_panel_at_both_sizes_and_in_both_themes(chromium, lab, name, capsys):
    complaints: list[str] = []
    with page_of(chromium, f"{lab}/doc/tree/notebooks/{name}.ipynb?token={TOKEN}&reset", complaints) as page:
        run_all(page)
        show(page, ".kfac-panel")
        page.wait_for_selector(PICTURE, timeout=60_000)
        sliders = page.locator(".kfac-panel .noUi-handle:visible").count()  # the others are folded away
        times = [median(latencies(page, PICTURE, keys=8, slider=i)[1]) for i in range(min(2, sliders))]
        if page.locator(".kfac-panel .jupyter-widget-Collapse-header").count():
            page.locator(".kfac-panel .jupyter-widget-Collapse-header").first.click()
            page.wait_for_timeout(300)
        page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
        page.wait_for_selector("body[data-jp-theme-light=false]", state="attached")
        slowest = max((moved(page, c) for c in page.locator(".kfac-panel :is(.noUi-handle, select)").all()), default=0)
        page.wait_for_selector("#jupyterlab-splash", state="detached")
        screenshot(page, f"{name}_dark")
        page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Light'})")
        page.wait_for_selector("body[data-jp-theme-light=true]", state="attached")
        page.set_viewport_size({"width": 390, "height": 844})
        page.wait_for_timeout(1000)
        for control in page.locator(".kfac-panel :is(.noUi-handle, select)").all():
            control.scroll_into_view_if_needed()
            left, right = control.evaluate("e => { const b = e.getBoundingClientRect(); return [b.left, b.right]; }")
            assert left >= 0 and right <= 390, "a control leaves the phone's screen"
        moved(page, page.locator(".kfac-panel :is(.noUi-handle, select)").first)
        page.wait_for_selector("#jupyterlab-splash", state="detached")
        screenshot(page, f"{name}_phone")
    with capsys.disabled():
        spans = ", ".join(f"{t:.0f} ms" for t in times)
        print(f"\n{name}: key to picture {spans}; any control within {slowest:.1f} s", end="")
    assert complaints == []


def show(page, selector: str) -> None:
    """Scroll to what JupyterLab renders only once it is near the screen."""
    deadline = time.monotonic() + 60
    while not page.locator(selector).count() and time.monotonic() < deadline:
        page.mouse.move(700, 400)
        page.mouse.wheel(0, 500)
        page.wait_for_timeout(100)
    page.locator(selector).first.scroll_into_view_if_needed()


def moved(page, control) -> float:
    """Move a slider by a key or a list by an entry; seconds until the picture belongs to it, without an error."""
    before = page.locator(".kfac-panel code").first.inner_text()
    start = time.perf_counter()
    if control.evaluate("e => e.tagName") == "SELECT":
        control.select_option(index=control.evaluate("e => (e.selectedIndex + 1) % e.options.length"))
    else:
        control.focus()
        end = control.get_attribute("aria-valuenow") == control.get_attribute("aria-valuemax")
        page.keyboard.press("ArrowLeft" if end else "ArrowRight")
    page.wait_for_function(
        "command => document.querySelector('.kfac-panel code').innerText !== command"
        " && document.querySelector('img.widget-image').complete"
        " && !document.querySelector('.kfac-alert').textContent.includes('computing')",
        arg=before,
        timeout=30_000,
    )
    spent = time.perf_counter() - start
    page.wait_for_timeout(150)
    assert page.locator(".kfac-alert").first.inner_text() == ""
    return spent


def test_voila(chromium, voila, capsys):
    complaints: list[str] = []
    started = time.perf_counter()
    with page_of(chromium, f"{voila}/?token={TOKEN}", complaints) as page:
        drive(page)
        ready = time.perf_counter() - started
        screenshot(page, "voila")
        damping = latencies(page, PICTURE)
    with capsys.disabled():
        print(f"\nVoila: page ready and driven after {ready:.1f} s")
        report("Voila, damping", damping)
    assert complaints == []


def test_the_site_is_whole_and_needs_nothing_from_elsewhere(chromium, tmp_path):
    """Built without executing anything: its pages, their formulas and pictures, and the links between them."""
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-D", "nb_execution_mode=off"]
    subprocess.run([*command, str(ROOT / "notebooks"), str(tmp_path)], cwd=ROOT, check=True, timeout=300)
    complaints: list[str] = []
    stems = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    written = ("index", "notation", "gallery", "changes", "api_method", "how_a_step_is_made")
    for name in (*written, *stems, "live/00_playground", "live/15_pde"):
        with page_of(chromium, "about:blank", complaints) as page:
            asked: list[str] = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto((tmp_path / f"{name}.html").as_uri())
            page.wait_for_load_state("networkidle")
            assert page.evaluate("() => [...document.images].every(i => i.complete && i.naturalWidth && i.alt)"), name
            assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
            if page.locator(".math").count():
                page.wait_for_selector("mjx-container")
                assert not page.locator("mjx-merror").count(), name
            links = page.evaluate("() => [...document.links].map(a => a.href)")
            broken = [link for link in links if link.startswith("file:") and not Path(
                urllib.request.url2pathname(link.removeprefix("file://").split("#")[0])).exists()]  # fmt: skip
            assert broken == [], name
            kept = page.evaluate("() => [...document.querySelectorAll('a[download]')].map(a => a.href)")
            assert not [link for link in kept if link.endswith(".html")], "a page is there to be opened"
            fragments = page.evaluate("() => [...document.links].filter(a => a.pathname === location.pathname && "
                                      "a.hash && !document.getElementById(decodeURIComponent(a.hash.slice(1))))"
                                      ".map(a => a.hash)")  # fmt: skip
            assert fragments == [], name
            if name in stems:
                side = page.locator(".sidebar-tree a").evaluate_all("links => links.map(a => a.pathname)")
                assert {Path(link).stem for link in side} >= set(stems), "a notebook that the side does not name"
            screenshot(page, f"site_{name.replace('/', '_')}")
    assert complaints == []


def test_page_without_kernel(chromium, tmp_path):
    """The HTML page: opened as a file, moved by keys, with pictures, words and numbers that follow."""
    from kfac_viz.pages import save_page
    from kfac_viz.parameters import read
    from kfac_viz.studies import coarse_space

    choices = {name: parameter.default for name, parameter in read(coarse_space.run).items()}
    path = save_page(coarse_space.run, "page", tmp_path, **choices | dict(widths=(5,), n=40))
    complaints: list[str] = []
    with page_of(chromium, path.as_uri(), complaints) as page:
        for control in ("damping", "size"):
            before = [
                page.locator(f"#{part}").get_attribute(key) for part, key in (("missed", "src"), ("added", "src"))
            ]
            words = page.locator("#title").inner_text() + page.locator("#bars").inner_text()
            page.locator(f"#{control}").focus()
            page.keyboard.press("ArrowRight")
            after = [page.locator(f"#{part}").get_attribute(key) for part, key in (("missed", "src"), ("added", "src"))]
            assert (before[0] != after[0]) == (control == "damping") and before[1] != after[1]
            assert page.locator("#title").inner_text() + page.locator("#bars").inner_text() != words
        assert page.evaluate("() => [...document.images].every(image => image.complete && image.alt)")
        screenshot(page, "page")
    assert complaints == []


def test_the_race_without_kernel(chromium, tmp_path):
    """The page of four methods: every picture, the sentence and the curves follow both sliders."""
    from kfac_viz.pages import save_race
    from kfac_viz.studies import pde

    path = save_race(pde.run, "race", tmp_path, widths=(6, 5), points=24, steps=6, at_step=6, per_layer=4)
    complaints: list[str] = []
    with page_of(chromium, path.as_uri(), complaints) as page:
        for control, moving in (("size", ("coarse", "both")), ("at_step", ("kfac", "coarse", "both", "exact"))):

            def seen(moving=moving):
                pictures = [page.locator(f"#{name}").get_attribute("src") for name in moving]
                return [*pictures, page.locator("#title").inner_text(), page.locator("#errors").inner_html()]

            before = seen()
            page.locator(f"#{control}").focus()
            page.keyboard.press("ArrowLeft")
            assert all(old != new for old, new in zip(before, seen(), strict=True))
        assert page.evaluate("() => [...document.images].every(image => image.complete && image.alt)")
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
        screenshot(page, "race")
    assert complaints == []


def test_a_panel_in_an_output_widget_is_seen(chromium, lab):
    complaints: list[str] = []
    with page_of(chromium, f"{lab}/doc/tree/notebooks/nested.ipynb?token={TOKEN}&reset", complaints) as page:
        run_all(page)
        page.wait_for_selector(PICTURE, timeout=60_000)
        assert page.locator(".kfac-panel").is_visible() and not page.locator(".kfac-asleep").is_visible()
    assert complaints == []


def test_a_notebook_whose_kernel_is_gone_shows_the_picture(chromium, lab):
    """And says what to do; beside its kernel, and once run again, the panel is there."""
    complaints: list[str] = []
    address = f"{lab}/doc/tree/notebooks/small.ipynb?token={TOKEN}&reset"
    with page_of(chromium, address, complaints) as page:
        run_all(page)
        page.wait_for_selector(PICTURE, timeout=60_000)
        assert not page.locator(".kfac-asleep").is_visible()
        page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        page.reload()
        page.wait_for_selector(PICTURE, timeout=60_000)
        assert not page.locator(".kfac-asleep").is_visible()
        page.wait_for_function("() => document.querySelector('.noUi-handle')?.getAttribute('aria-label')")
        assert [words for words in complaints if "debugger state" not in words] == []  # its request ends with a reload
        page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    with page_of(chromium, address, []) as page:  # JupyterLab writes that it does not find the model
        page.wait_for_selector(".kfac-asleep img", timeout=60_000)
        assert "Run this cell" in page.locator(".kfac-asleep").inner_text()
        assert not page.get_by_text("model not found").is_visible() and page.get_by_text("beside it").last.is_visible()
        screenshot(page, "asleep")
        run_all(page)
        page.wait_for_selector(PICTURE, timeout=60_000)
        assert not page.locator(".kfac-asleep").is_visible()
