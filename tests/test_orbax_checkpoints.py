"""Trainings that are spread over devices, saved and restored through orbax."""

import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import Checkpoints, OrbaxCheckpoints, digest

pytest.importorskip("orbax.checkpoint")


class Pair(NamedTuple):
    left: jax.Array
    right: int


@pytest.fixture(scope="module")
def rows():
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,))
    return jax.NamedSharding(mesh, jax.P("x"))


@pytest.fixture
def training(rows):
    return {
        "model": {"w": jax.device_put(jnp.arange(24.0).reshape(6, 4) / 7, rows)},
        "half": jax.device_put(jnp.arange(6, dtype=jnp.bfloat16), rows),
        "keys": jax.device_put(jax.random.split(jax.random.key(1), 2), rows),
        "one key": jax.random.key(5, impl="rbg"),
        "pair": Pair(jnp.arange(5, dtype=jnp.int8), 2**70),
        "numbers": [True, 0.1, float("inf"), None],
        "empty": jnp.zeros((0, 3)),
        "numpy": (np.arange(6.0).reshape(2, 3).T, np.float32(0.1)),
        "second device": jax.device_put(jnp.arange(3), jax.devices()[1]),
        "weak": jnp.asarray(2.0),
        "function": jnp.tanh,
    }


def blank(tree):
    def zero(x):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                jnp.zeros_like(jax.random.key_data(x)), impl=str(jax.random.key_impl(x))
            )
        return x if callable(x) else x * 0 if hasattr(x, "dtype") else type(x)(0)

    return jax.tree.map(zero, tree)


@pytest.fixture
def checkpoints(tmp_path):
    made = OrbaxCheckpoints(tmp_path / "run", keep=2)
    yield made
    made.wait()


def test_a_state_comes_back_bit_for_bit_and_spread(checkpoints, training):
    like = blank(training)
    checkpoints.save(training, 3)
    restored, step = checkpoints.restore(like)
    assert step == 3 and jax.tree.structure(restored) == jax.tree.structure(training)
    assert digest(restored) == digest(training) != digest(like)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(training), strict=True):
        assert type(x) is type(y) and (hasattr(x, "dtype") or x == y)
        if isinstance(x, jax.Array):
            assert (x.sharding, x.committed) == (y.sharding, y.committed)
            assert getattr(x, "weak_type", None) == getattr(y, "weak_type", None)


def test_it_may_be_donated_at_once(checkpoints, rows):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    x, numbers = jax.device_put(jnp.arange(2.0**20), rows), np.arange(9.0)
    checkpoints.save({"x": x, "numbers": numbers}, 1)
    after = overwrite(x)
    numbers[:] = -1
    restored, _ = checkpoints.restore({"x": after, "numbers": numbers})
    assert (restored["x"] == jnp.arange(2.0**20)).all()
    assert (restored["numbers"] == np.arange(9)).all()


def test_old_ones_go_and_later_ones_are_another_training(checkpoints):
    assert checkpoints.restore({"x": jnp.zeros(3)}) is None
    for step in (1, 20, 300):
        checkpoints.save({"x": jnp.full(3, step)}, step)
    checkpoints.save({"x": jnp.zeros(3, int)}, 300)
    checkpoints.wait()
    assert checkpoints.steps() == [20, 300]
    assert checkpoints.restore({"x": jnp.zeros(3, int)})[0]["x"][0] == 300
    with pytest.raises(ValueError, match="later step 300"):
        checkpoints.save({"x": jnp.ones(3)}, 200)
    with pytest.raises(ValueError, match=r"other settings.*\nx: int32 \(3,\) there, int32 \(4,\)"):
        checkpoints.restore({"x": jnp.zeros(4, int)})


@pytest.mark.parametrize("part", ["arrays", "rest"])
def test_of_a_broken_one_the_one_before_is_taken(part, checkpoints):
    like = {"x": jnp.zeros(3, int)}
    for step in (1, 2):
        checkpoints.save({"x": jnp.full(3, step)}, step)
    checkpoints.wait()

    def damage(step):
        for path in Path(checkpoints.directory, str(step), part).rglob("*"):
            if path.is_file() and "commit" not in path.name:
                path.write_bytes(b"")

    damage(2)
    with pytest.warns(UserWarning, match="skipped: step 2"):
        restored, step = checkpoints.restore(like)
    assert step == 1 and restored["x"][0] == 1
    checkpoints.save({"x": jnp.full(3, 4)}, 2)
    assert checkpoints.restore(like)[0]["x"][0] == 4
    damage(1), damage(2)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="1, 2, and none can be read"):
        checkpoints.restore(like)


def test_what_cannot_be_written_is_told_at_the_next_call(checkpoints, monkeypatch):
    import tensorstore

    write = tensorstore.TensorStore.write

    def refuse_two(store, *args, **options):
        if re.search(r"/[23]\.orbax", str(store.spec().to_json())):  # the steps 2 and 3
            raise ValueError("no space")
        return write(store, *args, **options)

    like = {"x": jnp.ones(3)}
    checkpoints.save(like, 1)
    checkpoints.wait()
    monkeypatch.setattr("tensorstore.TensorStore.write", refuse_two)
    checkpoints.save(like, 2)
    with pytest.raises(OSError, match="earlier ones are as they were: .*no space"):
        checkpoints.wait()
    assert checkpoints.steps() == [1] and checkpoints.restore(like)[1] == 1
    checkpoints.save(like, 3)
    # There is room again: what is saved now must not be lost over what was not.
    with pytest.raises(OSError, match="no space"):
        checkpoints.save(like, 4)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 4]


def test_a_directory_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written to"):
        OrbaxCheckpoints(tmp_path / "file" / "run")


def test_one_host_does_not_write_what_is_spread_over_several(tmp_path, rows, monkeypatch):
    spread = jax.device_put(jnp.arange(4.0), rows)
    monkeypatch.setattr(type(spread), "is_fully_addressable", False)
    with pytest.raises(ValueError, match="'?w'? is spread over several hosts.*OrbaxCheckpoints"):
        Checkpoints(tmp_path).save({"w": spread}, 1)


def test_without_the_package_it_says_how_to_get_it(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "orbax", None)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxformers\[orbax\]'"):
        OrbaxCheckpoints(tmp_path)
