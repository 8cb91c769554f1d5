"""Measures decoding beside other libraries, on one machine in one run.

    python benchmarks/decode.py ["124M, batch 1" ...] [--contenders ours floor ...] [--json FILE]

A step continues prompts of 64 tokens by 128 tokens, greedily, and includes the pass over the
prompt. All contenders have the same weights and must give the same tokens. `floor` only reads the
bytes of the weights once per new token, as fast as this machine does. So its column "ours / it"
compares ours with the limit that memory sets. Where JAX finds a GPU, there are larger models in 16
bits. There `floor` copies, and the logits after the prompt must agree instead of the tokens, since
in 16 bits rounding decides between near ties. Contenders whose packages are not installed are left
out.
"""

import sys
from functools import partial

import contest
import numpy as np

PROMPT, NEW = 64, 128
GPT = dict(vocab=50304, d_model=768, layers=12, heads=12)
SMALL = dict(vocab=65, d_model=384, layers=6, heads=6)
XL = dict(vocab=50304, d_model=1600, layers=48, heads=25)
LLAMA = dict(vocab=32000, d_model=4096, layers=32, heads=32, d_ff=11008)
CONFIGS = {
    "124M, batch 1": GPT | {"batch": 1},
    "10M, batch 1": SMALL | {"batch": 1},
    "10M, batch 8": SMALL | {"batch": 8},
}
ON_GPU = {
    f"{name} in bfloat16, batch {batch}": shape | {"batch": batch, "dtype": "bfloat16"}
    for name, shape in {"124M": GPT, "1.5B": XL, "Llama 2 7B": LLAMA}.items()
    for batch in (1, 8, 64)
}


def weights(config: dict) -> dict[str, np.ndarray]:
    """Returns the stacked arrays by name, of GPT-2's shape or, with a `d_ff`, of Llama's."""
    noise = np.random.default_rng(0).standard_normal(2**22 + 1, np.float32)
    v, d, n = config["vocab"], config["d_model"], config["layers"]
    f = config.get("d_ff", 4 * d)
    shapes = {"tokens": (v, d), "qkv": (n, d, 3 * d), "out": (n, d, d)}
    shapes |= {"up": (n, d, f), "down": (n, f, d)}
    llama = {"gate": (n, d, f), "head": (d, v)}
    shapes |= llama if "d_ff" in config else {"positions": (PROMPT + NEW, d)}
    # Positions of this size make successive tokens differ.
    scales = {"positions": np.float32(1.0)}
    # An odd count of numbers is repeated, because drawing seven billion takes minutes.
    return {
        name: np.resize(np.roll(noise, 1000 * i), shape) * scales.get(name, np.float32(0.02))
        for i, (name, shape) in enumerate(shapes.items())
    }


def prompts(config: dict) -> np.ndarray:
    shape = config["batch"], PROMPT
    return np.random.default_rng(1).integers(0, config["vocab"], shape, np.int32)


def numbers(config: dict, tokens, logits):
    """Returns the numbers that must agree: new tokens, or in 16 bits logits after the prompt."""
    if "dtype" in config:
        return lambda: np.asarray(logits(), np.float32)[:, :: config["vocab"] // 8].ravel()
    return lambda: np.asarray(tokens())[:, PROMPT:].ravel()


def room(config: dict) -> int:
    """Returns how many positions the models have."""
    return PROMPT + config.get("new", NEW)


def our_architecture(config):
    """Returns a model of ours with random weights; within `jax.eval_shape` it takes no memory."""
    import jax

    import jaxformers as jf

    d, llama = config["d_model"], "d_ff" in config
    pieces = {
        "learnable_pos": True,
        "tie_embeddings": True,
        "feed_forward": partial(jf.FeedForward, activation=jf.activations.gelu_tanh),
    }
    if llama:
        pieces = {
            "position": jf.RotaryPositionalEncoding(),
            "norm": partial(jf.RMSNorm, eps=1e-5),
            "feed_forward": jf.GatedFeedForward,
            "use_bias": False,
        }

    sizes = config["vocab"], d, config["heads"], config["layers"], config.get("d_ff", 4 * d)
    sizes = *sizes, room(config), 0.0
    return jf.TransformerLM(*sizes, embedding_scale=1.0, key=jax.random.key(0), **pieces)


def our_model(config):
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    w, n = weights(config), config["layers"]
    llama, dtype = "d_ff" in config, config.get("dtype", "float32")

    def places(m):
        found = [m.embedding.token_embedding.weight]
        found.append(m.output.w if llama else m.embedding.position.weight)
        for layer in m.decoder.layers:
            a, f = layer.self_attention, layer.feed_forward
            found += [a.wq, a.wk, a.wv, a.wo]
            found += [f.w_gate, f.w_up, f.w_down] if llama else [f.w_in, f.w_out]
        return found

    def fill(path, x):
        """Returns gains and biases in place of their shapes."""
        given = isinstance(x, jax.Array)
        return x if given else jnp.full(x.shape, path[-1].name == "gain", dtype)

    values = [w["tokens"], w["head" if llama else "positions"]]
    for i in range(n):
        values += [*np.split(w["qkv"][i], 3, axis=1), w["out"][i]]
        values += [w[name][i] for name in ("gate", "up", "down") if name in w]
    model = eqx.filter_eval_shape(partial(our_architecture, config))
    shapes = [x.shape for x in places(model)]
    values = [jnp.asarray(x.reshape(s), dtype) for x, s in zip(values, shapes, strict=True)]
    return jax.tree_util.tree_map_with_path(fill, eqx.tree_at(places, model, values))


def ours(config):
    import jax

    model, prompt = our_model(config), prompts(config)
    logits = jax.jit(lambda tokens: model.logits(tokens)[:, -1])

    def step():
        return model.generate(prompt, NEW).block_until_ready()

    return step, numbers(config, step, lambda: logits(prompt))


def floor(config):
    """Measures the time to read the weights; its numbers to compare are ours."""
    _, check = ours(config)
    w = weights(config)
    # A token reads one row of a table that is not the output layer as well.
    unread = ("tokens", "positions") if "head" in w else ("positions",)
    size = sum(x.size for name, x in w.items() if name not in unread)
    read = reading(size, config.get("dtype", "float32"))

    def step():
        for _ in range(NEW):
            y = read()
        y.block_until_ready()

    return step, check


def reading(size, dtype="float32"):
    """Returns a function that reads so many numbers, as fast as this machine does."""
    import jax
    import jax.numpy as jnp

    x, width = jnp.zeros(size, dtype), 8192
    if jax.default_backend() == "cpu":  # a product of matrices reads with all cores
        x = x[: size // width * width].reshape(-1, width)
        return partial(jax.jit(lambda x: x @ x[0]), x)
    # The same number of bytes, one half read and one half written.
    return partial(jax.jit(lambda x: x + 1), x[: size // 2])


def torch_setting(config):
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device), getattr(torch, config.get("dtype", "float32"))


def hugging_face_model(config):
    """Returns a model of transformers with random weights."""
    import transformers

    device, dtype = torch_setting(config)
    v, d, n, heads = (config[name] for name in ("vocab", "d_model", "layers", "heads"))
    positions = {"max_position_embeddings": room(config)}
    with device:
        if "d_ff" in config:
            sizes = dict(vocab_size=v, hidden_size=d, num_hidden_layers=n, rms_norm_eps=1e-5)
            sizes |= dict(num_attention_heads=heads, intermediate_size=config["d_ff"])
            shape = transformers.LlamaConfig(**sizes, **positions)
        else:
            sizes = dict(vocab_size=v, n_embd=d, n_layer=n, n_head=heads)
            shape = transformers.GPT2Config(**sizes, **positions)
        return transformers.AutoModelForCausalLM.from_config(shape, dtype=dtype).eval()


def hugging_face(config, **options):
    """Runs `generate` of transformers with its default cache."""
    import torch
    import transformers

    w, n, (device, _) = weights(config), config["layers"], torch_setting(config)
    model = hugging_face_model(config)
    arrays = llama_names(w, n) if "d_ff" in config else gpt_names(w, n)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, array in arrays.items():
            parameters[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))
    prompt = torch.from_numpy(prompts(config)).long().to(device)
    settings = transformers.GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )

    @torch.inference_mode()
    def step():
        # A transfer waits for the device.
        return model.generate(prompt, settings, attention_mask=torch.ones_like(prompt)).cpu()

    def logits():
        with torch.inference_mode():
            return model(prompt).logits[:, -1].float().cpu()

    return step, numbers(config, step, logits)


def gpt_names(w, n):
    """Returns the arrays by Hugging Face's names for GPT-2, which has them as (in, out)."""
    named = {"transformer.wte.weight": w["tokens"], "transformer.wpe.weight": w["positions"]}
    places = {"qkv": "attn.c_attn", "out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    for name, place in places.items():
        named |= {f"transformer.h.{i}.{place}.weight": w[name][i] for i in range(n)}
    return named


def llama_names(w, n):
    """Returns the arrays by Hugging Face's names for Llama, which has them as (out, in)."""
    named = {"model.embed_tokens.weight": w["tokens"], "lm_head.weight": w["head"].T}
    places = {"out": "self_attn.o_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    for name, place in (places | {"gate": "mlp.gate_proj"}).items():
        named |= {f"model.layers.{i}.{place}.weight": w[name][i].T for i in range(n)}
    for i in range(n):
        for part, array in zip("qkv", np.split(w["qkv"][i].T, 3), strict=True):
            named[f"model.layers.{i}.self_attn.{part}_proj.weight"] = array
    return named


def torch_loop(config):
    """Runs a model and a loop written by hand in torch, with a cache of fixed size."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    w, (device, dtype) = weights(config), torch_setting(config)
    d, heads, b, llama = config["d_model"], config["heads"], config["batch"], "d_ff" in config
    f = config.get("d_ff", 4 * d)
    norm = partial(nn.RMSNorm, d, eps=1e-5) if llama else partial(nn.LayerNorm, d)
    line = partial(nn.Linear, bias=not llama)
    frequency = 10000.0 ** -(torch.arange(0, d // heads, 2, device=device) / (d // heads))
    angles = torch.outer(torch.arange(PROMPT + NEW, device=device), frequency)
    cos, sin = (x(angles).repeat(1, 2).to(dtype) for x in (torch.cos, torch.sin))

    def rotate(x, start):
        low, high = x.chunk(2, dim=-1)
        here = slice(start, start + x.shape[2])
        return x * cos[here] + torch.cat((-high, low), dim=-1) * sin[here]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_1, self.norm_2 = norm(), norm()
            self.qkv, self.out = line(d, 3 * d), line(d, d)
            self.up, self.down = line(d, f), line(f, d)
            self.gate = line(d, f) if llama else None
            cache = torch.zeros(2, b, heads, PROMPT + NEW, d // heads)
            self.register_buffer("cache", cache)

        def forward(self, x, start):
            b, t, _ = x.shape
            qkv = self.qkv(self.norm_1(x)).view(b, t, 3, heads, d // heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            if llama:
                q, k = rotate(q, start), rotate(k, start)
            self.cache[0, :, :, start : start + t], self.cache[1, :, :, start : start + t] = k, v
            k, v = self.cache[:, :, :, : start + t]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=t > 1)
            x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
            y = self.norm_2(x)
            if llama:
                return x + self.down(F.silu(self.gate(y)) * self.up(y))
            return x + self.down(F.gelu(self.up(y), approximate="tanh"))

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(config["vocab"], d)
            self.positions = None if llama else nn.Embedding(PROMPT + NEW, d)
            self.blocks = nn.ModuleList(Block() for _ in range(config["layers"]))
            self.norm = norm()
            self.head = nn.Linear(d, config["vocab"], bias=False)
            self.head.weight = self.head.weight if llama else self.tokens.weight

        def forward(self, tokens, start):
            """Returns the logits after the last of `tokens`, which begin at position `start`."""
            x = self.tokens(tokens)
            if not llama:
                x = x + self.positions.weight[start : start + tokens.shape[1]]
            for block in self.blocks:
                x = block(x, start)
            return self.head(self.norm(x[:, -1]))

    with device:
        model = Decoder().to(dtype)
    with torch.no_grad():
        model.tokens.weight.copy_(torch.from_numpy(w["tokens"]))
        if llama:
            model.head.weight.copy_(torch.from_numpy(w["head"].T))
        else:
            model.positions.weight.copy_(torch.from_numpy(w["positions"]))
        for i, block in enumerate(model.blocks):
            for name in {"qkv", "out", "up", "down", "gate"} & {*w}:
                layer = getattr(block, name)
                layer.weight.copy_(torch.from_numpy(w[name][i].T))
                if not llama:
                    layer.bias.zero_()
    prompt = torch.from_numpy(prompts(config)).long().to(device)

    @torch.inference_mode()
    def step():
        tokens = torch.empty(b, PROMPT + NEW, dtype=torch.long, device=device)
        tokens[:, :PROMPT] = prompt
        start = 0
        for end in range(PROMPT, PROMPT + NEW):
            tokens[:, end] = model(tokens[:, start:end], start).argmax(-1)
            start = end
        return tokens.cpu()

    def logits():
        with torch.inference_mode():
            return model(prompt, 0).float().cpu()

    return step, numbers(config, step, logits)


CONTENDERS = {"ours": ours, "floor": floor}
if contest.installed("torch"):
    CONTENDERS["torch loop"] = torch_loop
if contest.installed("torch", "transformers"):
    CONTENDERS["Hugging Face"] = hugging_face


if __name__ == "__main__":
    is_child = "--child" in sys.argv
    if not is_child and contest.found_gpu():
        CONFIGS |= ON_GPU
    if "Hugging Face" in CONTENDERS and (is_child or CONFIGS.keys() >= ON_GPU.keys()):
        # On a GPU transformers compiles the model for such a cache.
        static = partial(hugging_face, cache_implementation="static")
        CONTENDERS["Hugging Face static"] = static
    contest.main(__doc__, CONTENDERS, CONFIGS, tolerance=0.05)
