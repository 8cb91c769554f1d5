"""The strict world of the tests: no silent promotion of types, and two devices."""

import ast
import collections
import ctypes
import gc
import itertools
import logging
import os
import re
import sys
import tracemalloc
from pathlib import Path

from quick import xla_flags

# Read when the first device starts.
os.environ["XLA_FLAGS"] = xla_flags()

import jax
import jaxtyping
import pytest
from jaxtyping._import_hook import JaxtypingTransformer

check_function = JaxtypingTransformer.visit_FunctionDef


def check_outer_function(transformer, node):
    """Leaves nested functions unchecked: each call of the outer one would wrap them anew."""
    nested = any(isinstance(parent, ast.FunctionDef) for parent in transformer._parents)
    return node if nested else check_function(transformer, node)


JaxtypingTransformer.visit_FunctionDef = check_outer_function

# Tracing makes many objects that live for long, which the collector would visit again and again.
gc.set_threshold(200_000, 50, 100)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 2)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """JAX keeps every program it compiled in memory maps, of which Linux allows 65,530."""
    directory = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", directory)  # the command line sets it
    jax.clear_caches()
    # glibc keeps what was freed, gigabytes in small pieces, and then searches long for a large one.
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@pytest.fixture
def getkey():
    """A function that gives another PRNG key at each call, the same ones in every run."""
    seeds = itertools.count(2026)
    return lambda: jax.random.key(next(seeds))


@pytest.fixture
def no_shape_checker():
    """Users do not run the shape checker: without it, bad input has to meet our own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def no_native(monkeypatch):
    """Does without operations in C, in programs that are not compiled yet."""
    monkeypatch.setattr("jaxformers.native.library.obstacle", lambda: "off")


@pytest.fixture(scope="module")
def quick_compilation():
    """Programs that run once on tiny arrays are not worth optimizing."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def small_memory():
    """No more than 100 MB may be allocated, by Python or NumPy."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


@pytest.fixture
def compiled(caplog):
    """A function that gives the names of the programs that JAX compiled since the last call."""
    jax.config.update("jax_log_compiles", True)

    def names():
        texts = [record.getMessage() for record in caplog.records]
        found = [text for text in texts if text.startswith("Finished XLA compilation")]
        caplog.clear()
        return found

    with caplog.at_level(logging.WARNING, "jax._src.dispatch"):
        yield names
    jax.config.update("jax_log_compiles", False)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A function that gives the directory of a case of `hf_cases`, which is made once."""
    from hf_checkpoints import make

    known = {}

    def directory(name):
        if name not in known:
            known[name] = tmp_path_factory.mktemp(name)
            make(name, known[name])
        return known[name]

    return directory


def pytest_addoption(parser):
    parser.addoption("--list-skipped", metavar="FILE", help="write the skipped tests to FILE")
    parser.addoption("--thorough", action="store_true", help="run all cases of each test")


def pytest_collection_modifyitems(config, items):
    """Leaves out cases that take long and differ little, unless `--thorough` asks for them."""
    if config.getoption("--thorough"):
        return
    cases = collections.defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    for found in cases.values():
        if few := found[0].get_closest_marker("few"):
            kept = min(few.args[0], len(found))
            spaced = {i * (len(found) - 1) // max(kept - 1, 1) for i in range(kept)}
            found[:] = [item for i, item in enumerate(found) if i in spaced]
        if len(found) > 1:  # a case that is asked for by its name is run
            found[:] = [item for item in found if not item.get_closest_marker("thorough")]
    kept = {item for found in cases.values() for item in found}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


# Packages that tests need and which extra brings them.
EXTRAS = {
    **dict.fromkeys(
        ("compressed_tensors", "flax", "jsonschema", "openai", "optax", "peft"), "parity"
    ),
    **dict.fromkeys(("datasets", "grain"), "parity"),
    **dict.fromkeys(("pydantic", "sentence_transformers", "torch", "transformers"), "parity"),
    "llguidance": "constrained",
    **dict.fromkeys(("starlette", "uvicorn"), "serve"),
    **dict.fromkeys(("huggingface_hub", "jinja2", "safetensors", "tokenizers"), "hf"),
    **dict.fromkeys(("matplotlib", "tqdm"), "train"),
    "gguf": "gguf",
    "orbax": "orbax",
}


def reason_of(report):
    """Returns why a test was skipped; for a missing package the install line to type."""
    reason = report.longrepr[2].removeprefix("Skipped: ")
    missing = re.match(r"could not import '(\w+)", reason)
    if missing is None:
        return reason
    package = missing[1]
    install = f"-e '.[{EXTRAS[package]}]'" if package in EXTRAS else package.replace("_", "-")
    return f"{package} is not installed (pip install {install})"


def pytest_terminal_summary(terminalreporter, config):
    """Says once for each reason how many tests were skipped, and lists the tests on request."""
    # A module that is skipped as a whole is one report of its collection.
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = collections.Counter(map(reason_of, skipped))
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count} skipped: {reason}")
    if path := config.getoption("--list-skipped"):
        names = sorted({report.nodeid for report in skipped})
        Path(path).write_text("".join(f"{name}\n" for name in names))
