"""The site of the documentation: all pages are in its navigation, and all public names in its API.

`.ci/slow site` builds the site and opens its pages in a browser.
"""

import importlib
import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Whose public names the pages of the API have.
MODULES = [
    "jaxformers",
    *(f"jaxformers.{name}" for name in ("adapters", "constraints", "data", "inspect", "optim")),
    *(f"jaxformers.{name}" for name in ("plot", "sharding", "text", "generation.processors")),
]


def load_hooks():
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "site" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks


hooks = load_hooks()
CONFIG = (ROOT / "mkdocs.yml").read_text()
IN_NAVIGATION = [name for _, _, name in hooks.pages_of(CONFIG)]


def source_of(name: str) -> Path:
    sources = {page: source for source, page in hooks.ELSEWHERE.items()}
    return ROOT / sources.get(name, f"docs/{name}")


def test_every_page_is_in_the_navigation_once():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    pages |= {name for name in hooks.ELSEWHERE.values() if name.endswith(".md")}
    assert sorted(IN_NAVIGATION) == sorted(pages)


def anchors_of(text: str) -> set[str]:
    """The anchors that Markdown gives to the headings of a page."""
    prose = re.sub(r"(?ms)^```.*?^```$", "", text)
    titles = re.findall(r"(?m)^#+ (.+)$", prose)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_links_and_anchors_of_all_pages_lead_somewhere():
    for name in IN_NAVIGATION:
        page = source_of(name)
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in link:
                continue
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), (name, link)
            assert not anchor or anchor in anchors_of(target.read_text()), (name, link)


def things_of_the_api() -> dict[str, object]:
    texts = [path.read_text() for path in (DOCS / "api").glob("*.md")]
    shown = re.findall(r"^::: (\S+)$", "\n".join(texts), re.MULTILINE)
    assert len(shown) == len(set(shown))
    places = {path: path.rpartition(".") for path in shown}
    return {
        path: getattr(importlib.import_module(module), name)
        for path, (module, _, name) in places.items()
    }


def test_the_api_shows_the_stars_of_docstrings():
    """Markdown takes two stars outside of code for the ends of a text in italics."""
    for path, thing in things_of_the_api().items():
        prose = re.sub(r"(?ms)`.*?`|^ *>>>.*|^ *[*\w, ]+:", "", thing.__doc__)
        assert not re.search(r"\*\S[^*]*\S\*|\*\*\d", prose), path


def test_the_api_has_all_public_names():
    things = things_of_the_api().values()
    missing = []
    for module in MODULES:
        for name, thing in vars(importlib.import_module(module)).items():
            if callable(thing) and not name.startswith("_"):
                if not any(thing is other for other in things):
                    missing.append(f"{module}.{name}")
    assert missing == []


def test_the_list_for_language_models_has_all_pages_with_their_first_sentences():
    pages = hooks.pages_of(CONFIG)
    texts = {name: source_of(name).read_text() for name in IN_NAVIGATION}
    written = hooks.list_of_pages("What it is", pages, texts)
    lines = re.findall(r"^- \[(.+?)\]\((.+?)\): (.+)$", written, re.MULTILINE)
    assert [name for _, name, _ in lines] == IN_NAVIGATION
    assert all(10 < len(sentence) < 400 and "](" not in sentence for _, _, sentence in lines)
    assert written.startswith("# jaxformers\n\n> What it is\n")


def test_links_out_of_the_pages_lead_to_places_of_the_site():
    text = "[a](../benchmarks/README.md#b) [c](training.md#d) [e](https://f.org) [g](#h)"
    moved = hooks.relinked(text, "docs/x.md", "x.md")
    assert moved == "[a](benchmarks.md#b) [c](training.md#d) [e](https://f.org) [g](#h)"
    assert (
        hooks.relinked("[a](../docs/b.md)", "benchmarks/README.md", "benchmarks.md") == "[a](b.md)"
    )


def test_the_site_needs_nothing_from_elsewhere():
    assert re.search(r"^  font: false", CONFIG, re.MULTILINE)
    assert "http" not in (DOCS / "assets" / "site.css").read_text()
    assert not re.search(r"extra_javascript|https?://", CONFIG)
