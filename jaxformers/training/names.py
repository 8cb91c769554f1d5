"""What the arguments of a training and the arrays of a batch are called elsewhere.

Hugging Face's Trainer, PyTorch, fairseq, T5X and MaxText have other names for the same things. Each
table gives, for such a name, the ones here: the first that exists where it was used is meant.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import ParamSpec, TypeVar

from jaxformers.checks import explain_options

Names = Mapping[str, tuple[str, ...]]
P = ParamSpec("P")
R = TypeVar("R")


def _table(**elsewhere: str) -> Names:
    """The names here, by a name elsewhere."""
    found: dict[str, tuple[str, ...]] = {}
    for here, names in elsewhere.items():
        for name in names.split():
            found[name] = *found.get(name, ()), here
    return found


ARGUMENTS = _table(
    model="net network module params parameters weights",
    optimizer="optim opt tx optimizers learning_rate lr weight_decay max_grad_norm lr_scheduler "
    "schedule scheduler",
    state="opt_state optimizer_state optim_state",
    batch="data inputs example",
    eval_batches="eval_dataset eval_data eval_dataloader val_batches val_data val_dataset "
    "val_dataloader val_loader valid_batches validation_data validation_batches test_batches",
    batches="data dataset train_dataset train_data train_batches train_dataloader dataloader "
    "data_loader loader train_loader eval_dataset eval_data val_data eval_batches val_batches "
    "batch_size",
    loss="loss_fn loss_function lossfn criterion objective",
    eval_loss="eval_loss_fn compute_metrics metrics",
    steps="num_steps n_steps max_steps total_steps train_steps num_train_steps iterations "
    "num_iterations max_iters epochs num_epochs n_epochs num_train_epochs",
    eval_every="eval_steps eval_interval eval_freq eval_frequency val_every validate_every "
    "log_every logging_steps",
    key="seed rng rngs prng_key rng_key random_key dropout_key random_state",
    checkpoint="checkpoints checkpoint_dir checkpoint_every ckpt ckpt_dir output_dir save_dir "
    "save_every save_steps resume resume_from_checkpoint",
    callbacks="callback hooks on_step",
    log="logdir log_dir logging_dir logger metrics_file tensorboard report_to",
    progress="progress_bar show_progress verbose disable_tqdm tqdm quiet",
    bad_steps="skip_nan skip_nonfinite nan_policy",
    compute_dtype="dtype precision mixed_precision bf16 fp16 amp",
    accumulate="accumulation accumulation_steps accum_steps grad_accum grad_accum_steps "
    "gradient_accumulation gradient_accumulation_steps accumulate_grad_batches microbatches",
    count="count_fn weight weight_fn num_items_in_batch",
)

ARRAYS = _table(
    tokens="input_ids inputs input input_tokens token_ids ids idx x text src src_tokens",
    src="input_ids inputs input input_tokens token_ids ids x source src_tokens src_ids source_ids "
    "tokens encoder_inputs encoder_input_ids encoder_input_tokens",
    tgt="decoder_input_ids decoder_inputs decoder_input_tokens prev_output_tokens tgt_tokens "
    "tgt_in target_ids decoder_ids",
    targets="labels label label_ids lm_labels masked_lm_labels target target_tokens y outputs tgt "
    "decoder_target_tokens decoder_labels next_tokens",
    padding_mask="attention_mask mask input_mask pad_mask attn_mask key_padding_mask "
    "src_padding_mask src_key_padding_mask encoder_attention_mask",
    src_padding_mask="attention_mask mask input_mask padding_mask pad_mask key_padding_mask "
    "src_mask src_key_padding_mask memory_key_padding_mask encoder_attention_mask "
    "encoder_padding_mask",
    tgt_padding_mask="decoder_attention_mask decoder_padding_mask tgt_mask tgt_key_padding_mask "
    "target_padding_mask",
    loss_mask="label_mask labels_mask target_mask targets_mask loss_weights target_weights weights "
    "decoder_loss_weights completion_mask assistant_mask assistant_masks mlm_mask masked_positions",
    positions="position_ids position pos inputs_position decoder_position_ids",
    segment_ids="seq_idx segments segmentation document_ids doc_ids sequence_ids "
    "inputs_segmentation",
    token_types="token_type_ids token_type type_ids",
)

# What a new name alone does not mend.
LABELS = {
    "a language model": "Hugging Face's labels repeat the tokens, and its models shift them; here "
    "targets[:, i] is the token after tokens[:, i]: pass text[:, :-1] as tokens and text[:, 1:] as "
    "targets.",
    "an encoder-decoder": "tgt is what the decoder reads: the start token, then the labels but for "
    "the last.",
    "a masked language model": "loss_mask says which tokens were masked: labels != -100.",
}
MASKS = "A mask is boolean and True where a token is real or a target counts: write mask == 1"
OTHER_MASKS = "PyTorch's key_padding_mask is True where there is padding: write ~mask"


def among(known: Collection[str], table: Names) -> Names:
    """What each name of a table means where there are certain names: one of those, or nothing."""
    return {name: tuple(x for x in here if x in known)[:1] for name, here in table.items()}


def explain_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function, so that an error explains an argument that it does not have."""
    return explain_options(function, among(inspect.signature(function).parameters, ARGUMENTS))


def advise(unknown: Iterable[str], of: str) -> str:
    """What to mind when arrays of a batch are renamed.

    Arguments:
        unknown: their names.
        of: what the batch is of, such as "a language model".
    """
    advice = []
    meant = {name: ARRAYS.get(name, ()) for name in unknown}
    if any("targets" in here for here in meant.values()):
        advice.append(LABELS[of])
    if any(name.endswith("key_padding_mask") for name in meant):
        advice.append(OTHER_MASKS + ".")
    elif any(here and here[0].endswith("mask") for here in meant.values()):
        advice.append(MASKS + ".")
    return " ".join(advice)
