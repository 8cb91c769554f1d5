"""Opens every page of the built site in Chromium: python tests/site_in_browser.py build/site.

It needs selenium, and `chromium` and `chromedriver` of the system. Each page is opened in a wide
and in a narrow window, in light and in dark colors. There must be no message in the console, no
request to another server, no link or picture that leads nowhere, and nothing wider than the window.
The search must find the page about beam search. `--shots DIRECTORY` keeps pictures of some pages.
"""

import argparse
import functools
import http.server
import json
import shutil
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

from selenium import webdriver
from selenium.webdriver.common.by import By

OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
SIZES = {"wide": (1280, 900), "narrow": (360, 780)}
COLORS = {"light": "default", "dark": "slate"}
SHOWN = ("index.html", "from-torch.html", "how-it-works.html", "api/models.html")

# What is wider than the window, unless something around it scrolls.
TOO_WIDE = """
const width = document.documentElement.clientWidth, found = [];
for (const x of document.querySelectorAll('.md-content *')) {
  const box = x.getBoundingClientRect();
  if (box.width === 0 || box.right <= width + 1) continue;
  let around = x.parentElement;
  while (around && !/auto|scroll|hidden/.test(getComputedStyle(around).overflowX)) {
    around = around.parentElement;
  }
  if (!around || around.matches('html, body')) found.push(x.outerHTML.slice(0, 120));
}
if (document.documentElement.scrollWidth > width) found.push('the page');
return found;
"""
LINKS = """
return [...document.querySelectorAll('a[href]')].map(x => x.href).concat(
  [...document.images].filter(x => !x.complete || !x.naturalWidth).map(x => 'broken: ' + x.src))
"""
IDS = "return [...document.querySelectorAll('[id], [name]')].map(x => x.id || x.name)"


def serve(site: Path) -> str:
    """Serves the site on a free port and returns its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


def start(profile: str) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    return webdriver.Chrome(options=options, service=service)


def resize(browser: webdriver.Chrome, size: tuple[int, int]) -> None:
    """Sets the size of the page itself, which may be narrower than a window can be."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def color(browser: webdriver.Chrome, name: str) -> None:
    """Has the system prefer a color scheme."""
    features = [{"name": "prefers-color-scheme", "value": name}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def requested(browser: webdriver.Chrome) -> set[str]:
    """Returns the addresses that were asked for since the last call."""
    messages = [json.loads(x["message"])["message"] for x in browser.get_log("performance")]
    return {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }


def search(browser: webdriver.Chrome, address: str, words: str, timeout: float = 30) -> list[str]:
    """Returns the addresses of what the search of the site finds."""
    browser.get(address + "index.html")
    resize(browser, SIZES["wide"])
    field = browser.find_element(By.CSS_SELECTOR, "input.md-search__input")
    field.click()
    field.send_keys(words)
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        found = browser.find_elements(By.CSS_SELECTOR, "a.md-search-result__link")
        if found:
            return [x.get_attribute("href").partition("?")[0].removeprefix(address) for x in found]
        time.sleep(0.2)
    return []


def check(site: Path, shots: Path | None) -> list[str]:
    """Returns what is wrong with the site."""
    address, wrong = serve(site), []
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    targets: dict[str, set[str]] = {}  # the anchors of each page
    links: dict[str, set[str]] = {}
    with tempfile.TemporaryDirectory() as profile:
        browser = start(profile)
        try:
            for scheme, body in COLORS.items():
                color(browser, scheme)
                browser.get(address + "index.html")
                browser.execute_script("localStorage.clear()")  # it has the colors from before
                for name, size in SIZES.items():
                    resize(browser, size)
                    for page in pages:
                        at = f"{page} ({name}, {scheme})"
                        browser.get(address + page)
                        style = "return document.body.dataset.mdColorScheme"
                        if browser.execute_script(style) != body:
                            wrong.append(f"{at}: the colors are not {scheme}")
                        wrong += [f"{at}: {x['message']}" for x in browser.get_log("browser")]
                        wrong += [
                            f"{at}: wider than the window: {x}"
                            for x in browser.execute_script(TOO_WIDE)
                        ]
                        wrong += [
                            f"{at}: asks for {url}"
                            for url in requested(browser)
                            if not url.startswith((address, "data:", "blob:", "chrome"))
                        ]
                        links[page] = set(browser.execute_script(LINKS))
                        targets[page] = set(browser.execute_script(IDS))
                        if shots and page in SHOWN:
                            file = f"{page.replace('/', '-')}-{name}-{scheme}.png"
                            browser.save_screenshot(str(shots / file))
            found = search(browser, address, "beam search")
            if not any(x.startswith("generation.html") for x in found):
                wrong.append(f"the search for 'beam search' finds {found}")
        finally:
            browser.quit()
    for page, urls in links.items():
        for url in urls:
            if url.startswith("broken: "):
                wrong.append(f"{page}: {url}")
            elif url.startswith(address):
                path, anchor = unquote(urlsplit(url).path)[1:], unquote(urlsplit(url).fragment)
                path = path + "index.html" if path.endswith("/") or not path else path
                if not (site / path).is_file():
                    wrong.append(f"{page}: no {path}")
                elif anchor and path in targets and anchor not in targets[path]:
                    wrong.append(f"{page}: no {anchor} in {path}")
    print(f"{len(pages)} pages in {len(SIZES)} sizes and {len(COLORS)} colors, search: {found[:3]}")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("site", type=Path)
    parser.add_argument("--shots", type=Path)
    arguments = parser.parse_args()
    if arguments.shots:
        arguments.shots.mkdir(parents=True, exist_ok=True)
    problems = check(arguments.site, arguments.shots)
    print("\n".join(problems))
    raise SystemExit(bool(problems))
