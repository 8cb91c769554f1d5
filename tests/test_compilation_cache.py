"""Compiled programs outlive the process that compiled them."""

import os
import subprocess
import sys

import jax
import pytest

from jaxformers import keep_compiled_programs

PROGRAM = """
import jax, jax.numpy as jnp
from jaxformers import keep_compiled_programs
print(keep_compiled_programs())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.jit(lambda x: jnp.sin(x) * 3)(jnp.ones(7)).block_until_ready()
print(sum("cache_hits" in name for name in hits) > 0)
"""


@pytest.mark.parametrize("told", [False, True])
def test_a_second_process_compiles_nothing(tmp_path, told):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    directory = tmp_path / "mine" if told else tmp_path / "jaxformers" / "programs"
    if told:  # JAX's own setting stands
        environment["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    for hit in (False, True):
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment
        )
        assert run.stdout.splitlines() == [str(directory), str(hit)], run.stderr
    assert list(directory.iterdir())


def test_a_file_in_the_way(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="need a directory that can be written, got .*file"):
        keep_compiled_programs(tmp_path / "file")
    assert jax.config.jax_compilation_cache_dir == before
