"""Names of other libraries, with the names here that have the same meaning.

Hugging Face's libraries, PyTorch, fairseq, T5X and MaxText have other names for the same things.
Each table maps such a name to names here. An error suggests the first of them that is an option of
the function that was called.
"""

from collections.abc import Mapping

Names = Mapping[str, tuple[str, ...]]


def table(**elsewhere: str) -> dict[str, tuple[str, ...]]:
    """Returns the names here by each name elsewhere; an argument lists the latter in one text."""
    found: dict[str, tuple[str, ...]] = {}
    for here, names in elsewhere.items():
        for name in names.split():
            found[name] = *found.get(name, ()), here
    return found


# The arguments of `fit`, `train_step`, `evaluate`.
ARGUMENTS = table(
    model="net network module params parameters weights",
    optimizer="optim opt tx optimizers learning_rate lr weight_decay max_grad_norm lr_scheduler "
    "schedule scheduler warmup warmup_steps warmup_ratio num_warmup_steps betas grad_clip "
    "gradient_clip clip_norm grad_clip_norm gradient_clip_val gradient_clip_norm max_norm",
    state="opt_state optimizer_state optim_state",
    batch="data inputs example",
    eval_batches="eval_dataset eval_data eval_dataloader val_batches val_data val_dataset "
    "val_dataloader val_loader valid_batches validation_data validation_batches test_batches",
    batches="data dataset train_dataset train_data train_batches train_dataloader dataloader "
    "data_loader loader train_loader eval_dataset eval_data val_data eval_batches val_batches "
    "batch_size shuffle",
    loss="loss_fn loss_function lossfn criterion objective",
    eval_loss="eval_loss_fn compute_metrics metrics",
    steps="num_steps n_steps max_steps total_steps train_steps num_train_steps iterations "
    "num_iterations max_iters",
    epochs="num_epochs n_epochs num_train_epochs max_epochs epoch",
    eval_weights="eval_params ema ema_params ema_decay ema_weights averaged_weights use_ema swa",
    eval_every="eval_steps eval_interval eval_freq eval_frequency val_every validate_every",
    key="seed rng rngs prng_key rng_key random_key dropout_key random_state",
    checkpoint="checkpoints checkpoint_dir checkpoint_every ckpt ckpt_dir output_dir save_dir "
    "save_every save_steps resume resume_from_checkpoint",
    callbacks="callback hooks on_step early_stopping log_every logging_steps log_every_n_steps "
    "on_log loggers",
    log="logdir log_dir logging_dir logger metrics_file tensorboard report_to",
    progress="progress_bar show_progress verbose disable_tqdm tqdm quiet",
    bad_steps="skip_nan skip_nonfinite nan_policy",
    compute_dtype="dtype precision mixed_precision bf16 fp16 amp",
    accumulate="accumulation accumulation_steps accum_steps grad_accum grad_accum_steps "
    "gradient_accumulation gradient_accumulation_steps accumulate_grad_batches microbatches",
    count="count_fn weight weight_fn num_items_in_batch",
    mesh="device_mesh sharding shardings fsdp strategy",
)

# The arrays of a batch.
ARRAYS = table(
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

# The options of models and of `generate`. The arrays in a call of a model have the names of the
# arrays in a batch.
OPTIONS = ARRAYS | table(
    cache="past_key_values",
    key="do_sample seed rng",
    max_new_tokens="max_length max_tokens",
    max_length="max_new_tokens max_tokens",
    start_token="decoder_start_token_id",
    end_token="eos_token_id",
    pad_token="pad_token_id",
    bad_words="bad_words_ids",
    forced_first_token="forced_bos_token_id",
    forced_last_token="forced_eos_token_id",
    logits_fn="logits_processor",
    draft_model="assistant_model",
    prompt_lookup="prompt_lookup_num_tokens",
    d_model="hidden_size",
    d_ff="intermediate_size dim_feedforward",
    num_heads="nhead num_attention_heads",
    num_kv_heads="num_key_value_heads",
    num_layers="num_hidden_layers",
    max_seq_length="max_position_embeddings",
    tie_embeddings="tie_word_embeddings",
)

# The arguments of `TextEmbedder`, `TextClassifier` and their `from_pretrained`.
TEXTS = table(
    texts="sentences inputs input text queries documents",
    pairs="text_pair text_pairs text_target",
    normalize="normalize_embeddings",
    progress="show_progress_bar progress_bar show_progress verbose disable_tqdm tqdm",
    top_k="return_all_scores",
    truncate_dim="dim dimensions matryoshka_dim",
    max_seq_length="max_length model_max_length",
    dtype="torch_dtype model_kwargs",
)

# Options of `apply_chat_template` in transformers, with the advice for each.
CHAT_OPTIONS = {
    "conversation": "The conversation is the first argument, messages.",
    "chat_template": "Pass template=, the name or the text of one.",
    "return_assistant_tokens_mask": "jaxformers.data.chat says which tokens are the assistant's.",
    **dict.fromkeys(
        (
            *("tokenize", "return_tensors", "return_dict", "padding", "truncation", "max_length"),
            "tokenizer_kwargs",
        ),
        "It returns text always: encode(text, add_special_tokens=False) makes token ids of it.",
    ),
}
