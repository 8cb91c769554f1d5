"""The settings for generation in a checkpoint: some are used, and a warning names the others.

`generate` uses special tokens and bans, because a model without them does not write as it was
trained to write. Beams, sampling and penalties are the choice of the caller. If a file asks for
some of them and the call does not, the tokens differ from those of transformers, which uses them
silently. Then a warning names them.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxformers.origin import Origin
from jaxformers.warn import warn_once


class Setting(NamedTuple):
    """An entry of generation_config.json that changes tokens and is not taken.

    Arguments:
        neutral: the values beside null with which it changes nothing.
        option: the option of `generate` that has its effect; "" if there is none.
        within: what it is without effect, "sampling" or "beams"; "" for an effect at all times.
    """

    neutral: tuple[Any, ...] = ()
    option: str = ""
    within: str = ""


SETTINGS = {
    "do_sample": Setting((False,), "key"),
    "temperature": Setting((1.0,), "temperature", "sampling"),
    "top_k": Setting((0,), "top_k", "sampling"),
    "top_p": Setting((1.0,), "top_p", "sampling"),
    "min_p": Setting((0.0,), "min_p", "sampling"),
    "typical_p": Setting((1.0,), "typical_p", "sampling"),
    "epsilon_cutoff": Setting((0.0,), "", "sampling"),
    "eta_cutoff": Setting((0.0,), "", "sampling"),
    "top_h": Setting((), "", "sampling"),
    "num_beams": Setting((1,), "num_beams"),
    "length_penalty": Setting((1.0,), "length_penalty", "beams"),
    "early_stopping": Setting((False,), "early_stopping", "beams"),
    "num_beam_groups": Setting((1,), "", "beams"),
    "diversity_penalty": Setting((0.0,), "", "beams"),
    "renormalize_logits": Setting((False,), "", "beams"),
    "num_return_sequences": Setting((1,), "num_return_sequences"),
    "repetition_penalty": Setting((1.0,), "repetition_penalty"),
    "no_repeat_ngram_size": Setting((0,), "no_repeat_ngram_size"),
    "min_length": Setting((0,), "min_new_tokens"),
    "min_new_tokens": Setting((0,), "min_new_tokens"),
    "stop_strings": Setting(([], ""), "stop_sequences"),
    "encoder_repetition_penalty": Setting((1.0,)),
    "encoder_no_repeat_ngram_size": Setting((0,)),
    "exponential_decay_length_penalty": Setting(),
    "sequence_bias": Setting(([], {})),
    "guidance_scale": Setting((1.0,)),
    "forced_decoder_ids": Setting(([],)),
    "force_words_ids": Setting(([],)),
    "constraints": Setting(([],)),
    "penalty_alpha": Setting((0.0,)),
    "dola_layers": Setting(),
    "token_healing": Setting((False,)),
    "watermarking_config": Setting(),
    "max_time": Setting(),
}

# Entries that change no token: lengths, which a call states; bookkeeping; how fast and with which
# outputs transformers computes; NaN, which is an error here.
WITHOUT_EFFECT = frozenset(
    """
    max_length max_new_tokens use_cache cache_implementation cache_config max_cache_len
    return_legacy_cache output_attentions output_hidden_states output_scores output_logits
    return_dict_in_generate remove_invalid_values is_assistant num_assistant_tokens
    num_assistant_tokens_schedule assistant_confidence_threshold assistant_early_exit
    assistant_lookbehind target_lookbehind assistant_ensemble_weight speculation_type use_mtp
    prompt_lookup_num_tokens max_matching_ngram_size low_memory prefill_chunk_size compile_config
    disable_compile continuous_batching_config transformers_version _from_model_config _commit_hash
    _original_object_hash model_type _num_labels generation_kwargs trust_remote_code
    """.split()
)

# Taken: see `hf/generation_config.py`.
TOKEN_KEYS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("forced_bos_token_id", "forced_eos_token_id", "bad_words_ids"),
    *("suppress_tokens", "begin_suppress_tokens"),
)


def is_set(name: str, value: Any) -> bool:
    """Returns whether an entry of `SETTINGS` has an effect.

    Example:
        >>> is_set("repetition_penalty", 1.0), is_set("repetition_penalty", 1.2)
        (False, True)
    """
    return value is not None and not any(
        value == x and isinstance(value, bool) == isinstance(x, bool)
        for x in SETTINGS[name].neutral
    )


@functools.lru_cache
def settings_of(origin: Origin) -> dict[str, Any]:
    """Returns the entries that change tokens and are not taken, by name.

    They are those of generation_config.json. A checkpoint without that file has them in
    config.json, where transformers looks for them then.
    """
    if origin.generation_config is None:
        entries, told = json.loads(origin.config), SETTINGS.keys()
    else:
        entries = json.loads(origin.generation_config)
        told = entries.keys() - WITHOUT_EFFECT - set(TOKEN_KEYS)
    unknown = told - SETTINGS.keys()
    known = {x: entries[x] for x in SETTINGS if x in entries and is_set(x, entries[x])}
    return known | {x: entries[x] for x in sorted(unknown) if entries[x]}


def neglected(settings: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings by which the tokens of a call are other than those it asks for.

    Arguments:
        settings: as `settings_of` gives them.
        options: of the call; what they say is the caller's choice.

    Example:
        >>> neglected({"num_beams": 4, "length_penalty": 2.0}, {"num_beams": 1})
        {}
        >>> neglected({"num_beams": 4, "length_penalty": 2.0}, {"num_beams": 3})
        {'length_penalty': 2.0}
    """
    samples = _is_said("key", options) or "do_sample" in settings
    searches = options.get("num_beams", settings.get("num_beams", 1)) != 1
    in_use = {"": True, "sampling": samples, "beams": searches}
    rows = {name: SETTINGS.get(name, Setting()) for name in settings}
    return {
        name: settings[name]
        for name, row in rows.items()
        if in_use[row.within] and not _is_said(row.option, options)
    }


def _is_said(option: str, options: Mapping[str, Any]) -> bool:
    """Returns whether a call says something about an option, if only None."""
    if option not in options:
        return False
    value = options[option]
    # Arguments of `generate` that are always there, with a default.
    if option in ("key", "top_k", "top_p", "temperature"):
        return value is not None and not (isinstance(value, int | float) and value == 1.0)
    return True


def warn_of_neglected(origin: Origin | None, options: Mapping[str, Any]) -> None:
    """Gives a warning that names the settings that a call neglects, if there are any."""
    found = {} if origin is None else neglected(settings_of(origin), options)
    if origin is None or not found:
        return
    file = "config.json" if origin.generation_config is None else "generation_config.json"
    says = {name: SETTINGS.get(name, Setting()).option for name in found}
    ways = {"key": "key=jax.random.key(0)", "stop_sequences": "stop_sequences=[[ids of the text]]"}
    passed = dict.fromkeys(
        ways.get(option, f"{option}={found.get(option, '...')!r:.40}")
        for option in says.values()
        if option
    )
    advice = [f"pass {', '.join(passed)}"] if passed else []
    without = [name for name, option in says.items() if not option and name in SETTINGS]
    unknown = [name for name in says if name not in SETTINGS]
    if without:
        advice.append(f"for {', '.join(without)} there is no option but a logits_fn of your own")
    if unknown:
        advice.append(f"{', '.join(unknown)} is not known here")
    listed = ", ".join(f"{name} = {value!r:.60}" for name, value in found.items())
    warn_once(
        f"{file} of this model's checkpoint asks for {listed}. generate takes special tokens from "
        "there and leaves these to you, so that tokens are other than those of transformers. If "
        f"you want them: {'; '.join(advice)}. Else pass what you want instead, or ignore this "
        "warning with warnings.filterwarnings."
    )


def complete(
    origin: Origin | None, options: Mapping[str, Any], is_beginning: bool
) -> dict[str, Any]:
    """Returns the options of a call with the special tokens of the model's checkpoint.

    Arguments:
        origin: where the model came from.
        options: of the call.
        is_beginning: whether the first new token is the second of its row. The checkpoint's
            `forced_first_token` is for that one alone, as in transformers.
    """
    if origin is None:
        return dict(options)
    own = origin.special_tokens._asdict()
    del own["start_token"]
    if not is_beginning:
        del own["forced_first_token"]
    if options.get("end_token") is not None:
        del own["forced_last_token"]  # whose purpose is to end as the checkpoint's texts do
    missing = {
        name: value
        for name, value in own.items()
        if value not in (None, ()) and options.get(name) is None
    }
    return {**options, **missing}
