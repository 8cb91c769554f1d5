"""Decoding against Hugging Face transformers: the same tokens, the same warped logits."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import (
    FeedForward,
    GatedFeedForward,
    RMSNorm,
    RotaryPositionalEncoding,
    Transformer,
    TransformerLM,
)
from jaxformers.generation import processors
from jaxformers.generation.processors import History
from jaxformers.generation.sampling import Warper

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers.generation import logits_process as hf  # noqa: E402

V, D, N, G, D_FF, LAYERS, MAX = 31, 16, 4, 2, 24, 2, 64
END, PAD = 7, 29


def value(parameter):
    return jnp.asarray(parameter.detach().numpy())


def randomize(model, seed=0, spread=0.6):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = parameter.ndim == 1 and name.endswith("weight")
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(gain + spread * noise / (5 if parameter.ndim == 1 else 1))
    return model.eval()


def follow(model, path):
    """The array at a path such as `decoder.layers.0.feed_forward.w_in`."""
    for name in path.split("."):
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


def with_weights(model, weights):
    """`model` with the given arrays at the given paths."""
    for path, array in weights.items():
        assert follow(model, path).shape == array.shape, path
    arrays = list(weights.values())
    return eqx.tree_at(lambda m: [follow(m, path) for path in weights], model, arrays)


def linear(at, w, b, module, *shape):
    """The weights of a torch linear map, whose matrix is (out, in)."""
    weights = {f"{at}.{w}": value(module.weight).T}
    if module.bias is not None:
        weights[f"{at}.{b}"] = value(module.bias)
    if shape:
        weights[f"{at}.{w}"] = weights[f"{at}.{w}"].reshape(shape)
        if module.bias is not None and shape[0] == D and w != "wo":
            weights[f"{at}.{b}"] = weights[f"{at}.{b}"].reshape(shape[1:])
    return weights


def heads(at, module, out="o_proj", groups=N):
    weights = linear(at, "wo", "bo", getattr(module, out), N, D // N, D)
    for name, count in (("q", N), ("k", groups), ("v", groups)):
        weights |= linear(
            at, f"w{name}", f"b{name}", getattr(module, f"{name}_proj"), D, count, D // N
        )
    return weights


def norm(at, module):
    weights = {f"{at}.gain": value(module.weight)}
    return weights | ({f"{at}.b": value(module.bias)} if hasattr(module, "bias") else {})


def llama():
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, num_attention_heads=N, num_key_value_heads=G,
        intermediate_size=D_FF, num_hidden_layers=LAYERS, max_position_embeddings=MAX,
        rms_norm_eps=1e-6, eos_token_id=END, pad_token_id=PAD, bos_token_id=1,
    )  # fmt: skip
    theirs = randomize(transformers.LlamaForCausalLM(config))
    ours = TransformerLM(
        V, D, N, LAYERS, D_FF, num_kv_heads=G, use_bias=False, norm=RMSNorm,
        feed_forward=GatedFeedForward, position=RotaryPositionalEncoding(), embedding_scale=1.0,
        key=jax.random.key(0),
    )  # fmt: skip
    weights = {
        "embedding.token_embedding.weight": value(theirs.model.embed_tokens.weight),
        "output.w": value(theirs.lm_head.weight).T,
        **norm("decoder.norm", theirs.model.norm),
    }
    for i, layer in enumerate(theirs.model.layers):
        at = f"decoder.layers.{i}"
        weights |= heads(f"{at}.self_attention", layer.self_attn, groups=G)
        for name in ("gate", "up", "down"):
            module = getattr(layer.mlp, f"{name}_proj")
            weights |= linear(f"{at}.feed_forward", f"w_{name}", f"b_{name}", module)
        weights |= norm(f"{at}.self_attention_residual.norm", layer.input_layernorm)
        weights |= norm(f"{at}.feed_forward_residual.norm", layer.post_attention_layernorm)
    return with_weights(ours, weights), theirs


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=D, n_head=N, n_layer=LAYERS, n_inner=D_FF, n_positions=MAX,
        eos_token_id=END, pad_token_id=PAD, bos_token_id=1,
    )  # fmt: skip
    theirs = randomize(transformers.GPT2LMHeadModel(config))
    ours = TransformerLM(
        V, D, N, LAYERS, D_FF, MAX, learnable_pos=True, tie_embeddings=True, embedding_scale=1.0,
        feed_forward=partial(FeedForward, activation=jax.nn.gelu), key=jax.random.key(0),
    )  # fmt: skip
    weights = {
        "embedding.token_embedding.weight": value(theirs.transformer.wte.weight),
        "embedding.position.weight": value(theirs.transformer.wpe.weight),
        **norm("decoder.norm", theirs.transformer.ln_f),
    }
    for i, layer in enumerate(theirs.transformer.h):
        at = f"decoder.layers.{i}"
        w, b = value(layer.attn.c_attn.weight), value(layer.attn.c_attn.bias)
        for j, name in enumerate("qkv"):
            part = slice(j * D, (j + 1) * D)
            weights[f"{at}.self_attention.w{name}"] = w[:, part].reshape(D, N, -1)
            weights[f"{at}.self_attention.b{name}"] = b[part].reshape(N, -1)
        weights |= {
            f"{at}.self_attention.wo": value(layer.attn.c_proj.weight).reshape(N, -1, D),
            f"{at}.self_attention.bo": value(layer.attn.c_proj.bias),
            f"{at}.feed_forward.w_in": value(layer.mlp.c_fc.weight),
            f"{at}.feed_forward.b_in": value(layer.mlp.c_fc.bias),
            f"{at}.feed_forward.w_out": value(layer.mlp.c_proj.weight),
            f"{at}.feed_forward.b_out": value(layer.mlp.c_proj.bias),
            **norm(f"{at}.self_attention_residual.norm", layer.ln_1),
            **norm(f"{at}.feed_forward_residual.norm", layer.ln_2),
        }
    return with_weights(ours, weights), theirs


class HalvedSinusoids(eqx.Module):
    """Marian's positions: all sines first, then all cosines."""

    @property
    def max_seq_length(self):
        return MAX

    def embed(self, positions):
        frequencies = 10000.0 ** (-np.arange(0, D, 2) / D)
        angles = jnp.maximum(positions, 0)[..., None].astype(jnp.float32) * frequencies.astype(
            np.float32
        )
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def marian():
    config = transformers.MarianConfig(
        vocab_size=V, d_model=D, encoder_layers=1, decoder_layers=LAYERS,
        encoder_attention_heads=N, decoder_attention_heads=N, encoder_ffn_dim=D_FF,
        decoder_ffn_dim=D_FF, max_position_embeddings=MAX, activation_function="relu",
        scale_embedding=False, eos_token_id=END, pad_token_id=PAD, decoder_start_token_id=0,
        forced_eos_token_id=None, decoder_vocab_size=V,
    )  # fmt: skip
    theirs = transformers.MarianMTModel(config)
    tables = [theirs.model.encoder.embed_positions, theirs.model.decoder.embed_positions]
    kept = [table.weight.detach().clone() for table in tables]
    randomize(theirs, seed=2)
    with torch.no_grad():
        for table, weight in zip(tables, kept, strict=True):
            table.weight.copy_(weight)
    ours = Transformer(
        V, V, D, N, 1, LAYERS, D_FF, MAX, norm_first=False, final_norm=False, tie_embeddings=True,
        share_embeddings=True, embedding_scale=1.0, position=HalvedSinusoids(),
        key=jax.random.key(0),
    )  # fmt: skip
    ours = eqx.tree_at(lambda m: m.output.b, ours, jnp.zeros(V), is_leaf=lambda x: x is None)
    weights = {
        "tgt_embedding.token_embedding.weight": value(theirs.model.shared.weight),
        "output.b": value(theirs.final_logits_bias)[0],
    }
    for side, stack in (("encoder", theirs.model.encoder), ("decoder", theirs.model.decoder)):
        for i, layer in enumerate(stack.layers):
            at = f"{side}.layers.{i}"
            weights |= heads(f"{at}.self_attention", layer.self_attn, "out_proj")
            weights |= norm(f"{at}.self_attention_residual.norm", layer.self_attn_layer_norm)
            if side == "decoder":
                weights |= heads(f"{at}.cross_attention", layer.encoder_attn, "out_proj")
                weights |= norm(
                    f"{at}.cross_attention_residual.norm", layer.encoder_attn_layer_norm
                )
            weights |= linear(f"{at}.feed_forward", "w_in", "b_in", layer.fc1)
            weights |= linear(f"{at}.feed_forward", "w_out", "b_out", layer.fc2)
            weights |= norm(f"{at}.feed_forward_residual.norm", layer.final_layer_norm)
    return with_weights(ours, weights), theirs


FAMILIES = {"llama": llama, "gpt2": gpt2, "marian": marian}


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    return request.param, *FAMILIES[request.param]()


PROMPT = np.array([[1, 5, 9, 2, 12], [1, 3, 3, 17, 28], [1, 8, 30, 11, 4]])
LEFT = np.array([[1, 5, 9, 2, 12], [PAD, PAD, 1, 17, 28], [PAD, 1, 30, 11, 4]])


# Marian counts the positions of a source from its first column, padding or not.
RIGHT = np.array([[1, 5, 9, 2, 12], [1, 17, 28, PAD, PAD], [1, 30, 11, 4, PAD]])


def generate_both(models, new, **options):
    """Tokens of ours and of theirs, filled up to one length with the padding token."""
    name, ours, theirs = models
    renamed = {"bad_words": "bad_words_ids", "forced_first_token": "forced_bos_token_id",
               "forced_last_token": "forced_eos_token_id"}  # fmt: skip
    their_options = {renamed.get(key, key): option for key, option in options.items()}
    given = RIGHT if name == "marian" else LEFT
    tokens, real = torch.tensor(given), torch.tensor(given != PAD).long()
    their_options = {"num_beams": 1, "do_sample": False, "max_new_tokens": new} | their_options
    with torch.no_grad():
        wanted = theirs.generate(tokens, attention_mask=real, **their_options).numpy()
    options = {"pad_token": PAD, **options}
    if name == "marian":
        got = ours.generate(given, new + 1, 0, END, src_padding_mask=given != PAD, **options)
    else:
        got = ours.generate(given, new, end_token=END, padding_mask=given != PAD, **options)
    width = ((0, 0), (0, got.shape[1] - wanted.shape[1]))
    return np.asarray(got), np.pad(wanted, width, constant_values=PAD)


def test_logits_are_equal(models):
    name, ours, theirs = models
    prompt, tgt = jnp.asarray(PROMPT), jnp.asarray(PROMPT[::-1, 1:])
    with torch.no_grad():
        if name == "marian":
            wanted = theirs(
                input_ids=torch.tensor(PROMPT), decoder_input_ids=torch.tensor(np.asarray(tgt))
            )
            got = ours.logits(prompt, tgt)
        else:
            wanted, got = theirs(torch.tensor(PROMPT)), ours.logits(prompt)
    np.testing.assert_allclose(got, wanted.logits.numpy(), rtol=1e-4, atol=1e-4)


def test_greedy_tokens_are_equal(models):
    ours, theirs = generate_both(models, 20)
    np.testing.assert_array_equal(ours, theirs)
    assert len({tuple(row) for row in ours}) == 3 and len(set(ours.ravel())) > 3


def test_constrained_greedy_tokens_are_equal(models):
    # The padding token is banned: HF counts padding among the n-grams that a row has had.
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 9,
               "bad_words": [[3], [5, 6], [12, 4, 9], [PAD]], "forced_last_token": END}  # fmt: skip
    ours, theirs = generate_both(models, 16, **options)
    np.testing.assert_array_equal(ours, theirs)


BEAMS = {
    "long": {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
    "short": {"num_beams": 3, "length_penalty": -1.0, "early_stopping": "never"},
    "early": {"num_beams": 3, "early_stopping": True},
    "several": {"num_beams": 4, "num_return_sequences": 3},
    "constrained": {"num_beams": 3, "no_repeat_ngram_size": 2, "min_new_tokens": 4,
                    "repetition_penalty": 1.2},
}  # fmt: skip


@pytest.mark.few(6)
@pytest.mark.parametrize("options", BEAMS.values(), ids=BEAMS)
def test_beam_search_finds_the_same_tokens(models, options):
    ours, theirs = generate_both(models, 12, **options)
    np.testing.assert_array_equal(ours, theirs)


def test_beam_scores_are_equal(models):
    name, ours, theirs = models
    with torch.no_grad():
        wanted = theirs.generate(
            torch.tensor(PROMPT), max_new_tokens=9, num_beams=3, num_return_sequences=2,
            do_sample=False, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    options = {"num_beams": 3, "num_return_sequences": 2, "return_scores": True}
    if name == "marian":
        got = ours.generate(PROMPT, 10, 0, END, **options)
    else:
        got = ours.generate(PROMPT, 9, end_token=END, **options)
    np.testing.assert_allclose(got.scores, wanted.sequences_scores.numpy(), rtol=1e-4, atol=1e-5)
    log_probs = np.asarray(got.log_probs)
    lengths = (log_probs != 0).sum(-1)
    np.testing.assert_allclose(log_probs.sum(-1) / lengths, got.scores, rtol=1e-4)


# The steps between logits and choice, one by one and all together.

ROWS, WIDE = 4, 53
LOGITS = 3 * np.random.default_rng(0).normal(size=(ROWS, WIDE)).astype(np.float32)
WARPERS = {
    "temperature": (0.7, hf.TemperatureLogitsWarper),
    "top_k": (9, hf.TopKLogitsWarper),
    "top_p": (0.8, hf.TopPLogitsWarper),
    "min_p": (0.05, hf.MinPLogitsWarper),
    "typical_p": (0.6, hf.TypicalLogitsWarper),
}


def rows(number):
    dtype = np.int32 if isinstance(number, int) else np.float32
    return jnp.full(ROWS, number, dtype)


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("names", [*([name] for name in WARPERS), list(WARPERS)], ids=str)
def test_warped_logits_are_equal(names, keep):
    numbers = {name: rows(WARPERS[name][0]) for name in names}
    wanted = torch.tensor(LOGITS)
    for name in names:
        number, make = WARPERS[name]
        options = {} if name == "temperature" else {"min_tokens_to_keep": keep}
        wanted = make(number, **options)(None, wanted)
    got = Warper(**numbers, keep=keep)(jnp.asarray(LOGITS))
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-5)
    if names != ["temperature"]:
        kept = np.isfinite(got).sum(-1)
        assert (kept >= keep).all() and (kept < WIDE).all()


def test_few_probable_tokens_are_kept():
    """Cuts that would leave nothing leave the best tokens, as many as have to be kept."""
    logits = jnp.asarray([[9.0, 1.0, 0.5, 0.0, -1.0]])
    for name, number in (("top_p", 0.01), ("min_p", 1.0), ("typical_p", 0.01)):
        for keep in (1, 2):
            got = Warper(**{name: jnp.asarray([number], jnp.float32)}, keep=keep)(logits)
            assert np.isfinite(got).sum() == keep, name


SO_FAR = np.array([[4, 5, 4, 5, 4, 9], [1, 2, 3, 1, 2, 2], [8, 8, 8, 8, 8, 8], [7, 1, 6, 2, 5, 3]])
BAD_WORDS = [[5], [9, 2], [1, 2, 2, 6], [8, 8]]
CONSTRAINTS = {
    "repetition_penalty": (
        processors.RepetitionPenalty(rows(1.4)),
        lambda: hf.RepetitionPenaltyLogitsProcessor(1.4),
    ),
    "no_repeat_ngram_size": (
        processors.NoRepeatNgram(rows(2)),
        lambda: hf.NoRepeatNGramLogitsProcessor(2),
    ),
    "bad_words": (
        processors.BadWords(BAD_WORDS),
        lambda: hf.NoBadWordsLogitsProcessor(BAD_WORDS, eos_token_id=END),
    ),
    "min_new_tokens": (
        processors.MinNewTokens(rows(5)),
        lambda: hf.MinNewTokensLengthLogitsProcessor(2, 5, END),
    ),
    "forced_last_token": (
        processors.ForcedLastToken(rows(3)),
        lambda: hf.ForcedEOSTokenLogitsProcessor(7, 3),
    ),
}


@pytest.mark.few(5)
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(
    "names", [*([name] for name in CONSTRAINTS), list(CONSTRAINTS)[:4]], ids=str
)
def test_constrained_logits_are_equal(names, padding):
    wanted = torch.tensor(LOGITS)
    for name in names:
        wanted = CONSTRAINTS[name][1]()(torch.tensor(SO_FAR), wanted)
    # Columns before the row and after it hold what must not count.
    buffer = np.full((ROWS, padding + 6 + 4), 1, np.int32)
    buffer[:, padding : padding + 6] = SO_FAR
    history = History(
        jnp.asarray(buffer),
        jnp.full(ROWS, padding),
        start=jnp.int32(padding + 2),
        length=jnp.int32(padding + 6),
        limit=jnp.int32(padding + 7),
        end_tokens=jnp.asarray([END]),
    )
    got = jnp.asarray(LOGITS)
    for name in names:
        _, got = CONSTRAINTS[name][0](None, got, history)
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-5)
    assert not np.array_equal(got, LOGITS)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 7])
def test_ngrams_of_any_size(size):
    wanted = hf.NoRepeatNGramLogitsProcessor(size)(torch.tensor(SO_FAR), torch.tensor(LOGITS))
    history = History(jnp.asarray(SO_FAR), jnp.zeros(ROWS, jnp.int32), jnp.int32(0), jnp.int32(6))
    _, got = processors.NoRepeatNgram(rows(size))(None, jnp.asarray(LOGITS), history)
    np.testing.assert_array_equal(got, wanted.numpy())


def test_presence_and_frequency_penalties():
    history = History(jnp.asarray(SO_FAR), jnp.zeros(ROWS, jnp.int32), jnp.int32(2), jnp.int32(6))
    _, got = processors.FrequencyPenalty(rows(0.5))(None, jnp.asarray(LOGITS), history)
    _, got = processors.PresencePenalty(rows(0.25))(None, got, history)
    wanted = LOGITS.copy()
    for row, new in enumerate(SO_FAR[:, 2:]):
        for token in set(new):
            wanted[row, token] -= 0.25 + 0.5 * (new == token).sum()
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
