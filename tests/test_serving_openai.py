"""The official client of OpenAI against the server, with a tiny model and the real engine."""

import asyncio
import base64
import json
import re
import threading
import time
import typing
from functools import partial

import jax
import numpy as np
import pytest
from test_cli import encoder_of
from test_text_generator import TEMPLATE, V, lm_of, tokenizer_of
from test_token_text import byte_level

from jaxformers import (
    JSONSchema,
    RotaryPositionalEncoding,
    TextEmbedder,
    TextGenerator,
    Transformer,
)
from jaxformers.hf.load import with_origin
from jaxformers.origin import Origin, SpecialTokens

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
from serving import serving  # noqa: E402

from jaxformers.serving.embeddings import Embedder  # noqa: E402
from jaxformers.serving.engine import Engine  # noqa: E402
from jaxformers.serving.errors import Refused  # noqa: E402
from jaxformers.serving.fields import Fields  # noqa: E402
from jaxformers.serving.generator import Generator  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_shape_checker", "quick_compilation")
HELLO = [{"role": "user", "content": "the cat sat"}]
TEXTS = ["w1 w2", "w3", "w4 w5 w6"]


@pytest.fixture(scope="module")
def text():
    tokenizer = tokenizer_of(byte_level(), eos_token="<|endoftext|>", chat_template=TEMPLATE)
    return TextGenerator(lm_of(position=RotaryPositionalEncoding()), tokenizer)


@pytest.fixture(scope="module")
def embedder():
    return TextEmbedder(*encoder_of(9))


@pytest.fixture(scope="module")
def server(text, embedder):
    engine = Engine(text.model, rows=4, waiting=12)
    engine.start()
    with serving(Generator("tiny", text, engine, 12), Embedder("vectors", embedder)) as running:
        running.engine = engine
        yield running


@pytest.fixture(scope="module")
def client(server):
    url = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def chat(client):
    return partial(client.chat.completions.create, model="tiny", messages=HELLO, max_tokens=12)


def test_models(client):
    assert [x.id for x in client.models.list()] == ["tiny", "vectors"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")


def test_chat(chat, text):
    found = chat(temperature=0)
    wanted = text.chat(HELLO, 12, return_scores=True)
    [choice] = found.choices
    assert choice.message.content == wanted.text and choice.finish_reason == wanted.finish_reason
    assert found.usage.prompt_tokens == wanted.prompt_tokens
    assert found.usage.completion_tokens == len(wanted.tokens)
    stream = chat(temperature=0, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(x.choices[0].delta.content or "" for x in chunks[:-1]) == wanted.text
    assert chunks[-1].usage == found.usage


def test_stop(chat, text):
    whole = text.chat(HELLO, 12)
    stop = whole[len(whole) // 2 :][:2]
    wanted = text.chat(HELLO, 12, stop=stop)
    found = chat(temperature=0, stop=[stop, "nowhere"]).choices[0]
    assert (found.message.content, found.finish_reason) == (wanted, "stop") and wanted != whole


def test_log_probs(chat, text):
    wanted = text.chat(HELLO, 12, return_scores=True)
    listed = chat(temperature=0, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    got = [x.logprob for x in listed]
    np.testing.assert_allclose(got, wanted.log_probs[: len(got)], rtol=1e-4, atol=1e-4)
    assert len(got) >= len(wanted.tokens) - 1
    assert all(x.top_logprobs[0].logprob == pytest.approx(x.logprob) for x in listed)
    assert all(len(x.top_logprobs) == 3 for x in listed)


def test_the_seed_is_that_of_generate(client, chat, text):
    options = {"temperature": 1.3, "top_p": 0.9}
    wanted = [text.chat(HELLO, 12, key=jax.random.key(s), **options) for s in (5, 6)]
    assert [chat(seed=s, **options).choices[0].message.content for s in (5, 6)] == wanted
    key = jax.random.key(9)
    several = text.chat([HELLO] * 3, 12, key=key, **options)
    found = chat(seed=9, n=3, **options).choices
    assert [x.message.content for x in found] == several and len(set(several)) == 3
    prompts = ["the cat sat", "where", "a mat"]
    wanted = text(prompts, 8, key=key, temperature=0.7, top_k=20, presence_penalty=0.5)
    found = client.completions.create(
        model="tiny",
        prompt=prompts,
        max_tokens=8,
        seed=9,
        temperature=0.7,
        presence_penalty=0.5,
        extra_body={"top_k": 20},
    )
    assert [x.text for x in found.choices] == wanted


SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 22]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def format_of(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


def test_json_schema(chat, text):
    given = {"temperature": 1.5, "max_tokens": 40}
    found = chat(seed=3, response_format=format_of(SCHEMA), **given).choices[0]
    value = json.loads(found.message.content)
    assert found.finish_reason == "stop" and value["a"] in (1, 22) and len(value) == 2
    options = {"key": jax.random.key(3), "temperature": 1.5}
    wanted = text.chat(HELLO, 40, constraint=JSONSchema(SCHEMA, text.tokenizer), **options)
    assert found.message.content == wanted


def test_a_model_of_pydantic(client):
    pydantic = pytest.importorskip("pydantic")

    class Answer(pydantic.BaseModel):
        a: typing.Literal[1, 22]
        b: bool

    found = client.chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Answer, max_tokens=40, seed=4
    )
    assert found.choices[0].message.parsed.a in (1, 22)


def test_the_asynchronous_client(server, text):
    """It leaves a stream, whose row is free then."""

    async def talk():
        url = f"http://127.0.0.1:{server.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:
            given = {"model": "tiny", "prompt": "where", "temperature": 0}
            stream = await client.completions.create(**given, max_tokens=3000, stream=True)
            async for chunk in stream:
                if chunk.choices[0].text:
                    break
            await stream.close()
            several = [client.completions.create(**given, max_tokens=n) for n in (9, 4, 7)]
            return [x.choices[0].text for x in await asyncio.gather(*several)]

    assert asyncio.run(talk()) == [text("where", n) for n in (9, 4, 7)]
    end = time.monotonic() + 60
    while server.engine.counts()["busy"]:
        assert time.monotonic() < end


def test_recursive_schemas_and_any_object(chat):
    pytest.importorskip("llguidance")
    node = {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}
    found = chat(
        seed=1,
        response_format=format_of(
            {
                **SCHEMA,
                "properties": {"a": {"$ref": "#/$defs/node"}, "b": {"type": "null"}},
                "$defs": {
                    "node": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/list"}]},
                    "list": {**node, "items": {"$ref": "#/$defs/node"}},
                },
            }
        ),
        max_tokens=60,
    )
    if found.choices[0].finish_reason == "stop":
        assert list(json.loads(found.choices[0].message.content)) == ["a", "b"]
    text = chat(seed=1, response_format={"type": "json_object"}).choices[0].message.content
    assert text.lstrip().startswith("{")


def test_completions_as_events(client, text):
    stream = client.completions.create(
        model="tiny", prompt="where", max_tokens=9, temperature=0, stream=True
    )
    assert "".join(x.choices[0].text for x in stream) == text("where", 9)


def test_embeddings(client, embedder):
    wanted = embedder(TEXTS)
    found = client.embeddings.create(model="vectors", input=TEXTS)
    np.testing.assert_allclose([x.embedding for x in found.data], wanted, rtol=1e-6, atol=1e-6)
    assert found.usage.prompt_tokens == 6 and [x.index for x in found.data] == [0, 1, 2]
    numbers = client.embeddings.create(model="vectors", input=TEXTS[0], encoding_format="float")
    np.testing.assert_allclose(numbers.data[0].embedding, wanted[0], rtol=1e-6, atol=1e-6)
    ids = client.embeddings.create(model="vectors", input=[[1, 2], [3]])
    np.testing.assert_allclose([x.embedding for x in ids.data], wanted[:2], rtol=1e-6, atol=1e-6)
    short = client.embeddings.create(model="vectors", input=TEXTS, dimensions=5)
    np.testing.assert_allclose(
        [x.embedding for x in short.data],
        embedder(TEXTS, truncate_dim=5, normalize=True),
        rtol=1e-6,
        atol=1e-6,
    )
    raw = client.embeddings.with_raw_response.create(
        model="vectors", input=TEXTS[1], encoding_format="base64"
    )
    content = json.loads(raw.content)["data"][0]["embedding"]
    # Alone as in the request: rows of another batch are summed in another order.
    np.testing.assert_allclose(
        np.frombuffer(base64.b64decode(content), "<f4"), embedder(TEXTS[1]), rtol=1e-6
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"input": ""},
        {"input": []},
        {"input": ["a", 1]},
        {"input": [[40]]},
        {"input": [[]]},
        {"input": "w1 " * 10},
        {"input": "a", "dimensions": 13},
        {"input": "a", "model": "tiny"},
    ],
    ids=range(8),
)
def test_wrong_embeddings(client, fields):
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(**{"model": "vectors", **fields})
    assert caught.value.body["param"] in fields


def test_a_default_prompt_is_counted():
    prompts = {"document": "w1 w2 w3 "}
    model = TextEmbedder(*encoder_of(9), prompts=prompts, default_prompt="document")
    embedder = Embedder("vectors", model)
    try:
        found = asyncio.run(embedder.embed(Fields({"input": "w4 w5"})))
        assert found["usage"]["prompt_tokens"] == 5
        np.testing.assert_allclose(found["data"][0]["embedding"], model("w4 w5"), rtol=1e-5)
        with pytest.raises(Refused, match="has 10 tokens"):
            asyncio.run(embedder.embed(Fields({"input": "w4 " * 7})))
    finally:
        embedder.close()


def test_every_field_of_embeddings_is_known(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="vectors", input="w1", extra_body={"zzz": 1})
    known = re.findall(r"\w+", caught.value.body["message"])
    assert set(openai.types.EmbeddingCreateParams.__annotations__) <= set(known)


def test_errors(client, chat):
    with pytest.raises(openai.NotFoundError) as caught:
        chat(model="gpt-5")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        chat(max_tokens=10**6)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="embeddings alone"):
        chat(model="vectors")
    with pytest.raises(openai.BadRequestError, match="n must be"):
        chat(n=0)
    with pytest.raises(openai.BadRequestError, match="at most 12 answers"):
        chat(n=13)


def test_many_clients_at_once(client, text, server):
    """Each gets what it gets alone, and those beyond the queue are told to come again."""
    prompts = [f"the cat {i} sat" for i in range(12)]
    wanted = [text(x, 10) for x in prompts]
    got, refused = [None] * len(prompts), []

    def ask(i):
        while got[i] is None:
            try:
                answer = client.completions.create(
                    model="tiny", prompt=prompts[i], max_tokens=10, temperature=0, n=1 + i % 3
                )
                got[i] = {x.text for x in answer.choices}
            except openai.RateLimitError as error:
                refused.append(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert got == [{x} for x in wanted]
    assert server.engine.counts()["busy"] == 0


def test_an_encoder_decoder(text):
    """Its prompts are sources, and it keeps to what its checkpoint forces and forbids."""
    sizes = {"d_model": 24, "num_heads": 4, "d_ff": 40, "max_seq_length": 40}
    sizes |= {"num_encoder_layers": 1, "num_decoder_layers": 2}
    model = Transformer(V, V, **sizes, dropout_rate=0.0, key=jax.random.key(2))
    special = SpecialTokens(3, (400,), 400, 7, None, ((9,), (400,)), (11, 12), (13,))
    model = with_origin(model, Origin("{}", special_tokens=special))
    pair = TextGenerator(model, text.tokenizer)
    engine = Engine(model, rows=2)
    engine.start()
    with serving(Generator("pair", pair, engine, 4)) as server:
        prompts = ["the cat sat", "where was it?"]
        status, found = server.post(
            "/v1/completions", model="pair", prompt=prompts, max_tokens=9, temperature=0
        )
        assert status == 200 and [x["text"] for x in found["choices"]] == pair(prompts, 9)
        assert found["usage"]["prompt_tokens"] == sum(
            len(np.asarray(text.tokenizer.encode(x)[0])) for x in prompts
        )
        asked = {"model": "pair", "prompt": "the cat " * 40}
        assert (
            server.post("/v1/completions", **asked)[1]["error"]["code"] == "context_length_exceeded"
        )
