"""From text to text: generation, chats, conversations, choices and scores."""

import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generation import count_compilations
from test_token_text import byte_level, sentencepiece

from jaxformers import (
    RotaryPositionalEncoding,
    TextGenerator,
    Tokenizer,
    Transformer,
    TransformerLM,
)
from jaxformers.hf.load import with_origin
from jaxformers.origin import Origin, SpecialTokens
from jaxformers.text.stop_table import stop_table

tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("no_shape_checker", "quick_compilation")

KEY = jax.random.key(6)
V, MAX = 512, 96
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PROMPTS = ["the cat sat", "where", "日本 was it? Naïve – 1234567", " on a mat; they're", "x=y"]


def tokenizer_of(backend, **config):
    files = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": json.dumps(config)}
    return Tokenizer({name: content.encode() for name, content in files.items()})


def lm_of(**pieces):
    sizes = {"d_model": 24, "num_heads": 4, "num_layers": 2, "d_ff": 40, "max_seq_length": MAX}
    model = TransformerLM(V, **sizes | pieces, dropout_rate=0.0, key=jax.random.key(0))
    return jax.tree.map(lambda x: 2 * x if isinstance(x, jax.Array) else x, model)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(byte_level(), eos_token="<|endoftext|>", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def text(tokenizer):
    return TextGenerator(lm_of(position=RotaryPositionalEncoding()), tokenizer)


def ids_of(tokenizer, text, **options):
    return np.asarray(tokenizer.encode(text, **options)[0])


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("options", [{}, {"key": KEY, "temperature": 1.3}], ids=["greedy", "drawn"])
def test_the_new_text_is_that_of_the_new_tokens(make, options):
    tokenizer = tokenizer_of(make())
    text = TextGenerator(lm_of(position=RotaryPositionalEncoding()), tokenizer)
    for prompt in PROMPTS[:3]:
        ids = ids_of(tokenizer, prompt)
        whole = text.model.generate(ids[None], 30, **options)[0]
        got = text(prompt, 30, return_scores=True, **options)
        assert got.tokens == whole[len(ids) :].tolist() and got.finish_reason == "length"
        assert got.prompt_tokens == len(ids) and len(got.log_probs) == 30
        assert got.score == pytest.approx(got.log_probs.sum(), rel=1e-5)
        if "\ufffd" not in got.text:
            assert prompt + got.text == tokenizer.decode(whole)
        with text.stream(prompt, 30, **options) as stream:
            assert "".join(stream) == got.text == stream.text
        assert stream.tokens == got.tokens and stream.finish_reason == "length"


def test_texts_do_not_depend_on_the_batch(text):
    temperatures = [0.7, 1.0, 1.3, 0.9, 1.1]
    whole = text(PROMPTS, 12, key=KEY, temperature=temperatures, min_new_tokens=[1, 2, 3, 4, 5])
    assert len(set(whole)) == 5
    split = text(
        PROMPTS,
        12,
        key=KEY,
        temperature=jnp.array(temperatures),
        min_new_tokens=np.array([1, 2, 3, 4, 5]),
        batch_size=2,
    )
    assert split == whole
    pieces = list(text.stream(PROMPTS, 12, key=KEY, temperature=temperatures))
    assert ["".join(row) for row in zip(*pieces, strict=True)] == text(
        PROMPTS, 12, key=KEY, temperature=temperatures
    )
    assert text([PROMPTS[1]], 12) == [text(PROMPTS[1], 12)] == [text(PROMPTS, 12)[1]]


def test_stop_strings(text):
    options = {"key": KEY, "return_scores": True}
    free = text(PROMPTS, 24, **options)
    for i, whole in enumerate(free):
        middle = len(whole.text) // 2
        stop = [whole.text[middle : middle + 2], whole.text[-5:-3], "never in it \x01"]
        place = min(whole.text.find(x) for x in stop[:2])
        got = text(PROMPTS, 24, stop=stop, **options)[i]
        assert (got.text, got.finish_reason) == (whole.text[:place], "stop")
        assert len(got.log_probs) == len(got.tokens) < 24
        assert got.tokens == whole.tokens[: len(got.tokens)]
    stream = text.stream(PROMPTS, 24, stop=stop, key=KEY)
    pieces = zip(*stream, strict=True)
    assert ["".join(x) for x in pieces] == stream.text == text(PROMPTS, 24, stop=stop, key=KEY)
    assert stream.finish_reason[-1] == "stop"


def test_end_tokens_are_the_tokenizers_where_the_model_names_none(text):
    free = text(PROMPTS[0], 20, return_scores=True, end_token=[])
    assert len(free.tokens) == 20
    end = free.tokens[7]
    got = text(PROMPTS[0], 20, return_scores=True, end_token=end)
    first = free.tokens.index(end)
    assert got.tokens == free.tokens[: first + 1] and got.finish_reason == "stop"
    assert free.text.startswith(got.text)
    # A model that writes nothing else than the tokenizer's end.
    end = text.tokenizer.end_token
    got = text("x", 5, logits_fn=lambda logits, *_: logits.at[:, end].set(99.0), return_scores=True)
    assert (got.text, got.tokens, got.finish_reason) == ("", [end], "stop")


def test_beams_and_drafts(text):
    beams = text(PROMPTS[:2], 8, num_beams=3, num_return_sequences=2)
    assert len(beams) == 4
    assert text(PROMPTS[0], 8, num_beams=3, num_return_sequences=2) == beams[:2]
    assert text(PROMPTS[1], 8, num_beams=3) == beams[2]
    scored = text(PROMPTS[0], 8, num_beams=3, return_scores=True)
    ids = ids_of(text.tokenizer, PROMPTS[0])
    out = text.model.generate(
        ids, 8, num_beams=3, return_scores=True, end_token=text.tokenizer.end_token
    )
    assert scored.score == pytest.approx(float(out.scores))
    assert text(PROMPTS, 12, prompt_lookup=2) == text(PROMPTS, 12)


@pytest.fixture(scope="module")
def pair(tokenizer):
    sizes = {"d_model": 24, "num_heads": 4, "num_encoder_layers": 1, "num_decoder_layers": 2}
    model = Transformer(V, V, **sizes, d_ff=40, max_seq_length=MAX, key=jax.random.key(0))
    model = jax.tree.map(lambda x: 2 * x if isinstance(x, jax.Array) else x, model)
    origin = Origin("{}", special_tokens=SpecialTokens(start_token=3))
    return TextGenerator(with_origin(model, origin), tokenizer)


def test_encoder_decoders(pair):
    source = ids_of(pair.tokenizer, PROMPTS[0])
    whole = pair.model.generate(source[None], 13, end_token=pair.tokenizer.end_token)[0]
    got = pair(PROMPTS[0], 12, return_scores=True)
    assert got.tokens == whole[1:].tolist()
    assert "".join(pair.stream(PROMPTS[0], 12)) == got.text == pair(PROMPTS, 12)[0]
    score = pair.score(got.text, given=PROMPTS[0])
    tgt = np.r_[3, ids_of(pair.tokenizer, got.text)]
    np.testing.assert_allclose(
        score.log_probs, pair.model.score(source, tgt)[1:], rtol=1e-4, atol=1e-5
    )
    answers = ["cat", "mat;", "dog it"]
    chosen = pair.choose(PROMPTS[0], answers)
    totals = np.array([pair.score(x, given=PROMPTS[0]).total for x in answers])
    wanted = np.exp(totals) / np.exp(totals).sum()
    np.testing.assert_allclose(list(chosen.values()), wanted, rtol=1e-3)
    with pytest.raises(ValueError, match="given="):
        pair.score("the")
    with pytest.raises(ValueError, match="encoder"):
        pair.conversation()


def test_chat(text):
    one = [{"role": "user", "content": "the cat?"}]
    other = [{"role": "system", "content": "on a mat"}, *one]
    prompt = text.tokenizer.apply_chat_template(one)
    ids = ids_of(text.tokenizer, prompt, add_special_tokens=False)
    end = text.tokenizer.end_token
    wanted = text.model.generate(ids, 10, end_token=end)[len(ids) :]
    answer = text.chat(one, 10)
    assert answer == text.tokenizer.decode(wanted)
    assert text.chat([one, other], 10) == [answer, text.chat(other, 10)]
    assert "".join(text.chat_stream(one, 10)) == answer
    begun = [*one, {"role": "assistant", "content": "It was"}]
    more = text.chat(begun, 6, variables={"continue_final_message": True})
    assert more == text(text.tokenizer.apply_chat_template(begun, continue_final_message=True), 6)
    with pytest.raises(ValueError, match="enable_thinking"):
        text.chat(one, variables={"enable_thinking": False})
    with pytest.raises(ValueError, match="variables"):
        text.chat(one, variables="tools")


def test_choices_are_those_of_the_scores(text):
    prompt, answers = PROMPTS[0], [" on a mat", " was", " the cat; it"]
    chosen = text.choose(prompt, answers)
    totals = np.array([text.score(x, given=prompt).total for x in answers])
    wanted = np.exp(totals - totals.max())
    np.testing.assert_allclose(list(chosen.values()), wanted / wanted.sum(), rtol=1e-3)
    assert list(chosen) == answers
    chat = [{"role": "user", "content": "the cat?"}]
    assert sum(text.choose(chat, ["yes", "no"]).values()) == pytest.approx(1.0)
    for wrong in (["a"], [], ["a", "a"], ["a", ""], "ab", [1, 2]):
        with pytest.raises(ValueError, match="answers"):
            text.choose(prompt, wrong)


def test_scores(text):
    prompt = PROMPTS[2]
    ids = ids_of(text.tokenizer, prompt)
    score = text.score(prompt)
    assert score.tokens == ids[1:].tolist()
    np.testing.assert_allclose(score.log_probs, text.model.score(ids)[1:], rtol=1e-4, atol=1e-5)
    assert score.perplexity == pytest.approx(np.exp(-score.total / len(ids[1:])))
    several = text.score([" cat", " " + prompt, "!"], given="the")
    for got, rest in zip(several, [" cat", " " + prompt, "!"], strict=True):
        whole = ids_of(text.tokenizer, "the" + rest)
        begin = len(ids_of(text.tokenizer, "the"))
        assert got.tokens == whole[begin:].tolist()
        wanted = text.model.score(whole)[begin:]
        np.testing.assert_allclose(got.log_probs, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="given"):
        text.score(PROMPTS[:2], given=["a"])


ODD = [
    *(
        "",
        " ",
        "\x00",
        "\n\n\n",
        "👩‍👩‍👧‍👦🇩🇪",
        "e\u0301",
        "\ufeff",
        "<|endoftext|>",
        "\ud800",
        "é" * 500,
    ),
    *(
        None,
        3,
        2.5,
        b"bytes",
        [],
        [""],
        ["a", 3],
        [None],
        ("the", "cat"),
        {"a": 1},
        [[1, 2]],
        object(),
    ),
    *("the " * 90, "the " * 25_000, np.array([1, 2]), ["the " * 40, "x"]),
]


@pytest.fixture(scope="module")
def short(tokenizer):
    """A generator whose model knows few positions."""
    return TextGenerator(lm_of(), tokenizer)


@pytest.mark.few(8)
@pytest.mark.parametrize("number", range(len(ODD)))
def test_odd_input_gives_a_result_or_a_clear_error(short, number):
    given = ODD[number]
    calls = {
        "call": lambda: short(given, 3),
        "stream": lambda: list(short.stream(given, 3)),
        "chat": lambda: short.chat([{"role": "user", "content": given}], 3),
        "messages": lambda: short.chat(given, 3),
        "choose": lambda: short.choose(given, ["a", "b"]),
        "answers": lambda: short.choose("the", given),
        "score": lambda: short.score(given),
        "given": lambda: short.score("the cat", given=given),
        "stop": lambda: short("the", 3, stop=given),
        "turn": lambda: short.conversation()(given, 3),
    }
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            assert len(str(error)) > 20, name


def test_arguments_that_are_not_for_text(short):
    for options in (
        {"cache": 1},
        {"return_cache": True},
        {"padding_mask": [True]},
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": MAX},
        {"batch_size": 0},
        {"skip_special_tokens": 1},
        {"progress": "yes"},
        {"stop": ""},
        {"stop": [""]},
        {"stop": [1]},
        {"num_beam": 2},
        {"temperature": 2.0},
        {"prompt": ["a", "b", "c"], "batch_size": 2, "key": 3},
        {"prompt": ["a", "b", "c"], "batch_size": 2, "key": jax.random.split(KEY, 2)},
        {"prompt": ["a", "b", "c"], "batch_size": 2, "key": KEY, "temperature": [1.0, 2.0]},
    ):
        with pytest.raises(ValueError):
            short(**{"prompt": "the cat", **options})
    with pytest.raises(ValueError, match="TextEmbedder"):
        TextGenerator(None, short.tokenizer)
    with pytest.raises(ValueError, match="load_tokenizer"):
        TextGenerator(short.model, None)
    with pytest.raises(ValueError, match="variables are for messages"):
        short.choose("the", ["a", "b"], variables={"tools": []})
    for wrong in ({"num_beam": 2}, {"stop": ""}, {"skip_special_tokens": 1}):
        with pytest.raises(ValueError):
            short.conversation(**wrong)


def test_few_programs(text):
    """After a warm-up nothing is compiled for other lengths, batches, numbers and stop strings."""
    assert text.warm_up(24, 16, batch_size=4, key=KEY, temperature=0.5) > 0
    text.warm_up(24, 16, streams=True)
    text.warm_up(16, 16, stop="mat")

    keys = [jax.random.key(n) for n in range(4)]
    with count_compilations() as compiled:
        for n in (1, 2, 3):
            text(["the cat", "x", "was it?"][:n], 9 + n, key=keys[n], temperature=0.3 * n)
        text(["the cat", "x", "was it?", "y", "z"] * 2, 9, key=KEY, temperature=0.9, batch_size=4)
        list(text.stream("on a mat", 13, stop=["it"]))
        text("the cat", 12, stop=["it", "was"])
    assert compiled == []


@pytest.mark.parametrize("options", [{}, {"prompt_lookup": 2}, {"num_beams": 2}], ids=str)
def test_stop_strings_end_rows_in_the_compiled_loop(text, options):
    """Without it all rows are written to the end, and only cut afterwards."""
    free = text(PROMPTS[2], 24, **options)
    # Bytes that are no character are shown as a sign, which no token writes.
    stop = [free[i : i + 2] for i in range(5, len(free)) if "\ufffd" not in free[i : i + 2]][5]
    table = stop_table([stop, "never \x01"], text.tokenizer, V)
    ids = ids_of(text.tokenizer, PROMPTS[2])[None]
    new = text.model.generate(ids, 24, processors=[table], pad_token=7, **options)[
        0, ids.shape[1] :
    ]
    new = np.asarray(new).tolist()
    while new[-1] == 7:
        new.pop()
    decoded = [text.tokenizer.decode(ids[0].tolist() + new[:n]) for n in range(len(new) + 1)]
    begin = len(decoded[0])
    assert stop not in decoded[-2][begin:]
    if "num_beams" not in options:  # another beam may win without it
        assert len(new) < 24 and stop in decoded[-1][begin:]


def test_stop_strings_of_tokens_that_are_no_bytes_cut_the_text(tokenizer):
    """A tokenizer of words writes spaces between them, which no token has."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(V)}))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    text = TextGenerator(lm_of(), tokenizer_of(words))
    free = text("w1 w2", 8)
    assert stop_table([" w"], text.tokenizer, V) is None
    stop = free.split()[3]
    assert text("w1 w2", 8, stop=stop) == free[: free.find(stop)]


def test_a_score_needs_a_token_before_another(text):
    assert len(ids_of(text.tokenizer, "the")) == 1
    for call in (
        lambda: text.score("a"),
        lambda: text.score(["the cat", "a"]),
        lambda: text.score("", given="the cat"),
        lambda: text.score("he", given="t"),  # both are one token
    ):
        with pytest.raises(ValueError, match="token to score"):
            call()
    score = text.score("he cat", given="t")
    assert score == text.score("the cat") and (score.log_probs < 0).all()


def test_answers_with_the_same_tokens_are_refused():
    backend = byte_level()
    backend.normalizer = tokenizers.normalizers.Lowercase()
    text = TextGenerator(lm_of(), tokenizer_of(backend))
    with pytest.raises(ValueError, match="same tokens"):
        text.choose("the", [" Cat", " cat", " mat"])


def test_several_threads_share_a_stream(text):
    with text.stream(PROMPTS[0], 30, key=KEY) as stream:
        pieces, errors = [], []

        def read():
            try:
                pieces.extend(stream)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    whole = text(PROMPTS[0], 30, key=KEY)
    assert errors == [] and stream.text == whole and sorted("".join(pieces)) == sorted(whole)


def test_a_stop_string_that_the_first_token_loses():
    """Sentencepiece leaves out the space before a text, whose byte the table has seen."""
    text = TextGenerator(lm_of(), tokenizer_of(sentencepiece(), chat_template=TEMPLATE))
    space, word = (text.tokenizer.backend.token_to_id(x) for x in ("<0x20>", "\u2581the"))
    assert None not in (space, word)

    def force(logits, tokens, real):
        begun = (tokens == space).any(1, keepdims=True)
        return jnp.where(begun, logits.at[:, word].set(99.0), logits.at[:, space].set(99.0))

    one = [{"role": "user", "content": "x"}]
    free = text.chat(one, 4, logits_fn=force)
    assert free == " the the the"
    got = text.chat(one, 4, logits_fn=force, stop=" ", return_scores=True)
    streamed = text.chat_stream(one, 4, logits_fn=force, stop=" ")
    assert "".join(streamed) == got.text == free[: free.find(" ")]
    assert streamed.tokens == got.tokens


def test_a_prompt_may_begin_with_the_token_of_padding(tokenizer):
    """As GPT-2's texts do; it is no padding there, and nobody is warned."""
    model = with_origin(lm_of(), Origin("{}", special_tokens=SpecialTokens(end_token=(400,))))
    text = TextGenerator(model, tokenizer)
    assert tokenizer.end_token == 400
    got = text(["<|endoftext|>the cat", "x<|endoftext|>", "the cat"], 6)
    assert got[0] == text("<|endoftext|>the cat", 6) != got[2]
    with text.stream("<|endoftext|>the cat", 6) as stream:
        assert "".join(stream) == got[0]
