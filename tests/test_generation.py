"""Decoding by the compiled loop against a plain loop over the whole model."""

import re
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import (
    ALiBi,
    DynamicScaling,
    LongScaling,
    RotaryPositionalEncoding,
    Transformer,
    TransformerLM,
    normal,
)
from jaxformers.generation import loop
from jaxformers.generation.prompts import bucket
from jaxformers.generation.sampling import draw, row_keys

V, D, N, D_FF, MAX = 37, 24, 4, 40, 32
POSITIONS = {
    "sinusoid": {},
    "learned": {"learnable_pos": True},
    "rotary": {"position": RotaryPositionalEncoding()},
    "alibi": {"position": ALiBi()},
}


def make_lm(num_layers=1, scale=2.0, **pieces):
    sizes = {"d_model": D, "num_heads": N, "d_ff": D_FF, "max_seq_length": MAX} | pieces
    model = TransformerLM(V, num_layers=num_layers, **sizes, key=jax.random.key(0))
    # Larger weights than those of a fresh model, so that it does not just repeat a token.
    return jax.tree.map(lambda x: scale * x if eqx.is_array(x) else x, model)


def make_seq2seq(**pieces):
    sizes = {"d_model": D, "num_heads": N, "d_ff": D_FF, "max_seq_length": MAX}
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 2}
    model = Transformer(29, V, **sizes, **layers, **pieces, key=jax.random.key(0))
    return jax.tree.map(lambda x: 2 * x if eqx.is_array(x) else x, model)


def prompt_of(length, rows=None, seed=0):
    shape = (length,) if rows is None else (rows, length)
    return np.random.default_rng(seed).integers(0, V, shape)


@eqx.filter_jit
def full_logits(model, tokens, real):
    return model.logits(tokens, padding_mask=real)


@eqx.filter_jit
def full_seq2seq_logits(model, src, src_real, tgt, real):
    return model.logits(src, tgt, tgt_padding_mask=real, src_padding_mask=src_real)


def by_hand(logits, row, new, choose=lambda logits, _: int(jnp.argmax(logits)), width=32):
    """Tokens from a loop in which the whole sequence goes through the model for each token."""
    row = list(row)
    for index in range(new):
        tokens = jnp.asarray([row + [0] * (width - len(row))])
        real = jnp.arange(width)[None] < len(row)
        row.append(choose(logits(tokens, real)[0, len(row) - 1], index))
    return np.asarray(row)


def greedy(model, row, new):
    return by_hand(partial(full_logits, model), row, new)


@pytest.mark.few(7)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("position", POSITIONS)
def test_equals_a_loop_over_the_whole_model_for_each_padding(position, num_kv_heads, window):
    model = make_lm(num_kv_heads=num_kv_heads, window=window, **POSITIONS[position])
    rows, new = [prompt_of(5, seed=1), prompt_of(3, seed=2)], 7
    left = np.stack([rows[0], np.r_[0, 0, rows[1]]])
    right = np.stack([rows[0], np.r_[rows[1], 0, 0]])
    real = np.array([[True] * 5, [False] * 2 + [True] * 3])
    wanted = np.stack([greedy(model, row, new)[len(row) :] for row in rows])
    assert len(set(wanted.ravel())) > 2  # a model that repeats itself would hide errors
    for prompt, mask in ((left, real), (right, real[:, ::-1])):
        out = model.generate(prompt, new, padding_mask=mask)
        assert out.dtype == jnp.int32
        np.testing.assert_array_equal(out, np.concatenate([prompt, wanted], axis=1))


# One row without padding, one padded on the left, one on the right and in between.
TOKENS = jnp.asarray(prompt_of(23, 3))
REAL = np.arange(23) >= np.array([[0], [5], [0]])
REAL[2, [1, 2, 8, 20, 21, 22]] = False
REAL = jnp.asarray(REAL)


@eqx.filter_jit
def cached_logits(model, tokens, cache, **masks):
    hidden, cache = model.forward(tokens, **masks, cache=cache)
    return model.logits_of(hidden), cache


def assert_chunks_give(wanted, cache, step):
    for chunks in ((23,), (1,) * 23, (4, 1, 18)):
        filled, start = cache, 0
        for size in chunks:
            part = slice(start, start + size)
            got, filled = step(TOKENS[:, part], REAL[:, part], filled)
            got, want = (jnp.where(REAL[:, part, None], x, 0.0) for x in (got, wanted[:, part]))
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
            start += size


@pytest.mark.few(4)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("position", POSITIONS)
def test_cached_logits_equal_full_ones_in_any_chunking(position, window):
    model = make_lm(num_layers=2, scale=1.0, num_kv_heads=2, window=window, **POSITIONS[position])

    def step(tokens, real, cache):
        return cached_logits(model, tokens, cache, padding_mask=real)

    assert_chunks_give(full_logits(model, TOKENS, REAL), model.init_cache(3, 24), step)


@pytest.mark.parametrize("window", [None, 3])
def test_cached_logits_of_an_encoder_decoder_equal_full_ones(window):
    model = make_seq2seq(num_kv_heads=2, window=window, **POSITIONS["rotary"])
    model = jax.tree.map(lambda x: x / 2 if eqx.is_array(x) else x, model)
    src, src_real = TOKENS[:, :6] % 29, jnp.asarray([[True] * 6, [True] * 4 + [False] * 2] * 3)[:3]
    wanted = full_seq2seq_logits(model, src, src_real, TOKENS, REAL)
    cache = model.init_cache(model.encode(src, src_padding_mask=src_real), 24)

    def step(tokens, real, cache):
        masks = {"padding_mask": real, "src_padding_mask": src_real}
        return cached_logits(model, tokens, cache, **masks)

    assert_chunks_give(wanted, cache, step)


@pytest.mark.few(2)
@pytest.mark.parametrize("position", POSITIONS)
def test_encoder_decoder_equals_a_loop_over_the_whole_model(position):
    model = make_seq2seq(num_kv_heads=2, **POSITIONS[position])
    src = jnp.asarray([[3, 1, 4, 1, 5, 9], [2, 6, 5, 0, 0, 0]])
    src_real = jnp.asarray([[True] * 6, [True] * 3 + [False] * 3])
    out = model.generate(src, 9, 1, None, src_padding_mask=src_real)
    for row, one, one_real in zip(out, src[:, None], src_real[:, None], strict=True):
        logits = partial(full_seq2seq_logits, model, one, one_real)
        np.testing.assert_array_equal(row, by_hand(logits, [1], 8))
    np.testing.assert_array_equal(model.generate(src[0], 9, 1, None), out[0])


def test_a_row_ends_at_its_end_token_and_the_loop_when_all_have():
    model, prompt, new = make_lm(), prompt_of(4, 2), 12
    free = np.asarray(model.generate(prompt, new))[:, 4:]
    end = int(free[0, 2])
    out = np.asarray(model.generate(prompt, new, end_token=end))[:, 4:]
    filled = np.asarray(model.generate(prompt, new, end_token=end, pad_token=36))[:, 4:]
    for row, padded, loose in zip(out, filled, free, strict=True):
        stop = list(loose).index(end) + 1 if end in loose else new
        np.testing.assert_array_equal(row, [*loose[:stop], *[end] * (new - stop)])
        np.testing.assert_array_equal(padded, [*loose[:stop], *[36] * (new - stop)])


def test_the_loop_ends_when_every_row_has(monkeypatch):
    """A budget of a thousand tokens must cost no more than the tokens there are."""
    steps = []
    plain = loop.advance

    def counted(step, plan, state):
        jax.debug.callback(lambda: steps.append(1))
        return plain(step, plan, state)

    monkeypatch.setattr(loop, "advance", counted)
    model = make_lm(position=RotaryPositionalEncoding())
    first = model.generate(prompt_of(4), 3)[4:]
    jax.effects_barrier()
    steps.clear()
    model.generate(prompt_of(4), 1000, end_token=int(first[2]))
    jax.effects_barrier()
    assert 0 < len(steps) <= 2


def test_sampling_equals_a_loop_that_draws_with_the_rows_keys():
    model, prompt, key = make_lm(), prompt_of(4, 3), jax.random.key(5)
    out = model.generate(prompt, 9, key=key, temperature=1.7)
    for i, row in enumerate(prompt):
        row_key = jax.random.fold_in(key, i)[None]

        def choose(logits, index, row_key=row_key):
            return int(draw(jnp.asarray(logits / 1.7)[None], row_key, jnp.asarray(index))[0])

        np.testing.assert_array_equal(out[i], by_hand(partial(full_logits, model), row, 9, choose))


def test_a_row_does_not_depend_on_the_other_rows():
    model, prompt = make_lm(), prompt_of(5, 4)
    keys = jax.random.split(jax.random.key(1), 4)
    options = {"temperature": np.array([0.5, 3.0, 1.0, 2.0]), "top_k": np.array([3, 36, 5, 9])}
    out = model.generate(prompt, 8, key=keys, end_token=3, **options)
    for i in (2, 0):
        one = {name: value[i : i + 1] for name, value in options.items()}
        alone = model.generate(prompt[i : i + 1], 8, key=keys[i : i + 1], end_token=3, **one)
        np.testing.assert_array_equal(alone[0], out[i])
    # One key for the batch: row i has fold_in(key, i), whichever rows there are beside it.
    key = jax.random.key(2)
    both, first = model.generate(prompt, 8, key=key), model.generate(prompt[:2], 8, key=key)
    np.testing.assert_array_equal(both[:2], first)
    assert not np.array_equal(both, model.generate(prompt, 8, key=jax.random.key(3)))


def test_old_style_keys_are_taken():
    model, prompt = make_lm(), prompt_of(5, 2)
    new = model.generate(prompt, 4, key=jax.random.key(7))
    np.testing.assert_array_equal(model.generate(prompt, 4, key=jax.random.PRNGKey(7)), new)
    keys = jax.random.split(jax.random.PRNGKey(1), 2)
    assert row_keys(keys, 2).shape == (2,)


def test_on_two_devices_as_on_one():
    model, prompt = make_lm(), prompt_of(5, 4)
    key, devices = jax.random.key(1), jax.devices()[:2]
    assert len(devices) == 2
    mesh = jax.sharding.Mesh(devices, ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arrays, rest = eqx.partition(model, eqx.is_array)
    spread = eqx.combine(jax.device_put(arrays, everywhere), rest)
    out = spread.generate(jax.device_put(prompt, rows), 8, key=key)
    assert out.sharding.is_equivalent_to(rows, 2)
    np.testing.assert_array_equal(out, model.generate(prompt, 8, key=key))


def test_new_numbers_and_new_lengths_inside_a_bucket_compile_nothing():
    model = make_lm()
    options = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "end_token": 3}
    model.generate(prompt_of(4, 2), 6, key=jax.random.key(0), **options)
    with jax.log_compiles(False), count_compilations() as compiled:
        for t, new, temperature in ((5, 6, 0.7), (9, 3, 1.3), (16, 16, 2.0)):
            options |= {"temperature": temperature, "top_k": t, "top_p": 0.4, "end_token": t}
            out = model.generate(prompt_of(t, 2), new, key=jax.random.key(t), **options)
            assert out.shape == (2, t + new)
    assert compiled == []
    with count_compilations() as compiled:
        model.generate(prompt_of(17 - 2, 3), 6, key=jax.random.key(0), **options)
    assert len(compiled) > 0  # another batch size: the counter works


class count_compilations:
    """A list of what XLA compiles inside the block."""

    def __enter__(self):
        self.events, self.on = [], True
        jax.monitoring.register_event_duration_secs_listener(self.heard)
        return self.events

    def heard(self, event, duration, **_):
        if self.on and event == "/jax/core/compile/backend_compile_duration":
            self.events.append(duration)

    def __exit__(self, *_):
        self.on = False


def test_buckets():
    assert [bucket(n) for n in (1, 16, 17, 24, 25, 33, 48, 49, 65)] == [
        16, 16, 24, 24, 32, 48, 48, 64, 96,
    ]  # fmt: skip
    assert bucket(17, 20) == 20 and bucket(17, 12) == 17
    for n in range(1, 500):
        assert n <= bucket(n) <= max(16, 1.5 * n)


@pytest.mark.parametrize("learnable_pos", [False, True])
def test_a_prompt_and_budget_that_fill_the_context(learnable_pos):
    model = make_lm(learnable_pos=learnable_pos)
    prompt = prompt_of(17)
    np.testing.assert_array_equal(model.generate(prompt, MAX - 17), greedy(model, prompt, MAX - 17))
    np.testing.assert_array_equal(
        model.generate(prompt[:-1], 3)[:19], greedy(model, prompt[:-1], 3)
    )


@pytest.mark.parametrize("heads", [N, 1])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_cache_is_written_in_place_and_nothing_of_its_size_is_copied_per_token(rows, heads):
    model = make_lm(position=RotaryPositionalEncoding(), num_kv_heads=heads)
    program, slots = compiled_run(model, prompt_of(4, rows), 100)
    (body,) = set(re.findall(r" while\(.*body=(%\S+?),", program))
    start = program.index(f"\n{body} (")
    lines = program[start : program.index("\n}", start)]
    cached = rf"{slots},{D // N}]"
    assert "dynamic-update-slice" in lines and cached in lines
    assert not re.findall(rf".*= f32\[[\d,]*{re.escape(cached)}\S* copy\(.*", lines)


@pytest.mark.parametrize("window", [None, 40])
# The first is read in a part and a chunk, the second in three chunks, of which one row fills one.
@pytest.mark.parametrize("longest", [loop.CHUNK + 90, 2 * loop.CHUNK + 1])
def test_a_prompt_longer_than_a_chunk(longest, window):
    model = make_lm(position=RotaryPositionalEncoding(), window=window)
    lengths = np.array([longest, 5, longest - loop.CHUNK - 20])
    tokens = prompt_of(longest, 3)
    real = np.arange(longest) >= longest - lengths[:, None]
    out = model.generate(tokens, 4, padding_mask=real)
    np.testing.assert_array_equal(out[:, :longest], tokens)
    real = np.pad(real, ((0, 0), (0, 4)), constant_values=True)
    expected = full_logits(model, out, real).argmax(-1)[:, -5:-1]
    np.testing.assert_array_equal(out[:, -4:], expected)


def test_a_long_prompt_continues_a_cache():
    model = make_lm(position=RotaryPositionalEncoding())
    prompt = np.asarray(prompt_of(3 + loop.CHUNK + 50, 2))
    first = model.generate(prompt[:, :3], 2, return_cache=True)
    whole = np.concatenate([first.tokens, prompt[:, 3:]], axis=1)
    second = model.generate(prompt[:, 3:], 4, cache=first.cache)
    np.testing.assert_array_equal(second[:, -4:], model.generate(whole, 4)[:, -4:])


def test_a_long_prompt_does_not_go_through_the_feed_forward_at_once():
    model, t = make_lm(position=RotaryPositionalEncoding()), 2 * loop.CHUNK
    program, _ = compiled_run(model, prompt_of(t, 2), 4)
    assert f"f32[{2 * loop.CHUNK},{D_FF}]" in program and f"f32[{2 * t},{D_FF}]" not in program


def compiled_run(model, *args, **options):
    """The text of the program that `generate` runs, and its slots."""
    plain, grabbed = loop.run, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "jaxformers.generation.generate.run", lambda *args: grabbed.append(args) or plain(*args)
        )
        model.generate(*args, **options)
    return plain.lower(*grabbed[0]).compile().compiled.as_text(), grabbed[0][4]


def test_under_jit_and_vmap():
    model, prompt = make_lm(), jnp.asarray(prompt_of(5, 3))
    keys = jax.random.split(jax.random.key(1), 3)
    plain = model.generate(prompt, 6)
    np.testing.assert_array_equal(eqx.filter_jit(model.generate)(prompt, 6), plain)
    np.testing.assert_array_equal(jax.vmap(lambda row: model.generate(row, 6))(prompt), plain)
    sampled = jax.vmap(lambda row, key: model.generate(row, 6, key=key, top_k=5))(prompt, keys)
    for i in range(3):
        np.testing.assert_array_equal(
            model.generate(prompt[i], 6, key=keys[i], top_k=5), sampled[i]
        )


KEY = jax.random.key(0)
BAD = {
    "max_new_tokens": [
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": MAX},
    ],
    "end_token": [{"end_token": V}, {"end_token": -1}],
    "pad_token": [{"pad_token": V}],
    "temperature": [
        {"temperature": 0.0, "key": KEY},
        {"temperature": -1.0, "key": KEY},
        {"temperature": float("nan"), "key": KEY},
        {"temperature": 0.5},
        {"temperature": np.ones(3), "key": KEY},
    ],
    "top_k": [{"top_k": 0, "key": KEY}, {"top_k": 2.5, "key": KEY}, {"top_k": 5}],
    "top_p": [{"top_p": 0.0, "key": KEY}, {"top_p": 1.1, "key": KEY}, {"top_p": 0.5}],
    "min_p": [{"min_p": -0.1, "key": KEY}, {"min_p": 0.5}],
    "typical_p": [{"typical_p": 1.5, "key": KEY}, {"typical_p": 0.5}],
    "key": [{"key": 3}, {"key": jax.random.split(KEY, 3)}],
    "prompt": [
        {"prompt": np.zeros((2, 0), int)},
        {"prompt": [[V, 1]]},
        {"padding_mask": np.array([[True] * 4, [False] * 4])},
    ],
    "padding_mask": [{"padding_mask": np.ones((2, 3), bool)}],
    "temperatur": [{"temperatur": 0.5}],
}


@pytest.mark.parametrize("name, case", [(name, i) for name in BAD for i in range(len(BAD[name]))])
def test_bad_input_is_named(name, case, no_shape_checker):
    arguments = {"prompt": prompt_of(4, 2), "max_new_tokens": 3} | BAD[name][case]
    with pytest.raises(ValueError, match=name):
        make_lm().generate(**arguments)


def test_bad_input_to_the_encoder_decoder_is_named(no_shape_checker):
    model, src = make_seq2seq(), [[1, 2, 3]]
    for name, arguments in {
        "max_length": (src, 1, 0, 1),
        "max_new_tokens": (src, MAX + 1, 0, 1),
        "start_token": (src, 5, V, 1),
        "end_token": (src, 5, 0, V),
        "src": ([[29]], 5, 0, 1),
    }.items():
        with pytest.raises(ValueError, match=name):
            model.generate(*arguments)


def test_nan_logits_are_reported_not_sampled():
    model = make_lm()
    broken = eqx.tree_at(lambda m: m.embedding.token_embedding.weight,
                         model, replace_fn=lambda w: w.at[7].set(jnp.nan))  # fmt: skip
    prompt = np.array([[1, 2, 3], [4, 7, 6]])
    for options in ({}, {"key": KEY}):
        with pytest.raises(FloatingPointError, match="row 1 .*NaN"):
            broken.generate(prompt, 3, **options)


def test_padding_that_is_no_token_takes_no_room():
    model, prompt = make_lm(learnable_pos=True), np.zeros((2, 20), int)
    prompt[:, 15:] = prompt_of(5, 2)
    real = np.arange(20) >= 15
    out = model.generate(prompt, 20, padding_mask=np.stack([real, real]))
    np.testing.assert_array_equal(out[:, 20:], model.generate(prompt[:, 15:], 20)[:, 5:])


@pytest.mark.parametrize(
    "scaling",
    [
        DynamicScaling(4.0, 600),
        LongScaling([1.0] * 4, [2.0, 4.0, 8.0, 9.0], 600, attention_factor=1.2),
    ],
)
def test_angles_that_depend_on_the_length_of_a_long_prompt(scaling):
    """Chunks of a prompt would turn its first tokens as if the row were short."""
    model = TransformerLM(
        31,
        16,
        2,
        1,
        32,
        4096,
        init=normal(0.3),
        position=RotaryPositionalEncoding(scaling=scaling),
        key=jax.random.key(0),
    )
    prompt = jax.random.randint(jax.random.key(1), (2, 700), 0, 31)
    out = model.generate(prompt, 1, return_scores=True)
    expected = jax.nn.log_softmax(model.logits(prompt))[:, -1].max(-1)
    np.testing.assert_allclose(out.log_probs[:, 0], expected, atol=1e-5)
