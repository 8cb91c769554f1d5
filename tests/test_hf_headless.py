"""Checkpoints without an output layer: hidden states as under transformers, and the files back."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")
safetensors_torch = pytest.importorskip("safetensors.torch")

from hf_cases import HEADLESS  # noqa: E402

from jaxformers.cli.compare import table, verify  # noqa: E402

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("name", HEADLESS)
def test_hidden_states_are_equal(name, made):
    """Without padding and with padding on both sides; also after saving, in transformers."""
    rows = verify(made(name), sixteen_bits=name in ("qwen3_headless", "t5_encoder"))
    assert [row.name.split(",")[0] for row in rows[:3]] == ["hidden states"] * 3
    assert len(rows) >= 5
    assert all(row.passed for row in rows), f"\n{table(rows)}"
