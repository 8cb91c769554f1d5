"""Names that other libraries use: the error says which one is meant here."""

import inspect

import jax
import numpy as np
import pytest

from jaxformers import (
    AdamW,
    OutputLayer,
    Transformer,
    TransformerEncoder,
    TransformerLM,
    evaluate,
    fit,
    language_model_loss,
    masked_language_model_loss,
    sequence_to_sequence_loss,
    train_step,
)
from jaxformers.checks import OptionError, explain_options
from jaxformers.elsewhere import ARGUMENTS, ARRAYS

pytestmark = pytest.mark.usefixtures("no_shape_checker")
KEY = jax.random.key(3)
IDS = np.ones((2, 5), np.int32)


def language_model():
    return TransformerLM(17, 12, 3, 1, 20, 6, key=KEY)


def encoder_decoder():
    return Transformer(17, 17, 12, 3, 1, 1, 20, 6, key=KEY)


def encoder():
    return TransformerEncoder(17, 12, 3, 1, 20, 6, output=OutputLayer, key=KEY)


@pytest.mark.few(5)
@pytest.mark.parametrize(
    ("build", "loss", "given", "words"),
    [
        (
            language_model,
            language_model_loss,
            "input_ids attention_mask labels position_ids",
            "has no array 'attention_mask', 'input_ids', 'labels', 'position_ids'. Did you mean "
            "'padding_mask' for 'attention_mask', 'tokens' for 'input_ids', 'targets' for "
            "'labels', 'positions' for 'position_ids'? Hugging Face's labels repeat the tokens, "
            "and its models shift them; here targets[:, i] is the token after tokens[:, i]",
        ),
        (language_model, language_model_loss, "input_ids targets", "Did you mean 'tokens'? Its "),
        (language_model, language_model_loss, "tokens targets segment_id", "mean 'segment_ids'?"),
        (language_model, language_model_loss, "tokens labls", "Did you mean 'targets'?"),
        (language_model, language_model_loss, "src tgt", "'tokens' for 'src', 'targets' for 'tgt'"),
        (language_model, language_model_loss, "tokens targets token_type_ids", "type_ids'. Its"),
        (
            encoder_decoder,
            sequence_to_sequence_loss,
            "input_ids attention_mask decoder_input_ids decoder_attention_mask labels",
            "'src_padding_mask' for 'attention_mask', 'tgt_padding_mask' for "
            "'decoder_attention_mask', 'tgt' for 'decoder_input_ids', 'src' for 'input_ids', "
            "'targets' for 'labels'? tgt is what the decoder reads",
        ),
        (
            encoder_decoder,
            sequence_to_sequence_loss,
            "src tgt targets src_key_padding_mask",
            "Did you mean 'src_padding_mask'? PyTorch's key_padding_mask is True where there is",
        ),
        (encoder_decoder, sequence_to_sequence_loss, "tokens tgt targets", "Did you mean 'src'?"),
        (
            encoder,
            masked_language_model_loss,
            "input_ids token_type_ids attention_mask labels",
            "'padding_mask' for 'attention_mask', 'tokens' for 'input_ids', 'targets' for "
            "'labels', 'token_types' for 'token_type_ids'? loss_mask says which tokens were masked",
        ),
    ],
)
def test_arrays_of_a_batch(build, loss, given, words):
    batch = {name: IDS for name in given.split()}
    with pytest.raises(OptionError) as error:
        evaluate(build(), [batch], loss=loss)
    assert words in str(error.value)
    with pytest.raises(ValueError) as error:
        fit(build(), AdamW(1e-3), [batch], loss=loss, steps=1, key=KEY, progress=False)
    assert words in str(error.value)


REST = {"loss": language_model_loss, "key": KEY}


@pytest.mark.parametrize(
    ("function", "given", "meant"),
    [
        (fit, "stesp", "steps"),
        (fit, "max_steps", "steps"),
        (fit, "num_epochs", "epochs"),
        (fit, "logging_steps", "callbacks"),
        (fit, "eval_step", "eval_every"),
        (fit, "validation_data", "eval_batches"),
        (fit, "eval_dataset", "eval_batches"),
        (fit, "train_dataset", "batches"),
        (fit, "gradient_accumulation_steps", "accumulate"),
        (fit, "loss_fn", "loss"),
        (fit, "seed", "key"),
        (fit, "checkpoints", "checkpoint"),
        (fit, "lr", "optimizer"),
        (fit, "calback", "callbacks"),
        (fit, "gradient_clip", "optimizer"),
        (fit, "warmup_steps", "optimizer"),
        (fit, "shuffle", "batches"),
        (train_step, "acumulate", "accumulate"),
        (train_step, "opt_state", "state"),
        (train_step, "rng", "key"),
        (evaluate, "loss_fn", "loss"),
        (evaluate, "eval_batches", "batches"),
        (evaluate, "cuont", "count"),
    ],
)
def test_arguments(function, given, meant):
    """Whatever else is missing."""
    with pytest.raises(
        TypeError, match=f"{function.__name__} has no option '{given}'.*{meant}'\\?"
    ):
        function(**{given: 3})


def test_an_argument_that_nobody_means():
    with pytest.raises(OptionError, match="fit has no option 'zzz'. Its options are: accumulate,"):
        fit(language_model(), AdamW(1e-3), [], steps=1, **REST, zzz=3)


@pytest.mark.parametrize("given", ["gradient_noise", "device", "warm_restarts"])
def test_what_is_not_near_is_not_suggested(given):
    """Such as accumulate, since elsewhere that is called gradient_accumulation."""
    with pytest.raises(OptionError, match=f"fit has no option '{given}'. Its options are"):
        fit(**{given: 3})


def test_arrays_without_a_name_are_no_crash():
    with pytest.raises(OptionError, match="a language model has no array '1'. Its arrays are"):
        language_model_loss(language_model(), {1: IDS, "tokens": IDS})


def test_every_suggestion_exists():
    functions = fit, train_step, evaluate
    known = {name for function in functions for name in inspect.signature(function).parameters}
    assert {name for here in ARGUMENTS.values() for name in here} == known
    arrays = "tokens targets padding_mask loss_mask positions segment_ids token_types"
    arrays += " src tgt src_padding_mask tgt_padding_mask"
    assert {name for here in ARRAYS.values() for name in here} == set(arrays.split())


def test_a_function_that_suggests_names_is_as_before():
    assert list(inspect.signature(fit).parameters)[:3] == [
        "model",
        "optimizer",
        "batches",
    ]
    assert inspect.signature(fit).parameters["eval_every"].default == 500
    assert fit.__doc__.startswith("Trains a model")

    @explain_options
    def add(a, /, b, *, c=3):
        return a + b + c

    assert add(1, 2) == 6 and add(1, b=2, c=4) == 7
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'b'"):
        add(1)
    with pytest.raises(TypeError, match="takes 2 positional arguments"):
        add(1, 2, 3)
