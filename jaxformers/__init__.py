"""Transformer models for JAX as Equinox modules."""

from jaxformers.attention import MultiHeadAttention, scaled_dot_product_attention
from jaxformers.decoder import Cache, Decoder, DecoderLayer
from jaxformers.embedding import TokenEmbedding, TransformerEmbedding
from jaxformers.encoder import Encoder, EncoderLayer
from jaxformers.initializers import depth_scaled, normal, xavier_uniform
from jaxformers.layers import FeedForward, GatedFeedForward, LayerNorm, Residual, RMSNorm
from jaxformers.masks import (
    AttentionMask,
    create_causal_mask,
    create_padding_mask,
    padding_to_positions,
)
from jaxformers.output import OutputLayer
from jaxformers.positional_encoding import (
    ALiBi,
    LearnablePositionalEncoding,
    RotaryPositionalEncoding,
    SinusoidalPositionalEncoding,
    positional_encoding,
)
from jaxformers.transformer import Transformer, TransformerEncoder, TransformerLM
