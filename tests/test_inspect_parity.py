"""Hidden states and attention maps equal those of transformers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from hf_cases import V  # noqa: E402
from hf_checkpoints import make  # noqa: E402

from jaxformers import Transformer, attention_maps, from_pretrained, hidden_states  # noqa: E402

TOKENS = np.random.default_rng(0).integers(3, V, (2, 9)).astype(np.int32)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bert"])
def test_as_in_transformers(name, tmp_path, no_shape_checker):
    theirs, ours = make(name, tmp_path), from_pretrained(tmp_path)
    seq2seq = isinstance(ours, Transformer)
    source, target = torch.tensor(TOKENS).long(), torch.tensor(TOKENS[:, :5]).long()
    inputs = {"input_ids": source} | ({"decoder_input_ids": target} if seq2seq else {})
    with torch.no_grad():
        out = theirs(**inputs, output_hidden_states=True, output_attentions=True)
    given = (TOKENS, TOKENS[:, :5]) if seq2seq else (TOKENS,)
    states, maps = hidden_states(ours, *given), attention_maps(ours, *given)
    if seq2seq:
        pairs = [
            (states["encoder"], out.encoder_hidden_states),
            (states["decoder"], out.decoder_hidden_states),
            (maps["encoder"], out.encoder_attentions),
            (maps["decoder"], out.decoder_attentions),
            (maps["cross"], out.cross_attentions),
        ]
    else:
        pairs = [(states, out.hidden_states), (maps, out.attentions)]
    for mine, others in pairs:
        assert len(mine) == len(others)
        post_norm = name == "bert"  # which has no norm after the last layer
        last = len(mine) - 1 if mine[0].ndim == 3 and not post_norm else len(mine)
        for x, y in zip(mine[:last], others[:last], strict=True):
            np.testing.assert_allclose(x, y.numpy(), atol=1e-5)
