"""What the site has beside docs/: pages of other folders, all pages as Markdown, llms.txt."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The files that are pages or downloads of the site, and their names there.
ELSEWHERE = {
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    **{
        f"notebooks/{path.name}": f"notebooks/{path.name}"
        for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
    },
}


def on_files(files, config):
    """Adds the files of other folders."""
    from mkdocs.structure.files import File

    for source, name in ELSEWHERE.items():
        text = (ROOT / source).read_text()
        content = relinked(text, source, name) if name.endswith(".md") else text
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Leads links out of docs/ to the pages that the site has of these files."""
    if page.file.src_uri.startswith("from-"):
        page.meta["hide"] = ["toc"]  # two columns of code need the width
    source = f"docs/{page.file.src_uri}"
    return markdown if page.file.generated_by else relinked(markdown, source, page.file.src_uri)


def on_post_build(config):
    """Writes the pages as Markdown beside the HTML, and the list of them."""
    site = Path(config.site_dir)
    pages = pages_of((ROOT / "mkdocs.yml").read_text())
    sources = {name: source for source, name in ELSEWHERE.items()}
    texts = {}
    for _, _, name in pages:
        source = sources.get(name, f"docs/{name}")
        texts[name] = relinked((ROOT / source).read_text(), source, name)
        (site / name).write_text(texts[name])
    (site / "llms.txt").write_text(list_of_pages(config.site_description, pages, texts))


def relinked(text: str, source: str, name: str) -> str:
    """Returns a page's text with links for its place in the site, `name`."""

    def place(match):
        target, _, anchor = match[1].partition("#")
        if "://" in target or not target:
            return match[0]
        path = os.path.normpath(os.path.join(os.path.dirname(source), target))
        path = ELSEWHERE.get(path, path.removeprefix("docs/"))
        link = os.path.relpath(path, os.path.dirname(name) or ".")
        return f"]({link}{'#' + anchor if anchor else ''})"

    return re.sub(r"\]\(([^)\s]+)\)", place, text)


def pages_of(config: str) -> list[tuple[str, str, str]]:
    """Returns the section, the title and the file of each page in the navigation of mkdocs.yml."""
    section, pages = "", []
    for line in config.partition("\nnav:\n")[2].splitlines():
        title, _, name = line.strip().removeprefix("- ").partition(":")
        if name:
            pages.append((section if line.startswith("      ") else "", title, name.strip()))
        else:
            section = title
    return pages


def list_of_pages(description: str, pages: list, texts: dict[str, str]) -> str:
    """Returns llms.txt: a link to each page as Markdown, with its first sentence."""
    lines, last = ["# jaxformers", "", f"> {description}"], None
    for section, title, name in pages:
        if section != last:
            lines += ["", f"## {section or 'Start'}", ""]
        last = section
        lines.append(f"- [{title}]({name}): {first_sentence(texts[name])}")
    return "\n".join(lines) + "\n"


def first_sentence(text: str) -> str:
    """Returns the first sentence of a page below its title, without links."""
    prose = re.sub(r"(?ms)^```.*?^```$", "", text)
    blocks = [block.strip() for block in prose.split("\n\n")]
    first = next(block for block in blocks if block and block[0] not in "#<|!:")
    item = re.split(r"\n- ", first.removeprefix("- "))[0]
    words = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", " ".join(item.split()))
    return re.split(r"(?<=\.) (?=[A-Z`])", words, maxsplit=1)[0].rstrip(":")
