"""benchmarks/beside_llama_cpp.py is tried with a tiny model; llama.cpp too, where it is found."""

import importlib
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxformers as jf

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
save_file = pytest.importorskip("safetensors.numpy").save_file

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
D, F = 32, 64
TEXT = "To be, or not to be, that is the question.\n\nWhether 'tis nobler in the mind.\n\n"


@pytest.fixture
def beside(monkeypatch, tmp_path):
    """The script with few tokens, whose contenders are in the process of the test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("beside_llama_cpp")
    sizes = {"PROMPT": 8, "NEW": 4, "TEXT": 60, "WINDOW": 30, "LOGITS": 7}
    for name, size in sizes.items():
        monkeypatch.setattr(module, name, size)
    monkeypatch.setitem(module.CONFIGS["prefill 512"], "prompt", 20)
    monkeypatch.setattr(module.contest, "Child", SameProcess)
    monkeypatch.setattr(module.contest.time, "sleep", lambda seconds: None)
    (tmp_path / "text.txt").write_text(TEXT)
    write_decoder(tmp_path / "model.gguf")
    write_encoder(tmp_path / "sentences")
    return module


class SameProcess:
    """A contender in the process of the test."""

    def __init__(self, script, name, config, environment):
        make = sys.modules["beside_llama_cpp"].CONTENDERS[name]
        self.name, self.step_and_check = name, make(json.loads(json.dumps(config)))

    def ask(self, question):
        step, check = self.step_and_check
        if question == "check":
            return [float(x) for x in check()]
        return sys.modules["contest"].turn(step, int(question)) | {"build_seconds": 0.0}

    def close(self):
        pass


def write_decoder(path):
    """Writes a model of one layer, with a token for each byte."""
    rng = np.random.default_rng(0)
    vocabulary = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<|end|>", *vocabulary, "to"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, *[1] * (len(vocabulary) - 1)])
    writer.add_token_merges(["t o"])
    writer.add_eos_token_id(0)
    shapes = {"token_embd": (len(vocabulary), D), "blk.0.ffn_down": (D, F)}
    shapes |= dict.fromkeys(("blk.0.ffn_gate", "blk.0.ffn_up"), (F, D))
    shapes |= {f"blk.0.attn_{x}": (D, D) for x in ("q", "k", "v", "output")}
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(D, np.float32))
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        blocks = gguf.quantize(0.3 * rng.standard_normal(shape, np.float32), kind)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_encoder(directory):
    """Writes a BERT of one layer with a vocabulary of letters."""
    directory.mkdir()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = list("abcdefghijklmnopqrstuvwxyz,.'")
    vocabulary = [*special, *letters, *(f"##{x}" for x in letters), "be", "##er"]
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.add_special_tokens(special)
    backend.save(str(directory / "tokenizer.json"))
    config = {"model_type": "bert", "vocab_size": len(vocabulary), "hidden_size": D}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": F}
    config |= {"max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12}
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(1)
    tensors = {}
    for name, rows in {"word": len(vocabulary), "position": 512, "token_type": 2}.items():
        tensors[f"embeddings.{name}_embeddings.weight"] = rng.standard_normal((rows, D))
    layer = "encoder.layer.0."
    linear = {f"{layer}attention.self.{x}": (D, D) for x in ("query", "key", "value")}
    linear |= {f"{layer}attention.output.dense": (D, D)}
    linear |= {f"{layer}intermediate.dense": (F, D), f"{layer}output.dense": (D, F)}
    for name, shape in linear.items():
        tensors[f"{name}.weight"] = 0.3 * rng.standard_normal(shape)
        tensors[f"{name}.bias"] = 0.3 * rng.standard_normal(shape[0])
    for name in ("embeddings.", f"{layer}attention.output.", f"{layer}output."):
        tensors[f"{name}LayerNorm.weight"] = 1 + 0.3 * rng.standard_normal(D)
        tensors[f"{name}LayerNorm.bias"] = 0.3 * rng.standard_normal(D)
    arrays = {name: x.astype(np.float32) for name, x in tensors.items()}
    save_file(arrays, directory / "model.safetensors", metadata={"format": "pt"})


def run(beside, monkeypatch, directory, *arguments):
    files = [str(directory / "model.gguf"), str(directory / "text.txt")]
    options = ["--rounds", "1", "--allocator", "kept", "--files", str(directory / "files")]
    options += ["--embedder", str(directory / "sentences"), "--json", str(directory / "x.json")]
    monkeypatch.setattr(sys, "argv", ["beside_llama_cpp.py", *files, *arguments, *options])
    beside.main()
    return json.loads((directory / "x.json").read_text())["results"]


def test_the_script_runs_with_small_sizes(beside, monkeypatch, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(2 * TEXT)
    theirs = [x for x in ("llama.cpp F32", "llama.cpp BF16, flash") if x in beside.CONTENDERS]
    wanted = {
        "decoding": ["ours float32", "ours int8", "floor", *theirs],
        "prefill 512": ["ours float32", *theirs],
        "embeddings": ["ours float32", *theirs],
    }
    told = {}
    for name, contenders in wanted.items():
        results = run(beside, monkeypatch, tmp_path, name, "--contenders", *contenders)
        assert list(results) == [f"{name}/kept"]
        rows = results[f"{name}/kept"]
        assert list(rows) == contenders  # a time, of a difference, may be negative here
        told[name] = [row["agreement"] for row in rows.values()]
    assert told["decoding"][0].endswith("the same tokens") and told["decoding"][2] == ""
    assert told["embeddings"][0] == "least cosine 1.00000"
    printed = capsys.readouterr().out
    assert printed.count("takes") == 3 * len(theirs[:1])


def test_the_files_have_the_same_weights(beside, tmp_path):
    files = beside.written(beside.recast, tmp_path / "model.gguf", tmp_path / "model")
    assert list(files) == ["F32", "BF16", "F16", "Q8_0"]
    tensors = {kind: gguf.GGUFReader(path).tensors for kind, path in files.items()}
    for kind, found in tensors.items():
        types = {len(x.shape): x.tensor_type.name for x in found}
        assert types == {1: "F32", 2: kind}
        for x, y in zip(found, tensors["F32"], strict=True):
            unpacked = gguf.dequantize(x.data, x.tensor_type)
            np.testing.assert_allclose(unpacked, y.data, atol=0.01, err_msg=x.name)
    assert beside.numbers_read(files["F32"]) == sum(x.n_elements for x in tensors["F32"])
    model, again = (jf.from_pretrained(x) for x in (tmp_path / "model.gguf", files["F32"]))
    tokens = jnp.arange(1, 9)[None]
    assert (model.logits(tokens) == again.logits(tokens)).all()


def test_the_encoder_file_is_the_encoder(beside, tmp_path):
    path = tmp_path / "encoder.gguf"
    beside.encoder_file(tmp_path / "sentences", path, "F32")
    texts = ["to be, or not to be", "nobler"]
    vectors = [
        jf.TextEmbedder(jf.from_pretrained(x), jf.load_tokenizer(x))(texts)
        for x in (tmp_path / "sentences", path)
    ]
    np.testing.assert_array_equal(*vectors)


@pytest.mark.parametrize(
    "what, numbers, told",
    [
        ("decoding", [40.5, 1, 2, 3], "+1.25%"),
        ("decoding", [40.02, 1, 9, 3], "tokens part at 2"),
        ("prefill", [40.0, 1, 2, 3.5], "differ by at most 0.500"),
        ("embeddings", [1.0, 1.0, 1.0, 0.999], "0.99900"),
    ],
)
def test_numbers_are_compared(beside, what, numbers, told):
    first = [1.0] * 4 if what == "embeddings" else [40.0, 1, 2, 3]
    config = {"what": what}
    assert told in beside.compare(config, "llama.cpp Q8_0, flash", numbers, first)
    assert beside.compare(config, "floor", [], first) == ""
    if "part" not in told:
        for name in ("llama.cpp F32, flash", "ours float32"):
            with pytest.raises(ValueError, match=r"is allowed"):
                beside.compare(config, name, numbers, first)
    with pytest.raises(ValueError, match="nan"):
        beside.compare(config, "llama.cpp Q8_0", [float("nan")] * 4, first)


def test_perplexity_is_that_of_windows_read_alone(beside):
    class Next:
        """A model to which the token after the last is as probable as the six others together."""

        def logits(self, tokens):
            logits = np.zeros((len(tokens), 7), np.float32)
            logits[np.arange(len(tokens)), (np.array(tokens) + 1) % 7] = np.log(6)
            read.append(len(tokens))
            return logits

    read = []
    tokens = np.arange(61) % 7
    assert abs(beside.perplexity(Next(), tokens) - 2) < 1e-6 and read == [30, 30]
    assert abs(beside.perplexity(Next(), tokens[::-1]) - 12) < 1e-6


def test_a_short_text_is_refused(beside, monkeypatch, tmp_path):
    (tmp_path / "text.txt").write_text("short")
    with pytest.raises(SystemExit, match="more than 60 tokens, got 5"):
        run(beside, monkeypatch, tmp_path)
