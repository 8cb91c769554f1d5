"""Every default of every family's table is that of transformers' class: files hold differences."""

import dataclasses
import json

import pytest

transformers = pytest.importorskip("transformers")

from jaxformers.hf.families import FAMILIES  # noqa: E402
from jaxformers.hf.load import read_settings  # noqa: E402

IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


class NoTensors:
    """A checkpoint of which nothing but config.json is looked at."""

    bare = False

    def has(self, name):
        return False

    def merge(self, copy, of):
        return True

    def choose(self, names, name):
        pass


@pytest.fixture
def written():
    """A function that gives all entries of a family's default configuration."""

    def entries(model_type):
        config = transformers.CONFIG_MAPPING[model_type]()
        return json.loads(config.to_json_string(use_diff=False))

    return entries


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_file_without_settings_means_the_defaults(model_type, written):
    family = FAMILIES[model_type]
    empty = read_settings(family, {"model_type": model_type}, NoTensors())
    full = read_settings(family, written(model_type), NoTensors())
    assert dataclasses.asdict(empty) == dataclasses.asdict(full)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_special_tokens_are_the_defaults(model_type, written):
    entries = written(model_type)
    assert {key: FAMILIES[model_type].special.get(key) for key in IDS} == {
        key: entries.get(key) for key in IDS
    }


@pytest.mark.parametrize("model_type", FAMILIES)
def test_classes_are_those_of_transformers(model_type):
    for name in FAMILIES[model_type].classes.values():
        assert getattr(transformers, name).config_class.model_type == model_type
