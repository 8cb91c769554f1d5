"""Transformer models for JAX as Equinox modules."""

from jaxformers import data, sharding
from jaxformers.adapters import Dora, load_adapter, lora, save_adapter, unload
from jaxformers.attention import MultiHeadAttention
from jaxformers.checkpoint import Checkpoints, KeepBest, OrbaxCheckpoints, digest, load, save
from jaxformers.compilation_cache import keep_compiled_programs
from jaxformers.constraints import Choices, JSONSchema, LarkGrammar, Regex
from jaxformers.decoder import Cache, Decoder, DecoderLayer
from jaxformers.embedding import TokenEmbedding, TransformerEmbedding
from jaxformers.encoder import Encoder, EncoderLayer
from jaxformers.generation.generate import Generation
from jaxformers.generation.processors import Processor
from jaxformers.generation.scoring import perplexity
from jaxformers.generation.stream import TokenStream
from jaxformers.heads import Classifier
from jaxformers.initializers import depth_scaled, normal, xavier_uniform
from jaxformers.inspect import attention_maps, describe, hidden_states, patch, trace
from jaxformers.kernels.blockwise import blockwise_attention
from jaxformers.kernels.choice import choose_attention, fast_attention
from jaxformers.kernels.flash import flash_attention
from jaxformers.kernels.plain import dot_product_attention, scaled_dot_product_attention
from jaxformers.layer_stack import rematerialize, scan_layers, unroll_layers
from jaxformers.layers import Dense, FeedForward, GatedFeedForward
from jaxformers.masks import (
    AttentionMask,
    create_causal_mask,
    create_padding_mask,
    padding_to_positions,
)
from jaxformers.mixture_of_experts import MixtureOfExperts
from jaxformers.norms import AllHeadsNorm, LayerNorm, PerHeadNorm, RMSNorm
from jaxformers.optim import (
    Adafactor,
    AdamW,
    Averaged,
    Groups,
    Lion,
    Muon,
    Optimizer,
    as_optimizer,
    clip_by_global_norm,
    default_decay_mask,
    freeze,
    global_norm,
    schedules,
)
from jaxformers.optim.schedules import (
    Schedule,
    inverse_square_root,
    warmup_cosine,
    warmup_linear,
    warmup_stable_decay,
)
from jaxformers.output import OutputLayer
from jaxformers.pieces import Pieces
from jaxformers.positions.absolute import (
    LearnablePositionalEncoding,
    SinusoidalPositionalEncoding,
    positional_encoding,
)
from jaxformers.positions.bias import (
    ALiBi,
    T5PositionBias,
)
from jaxformers.positions.length_scaling import (
    DynamicScaling,
    LongScaling,
    long_attention_factor,
)
from jaxformers.positions.rotary import (
    RotaryPositionalEncoding,
)
from jaxformers.positions.scaling import (
    LinearScaling,
    Llama3Scaling,
    ProportionalScaling,
    YarnScaling,
    yarn_attention_factor,
)
from jaxformers.precision import cast_floating
from jaxformers.pretrained import from_pretrained
from jaxformers.quantization.quantize import quantize
from jaxformers.quantization.quantized import Quantized
from jaxformers.residual import (
    Addition,
    NoNorm,
    OneNorm,
    OutputNorm,
    PostNorm,
    PreNorm,
    Residual,
    Sandwich,
    TwoNorms,
)
from jaxformers.text.classifier import Label, TextClassifier
from jaxformers.text.embedder import TextEmbedder
from jaxformers.text.generator import TextGenerator
from jaxformers.tokenizers.tokenizer import Tokenizer, load_tokenizer
from jaxformers.trainability import trainable
from jaxformers.training import (
    BadSteps,
    Every,
    classification_loss,
    count_targets,
    evaluate,
    fit,
    language_model_loss,
    masked_language_model_loss,
    sequence_to_sequence_loss,
    train_step,
)
from jaxformers.training.losses import chunked_cross_entropy, cross_entropy
from jaxformers.transformer import Transformer
from jaxformers.transformer_encoder import TransformerEncoder
from jaxformers.transformer_lm import TransformerLM
from jaxformers.version import __version__
from jaxformers.weights import LowRank, merge
