"""The modules against PyTorch's and transformers' own: values and gradients to 1e-5."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import (
    ALiBi,
    AttentionMask,
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    FeedForward,
    GatedFeedForward,
    LayerNorm,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEncoding,
    Transformer,
    padding_to_positions,
    positional_encoding,
    scaled_dot_product_attention,
)

torch = pytest.importorskip("torch")
nn = torch.nn
torch.set_num_threads(1)  # threads beside the test processes only get in their way

B, T, S, N, D, F, LAYERS = 3, 5, 7, 2, 8, 13, 2
SEEDS = (0, 1, 2)
ACTIVATIONS = {"relu": jax.nn.relu, "gelu": partial(jax.nn.gelu, approximate=False)}
assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


# Weights: one mapping from torch's layout to ours, which reads values and gradients alike.


def randomize(module, rng):
    """All parameters drawn anew, those too that torch initializes to 0 and 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.tensor(rng.normal(0.1, scale, parameter.shape)))
    return module.eval()


def tensor(array):
    return torch.tensor(np.asarray(array))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def value(parameter):
    return parameter.detach().numpy()


def gradient(parameter):
    return parameter.grad.numpy()


def port(ours, theirs, read):
    """`ours` with each array replaced by what `read` gives for torch's parameter."""
    arrays = PORTS[type(ours)](ours, theirs, read)
    fields = [name for name, array in arrays.items() if array is not None]
    return eqx.tree_at(
        lambda module: [getattr(module, name) for name in fields],
        ours,
        [arrays[name] for name in fields],
    )


def port_norm(ours, theirs, read):
    bias = getattr(theirs, "bias", None)
    return {"gain": read(theirs.weight), **({} if bias is None else {"b": read(bias)})}


def port_attention(ours, theirs, read):
    d, n, h = ours.wq.shape
    wq, wk, wv = (w.T.reshape(d, n, h) for w in np.split(read(theirs.in_proj_weight), 3))
    weights = {"wq": wq, "wk": wk, "wv": wv, "wo": read(theirs.out_proj.weight).T.reshape(n, h, d)}
    if theirs.in_proj_bias is None:
        return weights
    bq, bk, bv = (b.reshape(n, h) for b in np.split(read(theirs.in_proj_bias), 3))
    return weights | {"bq": bq, "bk": bk, "bv": bv, "bo": read(theirs.out_proj.bias)}


def port_layer(ours, theirs, read):
    first, second = theirs.linear1, theirs.linear2
    feed_forward = {"w_in": read(first.weight).T, "w_out": read(second.weight).T}
    if first.bias is not None:
        feed_forward |= {"b_in": read(first.bias), "b_out": read(second.bias)}
    feed_forward = eqx.tree_at(
        lambda module: [getattr(module, name) for name in feed_forward],
        ours.feed_forward,
        list(feed_forward.values()),
    )
    if isinstance(ours, EncoderLayer):
        parts = {"self_attention": "self_attn", "feed_forward": None}
    else:
        parts = {
            "self_attention": "self_attn",
            "cross_attention": "multihead_attn",
            "feed_forward": None,
        }
    arrays = {"feed_forward": feed_forward}
    for i, (name, torch_name) in enumerate(parts.items(), start=1):
        if torch_name is not None:
            arrays[name] = port(getattr(ours, name), getattr(theirs, torch_name), read)
        residual = getattr(ours, f"{name}_residual")
        norm = port(residual.norm, getattr(theirs, f"norm{i}"), read)
        arrays[f"{name}_residual"] = eqx.tree_at(lambda r: r.norm, residual, norm)
    return arrays


def port_stack(ours, theirs, read):
    layers = zip(ours.layers, theirs.layers, strict=True)
    return {
        "layers": tuple(port(layer, torch_layer, read) for layer, torch_layer in layers),
        "norm": None if theirs.norm is None else port(ours.norm, theirs.norm, read),
    }


PORTS = {
    LayerNorm: port_norm,
    RMSNorm: port_norm,
    MultiHeadAttention: port_attention,
    EncoderLayer: port_layer,
    DecoderLayer: port_layer,
    Encoder: port_stack,
    Decoder: port_stack,
}


def without_weights(constructor, *sizes, **options):
    """A module whose arrays are shapes only, since torch's take their place."""
    key = jax.random.key(0)
    return eqx.filter_eval_shape(partial(constructor, *sizes, **options), key=key)


# Comparison: the same cotangent goes back through both.


def check_parity(ours, theirs, our_call, torch_call, shapes, shown=None, porter=port):
    """Values, gradients of all inputs and gradients of all weights agree, for several seeds.

    `shown` is a boolean `(b, t)` where only some outputs are meant to agree (not the padding's).
    """
    assert sum(p.numel() for p in theirs.parameters()) == sum(
        leaf.size for leaf in jax.tree.leaves(ours)
    )

    @jax.jit
    def ours_and_gradients(module, inputs, cotangent):
        def loss(module, inputs):
            output = our_call(module, *inputs)
            return (output * cotangent).sum(), output

        gradients, output = jax.grad(loss, argnums=(0, 1), has_aux=True)(module, inputs)
        return output, *gradients

    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        randomize(theirs, rng)
        theirs.zero_grad()
        inputs = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
        tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
        expected = torch_call(theirs, *tensors)
        cotangent = rng.normal(size=expected.shape).astype(np.float32)
        visible = np.ones(expected.shape[:-1], bool) if shown is None else shown
        cotangent = np.where(visible[..., None], cotangent, np.float32(0))
        (expected * torch.tensor(cotangent)).sum().backward()

        module = porter(ours, theirs, value)
        output, of_module, of_inputs = ours_and_gradients(module, inputs, cotangent)
        assert_close(output[visible], expected.detach().numpy()[visible])
        for got, tensor in zip(of_inputs, tensors, strict=True):
            assert_close(got, tensor.grad.numpy())
        wanted = porter(module, theirs, gradient)
        for (path, got), want in zip(
            jax.tree.leaves_with_path(of_module), jax.tree.leaves(wanted), strict=True
        ):
            assert_close(got, want, err_msg=jax.tree_util.keystr(path))


def masks(kind, t=T, s=S, seed=0):
    """The same mask twice: what our attention takes, and torch's `attn_mask` for it.

    torch hides where True and wants `(b * n, t, s)`. No query is left without any key, which
    torch answers with NaN.
    """
    rng = np.random.default_rng(seed)
    if kind == "none":
        return None, None
    if kind == "causal":
        ours, allowed = AttentionMask(causal=True), np.tril(np.ones((t, s), bool))
    elif kind == "padding":
        real = real_tokens(s)
        ours = AttentionMask(k_positions=padding_to_positions(jnp.asarray(real)))
        allowed = real[:, None, None, :]
    elif kind == "padding, left, causal":
        # On the left, a causal padding query would see nothing: there it sees itself.
        real = real_tokens(s)[:, ::-1]
        allowed = np.tril(np.ones((t, s), bool)) & real[:, None, None, :] | np.eye(t, s, dtype=bool)
        ours = jnp.asarray(allowed)
    else:
        shape = {"per query": (t, s), "per sequence": (B, 1, t, s), "per head": (B, N, t, s)}[kind]
        allowed = rng.random(shape) < 0.6
        allowed[..., 0] |= ~allowed.any(-1)
        ours = jnp.asarray(allowed)
    return ours, torch.tensor(~np.broadcast_to(allowed, (B, N, t, s)).reshape(B * N, t, s))


def real_tokens(s):
    """Padding on the right, by a different amount in each sequence."""
    return np.arange(s) < np.array([s, s - 1, s - 3])[:, None]


@pytest.mark.parametrize(
    "mask_kind, use_bias",
    [
        ("none", True),
        ("causal", False),
        ("padding", True),
        ("per query", False),
        ("per sequence", True),
        ("per head", True),
    ],
)
def test_multi_head_attention(mask_kind, use_bias):
    ours = without_weights(MultiHeadAttention, D, N, use_bias=use_bias)
    theirs = nn.MultiheadAttention(D, N, bias=use_bias, batch_first=True)
    mask, attn_mask = masks(mask_kind)

    check_parity(
        ours,
        theirs,
        lambda mha, q, k, v: mha(q, k, v, mask),
        lambda mha, q, k, v: mha(q, k, v, attn_mask=attn_mask)[0],
        [(B, T, D), (B, S, D), (B, S, D)],
    )


def test_attention_weights():
    """The function for one head, with values of another width than keys."""
    mask, attn_mask = masks("per head")
    q, k, v = (normal(B, N, *shape) for shape in ((T, 4), (S, 4), (S, 9)))
    output, weights = jax.jit(scaled_dot_product_attention)(q, k, v, mask)
    scores = tensor(q) @ tensor(k).mT / 2
    scores = scores.masked_fill(attn_mask.reshape(B, N, T, S), -torch.inf)
    expected = scores.softmax(-1)
    assert_close(weights, expected.numpy())
    assert_close(output, (expected @ tensor(v)).numpy())


# Every value of every option, with the combinations of a Latin square instead of all of them.
LAYER_OPTIONS = pytest.mark.parametrize(
    "norm_first, activation, use_bias, mask_kind",
    [
        (True, "relu", True, "padding"),
        (True, "gelu", False, "causal"),
        (False, "relu", False, "per head"),
        (False, "gelu", True, "padding, left, causal"),
    ],
)


def layer_options(norm_first, activation, use_bias):
    """The same options for our layers and for torch's."""
    ours = {
        "norm_first": norm_first,
        "use_bias": use_bias,
        "norm": partial(LayerNorm, use_bias=use_bias),
        "feed_forward": partial(FeedForward, activation=ACTIVATIONS[activation]),
    }
    theirs = {
        "d_model": D,
        "nhead": N,
        "dim_feedforward": F,
        "norm_first": norm_first,
        "bias": use_bias,
        "activation": activation,
        "dropout": 0.0,
        "batch_first": True,
    }
    return ours, theirs


@LAYER_OPTIONS
def test_encoder_layer(norm_first, activation, use_bias, mask_kind):
    our_options, torch_options = layer_options(norm_first, activation, use_bias)
    mask, attn_mask = masks(mask_kind, T, T)
    check_parity(
        without_weights(EncoderLayer, D, N, F, **our_options),
        nn.TransformerEncoderLayer(**torch_options),
        lambda layer, x: layer(x, mask),
        lambda layer, x: layer(x, src_mask=attn_mask),
        [(B, T, D)],
    )


@LAYER_OPTIONS
def test_decoder_layer(norm_first, activation, use_bias, mask_kind):
    our_options, torch_options = layer_options(norm_first, activation, use_bias)
    mask, attn_mask = masks(mask_kind, T, T)
    cross_mask, cross_attn_mask = masks("per sequence" if use_bias else "padding")
    check_parity(
        without_weights(DecoderLayer, D, N, F, **our_options),
        nn.TransformerDecoderLayer(**torch_options),
        lambda layer, x, memory: layer(x, memory, mask, cross_mask),
        lambda layer, x, memory: layer(x, memory, tgt_mask=attn_mask, memory_mask=cross_attn_mask),
        [(B, T, D), (B, S, D)],
    )


@pytest.mark.parametrize("norm_first", [True, False])
def test_stacks(norm_first):
    """Encoder and decoder; by default a norm ends pre-norm stacks only."""
    our_options, torch_options = layer_options(norm_first, "relu", True)
    padding, attn_mask = masks("padding", S, S)
    check_parity(
        without_weights(Encoder, LAYERS, D, N, F, **our_options),
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**torch_options),
            LAYERS,
            nn.LayerNorm(D) if norm_first else None,
            enable_nested_tensor=False,
        ),
        lambda encoder, x: encoder(x, padding),
        lambda encoder, x: encoder(x, mask=attn_mask),
        [(B, S, D)],
    )
    causal, causal_attn_mask = masks("causal", T, T)
    cross, cross_attn_mask = masks("padding", T, S)
    check_parity(
        without_weights(Decoder, LAYERS, D, N, F, **our_options),
        nn.TransformerDecoder(
            nn.TransformerDecoderLayer(**torch_options),
            LAYERS,
            nn.LayerNorm(D) if norm_first else None,
        ),
        lambda decoder, x, memory: decoder(x, memory, causal, cross),
        lambda decoder, x, memory: decoder(
            x, memory, tgt_mask=causal_attn_mask, memory_mask=cross_attn_mask
        ),
        [(B, T, D), (B, S, D)],
    )


class TorchModel(nn.Module):
    """A whole model around `nn.Transformer`: embeddings, sinusoids and an output layer."""

    def __init__(self, src_vocab_size, tgt_vocab_size, **options):
        super().__init__()
        self.src_embedding = nn.Embedding(src_vocab_size, D)
        self.tgt_embedding = nn.Embedding(tgt_vocab_size, D)
        del options["dim_feedforward"]
        self.transformer = nn.Transformer(
            num_encoder_layers=1,
            num_decoder_layers=LAYERS,
            dim_feedforward=F,
            **options,
        )
        self.output = nn.Linear(D, tgt_vocab_size)

    def forward(self, src, tgt, **masks):
        src_x = self.src_embedding(src) * D**0.5 + torch.tensor(numpy_sinusoids(src.shape[1], D))
        tgt_x = self.tgt_embedding(tgt) * D**0.5 + torch.tensor(numpy_sinusoids(tgt.shape[1], D))
        return self.output(self.transformer(src_x, tgt_x, **masks)).log_softmax(-1)


def port_model(ours, theirs, read):
    return eqx.tree_at(
        lambda m: (
            m.src_embedding.token_embedding.weight,
            m.tgt_embedding.token_embedding.weight,
            m.encoder,
            m.decoder,
            m.output.w,
            m.output.b,
        ),
        ours,
        (
            read(theirs.src_embedding.weight),
            read(theirs.tgt_embedding.weight),
            port(ours.encoder, theirs.transformer.encoder, read),
            port(ours.decoder, theirs.transformer.decoder, read),
            read(theirs.output.weight).T,
            read(theirs.output.bias),
        ),
    )


def numpy_sinusoids(length, width):
    """Section 3.5 of the paper, entry by entry."""
    table = np.empty((length, width))
    for position in range(length):
        for i in range(width):
            angle = position / 10000 ** (2 * (i // 2) / width)
            table[position, i] = np.cos(angle) if i % 2 else np.sin(angle)
    return table.astype(np.float32)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # torch about its own default
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer(norm_first):
    """The whole model: padded source and target, from token ids to log-probabilities."""
    our_options, torch_options = layer_options(norm_first, "relu", True)
    sizes = 11, 14, D, N, 1, LAYERS, F, 20
    ours = without_weights(Transformer, *sizes, final_norm=True, **our_options)
    rng = np.random.default_rng(5)
    src, tgt = jnp.asarray(rng.integers(0, 11, (B, S))), jnp.asarray(rng.integers(0, 14, (B, T)))
    src_real, tgt_real = jnp.asarray(real_tokens(S)), jnp.asarray(real_tokens(T))
    causal = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.bool)
    check_parity(
        ours,
        TorchModel(11, 14, **torch_options),
        lambda m: m(src, tgt, src_padding_mask=src_real, tgt_padding_mask=tgt_real),
        lambda m: m(
            tensor(src),
            tensor(tgt),
            tgt_mask=causal,
            src_key_padding_mask=~tensor(src_real),
            tgt_key_padding_mask=~tensor(tgt_real),
            memory_key_padding_mask=~tensor(src_real),
        ),
        [],
        shown=np.asarray(tgt_real),
        porter=port_model,
    )


@pytest.mark.parametrize("length, width", [(1, 1), (11, 6), (50, 7)])
def test_sinusoids(length, width):
    assert_close(positional_encoding(length, width), numpy_sinusoids(length, width))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3])
def test_grouped_heads_are_repeated_heads(getkey, num_kv_heads):
    """Query heads i and i + 1 beside each other share a key head, as in Llama."""
    n, h = 6, 4
    grouped = MultiHeadAttention(D, n, num_kv_heads=num_kv_heads, head_dim=h, key=getkey())
    names = ("wk", "wv", "bk", "bv")
    randomly = [normal(*getattr(grouped, name).shape) for name in names]
    grouped = eqx.tree_at(lambda m: [getattr(m, name) for name in names], grouped, randomly)
    repeated = eqx.tree_at(
        lambda m: [getattr(m, name) for name in names],
        grouped,
        [jnp.repeat(x, n // num_kv_heads, axis=-2) for x in randomly],
    )
    x, mask = normal(B, T, D), jnp.asarray(normal(B, n, T, T) > 0) | jnp.eye(T, dtype=bool)
    attend = eqx.filter_jit(lambda mha: mha(x, mask=mask))
    assert_close(attend(grouped), attend(repeated))


def test_rotary_is_that_of_llama_and_gptj():
    pytest.importorskip("transformers")
    from transformers.models.gptj import modeling_gptj as gptj
    from transformers.models.llama import modeling_llama as llama

    n, h, t, theta = 3, 8, 6, 500.0
    q, k = normal(B, n, t, h), normal(B, n, t, h, seed=1)
    positions = jnp.asarray(np.random.default_rng(0).integers(0, 50, (B, t)))
    torch_q, torch_k, torch_positions = (tensor(x) for x in (q, k, positions))

    config = llama.LlamaConfig(
        hidden_size=n * h,
        num_attention_heads=n,
        head_dim=h,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    cos, sin = llama.LlamaRotaryEmbedding(config)(torch_q, torch_positions)
    expected = llama.apply_rotary_pos_emb(torch_q, torch_k, cos, sin)
    halves = RotaryPositionalEncoding(theta)
    for ours, theirs in zip((q, k), expected, strict=True):
        assert_close(halves.rotate(ours, positions), theirs.numpy())

    # GPT-J has theta 10000 built in, heads after positions, and turns a part of the features.
    part = 6
    sin, cos = gptj.create_sinusoidal_positions(50, part)[torch_positions].chunk(2, -1)
    expected = torch_q.clone().transpose(1, 2)
    expected[..., :part] = gptj.apply_rotary_pos_emb(expected[..., :part], sin, cos)
    neighbors = RotaryPositionalEncoding(rotary_dim=part, interleaved=True)
    assert_close(neighbors.rotate(q, positions), expected.transpose(1, 2).numpy())


@pytest.mark.parametrize("num_heads", [1, 2, 3, 8, 12, 20])
def test_alibi_is_that_of_bloom(num_heads):
    """BLOOM adds slope * key position: the same up to a constant in each row of scores."""
    pytest.importorskip("transformers")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    s = 9
    theirs = build_alibi_tensor(torch.ones(1, s, dtype=torch.int64), num_heads, torch.float32)
    ours = ALiBi().bias(jnp.array([s - 1]), jnp.arange(s), num_heads)
    theirs = theirs.numpy()
    assert_close(ours - ours[..., :1], theirs - theirs[..., :1])


def test_rms_norm():
    check_parity(
        RMSNorm(D, eps=1e-3),
        nn.RMSNorm(D, eps=1e-3),
        lambda norm, x: norm(x),
        lambda norm, x: norm(x),
        [(B, T, D)],
    )


@pytest.mark.parametrize("eps, use_bias", [(1e-5, True), (0.1, False)])
def test_layer_norm(eps, use_bias):
    check_parity(
        LayerNorm(D, eps, use_bias),
        nn.LayerNorm(D, eps, bias=use_bias),
        lambda norm, x: norm(x),
        lambda norm, x: norm(x),
        [(B, T, D)],
    )


@pytest.mark.parametrize("use_bias", [True, False])
def test_swiglu(use_bias):
    class SwiGLU(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(D, F, bias=use_bias)
            self.up = nn.Linear(D, F, bias=use_bias)
            self.down = nn.Linear(F, D, bias=use_bias)

        def forward(self, x):
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    def port_swiglu(ours, theirs, read):
        names = [f"{letter}_{name}" for letter in "wb"[: 1 + use_bias] for name in parts]
        arrays = [read(getattr(theirs, name).weight).T for name in parts]
        if use_bias:
            arrays += [read(getattr(theirs, name).bias) for name in parts]
        return eqx.tree_at(lambda m: [getattr(m, name) for name in names], ours, arrays)

    parts = ("gate", "up", "down")
    check_parity(
        without_weights(GatedFeedForward, D, F, use_bias=use_bias),
        SwiGLU(),
        lambda feed_forward, x: feed_forward(x),
        lambda feed_forward, x: feed_forward(x),
        [(B, T, D)],
        porter=port_swiglu,
    )
