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
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.jit(lambda x: jnp.sin(x) * 3)(jnp.ones(7)).block_until_ready()
print(sum("cache_hits" in name for name in hits) > 0)
"""


def run(environment):
    """The lines that the program writes, and its notes."""
    environment = {name: x for name, x in os.environ.items() if "CACHE" not in name} | environment
    command = [sys.executable, "-c", PROGRAM]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    return found.stdout.splitlines(), found.stderr


@pytest.mark.parametrize("told", [False, True])
def test_a_second_process_compiles_nothing(tmp_path, told):
    """Programs that compile in an instant are kept, too."""
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    directory = tmp_path / "mine" if told else tmp_path / "jaxformers" / "programs"
    if told:  # JAX's own setting stands
        environment["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    for hit in (False, True):
        lines, notes = run(environment)
        assert lines == [str(directory), str(hit)], notes
    assert list(directory.iterdir())


def test_settings_that_keep_less(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    directory = tmp_path / "jaxformers" / "programs"
    least = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    lines, _ = run(environment | {least: "1.0"})
    assert lines == [str(directory), "False"] and not list(directory.iterdir())
    directory.rmdir()
    lines, _ = run(environment | {"JAX_ENABLE_COMPILATION_CACHE": "0"})
    assert lines == ["None", "False"] and not directory.exists()


def test_a_directory_that_cannot_be_written_breaks_no_program(tmp_path):
    (tmp_path / "jaxformers").write_text("")
    lines, notes = run({"XDG_CACHE_HOME": str(tmp_path)})
    assert lines == ["None", "False"]
    assert "compiled programs need a directory that can be written" in notes


def test_a_file_in_the_way(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="need a directory that can be written, got .*file"):
        keep_compiled_programs(tmp_path / "file")
    assert jax.config.jax_compilation_cache_dir == before
