"""Checkpoints of every family: outputs as under transformers, and the same files back."""

import subprocess
import sys

import equinox as eqx
import jax
import pytest

torch = pytest.importorskip("torch", reason="transformers runs on PyTorch")
transformers = pytest.importorskip("transformers", reason="what checkpoints are compared with")
safetensors = pytest.importorskip("safetensors", reason="the files that checkpoints come in")

from hf_cases import CASES, REFUSED, SPECIAL, V  # noqa: E402
from hf_checkpoints import load, make  # noqa: E402

from jaxformers import from_pretrained  # noqa: E402
from jaxformers.__main__ import main  # noqa: E402
from jaxformers.hf import verify as verification  # noqa: E402
from jaxformers.hf.verify import Row, table, verify  # noqa: E402

torch.set_num_threads(1)  # on arrays this small, more threads only wait for each other
CASES_AND_SETTINGS = [(name, i) for name, case in CASES.items() for i in range(len(case.off))]


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Programs that run once on tiny arrays are not worth optimising."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A function that gives the directory of a case's checkpoint, which is made once."""
    made = {}

    def directory(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make(name, made[name])
        return made[name]

    return directory


# What is stored in another way only generates nothing else; docs/parity.md generates with all.
STORED_OTHERWISE = (
    "_tied",
    "_shared",
    "_untied",
    "_unscaled",
    "_bare",
    "_without_prefix",
    "_older_file",
)


@pytest.mark.parametrize("name", CASES)
def test_checkpoint_is_equal(name, checkpoint):
    rows = verify(checkpoint(name), generate=not name.endswith(STORED_OTHERWISE))
    assert len(rows) >= 5
    assert all(row.passed for row in rows), f"\n{table(rows)}"


# What is loaded as a whole model is saved as one, though the file was of a model without a head.
BARE = {"gpt2_bare": "transformer.", "bart_bare": "model."}


@pytest.mark.parametrize("name", CASES)
def test_saved_file_is_equal(name, checkpoint, tmp_path):
    """The same names and the same bits, but for what only older files have."""
    from_pretrained(checkpoint(name)).save_pretrained(tmp_path)
    wanted, got = (read_tensors(directory) for directory in (checkpoint(name), tmp_path))
    for old, new in CASES[name].renames.items():
        got = {key.replace(old, new): x for key, x in got.items()}
    if name in BARE:
        got.pop("final_logits_bias", None)
        got = {key.removeprefix(BARE[name]): x for key, x in got.items()}
    needless = set(CASES[name].added)
    assert wanted.keys() - needless <= got.keys() <= wanted.keys()
    for key, x in got.items():
        assert x.dtype == wanted[key].dtype and torch.equal(x, wanted[key]), key


@pytest.mark.parametrize("setting", REFUSED)
def test_unknown_settings_are_refused(setting, checkpoint):
    with pytest.raises(ValueError, match=setting):
        from_pretrained(checkpoint(setting))


def read_tensors(directory):
    with safetensors.safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


# That the checkpoints are worth comparing, which torch alone shows.


@pytest.mark.parametrize("name, i", CASES_AND_SETTINGS)
def test_settings_matter(name, i, checkpoint):
    with torch.no_grad():
        on = outputs(load(name, checkpoint(name)))
        off = outputs(load(name, checkpoint(name), **CASES[name].off[i]))
    assert (on - off).abs().max() > 0.1


def outputs(model):
    unspecial = sorted(set(range(50)) - set(SPECIAL.values()))
    tokens = torch.tensor(unspecial)[torch.randperm(44, generator=torch.manual_seed(0))][:33]
    inputs = {"input_ids": tokens.reshape(3, 11)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(0)[:, :9]
    first = model(**inputs)[0]
    return first.log_softmax(-1) if first.shape[-1] == V else first


def test_checkpoints_are_reproducible(tmp_path):
    for directory, seed in {"a": 0, "b": 0, "c": 1}.items():
        make("gemma2", tmp_path / directory, seed)
    a, b, c = (read_tensors(tmp_path / directory) for directory in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)
    assert not any(((x == 0) | (x == 1)).any() for x in a.values())


# The command line.


def test_verify_prints_a_table(checkpoint, capsys):
    assert main(["verify", str(checkpoint("bert_classify")), "--seed", "3", "--no-generation"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["difference", "allowed"]
    assert [line.split("  ")[0] for line in lines[1:4]] == [
        "hidden states, no padding",
        "pooled, no padding",
        "classes, no padding",
    ]
    assert not any("differs" in line for line in lines)


def test_verify_finds_a_difference(checkpoint, capsys, monkeypatch):
    """A gain that is off by a thousandth shows in every row but the tokens."""

    def almost(path, **options):
        model = from_pretrained(path, **options)
        return eqx.tree_at(lambda m: m.decoder.norm.gain, model, replace_fn=lambda x: x * 1.001)

    monkeypatch.setattr(verification, "from_pretrained", almost)
    assert main(["verify", str(checkpoint("gpt2"))]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines()[1:] if "tokens" not in line]
    assert len(lines) >= 5 and all(line.endswith("<- differs") for line in lines)
    assert not Row("anything", float("nan"), 1.0).passed


def test_verify_says_what_is_missing(checkpoint, capsys, monkeypatch, tmp_path):
    assert main(["verify", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["verify", str(checkpoint("gpt2"))]) == 1
    assert "pip install 'jaxformers[hf,parity]'" in capsys.readouterr().err


def test_command_line_help():
    command = [sys.executable, "-W", "error", "-m", "jaxformers", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "verify" in run.stdout
