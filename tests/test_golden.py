"""Files that earlier versions wrote: they load for ever, and give what they gave then.

A change that makes one of these tests fail makes the files of users unreadable. The file stays as
it is; the change needs a line in one of the tables of `jaxformers/checkpoint`, or another design.
"""

import json
import os
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import (
    END,
    GOLDEN,
    KNOWN,
    SAVED,
    SUMS,
    TRAININGS,
    flat,
    losses,
    outputs,
    plain_state,
    result,
    sha256,
    sums,
    train,
    unpack,
)

import jaxformers
from jaxformers import Checkpoints, OrbaxCheckpoints, digest, load

pytest.importorskip("safetensors")

OBJECTS = sorted(path.name.split(".")[0] for path in GOLDEN.glob("objects/*.gz"))
TOLERANCES = {"bfloat16": 2e-2, "float16": 2e-3, "accumulated-bfloat16": 2e-2}


def test_no_golden_file_was_changed():
    files = {
        p.relative_to(GOLDEN).as_posix(): p
        for p in GOLDEN.rglob("*")
        if p.suffix in (".gz", ".npz")
    }
    listed = sums()
    assert files.keys() == listed.keys(), f"{SUMS} must list each golden file"
    changed = [name for name, path in files.items() if sha256(path) != listed[name]]
    assert not changed, (
        f"the golden files {changed} are not those that an earlier version wrote: take them back, "
        "and mend what reads them"
    )
    assert sum(path.stat().st_size for path in files.values()) < 800_000


def stored(path) -> list[tuple[str, tuple, bytes]]:
    """Type, shape and bits of all tensors in a file, whatever their names."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return sorted(
        (x["dtype"], tuple(x["shape"]), data[8 + size :][slice(*x["data_offsets"])])
        for name, x in header.items()
        if name != "__metadata__"
    )


NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int64": "I64"}
NAMES |= {"uint32": "U32", "int8": "I8", "bool": "BOOL", "complex64": "C64", "float64": "F64"}


def held(x: Any) -> list[tuple[str, tuple, bytes]]:
    """The same of what an object holds, each array once."""
    arrays = {}
    for leaf in jax.tree.leaves(x):
        if isinstance(leaf, jax.Array | np.ndarray | np.generic):
            key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            array = np.asarray(jax.random.key_data(leaf) if key else leaf)
            arrays[id(leaf)] = NAMES[str(array.dtype)], array.shape, array.tobytes()
    return sorted(arrays.values())


def outputs_in_float16(path: Path, tmp_path: Path) -> dict[str, np.ndarray]:
    """The outputs as where they were saved: newer processors sum float16 in float16.

    The flag is read when the first device starts, so it needs a process of its own.
    """
    script = (
        "import sys, numpy, golden_cases as g, jaxformers; "
        "x = jaxformers.load(sys.argv[1], known=g.KNOWN); "
        "numpy.savez(sys.argv[2], **g.outputs('float16', x))"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    flags = f"{os.environ['XLA_FLAGS']} --xla_cpu_max_isa=AVX2"
    environment = {**os.environ, "PYTHONPATH": paths, "XLA_FLAGS": flags}
    file = tmp_path / "found.npz"
    subprocess.run([sys.executable, "-c", script, path, file], env=environment, check=True)
    with np.load(file) as found:
        return dict(found)


def near(found: dict[str, np.ndarray], expected: Any, tolerance: float, what: str) -> None:
    assert found.keys() >= set(expected.files), f"{what} gives {list(found)}"
    for name in expected.files:
        assert found[name].shape == expected[name].shape, (what, name)
        error = np.max(np.abs(found[name] - expected[name]), initial=0)
        assert error <= tolerance, f"{name} of {what} is {error} beside what it was when saved"


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_loads_and_gives_what_it_gave(name, tmp_path, no_native):
    """By the functions of JAX that ran when it was saved: in 16 bits another order rounds apart."""
    path = unpack(GOLDEN / "objects" / f"{name}.safetensors.gz", tmp_path)
    loaded = load(path, known=KNOWN)
    assert held(loaded) == stored(path), f"the arrays of {name} are not bit for bit those saved"
    with np.load(GOLDEN / "objects" / f"{name}.npz") as expected:
        half = name == "float16"
        found = outputs_in_float16(path, tmp_path) if half else outputs(name, loaded)
        near(found, expected, TOLERANCES.get(name, 2e-5), f"the golden {name}")


def test_what_a_checkpoint_from_elsewhere_says_stays_with_its_model(tmp_path):
    found = {
        name: load(unpack(GOLDEN / "objects" / f"hf-{name}.safetensors.gz", tmp_path)).origin
        for name in ("gpt2", "llama", "bart", "bert")
    }
    assert {json.loads(x.config)["model_type"] for x in found.values()} == found.keys()
    assert {x.directory for x in found.values()} == {"checkpoints/tiny"}
    special = found["gpt2"].special_tokens
    assert (special.end_token, special.pad_token) == ((2, 5), 0)
    assert special.bad_words == ((3,), (4, 6))
    special = found["bart"].special_tokens
    assert (special.start_token, special.forced_first_token, special.forced_last_token) == (2, 0, 2)


def test_what_is_no_array_comes_back(tmp_path):
    found = load(unpack(GOLDEN / "objects" / "numbers.safetensors.gz", tmp_path))
    expected = (True, -(2**70), 0.1, 1e-320, float("-inf"), None, "\u2603")
    assert repr(found["numbers"]) == repr(expected)
    assert found["nested"] == [[], (), {}, [(1,)], {3: {"a.b": 1}}, {(1, "x"): 2.0}]
    assert found["types"] == (np.dtype("int8"), jnp.dtype(jnp.bfloat16), jnp.bfloat16, jnp.float32)
    assert found["types"][2] is jnp.bfloat16 and found["shared"][0] is found["shared"][1]
    functions = load(unpack(GOLDEN / "objects" / "functions.safetensors.gz", tmp_path))
    assert functions["classes"][:2] == [jaxformers.TransformerLM, jaxformers.LayerNorm]
    assert functions["classes"][3] is eqx.nn.Linear
    assert functions["normal"] is jaxformers.normal


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_goes_on_as_it_would_have(name, tmp_path):
    if "optax" in name:
        pytest.importorskip("optax")
    (saved,) = (GOLDEN / "trainings" / name).glob("step-*.gz")
    unpack(saved, tmp_path)
    with pytest.raises(ValueError, match="earlier version.*fit with the same checkpoint=.*steps="):
        load(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it goes on
        training = train(name, END, Checkpoints(tmp_path))
    tolerance = TOLERANCES.get(name, 2e-5)
    found = result(name, training) | {"losses": losses(tmp_path)}
    with np.load(GOLDEN / "trainings" / name / "after.npz") as expected:
        near(found, expected, tolerance, f"the training {name}, gone on from step {SAVED},")
    # What it has saved since then says how its model is built.
    trained, averaged = load(tmp_path, averaged=False), load(tmp_path)
    assert jax.tree.structure(trained) == jax.tree.structure(training.model)
    assert digest(trained) == digest(training.model)
    optimizer = jaxformers.as_optimizer(TRAININGS[name]["optimizer"]())
    assert digest(averaged) == digest(optimizer.averaged(training.model, training.optimizer_state))
    assert (digest(averaged) != digest(trained)) == ("averaged" in name)


def test_a_training_saved_by_orbax_goes_on(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    with tarfile.open(GOLDEN / "trainings" / "orbax" / f"step-{SAVED:09}.tar.gz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    with pytest.raises(ValueError, match="earlier version.*fit with the same checkpoint="):
        load(tmp_path / "run")
    checkpoints = OrbaxCheckpoints(tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it goes on
        training = train("averaged", END, checkpoints, log=tmp_path)
    found = result("averaged", training) | {"losses": losses(tmp_path)}
    with np.load(GOLDEN / "trainings" / "averaged" / "after.npz") as expected:
        near(found, expected, 2e-5, f"the training that orbax saved, gone on from step {SAVED},")
    assert digest(load(tmp_path / "run", averaged=False)) == digest(training.model)


def blanked(x):
    """The same kind of leaf with other numbers."""
    if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key(0, impl="rbg")
    return x * 0 if hasattr(x, "dtype") else type(x)(0)


def test_a_state_of_ones_own_comes_back(tmp_path):
    (saved,) = (GOLDEN / "trainings" / "plain").glob("step-*.gz")
    unpack(saved, tmp_path)
    blank = jax.tree.map(blanked, plain_state())
    state, step = Checkpoints(tmp_path).restore(blank)
    assert step == SAVED and eqx.tree_equal(state, plain_state())
    assert state["weak"].weak_type and state["host"][2:] == [True, 2**70, 0.25]
    assert (flat(state["optimizer"]) == flat(plain_state()["optimizer"])).all()
