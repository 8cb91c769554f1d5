"""Checkpoints of every family: outputs as under transformers, and the same files back."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")
safetensors_torch = pytest.importorskip("safetensors.torch")

from hf_cases import CASES, REFUSED, SPECIAL, V  # noqa: E402
from hf_checkpoints import load, make  # noqa: E402

from jaxformers import TransformerLM, from_pretrained  # noqa: E402
from jaxformers.__main__ import main  # noqa: E402
from jaxformers.cli import compare as verification  # noqa: E402
from jaxformers.cli.compare import Row, table, verify  # noqa: E402

torch.set_num_threads(1)  # on arrays this small, more threads only wait for each other
pytestmark = pytest.mark.usefixtures("quick_compilation")
CASES_AND_SETTINGS = [(name, i) for name, case in CASES.items() for i in range(len(case.off))]


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


# One of each kind; docs/parity.md has them all.
SIXTEEN_BITS = ("gpt2", "llama_bfloat16", "gemma2", "t5", "bert_classify", "modernbert")


# The first of each class of transformers, and with --thorough all.
FIRST = {case.architecture: name for name, case in reversed(CASES.items())}.values()
EQUAL = [pytest.param(x, marks=() if x in FIRST else pytest.mark.thorough) for x in CASES]


@pytest.mark.parametrize("name", EQUAL)
def test_checkpoint_is_equal(name, made):
    new = not name.endswith(STORED_OTHERWISE)
    rows = verify(made(name), generate=new, sixteen_bits=name in SIXTEEN_BITS)
    assert len(rows) >= 5
    assert all(row.passed for row in rows), f"\n{table(rows)}"


# transformers 4 scales the logits of a tied one, and 5 does not: written out, it is not scaled.
WRITTEN_OUT = {"mt5": ("lm_head.weight", "shared.weight")}


@pytest.mark.parametrize("name", CASES)
def test_saved_file_is_equal(name, made, tmp_path):
    """The same names and the same bits, but for what only older files have."""
    from_pretrained(made(name)).save_pretrained(tmp_path)
    wanted, got = (read_tensors(directory) for directory in (made(name), tmp_path))
    for old, new in CASES[name].renames.items():
        got = {key.replace(old, new): x for key, x in got.items()}
    if name in WRITTEN_OUT:
        head, table = WRITTEN_OUT[name]
        assert torch.equal(got.pop(head), got[table])
    needless = set(CASES[name].added)
    assert wanted.keys() - needless <= got.keys() <= wanted.keys()
    for key, x in got.items():
        assert x.dtype == wanted[key].dtype and torch.equal(x, wanted[key]), key


@pytest.mark.parametrize("setting", REFUSED)
def test_unknown_settings_are_refused(setting, made):
    with pytest.raises(ValueError, match=setting):
        from_pretrained(made(setting))


def read_tensors(directory):
    with safetensors.safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


# That the checkpoints are worth comparing, which torch alone shows.


@pytest.mark.parametrize("name, i", CASES_AND_SETTINGS)
def test_settings_matter(name, i, made):
    with torch.no_grad():
        on = outputs(load(name, made(name)))
        off = outputs(load(name, made(name), **CASES[name].off[i]))
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


def test_verify_prints_a_table(made, capsys):
    assert main(["verify", str(made("bert_classify")), "--seed", "3", "--no-generation"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["difference", "allowed"]
    assert [line.split("  ")[0] for line in lines[1:4]] == [
        "hidden states, no padding",
        "pooled, no padding",
        "classes, no padding",
    ]
    assert not any("differs" in line for line in lines)


def test_verify_finds_a_difference(made, capsys, monkeypatch):
    """A gain that is off by a thousandth shows in every row but the tokens."""

    def almost(path, **options):
        model = from_pretrained(path, **options)
        return eqx.tree_at(lambda m: m.decoder.norm.gain, model, replace_fn=lambda x: x * 1.001)

    monkeypatch.setattr(verification, "from_pretrained", almost)
    assert main(["verify", str(made("gpt2")), "--no-16-bits"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines()[1:] if "tokens" not in line]
    assert len(lines) >= 5 and all(line.endswith("<- differs") for line in lines)
    assert not Row("anything", float("nan"), 1.0).passed


def worsened(monkeypatch, dtype, factor):
    """`verify` gets a model with other weights where it asks for one of this type."""

    def worse(path, **options):
        model = from_pretrained(path, **options)
        changed = options.get("dtype") == dtype
        return jax.tree.map(lambda x: factor * x, model) if changed else model

    monkeypatch.setattr(verification, "from_pretrained", worse)


@pytest.mark.parametrize(
    "name, dtype", [("gpt2", "bfloat16"), ("bert_classify_float16", "float16")]
)
def test_sixteen_bits_are_compared_with_float32(made, monkeypatch, tmp_path, name, dtype):
    """In those of the file, or bfloat16; ours may be as far from float32 as torch, and twice."""
    path = made(name.removesuffix("_float16"))
    if name.endswith("float16"):
        path = in_dtype(path, tmp_path, dtype)
    # All weights a sixteenth larger, which is 16 times the rounding of bfloat16's.
    for factor, passed in {1: True, 1.0625: False}.items():
        worsened(monkeypatch, jax.numpy.dtype(dtype), factor)
        rows = verify(path, generate=False)
        found = [row for row in rows if row.name.endswith(f", {dtype} by torch's")]
        assert len(found) >= 3 and all(row.passed == passed for row in found), table(rows)
        assert all(0.3 < row.difference < 2 <= row.allowed for row in found) or factor > 1
        # A classifier gives one result per row, which says less than one per token.
        classes = {row.allowed for row in found if "classes" in row.name}
        assert all(min(classes) > row.allowed for row in found if "hidden" in row.name)
        assert all(row.passed for row in rows if row not in found), table(rows)


def test_what_overflows_in_torch_too_is_no_fault(made, monkeypatch):
    """Where torch gives NaN with 16 bits, ours may give numbers; where ours does, it may not."""
    of_torch = verification._their_outputs

    def overflowing(theirs, layout, sample):
        outputs = of_torch(theirs, layout, sample)
        few = next(theirs.model.parameters()).element_size() == 2
        return {name: x * np.nan for name, x in outputs.items()} if few else outputs

    monkeypatch.setattr(verification, "_their_outputs", overflowing)
    rows = verify(made("gpt2"), generate=False)
    assert all(row.passed for row in rows), table(rows)
    worsened(monkeypatch, jax.numpy.bfloat16, np.nan)
    rows = verify(made("gpt2"), generate=False)
    assert sum(not row.passed for row in rows) == 3, table(rows)


def in_dtype(path, directory, dtype, but=()):
    """A copy of a checkpoint whose file has another dtype, and whose config.json says the old."""
    shutil.copytree(path, directory, dirs_exist_ok=True)
    tensors = {
        name: x if name in but else x.to(getattr(torch, dtype))
        for name, x in read_tensors(path).items()
    }
    safetensors_torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize(
    "name, dtype",
    [("gpt2", "bfloat16"), ("llama_bfloat16", "float32"), ("bert", "float16"), ("gpt2", "mixed")],
)
def test_the_file_has_another_dtype_than_config_says(made, tmp_path, name, dtype):
    """It is compared as it is: what is saved has the type of the file, the widest of several."""
    but = ("transformer.wte.weight",) if dtype == "mixed" else ()
    path = in_dtype(made(name), tmp_path, dtype.replace("mixed", "bfloat16"), but)
    stated = json.loads((path / "config.json").read_text())["dtype"]
    assert stated != dtype
    rows = verify(path, generate=False, sixteen_bits=False)
    assert all(row.passed for row in rows), f"\n{table(rows)}"


def test_saving_in_another_dtype_is_found(made, monkeypatch, tmp_path):
    """That only config.json of what is saved would say another dtype is a difference, too."""
    path = in_dtype(made("gpt2"), tmp_path, "bfloat16")
    save = TransformerLM.save_pretrained

    def misstated(model, directory):
        save(model, directory)
        config = Path(directory) / "config.json"
        config.write_text(config.read_text().replace('"bfloat16"', '"float32"'))

    monkeypatch.setattr(TransformerLM, "save_pretrained", misstated)
    rows = verify(path, generate=False, sixteen_bits=False)
    assert [row.name for row in rows if not row.passed] == ["tensors, saved"]


def test_the_allowance_grows_with_the_rounding_of_torch(made, monkeypatch, tmp_path):
    """Of logits this large float32 has few digits, as of those of a deep model."""
    shallow = verify(made("gpt2_untied"), generate=False, sixteen_bits=False)
    assert all(1e-5 <= row.allowed < 1e-4 for row in shallow[:3])
    shutil.copytree(made("gpt2_untied"), tmp_path, dirs_exist_ok=True)
    tensors = read_tensors(tmp_path)
    tensors["lm_head.weight"] *= 300
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    rows = verify(tmp_path, sixteen_bits=False)
    assert all(row.passed for row in rows), table(rows)
    outputs = [row for row in rows if "log-probs" in row.name]
    assert len(outputs) == 4 and all(row.allowed == outputs[0].allowed > 1e-3 for row in outputs)
    assert all(row.difference > 1e-4 for row in outputs[:3]), table(rows)
    # A mistake is larger than that.
    worsened(monkeypatch, jax.numpy.float32, 1.001)
    rows = verify(tmp_path, generate=False, sixteen_bits=False)
    assert not any(row.passed for row in rows[:3]), table(rows)


def test_products_have_all_bits(made, monkeypatch):
    """On GPUs and TPUs they have fewer if JAX is not told."""
    seen = []
    ours, generate = verification._our_outputs, TransformerLM.generate

    def spy(function):
        def run(*args, **options):
            seen.append(jax.config.jax_default_matmul_precision)
            return function(*args, **options)

        return run

    monkeypatch.setattr(verification, "_our_outputs", spy(ours))
    monkeypatch.setattr(TransformerLM, "generate", spy(generate))
    before = jax.config.jax_default_matmul_precision
    verify(made("gpt2"), sixteen_bits=False)
    assert seen == ["highest"] * 4
    assert jax.config.jax_default_matmul_precision == before


def test_verify_says_what_is_missing(made, capsys, monkeypatch, tmp_path):
    assert main(["verify", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["verify", str(made("gpt2"))]) == 1
    assert "pip install 'jaxformers[hf,parity]'" in capsys.readouterr().err


def test_command_line_help():
    command = [sys.executable, "-W", "error", "-m", "jaxformers", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "verify" in run.stdout
