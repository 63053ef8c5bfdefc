"""The site as people see it: built with warnings as errors, then opened in a browser that asks no other server."""

import functools
import html.parser
import http.server
import importlib.util
import shutil
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from test_package import python

pytestmark = pytest.mark.full
# The parts of a page that would have to be moved to the side.
WIDE = """[document.documentElement, ...document.querySelectorAll("main, .bd-article-container, article")]
    .filter(part => part.scrollWidth > part.clientWidth + 1).map(part => part.className)"""
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site."""
    if importlib.util.find_spec("sphinx") is None:
        pytest.skip("needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    run = python("-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(folder), timeout=600)
    assert run.returncode == 0, run.stderr
    return folder


def pages_of(site):
    """The pages; the theme's folder has templates, too."""
    return sorted(path for path in site.rglob("*.html") if "_static" not in path.parts)


class Anchors(html.parser.HTMLParser):
    """The links and the ids of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.ids = set(), {""}
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.ids |= {named[key] for key in ("id", "name") if named.get(key)}
        if tag == "a" and named.get("href"):
            self.links.add(named["href"])


def test_every_internal_link_leads_to_a_place(site):
    pages = {path: Anchors(path) for path in pages_of(site)}
    assert len(pages) > 50
    for path, page in pages.items():
        for link in page.links:
            target, fragment = urldefrag(link)
            if "://" in target or target.startswith("mailto:"):
                continue
            file = (path.parent / unquote(target.partition("?")[0])).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            assert file.is_file(), f"{path.name}: {link}"
            if file in pages:
                assert unquote(fragment) in pages[file].ids, f"{path.name}: {link}"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    """That of a server of the site."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    """A browser without a window: that of Playwright, or one that is installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    names = "chromium", "chromium-browser", "google-chrome"
    installed = next((found for name in names if (found := shutil.which(name))), None)
    with playwright.sync_playwright() as running:
        if installed is None and not Path(running.chromium.executable_path).exists():
            pytest.skip("needs a browser: chromium, or `playwright install chromium`")
        opened = running.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, address):
    """A page that remembers what went wrong, and asks no other server."""
    opened, opened.wrong = browser.new_page(viewport=DESK), []
    opened.on("pageerror", lambda error: opened.wrong.append(str(error)))
    opened.on("console", lambda said: opened.wrong.append(said.text) if said.type in ("error", "warning") else None)
    opened.on("request", lambda request: request.url.startswith((address, "data:")) or opened.wrong.append(request.url))
    yield opened
    opened.close()


@pytest.mark.parametrize("view", [PHONE, DESK], ids=["phone", "desk"])
def test_every_page_loads_without_errors_and_fits_the_screen(site, address, page, view):
    page.set_viewport_size(view)
    for path in pages_of(site):
        name = path.relative_to(site).as_posix()
        page.goto(f"{address}/{name}", wait_until="load")
        assert not page.evaluate(WIDE), f"{name}: wider than the screen"
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth)"), name
        assert not page.wrong, f"{name}: {page.wrong}"


def test_search_finds_what_is_there(address, page):
    page.goto(f"{address}/search.html?q=bidirectional")
    for found in ("reference/compositions.html", "concepts/time.html"):
        page.wait_for_selector(f'#search-results li a[href*="{found}"]')
    page.goto(f"{address}/search.html?q=zzzzzz")
    page.wait_for_selector("#search-results p")
    assert not page.query_selector("#search-results li")


def test_it_follows_the_readers_colours_and_names_its_version(address, page):
    page.emulate_media(color_scheme="dark")
    page.goto(f"{address}/index.html")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.wait_for_selector(".version-switcher__menu a", state="attached")
    assert page.inner_text(".version-switcher__button").strip() == page.evaluate(
        "DOCUMENTATION_OPTIONS.theme_switcher_version_match"
    )
