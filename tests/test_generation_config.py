"""generation_config.json: bans and special tokens as transformers takes them, the rest named."""

import json
import shutil
import warnings

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from hf_checkpoints import make  # noqa: E402

import jaxformers  # noqa: E402
from jaxformers import Transformer, from_pretrained  # noqa: E402
from jaxformers.generation.checkpoint_settings import (  # noqa: E402
    SETTINGS,
    TOKEN_KEYS,
    WITHOUT_EFFECT,
    warn_of_neglected,
)
from jaxformers.origin import Origin  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_shape_checker")
torch.set_num_threads(1)

KEY, NEW = jax.random.key(0), 7
TOKENS = np.array([[8, 9, 30, 12, 25, 33, 41, 50, 11], [13, 14, 52, 44, 20, 19, 18, 9, 23]])
IDS = {"bos_token_id": 4, "eos_token_id": 7, "pad_token_id": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The directories of a decoder and of an encoder-decoder."""
    paths = {name: tmp_path_factory.mktemp(name) for name in ("llama", "bart")}
    for name, path in paths.items():
        make(name, path)
    return paths


@pytest.fixture
def checkpoint(made, tmp_path):
    """A function that gives a copy of a checkpoint whose generation_config.json has these entries.

    With None there is none; the entries of `config` are added to config.json.
    """
    count = iter(range(100))

    def write(name, entries, **config):
        path = tmp_path / str(next(count))
        shutil.copytree(made[name], path)
        written = json.loads((path / "config.json").read_text()) | config
        (path / "config.json").write_text(json.dumps(written))
        file = path / "generation_config.json"
        if entries is None:
            file.unlink()
        else:
            start = {"decoder_start_token_id": 5} if name == "bart" else {}
            file.write_text(json.dumps(IDS | start | entries))
        return path

    return write


def ours(path, tokens=TOKENS, model=None, **options):
    """The new tokens of our model, and those of the loop that streams."""
    model = from_pretrained(path) if model is None else model
    if isinstance(model, Transformer):
        return np.asarray(model.generate(tokens, NEW + 1, **options))[:, 1:]
    return np.asarray(model.generate(tokens, NEW, **options))[:, tokens.shape[1] :]


def theirs(path, tokens=TOKENS, **options):
    """The new tokens of transformers, filled up with padding."""
    kind = json.loads((path / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(path, dtype="float32")
    with torch.no_grad():
        out = model.generate(
            torch.tensor(tokens),
            attention_mask=torch.ones(tokens.shape, dtype=torch.int64),
            max_new_tokens=NEW,
            **options,
        ).numpy()
    new = out[:, 1 if kind.startswith("Bart") else tokens.shape[1] :]
    return np.pad(new, ((0, 0), (0, NEW - new.shape[1])), constant_values=3)


def both(path, copy, **options):
    """Our tokens, which are those of transformers, of the checkpoint and of it saved again."""
    model = from_pretrained(path)
    got = ours(path, model=model, **options)
    np.testing.assert_array_equal(got, theirs(path, **options))
    model.save_pretrained(copy)
    np.testing.assert_array_equal(ours(copy, **options), got)
    np.testing.assert_array_equal(theirs(copy, **options), got)
    return got


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_suppressed_tokens(name, checkpoint, tmp_path):
    """Ids that no vocabulary has may be among them, and the end token."""
    free = theirs(checkpoint(name, {}))
    common, first = free[:, 1:4].ravel().tolist(), free[:, 0].tolist()
    entries = {"suppress_tokens": [*common, 7], "begin_suppress_tokens": [*first, 10**6]}
    path = checkpoint(name, entries)
    got = both(path, tmp_path / "copy")
    assert not set(got.ravel()) & {*common, 7} and not set(got[:, 0]) & set(first)
    none = dict.fromkeys(entries, [])
    np.testing.assert_array_equal(ours(path, **none), free)


def test_bans_reach_every_way_to_generate(checkpoint, tmp_path):
    plain = from_pretrained(checkpoint("llama", {}))
    ids = ours(None, model=plain)[:, :2].ravel().tolist()
    path = checkpoint("llama", {"suppress_tokens": ids})
    model, wanted = from_pretrained(path), theirs(path)
    jaxformers.save(tmp_path / "native", model)
    for same, options in (
        (model, {"prompt_lookup": 2}),
        (plain, {"suppress_tokens": ids}),
        (jaxformers.load(tmp_path / "native"), {}),
    ):
        np.testing.assert_array_equal(ours(None, model=same, **options), wanted)
    streamed = np.stack(list(model.stream(TOKENS, NEW)), 1)
    np.testing.assert_array_equal(streamed, wanted[:, : streamed.shape[1]])
    assert not set(ours(None, model=model, key=KEY, temperature=9.0).ravel()) & set(ids)
    beams = ours(None, model=model, num_beams=3)
    np.testing.assert_array_equal(beams, theirs(path, num_beams=3))
    assert not np.array_equal(beams, theirs(checkpoint("llama", {}), num_beams=3))


def test_begins_are_suppressed_after_a_forced_token(checkpoint, tmp_path):
    free = theirs(checkpoint("bart", {"forced_bos_token_id": 9}))
    entries = {"forced_bos_token_id": 9, "begin_suppress_tokens": [9, *free[:, 1].tolist()]}
    got = both(checkpoint("bart", entries), tmp_path / "copy")
    assert set(got[:, 0]) == {9} and not set(got[:, 1]) & set(free[:, 1])


def test_a_forced_first_token_of_a_decoder_is_the_second_of_its_row(checkpoint):
    """So transformers has it; one that the call forces follows any prompt."""
    path = checkpoint("llama", {"forced_bos_token_id": 9})
    model, single = from_pretrained(path), TOKENS[:, :1]
    for tokens in (TOKENS, single):
        np.testing.assert_array_equal(ours(None, tokens, model), theirs(path, tokens))
    assert set(ours(None, single, model)[:, 0]) == {9}
    assert set(ours(None, model=model, forced_first_token=9)[:, 0]) == {9}
    turn = model.generate(TOKENS, 2, return_cache=True)
    more = model.generate(single, 3, cache=turn.cache)[:, 1:]
    longer = np.concatenate([turn.tokens, single], axis=1)
    np.testing.assert_array_equal(more, theirs(path, longer)[:, :3])


def test_one_of_several_forced_last_tokens(checkpoint):
    path = checkpoint("bart", {"forced_eos_token_id": [40, 21, 33]})
    assert from_pretrained(path).origin.special_tokens.forced_last_token == 21
    assert set(theirs(path)[:, -1]) == {21}


def test_older_files_of_bart_force_the_start_token_by_a_switch(checkpoint, tmp_path):
    switch = {"force_bos_token_to_be_generated": True}
    named = switch | IDS | {"decoder_start_token_id": 5}
    assert set(both(checkpoint("bart", None, **named), tmp_path / "copy")[:, 0]) == {4}
    for entries, config, wanted in (
        (None, named | {"forced_bos_token_id": None}, 4),
        (None, named | {"forced_bos_token_id": 9}, 9),
        (None, named | {"force_bos_token_to_be_generated": False}, None),
        ({}, switch, 1),  # that of config.json
        ({"forced_bos_token_id": None}, switch, None),
        ({"forced_bos_token_id": 8}, switch, 8),
    ):
        model = from_pretrained(checkpoint("bart", entries, **config))
        assert model.origin.special_tokens.forced_first_token == wanted


@pytest.mark.parametrize("key", ["suppress_tokens", "begin_suppress_tokens"])
def test_suppressed_tokens_of_wrong_types(key, checkpoint):
    for value in ["x", [1.0], [None], {"a": 1}, [[1]], True]:
        with pytest.raises(ValueError, match=f"^generation_config.json: {key} must be a token id"):
            from_pretrained(checkpoint("llama", {key: value}))
    model = from_pretrained(checkpoint("llama", {key: None}))
    for wrong in ([61], ["x"], [-1], 1.5, list(range(61))):
        with pytest.raises(ValueError, match=f"{key} must"):
            model.generate(TOKENS, 3, **{key: wrong})
    with pytest.raises(ValueError, match="force_bos_token_to_be_generated must be true or false"):
        from_pretrained(checkpoint("bart", {}, force_bos_token_to_be_generated=1))


# What is not taken.

SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
NEGLECTED = [
    ({"repetition_penalty": 1.2}, {}, ["repetition_penalty = 1.2", "pass repetition_penalty=1.2"]),
    ({"no_repeat_ngram_size": 3, "min_length": 5}, {}, ["no_repeat_ngram_size=3", "min_new_tok"]),
    ({"num_beams": 4, "length_penalty": 2.0, "early_stopping": True}, {},
     ["num_beams=4", "length_penalty=2.0", "early_stopping=True"]),
    ({"length_penalty": 2.0}, {"num_beams": 2}, ["length_penalty = 2.0"]),
    (SAMPLING, {}, ["do_sample = True", "temperature = 0.6", "key=jax.random.key"]),
    (SAMPLING, {"key": KEY, "temperature": 0.5}, ["pass top_p=0.9"]),
    ({"top_k": 5}, {"key": KEY}, ["top_k = 5"]),
    ({"encoder_repetition_penalty": 1.3, "sequence_bias": [[[3], -1.0]]}, {},
     ["for encoder_repetition_penalty, sequence_bias there is no option"]),
    ({"exponential_decay_length_penalty": [2, 1.1]}, {}, ["exponential_decay_length_penalty"]),
    ({"forced_decoder_ids": [[1, 5]], "guidance_scale": 2}, {}, ["forced_decoder_ids = [[1, 5]]"]),
    ({"stop_strings": ["."], "encoder_no_repeat_ngram_size": 2}, {}, ["stop_sequences="]),
    ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, {}, ["diversity_penalty"]),
    ({"penalty_alpha": 0.6, "top_k": 4}, {}, ["penalty_alpha"]),
    ({"a_new_cut": 0.3}, {}, ["a_new_cut = 0.3", "a_new_cut is not known here"]),
]  # fmt: skip


@pytest.mark.parametrize("entries, options, words", NEGLECTED, ids=str)
def test_what_is_not_taken_is_named(entries, options, words):
    with pytest.warns(UserWarning, match="^generation_config.json of this model's") as caught:
        warn_of_neglected(Origin("{}", json.dumps(entries)), options)
    for word in words:
        assert word in str(caught[0].message)


def test_the_first_call_with_other_tokens_warns(checkpoint):
    """Once, at the line of the user; the model itself warns of nothing."""
    model = from_pretrained(checkpoint("llama", {"repetition_penalty": 1.2}))
    model.score(TOKENS)
    for call in (
        lambda: model.generate(TOKENS, 2),
        lambda: model.generate(TOKENS, 2, num_beams=2),
        lambda: list(model.stream(TOKENS, 2)),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(), call()
        (warning,) = caught
        assert warning.category is UserWarning and warning.filename == __file__
    for _ in range(2):  # where warnings are errors
        with pytest.raises(UserWarning, match="asks for repetition_penalty = 1.2"):
            model.generate(TOKENS, 2)


UNCHANGED = [
    ({"temperature": 0.6, "top_p": 0.9, "top_k": 50, "do_sample": False}, {}),
    ({"num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 3.0, "min_length": 0}, {}),
    ({"max_length": 20, "max_new_tokens": 9, "transformers_version": "4.4", "use_cache": True}, {}),
    ({"bad_words_ids": [[3, 4]], "forced_eos_token_id": 7, "suppress_tokens": []}, {}),
    ({"num_beams": 4, "length_penalty": 2.0}, {"num_beams": 1}),
    ({"repetition_penalty": 1.2, "min_new_tokens": 3}, {"repetition_penalty": 1.0,
                                                        "min_new_tokens": None}),
    (SAMPLING, {"key": KEY, "temperature": 0.5, "top_p": 0.9}),
    ({"chat_format": None, "_from_model_config": True}, {}),
]  # fmt: skip


@pytest.mark.parametrize("entries, options", UNCHANGED, ids=str)
def test_what_changes_nothing_is_not_named(entries, options):
    warn_of_neglected(Origin("{}", json.dumps(entries)), options)


def test_without_the_file_config_json_says_it(checkpoint, tmp_path):
    """Beside the file transformers would read nothing of it, so the saved file has it all."""
    said = {"num_beams": 3, "no_repeat_ngram_size": 2, "length_penalty": 0.5, "min_length": 4}
    said |= {"suppress_tokens": [9, 12], "forced_eos_token_id": 7, "sequence_bias": [[[5], -1.0]]}
    path = checkpoint("bart", None, **IDS, **said, decoder_start_token_id=5, repetition_penalty=1.0)
    model = from_pretrained(path)
    with pytest.warns(UserWarning, match="^config.json of .* num_beams = 3, length_penalty = 0.5"):
        assert not set(ours(None, model=model).ravel()) & {9, 12}
    model.save_pretrained(tmp_path / "copy")
    written = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert written == IDS | said | {"decoder_start_token_id": 5}
    np.testing.assert_array_equal(theirs(tmp_path / "copy"), theirs(path))


def test_every_entry_of_transformers_is_taken_named_or_without_effect():
    known = SETTINGS.keys() | WITHOUT_EFFECT | set(TOKEN_KEYS)
    own = transformers.GenerationConfig().to_dict().keys()
    assert own - known == set()
