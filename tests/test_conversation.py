"""A conversation gives the answers of `chat` with all messages, and reads only what is new."""

import jax
import pytest
from test_generation import count_compilations
from test_text_generator import KEY, lm_of, tokenizer_of
from test_token_text import byte_level, sentencepiece

from jaxformers import RotaryPositionalEncoding, TextGenerator
from jaxformers.generation import stream as stream_module

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)

tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("no_shape_checker", "quick_compilation")

TURNS = ["the cat sat?", "日本", "where was it, and why?", "x"]


def generator(make=byte_level, **pieces):
    tokenizer = tokenizer_of(make(), eos_token="<|endoftext|>", chat_template=TEMPLATE)
    return TextGenerator(lm_of(**pieces), tokenizer)


@pytest.fixture(scope="module")
def text():
    return generator(position=RotaryPositionalEncoding(), max_seq_length=400)


def answers_of_chat(text, turns, beginning=(), options=lambda turn: {}, length=12):
    messages, answers = list(beginning), []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        answers.append(text.chat(messages, length, **options(len(messages))))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


ROTARY = {"position": RotaryPositionalEncoding(), "max_seq_length": 400}
KINDS = {
    "rotary": ROTARY,
    "window": ROTARY | {"window": 7},
    "learned": {"learnable_pos": True, "num_kv_heads": 2, "max_seq_length": 400},
}


@pytest.mark.few(2)
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_is_the_chat_with_all_messages(make, kind):
    text = generator(make, **KINDS[kind])
    beginning = [{"role": "system", "content": "on a mat"}]
    chat = text.conversation(beginning)
    wanted = answers_of_chat(text, TURNS, beginning)
    assert [chat(turn, 12) for turn in TURNS] == wanted
    assert [x["role"] for x in chat.messages[:3]] == ["system", "user", "assistant"]
    assert [x["content"] for x in chat.messages[2::2]] == wanted


def test_only_what_is_new_is_read(text):
    chat = text.conversation()
    read = []
    for turn in TURNS * 2:
        before = chat.tokens_read
        chat(turn, 12, key=KEY, temperature=0.01)
        read.append(chat.tokens_read - before)
    prompt = text.tokenizer.apply_chat_template(chat.messages)
    # Without the cache the last turn alone would read about all of it.
    assert sum(read) < 1.3 * len(text.tokenizer.encode(prompt)[0])


def test_sampling_with_one_key(text):
    def options(turn):
        return {"key": jax.random.fold_in(KEY, turn - 1), "temperature": 1.5}

    chat = text.conversation(key=KEY, temperature=1.5)
    assert [chat(x, 12) for x in TURNS] == answers_of_chat(text, TURNS, options=options)
    assert len({chat("x", 12) for _ in range(3)}) == 3


def test_stop_strings_and_streams(text):
    free = text.conversation()(TURNS[0], 20, key=KEY)
    stop = free[3:5]
    chat = text.conversation(stop=stop)
    pieces = list(chat.stream(TURNS[0], 20, key=KEY))
    assert "".join(pieces) == free[: free.find(stop)] == chat.messages[-1]["content"]
    wanted = text.chat([*chat.messages, {"role": "user", "content": TURNS[1]}], 12, stop=stop)
    assert chat(TURNS[1], 12) == wanted


def test_an_answer_that_is_left_early_stays_as_far_as_it_came(text):
    chat = text.conversation()
    stream = chat.stream(TURNS[0], 20)
    begun = next(stream) + next(stream)
    assert chat(TURNS[1], 12)  # the next turn closes it
    assert chat.messages[1] == {"role": "assistant", "content": begun} and len(chat.messages) == 4
    assert list(stream) == []
    wanted = text.chat(chat.messages[:3], 12)
    assert chat.messages[3]["content"] == wanted


def test_a_conversation_that_outgrows_the_context_says_so():
    text = generator()  # 96 positions
    chat = text.conversation()
    chat("the cat", 10)
    with pytest.raises(ValueError, match="outgrown the model's context of 96 tokens.*reset"):
        chat("was it? " * 40)
    assert len(chat.messages) == 2
    stream = chat.stream("y")  # as many as fit
    list(stream)
    assert stream.finish_reason == "length"
    prompt = text.tokenizer.apply_chat_template(chat.messages[:-1])
    ids = text.tokenizer.encode(prompt, add_special_tokens=False)[0]
    assert len(ids) + len(stream.tokens) == 96
    with pytest.raises(ValueError, match="outgrown"):
        chat("z")
    chat.reset()
    assert chat.messages == [] and chat("the cat", 10)


def test_an_error_leaves_the_conversation_as_it_was(text):
    chat = text.conversation()
    first = chat(TURNS[0], 12)
    for message, options in (
        (3, {}),
        ("\ud800", {}),
        ("x", {"temperature": -1.0, "key": KEY}),
        ("x", {"num_beams": 2}),
        ("x", {"stop": [""]}),
        ({"content": "without a role", "x": object()}, {}),
    ):
        with pytest.raises(ValueError):
            chat(message, 12, **options)
    assert len(chat.messages) == 2
    assert [first, chat(TURNS[1], 12)] == answers_of_chat(text, TURNS[:2])
    with pytest.raises(ValueError, match="messages"):
        text.conversation("Be brief.")


def test_turns_of_the_same_sizes_compile_nothing(text):
    def talk():
        chat = text.conversation()
        return [chat(turn, 12) for turn in TURNS]

    first = talk()
    with count_compilations() as compiled:
        assert talk() == first
    assert compiled == []


def interrupt_at(monkeypatch, count, error=KeyboardInterrupt, lose_state=False):
    """Lets the computation of one of the next tokens fail, as it does if a user interrupts it."""
    advance, left = stream_module.advance_stream, [count]

    def interrupted(*arguments):
        left[0] -= 1
        if left[0] or lose_state:
            result = advance(*arguments)
        if left[0]:
            return result
        raise error

    monkeypatch.setattr(stream_module, "advance_stream", interrupted)


@pytest.mark.parametrize("lose_state", [False, True])
def test_an_interrupt_or_an_error_leaves_a_usable_conversation(text, monkeypatch, lose_state):
    chat = text.conversation()
    first = chat(TURNS[0], 12)
    for error in (KeyboardInterrupt, FloatingPointError):
        with monkeypatch.context() as patch:
            interrupt_at(patch, 5, error, lose_state)
            with pytest.raises(error):
                chat(TURNS[2], 12)
        assert len(chat.messages) == 2
    assert [first, chat(TURNS[1], 12)] == answers_of_chat(text, TURNS[:2])
    # What a stream has shown before an interrupt is the answer; after an error there is none.
    for error, count in ((KeyboardInterrupt, 6), (FloatingPointError, 6)):
        stream = chat.stream(TURNS[2], 12)
        with monkeypatch.context() as patch:
            interrupt_at(patch, 5, error, lose_state)
            with pytest.raises(error):
                list(stream)
        assert list(stream) == [] and len(chat.messages) == count
        assert stream.finish_reason is None
    wanted = text.chat([*chat.messages, {"role": "user", "content": "x"}], 12)
    assert chat("x", 12) == wanted


def test_messages_that_would_be_lost_are_refused(text):
    one = {"role": "user", "content": "x"}
    for wrong in (None, 3, one, iter([one])):
        with pytest.raises(ValueError, match="messages must be a list"):
            text.conversation(wrong)
    for wrong in (3, jax.random.split(KEY, 2)):
        with pytest.raises(ValueError, match="key must be"):
            text.conversation(key=wrong)("x", 4)
