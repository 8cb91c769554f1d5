"""Measures a GGUF file beside llama.cpp: decoding, reading a prompt, and vectors of texts.

    python benchmarks/beside_llama_cpp.py MODEL.gguf TEXT [decoding "prefill 512" ...]
        [--embedder DIRECTORY] [--files DIRECTORY] [--contenders "ours int8" ...] [--json FILE]

`pip install llama-cpp-python` brings llama.cpp; without it, ours are measured alone. All contenders
have the weights of MODEL, whose blocks are unpacked and written in the other types to --files,
where later runs find them. A row of "decoding" is the time of one new token at batch 1: the time of
129 tokens less that of one, by 128, after a prompt of 64. "prefill" is the time to the first token
after a prompt. "embeddings" are vectors of 64 paragraphs of TEXT, tokenized in that time; the
encoder is a BERT of sentence-transformers, and --embedder names its directory.

Before anything is timed, perplexities of 2,000 tokens of TEXT in windows of 500, logits and vectors
must agree with ours in float32; the remarks say how far they do, and where greedy tokens part.
"floor" reads as many bytes as the float32 weights have. llama.cpp has a thread per core, and is
tried without and with its flash attention; its cache is in float16, as it is unless asked.
"""

import atexit
import itertools
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import contest
import numpy as np
from decode import reading
from gguf_types import encoder_file, recast

PROMPT, NEW, TEXT, WINDOW, TEXTS = 64, 128, 2000, 500, 64
LOGITS = 500  # one in so many is compared
FLASH = ", flash"
# What we call a type, and the types of llama.cpp's that it is compared with.
KINDS = {
    "float32": ("F32",),
    "bfloat16": ("BF16", "F16"),
    "int8": ("Q8_0",),
    "as it is": ("as it is",),
}
TYPES = [kind for kinds in KINDS.values() for kind in kinds if kind != "as it is"]
# The largest difference from ours in float32: of the perplexity, relative; of logits; and of the
# cosine of two vectors from 1.
EXACT, ROUNDED = (1e-3, 0.05, 1e-4), (2e-2, 2.0, 5e-3)


class Ours:
    """A model of ours, from a GGUF file."""

    def __init__(self, config, kind):
        import jaxformers as jf

        options = {"bfloat16": {"dtype": "bfloat16"}, "as it is": {"quantized": True}}
        self.model = jf.from_pretrained(config["model"], **options.get(kind, {"dtype": "float32"}))
        if kind == "int8":
            self.model = jf.quantize(self.model, bits=8)

    def generate(self, prompt, new):
        """Returns the new tokens, the most probable ones."""
        return np.asarray(self.model.generate(np.array([prompt]), new, end_token=[]))[0, -new:]

    def logits(self, tokens):
        """Returns the logits after each token."""
        import jax.numpy as jnp

        return np.asarray(self.model.logits(jnp.array([tokens])), np.float32)[0]


class LlamaCpp:
    """A model of llama.cpp, from a GGUF file."""

    def __init__(self, config, kind, flash):
        path = config["files"].get(kind, config["model"])
        self.open = partial(llama, path, flash_attn=flash)
        longest = config.get("prompt", PROMPT) + NEW
        self.model = self.open(n_ctx=-(-longest // 512) * 512, n_batch=2048)

    def generate(self, prompt, new):
        self.model.reset()
        self.model.eval(prompt)
        tokens = [int(self.last_logits().argmax())]
        while len(tokens) < new:
            self.model.eval(tokens[-1:])
            tokens.append(int(self.last_logits().argmax()))
        return np.array(tokens)

    def last_logits(self):
        import llama_cpp

        logits = llama_cpp.llama_get_logits_ith(self.model.ctx, -1)
        return np.ctypeslib.as_array(logits, shape=(self.model.n_vocab(),))

    def logits(self, tokens):
        size = len(tokens)
        model = self.open(n_ctx=size, n_batch=size, logits_all=True)
        model.eval(tokens)
        return model.scores[:size]


def llama(path, **options):
    import llama_cpp

    cores = os.cpu_count()
    return llama_cpp.Llama(path, n_threads=cores, n_threads_batch=cores, verbose=False, **options)


def decoding(config, make, kind, **options):
    """Measures the time of a new token."""
    model, tokens = make(config, kind, **options), config["tokens"]
    prompt = tokens[:PROMPT]

    def step():
        times = [time.perf_counter()]
        for new in (1, 1 + NEW):
            model.generate(prompt, new)
            times.append(time.perf_counter())
        first, all_of_them = np.diff(times)
        return float(all_of_them - first) / NEW

    return step, lambda: [perplexity(model, tokens), *model.generate(prompt, 1 + NEW)]


def perplexity(model, tokens):
    """Returns the perplexity of a text, of which each window is read alone."""
    losses = []
    for begin in range(0, len(tokens) - 1, WINDOW):
        targets = tokens[begin + 1 : begin + 1 + WINDOW]
        logits = model.logits(tokens[begin : begin + len(targets)]).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        right = logits[np.arange(len(targets)), targets]
        losses.append(np.log(np.exp(logits).sum(-1)) - right)
    return np.exp(np.concatenate(losses).mean())


def prefill(config, make, kind, **options):
    """Measures the time to the first token after a prompt."""
    model, prompt = make(config, kind, **options), config["tokens"][: config["prompt"]]
    return partial(model.generate, prompt, 1), lambda: model.logits(prompt)[-1, ::LOGITS]


def our_embedder(config, kind):
    import jaxformers as jf

    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    embedder = jf.TextEmbedder.from_pretrained(config["embedder"], dtype=dtype)
    if kind == "int8":
        embedder.model = jf.quantize(embedder.model, bits=8)
    return partial(embedder, normalize=True)


def their_embedder(config, kind, flash):
    model = llama(config["encoders"][kind], embedding=True, flash_attn=flash)
    return partial(model.embed, normalize=True)


def embeddings(config, make, kind, **options):
    """Measures the time of the vectors of some texts."""
    embed = make(config, kind, **options)
    return partial(embed, config["texts"]), lambda: np.ravel(embed(config["texts"][:4]))


def floor(config):
    """Measures the time to read the float32 weights."""
    read = reading(config["numbers"])

    def step():
        start = time.perf_counter()
        for _ in range(NEW):
            y = read()
        y.block_until_ready()
        return (time.perf_counter() - start) / NEW

    return step, list


def contender(config, ours, kind, **options):
    measure = {"decoding": decoding, "prefill": prefill, "embeddings": embeddings}[config["what"]]
    models, embedders = (Ours, our_embedder), (LlamaCpp, their_embedder)
    make = (models if ours else embedders)[config["what"] == "embeddings"]
    return measure(config, make, kind, **options)


CONTENDERS = {f"ours {kind}": partial(contender, ours=True, kind=kind) for kind in KINDS} | {
    "floor": floor
}
if contest.installed("llama_cpp"):
    CONTENDERS |= {
        f"llama.cpp {kind}{FLASH if flash else ''}": partial(
            contender, ours=False, kind=kind, flash=flash
        )
        for kinds in KINDS.values()
        for kind in kinds
        for flash in (False, True)
    }
AS_THEY_ARE = tuple(name for name in CONTENDERS if "as it is" in name)
CONFIGS = {
    "decoding": {"what": "decoding"},
    "prefill 512": {"what": "prefill", "prompt": 512, "without": ("floor",)},
    "prefill 1500": {"what": "prefill", "prompt": 1500, "without": ("floor",)},
    "embeddings": {"what": "embeddings", "without": ("floor", *AS_THEY_ARE)},
}


def compare(config, name, numbers, first):
    """Returns how far numbers are from ours in float32, and refuses those that are too far."""
    if not (numbers and first):  # of the floor
        return ""
    exact = name.removesuffix(FLASH).endswith("32")
    for_perplexity, for_logits, for_vectors = EXACT if exact else ROUNDED
    numbers, first = np.array(numbers), np.array(first)
    if config["what"] == "decoding":
        difference, allowed = numbers[0] / first[0] - 1, for_perplexity
        equal = numbers[1:] == first[1:]
        part = "the same tokens" if equal.all() else f"tokens part at {equal.argmin() + 1}"
        told = f"perplexity {numbers[0]:.3f} ({difference:+.2%}), {part}"
    elif config["what"] == "prefill":
        difference, allowed = np.abs(numbers - first).max(), for_logits
        told = f"logits differ by at most {difference:.3f}"
    else:
        vectors, of_first = (x.reshape(4, -1) for x in (numbers, first))
        difference, allowed = 1 - (vectors * of_first).sum(-1).min(), for_vectors
        told = f"least cosine {1 - difference:.5f}"
    if not abs(difference) <= allowed:  # NaN is too far
        raise ValueError(f"{told}, and {allowed:g} is allowed.")
    return told


def prepare(options):
    """Returns the files of all types and the tokens of the text; makes those that are missing."""
    import jaxformers as jf

    if options.embedder is None and "embeddings" in options.configs:
        print("embeddings are left out, since no --embedder names a directory.")
        options.configs.remove("embeddings")
    folder = options.files or Path(tempfile.mkdtemp())
    if options.files is None:
        atexit.register(shutil.rmtree, folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = options.text.read_text()
    tokens = jf.load_tokenizer(options.model).encode(text[: 8 * TEXT], add_special_tokens=False)
    tokens = np.asarray(tokens[0])[: TEXT + 1].tolist()
    if len(tokens) <= TEXT:
        raise SystemExit(f"the text must have more than {TEXT} tokens, got {len(tokens)}.")
    files = written(recast, options.model, folder / options.model.stem)
    given = {"model": str(options.model), "files": files, "tokens": tokens}
    given["numbers"] = numbers_read(files["F32"])
    if options.embedder is not None:
        given["embedder"] = str(options.embedder)
        given["encoders"] = written(encoder_file, options.embedder, folder / "encoder")
        given["texts"] = [x[:500] for x in text.split("\n\n") if x.strip()][:TEXTS]
    return given


def written(write, source, target):
    """Returns the files of a model by type, and writes those that are not there."""
    files = {kind: target.with_name(f"{target.name}.{kind}.gguf") for kind in TYPES}
    for kind, path in files.items():
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            write(source, unfinished, kind)
            unfinished.rename(path)
    return {kind: str(path) for kind, path in files.items()}


def numbers_read(path):
    """Returns how many weights are read for a token."""
    import gguf

    counts = {x.name: int(x.n_elements) for x in gguf.GGUFReader(path).tensors}
    table_alone = "output.weight" in counts  # of which a token reads a row
    return sum(counts.values()) - table_alone * counts["token_embd.weight"]


def arguments(parser):
    parser.add_argument("model", type=Path, help="a GGUF file of a decoder")
    parser.add_argument("text", type=Path, help="a file of at least 2,000 tokens")
    parser.add_argument("--embedder", type=Path, help="a directory of sentence-transformers")
    parser.add_argument("--files", type=Path, help="where the GGUF files of other types are kept")


def pairs(results):
    """Yields what ours take of the time of llama.cpp with the same type."""
    for (kind, theirs), flash in itertools.product(KINDS.items(), ("", FLASH)):
        for other in theirs:
            mine, its = results.get(f"ours {kind}"), results.get(f"llama.cpp {other}{flash}")
            if mine and its:
                ratio = mine["seconds"] / its["seconds"]
                yield f"ours {kind} takes {ratio:.2f} of llama.cpp {other}{flash}"


def main():
    found = contest.main(
        __doc__, CONTENDERS, CONFIGS, compare=compare, arguments=arguments, prepare=prepare
    )
    for name, results in found.items():
        print(f"\n{name}", *pairs(results), sep="\n  ")


if __name__ == "__main__":
    main()
