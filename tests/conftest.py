"""The strict world of the tests: no silent promotion of types, and two devices."""

import itertools
import os

# Most programs here run once: compiled with less optimising, the tests take three quarters of the
# time. Read when the first device starts.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 2)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """JAX keeps every program it compiled in memory maps, of which Linux allows 65,530."""
    directory = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", directory)  # the command line sets it
    jax.clear_caches()


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
