"""What importing the package does, which is nothing, and how its modules depend on each other."""

import ast
import graphlib
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import jaxformers

PACKAGE = Path(jaxformers.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}


def run_fresh(program):
    """What a new Python process prints, without the settings of this one."""
    command = [sys.executable, "-W", "error", "-c", program]
    # From the folder of the package that is tested here, whatever else is installed.
    run = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_import_starts_no_device_and_changes_no_setting():
    """Measured against the packages below it, which are imported first.

    Every way to a device goes through `get_backend`, so it is replaced before; the table of those
    already started says the same, where this version of JAX has one.
    """
    program = """
import jax, equinox, jaxtyping, numpy
from jax._src import xla_bridge

def refuse(*args, **kwargs):
    raise SystemExit("a device was started")

started = getattr(xla_bridge, "backends_are_initialized", lambda: False)
before, get_backend = dict(jax.config.values), xla_bridge.get_backend
xla_bridge.get_backend = xla_bridge.backends = refuse
import jaxformers
after = dict(jax.config.values)
print({name for name in before | after if before.get(name) != after.get(name)}, started())
xla_bridge.get_backend = get_backend
"""
    assert run_fresh(program) == "set() False"


def test_the_device_test_can_fail():
    program = """
import jax.numpy as jnp
from jax._src import xla_bridge
jnp.zeros(3)
print(xla_bridge.backends_are_initialized())
"""
    assert run_fresh(program) == "True"


def test_import_brings_the_core_packages_only():
    """Nothing is loaded that JAX, Equinox and NumPy do not load themselves."""
    program = """
import sys
import jax, jaxlib, equinox, numpy
before = {name.partition(".")[0] for name in sys.modules}
import jaxformers
after = {name.partition(".")[0] for name in sys.modules}
print(sorted(name for name in after - before if name not in sys.stdlib_module_names))
print([name for name in OTHERS if name in sys.modules])
"""
    others = "torch transformers optax flax matplotlib tqdm safetensors tokenizers huggingface_hub"
    loaded, others = run_fresh(f"OTHERS = {others.split()}\n{program}").splitlines()
    assert loaded == "['jaxformers']"
    assert others == "[]"


def imports_of(tree):
    """Modules of this package that are imported anywhere in a module, within functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in line {node.lineno}"
            # What is imported from a module may be a module itself.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if as_module(name) in MODULES else node.module for name in names]
        else:
            continue
        yield from (as_module(name) for name in names if name.split(".")[0] == "jaxformers")


def as_module(name):
    """Its name among `MODULES`: a package is its `__init__`."""
    name = name.removeprefix("jaxformers").removeprefix(".")
    return name if name in MODULES else f"{name}.__init__".removeprefix(".")


def test_imports_go_downward():
    """There is an order of the modules in which each imports earlier ones only."""
    graph = {name: set(imports_of(tree)) for name, tree in MODULES.items()}
    assert all("__init__" not in below for below in graph.values())
    assert set().union(*graph.values()) <= set(graph)
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    print(" <- ".join(order))
    assert order.index("checks") < order.index("attention") < order.index("transformer")


@pytest.mark.parametrize("name", MODULES)
def test_no_asserts(name):
    """`python -O` strips asserts: what must hold is checked, and errors say what to do."""
    for node in ast.walk(MODULES[name]):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}"


def test_everything_public_is_there_and_documented():
    names = [name for name in vars(jaxformers) if not name.startswith("_")]
    public = [getattr(jaxformers, name) for name in names if name not in MODULES]
    assert len(public) > 20
    for thing in public:
        if callable(thing):
            assert thing.__doc__, thing


# The world that these tests run in.


def test_types_are_not_promoted_silently():
    with pytest.raises(Exception, match="promotion"):
        jnp.ones(3, jnp.float32) + jnp.ones(3, jnp.bfloat16)


def test_shapes_are_checked():
    """Also in the processes that run tests side by side."""
    norm = jaxformers.LayerNorm(4)
    mha = jaxformers.MultiHeadAttention(4, 2, key=jax.random.key(0))
    with pytest.raises(jaxtyping.TypeCheckError):
        norm(jnp.ones((3, 4), jnp.int32))
    with pytest.raises(jaxtyping.TypeCheckError):
        mha(jnp.ones((2, 3, 4)), jnp.ones((3, 5, 4)))


def test_errors_are_ours_where_shapes_are_not_checked(no_shape_checker):
    mha = jaxformers.MultiHeadAttention(4, 2, key=jax.random.key(0))
    with pytest.raises(ValueError, match="same batch axis"):
        mha(jnp.ones((2, 3, 4)), jnp.ones((3, 5, 4)))


def test_warnings_are_errors():
    with pytest.raises(UserWarning):
        warnings.warn("a warning", UserWarning, stacklevel=1)


def test_there_are_two_devices():
    assert len(jax.devices()) == 2


def test_keys_are_fresh(getkey):
    keys = np.stack([jax.random.key_data(getkey()) for _ in range(9)])
    assert len(np.unique(keys, axis=0)) == 9
