"""The families of Hugging Face, one table each: data only.

Facts are those of the library's configuration and modelling files; the paper stands beside each
family. How to add one: `docs/families.md`.
"""

from jaxformers.hf.families.decoders import DECODERS
from jaxformers.hf.families.decoders_classic import CLASSIC_DECODERS
from jaxformers.hf.families.decoders_further import FURTHER_DECODERS
from jaxformers.hf.families.decoders_later import LATER_DECODERS
from jaxformers.hf.families.decoders_mixtures import MIXTURE_DECODERS
from jaxformers.hf.families.decoders_open import OPEN_DECODERS
from jaxformers.hf.families.encoder_decoders import ENCODER_DECODERS
from jaxformers.hf.families.encoders import ENCODERS
from jaxformers.hf.families.encoders_later import LATER_ENCODERS
from jaxformers.hf.families.encoders_rotary import ROTARY_ENCODERS

FAMILIES = {
    family.model_type: family
    for family in (
        *DECODERS,
        *LATER_DECODERS,
        *FURTHER_DECODERS,
        *MIXTURE_DECODERS,
        *CLASSIC_DECODERS,
        *OPEN_DECODERS,
        *ENCODER_DECODERS,
        *ENCODERS,
        *LATER_ENCODERS,
        *ROTARY_ENCODERS,
    )
}
