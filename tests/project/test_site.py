"""The site of the documentation: it builds, needs no network, and fits the screens it is read on.

What a browser draws is looked at in Chromium where there is one (Debian: `apt install chromium`).
"""

import html.parser
import json
import os
import queue
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs", reason="the documentation's tools are in the extra `docs`")

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
# Attributes by which a page loads something, as opposed to linking to it.
LOADED = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder with the site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def pages(site: Path) -> dict[str, str]:
    return {str(path.relative_to(site)): path.read_text() for path in site.rglob("*.html")}


class Loads(html.parser.HTMLParser):
    """What a page loads, and its text but that of code, scripts and formulas."""

    def __init__(self):
        super().__init__()
        self.urls, self.text, self.inside = [], [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in LOADED and (tag != "link" or given.get("rel") != "canonical"):
            self.urls.append(given.get(LOADED[tag]) or "")
        if tag in {"code", "pre", "script", "style", "math"}:
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.text.append(data)


def read(page: str) -> Loads:
    loads = Loads()
    loads.feed(page)
    return loads


def test_no_page_loads_anything_from_another_host(site):
    found = {
        (name, url)
        for name, page in pages(site).items()
        for url in read(page).urls + re.findall(r"\bimport\(\s*[\"']([^\"']*)", page)
        if url.startswith(("http:", "https:", "//"))
    }
    assert found == set()
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text()), style


def test_every_formula_became_mathml(site):
    text = {name: "".join(read(page).text) for name, page in pages(site).items()}
    left = r"\$[^$]+\$|\\[(\[]|\\[a-z]+\{"
    assert {name: re.findall(left, t) for name, t in text.items() if re.search(left, t)} == {}
    assert {name for name, page in pages(site).items() if "arithmatex" in page} == set()
    formulas = re.findall(r"<math\b.*?</math>", "".join(pages(site).values()), re.DOTALL)
    assert len(formulas) > 300
    assert [formula for formula in formulas if "\\" in formula] == []


def test_a_formula_that_cannot_be_converted_is_an_error_and_code_keeps_its_dollars():
    hook = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "offline.py")))
    assert "<mfrac>" in hook.mathml(r"\frac{1}{2} &lt; x", block=True)
    with pytest.raises(Exception, match="unknowncommand"):
        hook.mathml(r"\unknowncommand", block=False)
    cell = "<code>$x$</code> and $x$"
    assert hook.IN_CELL.sub(hook.in_cell, cell).startswith("<code>$x$</code> and <math>")


# --- in a browser --------------------------------------------------------------------------------

# Loads one page after the other, and writes down what each looks like on a desk and on a phone.
LOOK = """<!doctype html><body><script>
const later = (ms) => new Promise((done) => setTimeout(done, ms));
async function open(page) {
  const frame = document.createElement("iframe");
  frame.style.visibility = "hidden"; // laid out, but not painted
  frame.height = 900; frame.width = 1280; frame.src = page;
  document.body.append(frame);
  await new Promise((done) => (frame.onload = done));
  await later(100);
  return frame;
}
function look(frame, page, width) {
  frame.width = width;
  const inside = frame.contentDocument;
  const all = (what) => [...inside.querySelectorAll(what)];
  return {
    page, width,
    wide: inside.documentElement.scrollWidth > inside.documentElement.clientWidth,
    scrolled: all(".highlight pre > code, .highlight-ipynb pre")
      .filter((code) => code.scrollWidth > code.clientWidth + 1)
      .map((code) => [!!code.closest(".language-text"), code.textContent.slice(0, 60)]),
    formulas: all("math").length,
    undrawn: all("math").filter((math) => {
      const { width, height } = math.getBoundingClientRect();
      return !(width > 2 && height > 2);
    }).map((math) => math.textContent),
    loaded: frame.contentWindow.performance.getEntriesByType("resource").map((r) => r.name),
  };
}
(async () => {
  const seen = [];
  for (const page of PAGES) {
    const frame = await open(page);
    for (const width of [1280, 390]) seen.push(look(frame, page, width));
    frame.remove();
  }
  await fetch("/seen", { method: "POST", body: JSON.stringify(seen) });
})();
</script>"""


class Handler(SimpleHTTPRequestHandler):
    """Serves the site, and takes what the browser says of it."""

    def do_POST(self):
        self.server.answers.put(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


def looked_at(site: Path, profile: Path) -> list[dict]:
    """What a browser without a network makes of each page of a site."""
    names = [f"/{name}" for name in pages(site) if name != "404.html"]
    (site / "look.html").write_text(LOOK.replace("PAGES", json.dumps(names)))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    server.answers = queue.Queue()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--remote-debugging-port=0",  # or it would end by itself
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={profile}",
        "--window-size=1400,1000",
        f"http://127.0.0.1:{server.server_port}/look.html",
    ]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    browser = subprocess.Popen(command, start_new_session=True, **silent)
    try:
        looks = json.loads(server.answers.get(timeout=300))
    finally:
        os.killpg(browser.pid, signal.SIGKILL)  # with all its processes
        browser.wait(timeout=30)
        server.shutdown()
        server.server_close()
        (site / "look.html").unlink()
    assert len(looks) == 2 * len(names)
    return looks


@pytest.fixture(scope="module")
def seen(site, tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium here: nobody looked at the pages (apt install chromium)")
    return looked_at(site, tmp_path_factory.mktemp("browser"))


def test_a_browser_draws_the_formulas_and_asks_no_other_host(seen):
    assert sum(look["formulas"] for look in seen) > 600
    assert {look["page"]: look["undrawn"] for look in seen if look["undrawn"]} == {}
    other = {u for look in seen for u in look["loaded"] if not u.startswith("http://127.0.0.1")}
    assert other == set()


def test_code_does_not_scroll_sideways(seen):
    """Except printed tables on a phone: to wrap them would be to lose their columns."""
    wide = [
        (look["page"], look["width"], start)
        for look in seen
        for is_table, start in look["scrolled"]
        if look["width"] == 1280 or not is_table
    ]
    assert wide == []
    assert [(look["page"], look["width"]) for look in seen if look["wide"]] == []
