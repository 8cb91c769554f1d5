"""Fine-tuning: examples of every form, what counts in them, and a run that resumes."""

import json
import shutil
import signal

import equinox as eqx
import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytest.importorskip("jinja2")

import jaxformers.finetuning as finetuning  # noqa: E402
from jaxformers import Tokenizer, from_pretrained, load_adapter, load_tokenizer  # noqa: E402
from jaxformers.__main__ import main  # noqa: E402
from jaxformers.data import PackedDocuments, read_examples  # noqa: E402
from jaxformers.files.hub import TensorFiles  # noqa: E402
from jaxformers.finetuning import FineTuning, finetune  # noqa: E402
from jaxformers.tokenizers.training import save_new, train_bpe  # noqa: E402
from jaxformers.training.log import read_metrics  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_shape_checker", "quick_compilation")
torch.set_num_threads(1)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Thoughts of earlier answers are left out, and an answer is opened with a thought.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('/')[-1] }}<|im_end|>{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
SAY = {"red": "the color of blood", "blue": "the color of the sky", "green": "the color of grass"}


def message(role, content):
    return {"role": role, "content": content}


def lines(count):
    """Chats about three colors."""
    names = list(SAY)
    for i in range(count):
        name = names[i % 3]
        yield {"messages": [message("user", f"{i} {name}"), message("assistant", SAY[name])]}


def write(path, records):
    path.write_text("".join(f"{json.dumps(x)}\n" for x in records))
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small Llama with a byte-level tokenizer and a chat template."""
    directory = tmp_path_factory.mktemp("checkpoint")
    texts = [f"{name} {text} user assistant" for name, text in SAY.items()] * 5
    specials = {"eos_token": "<|im_end|>"}
    tokenizer = train_bpe(texts, 330, special_tokens=specials, others=["<|im_start|>", "<think>"])
    save_new(tokenizer, directory / "tokenizer")
    for path in (directory / "tokenizer").iterdir():
        shutil.copy(path, directory)
    shutil.rmtree(directory / "tokenizer")
    (directory / "chat_template.jinja").write_text(CHATML)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        eos_token_id=tokenizer.end_token,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def with_template(checkpoint, template):
    files = {path.name: path.read_bytes() for path in checkpoint.glob("tokenizer*")}
    more = {} if template is None else {"chat_template.jinja": template.encode()}
    return Tokenizer(files | more)


def learned(tokenizer, text):
    ids, counts = text
    return tokenizer.decode(ids[counts], skip_special_tokens=False)


# Examples.


def test_what_counts_in_examples_of_every_form(checkpoint, tmp_path):
    tokenizer = load_tokenizer(checkpoint)
    talk = [message("user", "red"), message("assistant", "blood"), message("user", "blue")]
    records = [
        {"messages": [*talk, message("assistant", "sky")], "id": 7},
        {"prompt": "green is", "completion": " grass"},
        {"instruction": "Name it.", "input": "blue", "output": "sky"},
        {"text": "the sky"},
    ]
    texts = read_examples(write(tmp_path / "x.jsonl", records), tokenizer)
    end = "<|im_end|>"
    whole = [tokenizer.decode(ids, skip_special_tokens=False) for ids, _ in texts]
    assert [learned(tokenizer, x) for x in texts] == [
        f"blood{end}sky{end}",
        f" grass{end}",
        f"sky{end}",
        f"the sky{end}",
    ]
    assert whole[1] == f"green is grass{end}"
    assert whole[2].startswith("<|im_start|>user\nName it.\n\nblue<|im_end|>\n")
    plain = with_template(checkpoint, None)
    [text] = read_examples(write(tmp_path / "y.jsonl", records[2:3]), plain)
    assert plain.decode(text[0], skip_special_tokens=False) == f"Name it.\n\nblue\n\nsky{end}"
    (tmp_path / "z.txt").write_text("red\nblue\n")
    [text] = read_examples(tmp_path / "z.txt", tokenizer)
    assert learned(tokenizer, text) == f"red\nblue\n{end}"


def test_a_space_before_an_answer_is_a_part_of_it(checkpoint, tmp_path):
    """Byte-level tokens begin with the space before them, here one that the template writes."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = with_template(checkpoint, template)
    record = {"messages": [message("user", "red"), message("assistant", "the color of blood")]}
    [text] = read_examples(write(tmp_path / "x.jsonl", [record]), tokenizer)
    assert learned(tokenizer, text).strip() == "the color of blood<|im_end|>"


def test_a_template_that_rewrites_answers(checkpoint, tmp_path):
    """Each answer is a text of its own then, in which it is the last and written in full."""
    tokenizer = with_template(checkpoint, THINKING)
    talk = [message("user", "red"), message("assistant", "hm/blood"), message("user", "blue")]
    record = {"messages": [*talk, message("assistant", "oh/sky")]}
    texts = read_examples(write(tmp_path / "x.jsonl", [record]), tokenizer)
    assert [learned(tokenizer, x) for x in texts] == ["hm/blood<|im_end|>", "oh/sky<|im_end|>"]
    whole = tokenizer.decode(texts[1][0], skip_special_tokens=False)
    assert "assistant\nblood<|im_end|>" in whole and "hm/" not in whole
    backwards = "{% for m in messages | reverse %}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(ValueError, match="line 1 of .*nobody can tell where the answer begins"):
        read_examples(tmp_path / "x.jsonl", with_template(checkpoint, backwards))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"text": "a"}\n{"text": 3}', "line 2 of .*text must be a text, got 3"),
        ('{"text": "a"}\n\n[1]', "line 3 of .*must be a JSON object"),
        ("{", "line 1 of .*no JSON"),
        ('{"prompt": "a"}', "line 1 of .*must have messages; prompt and completion.*'prompt'"),
        ('{"prompt": "a", "completion": 1}', "completion must be a text"),
        ('{"messages": "hi"}', "messages must be a list of objects"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', 'line 1 .*role "assistant"'),
        ('{"messages": [], "text": "a"}', "line 1 of .*messages must be a list"),
        ('{"text": ""}', "line 1 of .*nothing to learn"),
        ('{"prompt": "\\ud83d", "completion": "x"}', "line 1 .*half of a character"),
        ('{"messages": [{"role": "assistant", "content": "hi"}]}', "must not begin with an answer"),
        ('{"messages": [{"content": "hi"}]}', "message 0 must have a role"),
        ('{"messages": [{"role": "user", "content": [{"text": "a"}]}]}', "0 must be a text, got"),
        ("\n", "no line with an example"),
        ("", "is empty"),
    ],
)
def test_examples_that_cannot_be_read(text, words, checkpoint, tmp_path):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        read_examples(tmp_path / "x.jsonl", load_tokenizer(checkpoint))


def test_a_completion_gets_no_space_of_its_own(checkpoint, tmp_path):
    """The whole text is encoded at once: a tokenizer may put a space before each text."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(
        models.WordLevel({"\u2581=": 0, "\u25814": 1, "4": 2, "</s>": 3, "?": 4}, "?")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    files = {"tokenizer.json": backend.to_str().encode()}
    tokenizer = Tokenizer(files | {"tokenizer_config.json": b'{"eos_token": "</s>"}'})
    path = write(tmp_path / "x.jsonl", [{"prompt": "=", "completion": " 4"}])
    [(ids, counts)] = read_examples(path, tokenizer)
    assert ids.tolist() == [0, 1, 3] and counts.tolist() == [False, True, True]
    with pytest.raises(ValueError, match="no plain text"):
        read_examples(write(tmp_path / "x.json", [{"text": "="}]), tokenizer)


def test_what_needs_a_template_or_an_end(checkpoint, tmp_path):
    path = write(tmp_path / "x.jsonl", lines(1))
    with pytest.raises(ValueError, match="line 1 of .*no chat template"):
        read_examples(path, with_template(checkpoint, None))
    tokenizer = Tokenizer({"tokenizer.json": (checkpoint / "tokenizer.json").read_bytes()})
    path = write(tmp_path / "y.jsonl", [{"text": "red"}])
    with pytest.raises(ValueError, match="line 1 of .*no end token"):
        read_examples(path, tokenizer)


def test_packed_texts_count_as_they_say():
    rng = np.random.default_rng(0)
    ids = [rng.integers(100 * i, 100 * i + 100, n) for i, n in enumerate(rng.integers(2, 30, 40))]
    counts = [rng.random(len(x)) < 0.4 for x in ids]
    source = PackedDocuments(ids, 10, 4, counts=counts)
    expected = sorted(
        x[i] for x, c in zip(ids, counts, strict=True) for i in range(1, len(x)) if c[i]
    )
    for batches in (source.in_order(), (source[i] for i in range(-(-source.order.count // 4)))):
        found = [batch["targets"][batch["loss_mask"]] for batch in batches]
        rows = np.sort(np.concatenate(found)).tolist()
        assert rows[: len(expected)] == expected or set(rows) >= set(expected)
    for batch in source.in_order():
        assert (batch["segment_ids"][batch["loss_mask"]] > 0).all()
        parts = zip(batch["segment_ids"], batch["loss_mask"], strict=True)
        assert all(set(s[s > 0]) == set(s[m]) for s, m in parts)
    with pytest.raises(ValueError, match="counts must have a row of booleans for each"):
        PackedDocuments(ids, 10, 4, counts=counts[:-1])
    with pytest.raises(ValueError, match="that counts"):
        PackedDocuments([[1, 2, 3]], 10, 4, counts=[np.array([True, False, False])])


# The run.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "chats.jsonl", lines(60))


def settings_of(checkpoint, data, out, **more):
    usual = {"rank": 4, "steps": 12, "batch_size": 4, "length": 64, "eval_every": 4}
    usual |= {"save_every": 3, "learning_rate": 0.02}
    return FineTuning(str(checkpoint), data, str(out), **usual | more)


@pytest.fixture(scope="module")
def run(checkpoint, data, tmp_path_factory):
    """A run with an adapter, and its directory as it was when step 8 was made."""
    out = tmp_path_factory.mktemp("run") / "out"
    killed = out.with_name("killed")

    def copy(report):
        if report.step == 8:
            shutil.copytree(out, killed, ignore=shutil.ignore_patterns("*.tmp"))

    jax.config.update("jax_disable_most_optimizations", True)
    result = calling_back(copy, settings_of(checkpoint, data, out, merged=True))
    return result, out, killed


def calling_back(callback, settings):
    with pytest.MonkeyPatch.context() as patch:
        fit = finetuning.fit
        patch.setattr(finetuning, "fit", lambda *x, **k: fit(*x, **k, callbacks=[callback]))
        return finetune(settings, progress=False)


def assert_same_tensors(first, second):
    first, second = TensorFiles(first), TensorFiles(second)
    assert first.names == second.names
    for name in first.names:
        np.testing.assert_array_equal(first.read(name), second.read(name), err_msg=name)


def test_an_adapter_learns_and_is_written(run, checkpoint):
    result, out, _ = run
    assert result.done and len(result.summary) == 3
    assert result.written == (str(out / "adapter"), str(out / "merged"))
    known = json.loads((out / "finetune.json").read_text())
    rows = read_metrics(out)
    held = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert len(held) == 3 and held[-1] < 0.95 * known["before"]
    assert result.summary[0] == f"held-out loss: {known['before']:.4f} before, {held[-1]:.4f} after"
    assert f"{sum(row['tokens'] for row in rows if 'tokens' in row):,} tokens" in result.summary[1]
    tokens = np.array([[5, 9, 30, 12, 25]])
    adapted = load_adapter(from_pretrained(checkpoint), out / "adapter")
    np.testing.assert_allclose(
        adapted.logits(tokens), result.model.logits(tokens), atol=1e-5, rtol=1e-5
    )


def test_the_merged_model_answers_in_transformers(run):
    result, out, _ = run
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "merged")
    chat = [message("user", "5 blue")]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="np")
    ids = np.asarray(ids["input_ids"] if hasattr(ids, "keys") else ids)
    with torch.no_grad():
        logits = theirs(torch.tensor(ids)).logits.numpy()
        answer = theirs.generate(torch.tensor(ids), max_new_tokens=6, do_sample=False)
    np.testing.assert_allclose(result.model.logits(ids), logits, atol=1e-4, rtol=1e-4)
    mine = np.asarray(result.model.generate(ids, 6))
    np.testing.assert_array_equal(mine[0, : answer.shape[1]], answer.numpy()[0])


def test_a_killed_run_ends_with_the_same_bits(run, checkpoint, data):
    result, out, killed = run
    assert not (killed / "adapter").exists()
    again = finetune(settings_of(checkpoint, data, killed, merged=True), progress=False)
    equal = jax.tree.map(
        lambda x, y: bool((x == y).all()) if eqx.is_array(x) else True, again.model, result.model
    )
    assert all(jax.tree.leaves(equal))
    adapters = [(x / "adapter/adapter_model.safetensors").read_bytes() for x in (out, killed)]
    assert adapters[0] == adapters[1]
    assert again.summary[0] == result.summary[0]


def test_ctrl_c_stops_and_the_same_command_goes_on(checkpoint, data, tmp_path, capsys):
    settings = settings_of(checkpoint, data, tmp_path, steps=6, rank=None, learning_rate=1e-3)

    def stop(report):
        if report.step == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.warns(UserWarning, match="SIGINT: stopped after step"):
        stopped = calling_back(stop, settings)
    assert not stopped.done and not stopped.written
    with pytest.raises(ValueError, match=r"other settings: .*seed 0 \(now 2\)"):
        finetune(settings_of(checkpoint, data, tmp_path, steps=6, rank=None, seed=2))
    options = "--steps 6 --batch-size 4 --length 64 --eval-every 4 --save-every 3"
    options += " --learning-rate 1e-3"
    command = ["finetune", str(checkpoint), data, "--out", str(tmp_path), *options.split()]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "held-out loss: " in said and f"written: {tmp_path / 'model'}" in said
    assert "peak memory" in said
    model = from_pretrained(tmp_path / "model")
    first = from_pretrained(checkpoint)
    assert not np.array_equal(model.output.w, first.output.w)
    assert (tmp_path / "model/chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1"),
        ({"batch_size": 0}, "batch_size must be an integer"),
        ({"alpha": -1.0}, "alpha must be a finite number above 0"),
        ({"eval_share": 1.0}, "eval_share must be a number in"),
        ({"seed": -1}, "seed must be an integer"),
        ({"dtype": np.float32}, "dtype must be a text"),
        ({"epochs": 2}, "steps and epochs contradict each other"),
        ({"eval_data": "x", "eval_share": 0.1}, "eval_data and eval_share contradict"),
        ({"rank": None, "merged": True}, "merged is for an adapter"),
        ({"rank": None, "quantized": True}, "quantized is for an adapter"),
    ],
)
def test_settings_that_do_not_fit(more, words, checkpoint, data, tmp_path):
    with pytest.raises(ValueError, match=words):
        settings_of(checkpoint, data, tmp_path, **more)


def test_a_model_that_is_no_decoder(made, checkpoint, data, tmp_path, capsys):
    shutil.copytree(made("bert"), tmp_path / "bert")
    for path in checkpoint.glob("*token*"):
        shutil.copy(path, tmp_path / "bert")
    (tmp_path / "bert/chat_template.jinja").write_text(CHATML)
    assert main(["finetune", str(tmp_path / "bert"), data, "--out", str(tmp_path / "out")]) == 1
    assert "finetune is for decoders" in capsys.readouterr().err


def test_epochs_are_how_often_each_example_comes(checkpoint, data, tmp_path, monkeypatch):
    def steps_of(model, optimizer, batches, steps, **_):
        raise KeyError(steps * 64 / batches.order.count)

    monkeypatch.setattr(finetuning, "fit", steps_of)
    more = {"steps": None, "epochs": 20, "batch_size": 64, "eval_share": 0.0}
    with pytest.raises(KeyError) as found:
        finetune(settings_of(checkpoint, data, tmp_path / "out", **more))
    assert 20 <= found.value.args[0] < 25


def test_what_is_held_out(checkpoint, tmp_path):
    tokenizer = load_tokenizer(checkpoint)

    def split(records, **more):
        path = write(tmp_path / "x.jsonl", records)
        settings = settings_of(checkpoint, path, tmp_path, **more)
        train, held = finetuning.split(settings, tokenizer)
        return [[tokenizer.decode(ids) for ids, _ in part] for part in (train, held)]

    train, held = split(lines(60))
    assert len(held) == 3 and not set(train) & set(held) and len({*train, *held}) == 60
    assert split(lines(60)) == [train, held]
    assert split(lines(60), seed=1)[1] != held
    assert [len(x) for x in split(lines(2))] == [1, 1]
    assert [len(x) for x in split(lines(1))] == [1, 0]
    assert [len(x) for x in split(lines(60), eval_share=0.0)] == [60, 0]
    [whole], [end] = split([{"text": "red blue green " * 40}])
    assert len(end) < 0.1 * len(whole)
    other = write(tmp_path / "y.jsonl", [{"text": "red"}])
    train, held = split(lines(5), eval_data=other)
    assert len(train) == 5 and held == ["red"]
