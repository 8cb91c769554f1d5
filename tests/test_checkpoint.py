"""Files of models and of trainings: what comes back, and what happens when they are damaged."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformers
from jaxformers import AdamW, Checkpoints, digest

ROOT = Path(jaxformers.__file__).parent.parent


class Pair(NamedTuple):
    left: jax.Array
    right: int


class ScaleByMoments(NamedTuple):
    """A state as optax has it: a NamedTuple of a count and of trees like the model."""

    count: jax.Array
    mu: Any
    nu: Any


class EmptyState(NamedTuple):
    """What optax keeps where there is nothing to keep."""


@pytest.fixture
def model(getkey):
    return jaxformers.TransformerLM(
        31, 12, 3, 2, 20, 17, 0.3, learnable_pos=True, tie_embeddings=True, key=getkey()
    )


@pytest.fixture
def training(model, getkey):
    """A state with every kind of leaf."""
    optimizer = AdamW(1e-3)
    moments = eqx.filter(model, eqx.is_inexact_array)
    theirs = ScaleByMoments(jnp.zeros((), jnp.int32), moments, moments), EmptyState()
    return {
        "model": jaxformers.cast_floating(model, jnp.bfloat16),
        "ours": optimizer.init(model),
        "theirs": theirs,
        "keys": jax.random.split(getkey(), 3),
        "other key": jax.random.key(5, impl="rbg"),
        "pair": Pair(jnp.arange(5, dtype=jnp.int8), 7),
        "numbers": [True, 3, -(2**70), 0.1, float("inf"), None],
        "numpy": (np.linspace(0, 1, 6).reshape(2, 3).T, np.float64(0.1), np.zeros((0, 4))),
        "weak": jnp.asarray(2.0),
        "function": jnp.tanh,
    }


def blank(tree):
    """Another tree of the same form."""

    def zero(x):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                jnp.zeros_like(jax.random.key_data(x)), impl=str(jax.random.key_impl(x))
            )
        return x if callable(x) else x * 0 if hasattr(x, "dtype") else type(x)(0)

    return jax.tree.map(zero, tree)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        assert getattr(x, "dtype", None) == getattr(y, "dtype", None)
        assert getattr(x, "weak_type", None) == getattr(y, "weak_type", None)
        assert hasattr(x, "dtype") or x == y
    assert digest(a) == digest(b)


def files(directory):
    return sorted(path.name for path in Path(directory).iterdir())


# The state of a training.


def test_a_state_comes_back_bit_for_bit(training, tmp_path):
    checkpoints = Checkpoints(tmp_path / "deep" / "run")
    checkpoints.save(training, 5)
    like = blank(training)
    assert digest(like) != digest(training)
    restored, step = checkpoints.restore(like)
    assert step == 5
    same(restored, training)
    restored["numpy"][0][:] = 1  # can be written to, as what was saved


def test_nothing_there_is_no_state(tmp_path):
    assert Checkpoints(tmp_path).restore({"w": jnp.zeros(3)}) is None


def test_arrays_go_to_where_those_of_the_skeleton_are(tmp_path):
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,))
    rows, second = jax.NamedSharding(mesh, jax.P("x")), jax.devices()[1]
    tree = {
        "rows": jax.device_put(jnp.arange(6.0), rows),
        "second": jax.device_put(jnp.arange(3), second),
        "anywhere": jnp.arange(4),
        "keys": jax.device_put(jax.random.split(jax.random.key(1), 2), rows),
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(tree, 1)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
    for like in (tree, shapes):
        restored, _ = checkpoints.restore(like)
        same(restored, tree)
        for name in tree:
            assert restored[name].sharding == tree[name].sharding
    assert not checkpoints.restore(tree)[0]["anywhere"].committed


def test_a_training_goes_on_as_if_it_had_not_stopped(model, tmp_path, getkey):
    """With donation, which must not reach the copy that is being written."""
    optimizer, keys = AdamW(1e-2), jax.random.split(getkey(), 6)
    tokens = jax.random.randint(getkey(), (6, 2, 9), 0, 31)

    def run(model, state, steps, checkpoints=None):
        losses = []
        for i in steps:
            model, state, loss = jaxformers.train_step(
                model,
                state,
                {"tokens": tokens[i, :, :-1], "targets": tokens[i, :, 1:]},
                optimizer=optimizer,
                loss=jaxformers.language_model_loss,
                key=keys[i],
            )[:3]
            losses.append(float(loss))
            if checkpoints is not None:
                checkpoints.save((model, state), i + 1)
        return model, state, losses

    def fresh():
        return jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, model)

    with_checkpoints = Checkpoints(tmp_path, keep=4)
    state = optimizer.init(model)
    whole = run(fresh(), optimizer.init(model), range(6), with_checkpoints)
    with_checkpoints.wait()
    (tmp_path / "step-000000006.safetensors").unlink()
    (tmp_path / "step-000000005.safetensors").unlink()
    (half, state), step = with_checkpoints.restore((fresh(), optimizer.init(model)))
    rest = run(half, state, range(step, 6))
    assert step == 4 and rest[2] == whole[2][4:]
    same(rest[:2], whole[:2])


def test_what_is_written_is_the_state_at_the_time_of_saving(tmp_path, monkeypatch):
    """The writer begins when the arrays are long donated and overwritten."""
    import threading

    begin = threading.Event()
    write = jaxformers.checkpoint.directory.write_object
    monkeypatch.setattr(
        "jaxformers.checkpoint.directory.write_object", lambda *x: (begin.wait(9), write(*x))
    )
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    tree = {"a": jnp.arange(2.0**15) + 1, "b": jnp.arange(7) + 1}
    numbers = np.arange(9.0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"tree": tree, "numbers": numbers}, 1)
    after = overwrite(tree)
    assert tree["a"].is_deleted() and checkpoints.steps() == []
    numbers[:] = 0
    begin.set()
    restored, _ = checkpoints.restore({"tree": after, "numbers": numbers})
    same(restored["tree"], {"a": jnp.arange(2.0**15) + 1, "b": jnp.arange(7) + 1})
    assert (restored["numbers"] == np.arange(9)).all()


def test_old_checkpoints_go_when_new_ones_are_safe(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=2)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-7.safetensors").write_text("mine too")
    for step in (3, 10, 200):
        checkpoints.save({"x": jnp.full(3, step)}, step)
    checkpoints.wait()
    assert checkpoints.steps() == [10, 200]
    monkeypatch.setattr(os, "fsync", lambda _: fail(errno.EIO))
    checkpoints.save({"x": jnp.full(3, 201)}, 201)
    with pytest.raises(OSError, match="step-000000201.*cannot be written"):
        checkpoints.wait()
    assert checkpoints.steps() == [10, 200]
    assert [x for x in files(tmp_path) if "10" not in x and "200" not in x] == [
        "lock",
        "notes.txt",
        "step-7.safetensors",
    ]


def fail(number):
    raise OSError(number, os.strerror(number))


def test_the_same_step_can_be_saved_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for value in (1, 2):
        checkpoints.save({"x": jnp.full(3, value)}, 4)
    assert checkpoints.restore({"x": jnp.zeros(3, int)})[0]["x"][0] == 2


def test_another_training_does_not_write_over_this_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save({"x": jnp.ones(3)}, 100)
    with pytest.raises(ValueError, match="later step 100"):
        checkpoints.save({"x": jnp.ones(3)}, 50)
    assert checkpoints.steps() == [100]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t | {"pair": Pair(jnp.zeros(6, jnp.int8), 7)}, r"pair.left: int8 \(5,\) there"),
        (lambda t: t | {"pair": Pair(jnp.zeros(5, jnp.int16), 7)}, r"int16 \(5,\) here"),
        (lambda t: t | {"weak": 2.0}, r"weak: float32 \(\) there, float here"),
        (lambda t: t | {"more": 1}, "more: nothing there, int here"),
        (lambda t: {k: v for k, v in t.items() if k != "weak"}, "nothing here"),
        (lambda t: t | {"other key": jax.random.key(5, impl="unsafe_rbg")}, "other key: key<rbg>"),
        (lambda t: t | {"ours": EmptyState()}, "more$"),
    ],
)
def test_a_state_of_another_training_is_told_apart(change, says, training, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(training, 1)
    with pytest.raises(ValueError, match="begun with other settings") as error:
        checkpoints.restore(change(training))
    assert error.match(says)


@pytest.mark.parametrize("kind", ["flip", "truncate", "empty", "longer", "zeros", "other step"])
def test_damage_is_noticed_and_the_one_before_is_taken(kind, tmp_path):
    """Wherever it is: each flipped bit and each length counts."""
    rng = np.random.default_rng(len(kind))
    tree = {"a": jnp.arange(40.0), "b": (jax.random.key(1), 3)}
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(tree | {"a": tree["a"] * step}, step)
    checkpoints.wait()
    path = tmp_path / "step-000000002.safetensors"
    whole = path.read_bytes()
    places = [0, 7, 8, 20, 40, 120, len(whole) - 1, *rng.integers(0, len(whole), 25)]
    for at in places if kind in ("flip", "truncate") else [0]:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.integers(8)
        broken = {
            "flip": bytes(flipped),
            "truncate": whole[:at],
            "empty": b"",
            "longer": whole + b"\0",
            "zeros": bytes(len(whole)),
            "other step": (tmp_path / "step-000000001.safetensors").read_bytes(),
        }
        path.write_bytes(broken[kind])
        with pytest.warns(UserWarning, match="skipped.*step-000000002"):
            restored, step = checkpoints.restore(tree)
        assert step == 1
        same(restored, tree)
    # The training goes on, whose next checkpoint takes the place of the broken one.
    checkpoints.save(tree, 2)
    assert checkpoints.restore(tree)[1] == 2


def test_broken_checkpoints_go_with_the_next_save(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 3):
        checkpoints.save({"x": jnp.ones(3)}, step)
    checkpoints.wait()
    (tmp_path / "step-000000003.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="empty"):
        checkpoints.restore({"x": jnp.ones(3)})
    checkpoints.save({"x": jnp.ones(3)}, 2)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]


def test_where_all_are_broken_nothing_begins_anew(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save({"x": jnp.ones(3)}, step)
    checkpoints.wait()
    for step in (1, 2):
        (tmp_path / f"step-00000000{step}.safetensors").write_bytes(b"x")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="1, 2, and all are damaged"):
        checkpoints.restore({"x": jnp.ones(3)})


def test_a_full_disk_is_told_at_the_next_call(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"x": jnp.ones(3)}, 1)
    checkpoints.wait()
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("jaxformers.files.safetensors_file._made", lambda _: fail(errno.ENOSPC))
        checkpoints.save({"x": jnp.ones(3)}, 2)
        with pytest.raises(OSError, match="No space left on device.*as it was") as error:
            checkpoints.wait()
        assert error.value.errno == errno.ENOSPC
        assert files(tmp_path) == before
        checkpoints.save({"x": jnp.ones(3)}, 2)
        checkpoints._thread.join()
    # There is room again: what is saved now must not be lost over what was not.
    with pytest.raises(OSError, match="step-000000002.*No space left"):
        checkpoints.save({"x": jnp.ones(3)}, 3)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]


def test_a_file_that_may_not_grow(tmp_path):
    """What the system says of a full disk, by a limit on the size of files."""

    program = f"""
import resource
import numpy as np
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
from jaxformers import Checkpoints, save
checkpoints = Checkpoints({str(tmp_path)!r})
checkpoints.save({{"x": np.ones(1000)}}, 1)
checkpoints.save({{"x": np.ones(10_000)}}, 2)
for call in (checkpoints.wait, lambda: save({str(tmp_path / "model")!r}, np.ones(10_000))):
    try:
        call()
    except OSError as error:
        print(error)
print(checkpoints.restore({{"x": np.ones(1000)}})[1])
"""
    out = run(program).splitlines()
    assert "File too large" in out[0] and "File too large" in out[1]
    assert out[2] == "1"
    assert files(tmp_path) == ["lock", "step-000000001.safetensors"]


def run(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_directory_that_cannot_be_written_to_is_told_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="checkpoints cannot be written to .*file.run"):
        Checkpoints(tmp_path / "file" / "run")
    monkeypatch.setattr(Path, "write_bytes", lambda *_: fail(errno.EROFS))
    with pytest.raises(OSError, match="Read-only file system. Pass a directory"):
        Checkpoints(tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"directory": ""}, {"directory": None}, {"every": 0}, {"keep": 0}, {"keep": True}]
)
def test_options_that_make_no_sense(wrong, tmp_path, no_shape_checker):
    with pytest.raises(ValueError, match="path|every|keep"):
        Checkpoints(**{"directory": tmp_path, **wrong})


@pytest.mark.parametrize("step", [-1, 1.0, True, None])
def test_steps_that_make_no_sense(step, tmp_path, no_shape_checker):
    with pytest.raises(ValueError, match="step must be a whole number"):
        Checkpoints(tmp_path).save({}, step)


OPENING = """
import sys
from jaxformers import Checkpoints
for line in sys.stdin:
    try:
        Checkpoints(line.strip())
        print("opened", flush=True)
    except OSError as error:
        print(error, flush=True)
"""


def test_one_process_has_a_directory(tmp_path):
    first = Checkpoints(tmp_path)
    command = [sys.executable, "-c", OPENING]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as other:

        def tries():
            other.stdin.write(f"{tmp_path}\n")
            other.stdin.flush()
            return other.stdout.readline()

        assert f"in use by another training (process {os.getpid()})" in tries()
        second = Checkpoints(tmp_path)  # as when a cell of a notebook is run again
        del first
        assert "in use" in tries()
        del second
        assert tries() == "opened\n"


def test_one_process_writes_one_at_a_time(tmp_path, monkeypatch):
    """However many objects it has for a directory."""
    import threading

    begun, go_on = [], threading.Event()
    write = jaxformers.checkpoint.directory.write_object

    def slow(path, x):
        begun.append(path)
        go_on.wait(9)
        write(path, x)

    monkeypatch.setattr("jaxformers.checkpoint.directory.write_object", slow)
    first, second = Checkpoints(tmp_path), Checkpoints(tmp_path)
    first.save({"x": np.ones(3)}, 1)
    second.save({"x": np.ones(3)}, 2)
    second._thread.join(0.1)
    assert len(begun) == 1
    go_on.set()
    first.wait(), second.wait()
    assert first.steps() == [1, 2]


SAVING = """
import sys, numpy as np
from jaxformers import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=2)
restored = checkpoints.restore({"x": np.zeros(200_000), "step": 0})
start = restored[1] if restored else 0
assert start == 0 or (restored[0]["x"] == start).all() and restored[0]["step"] == start
print(start, flush=True)
for step in range(start + 1, 10**9):
    checkpoints.save({"x": np.full(200_000, float(step)), "step": step}, step)
    if step > start + 3:
        print(step, flush=True)
"""


def test_killed_in_the_middle_of_a_save(tmp_path):
    """Several times, at random moments of a process that does nothing but save."""
    rng, last = np.random.default_rng(6), 0
    for _ in range(3):
        command = [sys.executable, "-W", "error", "-c", SAVING, str(tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            start = int(process.stdout.readline())
            assert start >= last
            last = int(process.stdout.readline()) - 2  # of which the save is certainly over
            time.sleep(rng.uniform(0, 0.03))
            process.send_signal(signal.SIGKILL)
    checkpoints = Checkpoints(tmp_path)
    restored, step = checkpoints.restore({"x": np.zeros(200_000), "step": 0})
    assert step >= last > 0 and (restored["x"] == step).all() and restored["step"] == step
    assert not [name for name in files(tmp_path) if name.endswith("tmp")]


def test_who_has_a_directory_may_clean_it_meanwhile(tmp_path, monkeypatch):
    """A second process tries whether it can write just when the first one removes such files."""
    write = Path.write_bytes

    def write_and_lose(path, data):
        write(path, data)
        path.unlink()

    monkeypatch.setattr(Path, "write_bytes", write_and_lose)
    assert Checkpoints(tmp_path).steps() == []


def test_leftovers_of_killed_processes_go_and_nothing_else(tmp_path):
    kept = ["mine.tmp", "step-000000001.safetensors.x.tmp", "step-1.safetensors.7.8.tmp"]
    for name in [*kept, "step-000000001.safetensors.7.8.tmp"]:
        (tmp_path / name).write_text("")
    Checkpoints(tmp_path)
    assert files(tmp_path) == sorted([*kept, "lock"])


# Digests.


def test_digest_sees_every_bit_dtype_shape_and_place(training):
    tree = {"a": jnp.arange(6.0), "b": np.arange(6, dtype=np.int32), "k": jax.random.key(3)}
    others = [
        tree | {"a": tree["a"].at[3].add(1e-6)},
        tree | {"a": tree["a"].reshape(2, 3)},
        tree | {"b": tree["b"].view(np.uint32)},
        tree | {"k": jax.random.key(4)},
        tree | {"c": jnp.zeros(0)},
        {"b": tree["a"], "a": tree["b"], "k": tree["k"]},
        tree | {"a": -tree["a"]},  # -0.0 at the first place
    ]
    digests = [digest(tree), *map(digest, others)]
    assert len(set(digests)) == len(digests)
    assert digest(tree | {"f": jnp.tanh, "n": 3}) == digest(tree)
    assert digest(tree | {"b": jnp.asarray(tree["b"])}) == digest(tree)
    assert digest(training) == digest(jax.tree.map(lambda x: x, training))
