"""The table of parameters: its paths are those of optimizers, its sums are those of the model."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from jaxformers import (
    AdamW,
    Groups,
    Transformer,
    TransformerLM,
    describe,
    freeze,
    lora,
    quantize,
    scan_layers,
    trainable,
)

KEY = jax.random.key(3)


def language_model(layers=3):
    return TransformerLM(17, 12, 3, layers, 20, 6, key=KEY)


def arrays_of(model):
    return [x for x in jax.tree.leaves(model) if eqx.is_array(x)]


def paths_seen(model):
    """The paths that a predicate of `Groups` is called with."""
    seen = {}
    groups = Groups([(lambda path, x: seen.update({str(path): x.shape}), None)], AdamW(1e-3))
    groups.trains(model)
    return seen


MODELS = {
    "language model": language_model,
    "encoder-decoder": lambda: Transformer(17, 19, 12, 3, 2, 3, 20, 6, key=KEY),
    "scanned": lambda: scan_layers(language_model()),
    "adapters": lambda: lora(language_model(), 2, 4, key=KEY),
    "quantized": lambda: quantize(language_model(), bits=4, group_size=4),
    "adapters over a quantized model": lambda: lora(quantize(language_model()), 2, 4, key=KEY),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_paths_and_sums(build):
    model = build()
    table, arrays = describe(model), arrays_of(model)
    assert [row.shape for row in table.rows] == [x.shape for x in arrays]
    assert [row.dtype for row in table.rows] == [str(x.dtype) for x in arrays]
    assert table.bytes == sum(x.nbytes for x in arrays)
    assert {row.path: row.shape for row in table.rows if row.trained} == paths_seen(model)
    assert all(len(row.axes) == len(row.shape) for row in table.rows)
    for rows in (table.grouped, [row for part in table.parts.values() for row in part.rows]):
        assert sum(row.number for row in rows) == table.number
        assert sum(row.bytes for row in rows) == table.bytes
    chosen = eqx.filter(model, trainable(model))
    assert table.trained == sum(x.size for x in jax.tree.leaves(chosen))
    shapes = eqx.filter_eval_shape(lambda: model)
    assert describe(shapes) == table
    assert len(str(table).splitlines()) == len(table.grouped) + len(table.parts) + 4


def test_equal_layers_are_one_row():
    rows = {row.path: row for row in describe(language_model()).grouped}
    wq = rows["decoder.layers.*.self_attention.wq"]
    assert (wq.arrays, wq.shape, wq.axes, wq.number) == (3, (12, 3, 4), ("d", "n", "h"), 432)
    assert len(rows) == len(describe(language_model(1)).rows)
    deep = describe(language_model(1)).grouped[1]
    assert deep.path == "decoder.layers.0.self_attention.wq" and deep.arrays == 1
    stacked = {row.path: row for row in describe(scan_layers(language_model())).grouped}
    row = stacked["decoder.layers.stacked.self_attention.wq"]
    assert row.shape == (3, 12, 3, 4) and row.axes == ("l", "d", "n", "h") and row.number == 432


def test_what_an_optimizer_freezes():
    def lower(path, array):
        return path.startswith(("decoder.layers.0.", "decoder.layers.1.", "decoder.layers.3."))

    model = language_model(5)
    table = describe(model, freeze(AdamW(1e-3), lower))
    rows = {row.path: row for row in table.grouped}
    assert not rows["decoder.layers.0-1,3.feed_forward.w_in"].trained
    assert rows["decoder.layers.2,4.feed_forward.w_in"].trained
    assert rows["decoder.layers.2,4.feed_forward.w_in"].arrays == 2
    layer = sum(x.size for x in arrays_of(model.decoder.layers[0]))
    assert table.number - table.trained == 3 * layer
    with pytest.raises(ValueError, match="optimizer"):
        describe(model, 3)


def test_a_byte_of_four_bits_has_two_numbers():
    rows = {row.path: row for row in describe(MODELS["quantized"]()).grouped}
    integers = rows["decoder.layers.*.self_attention.wq.integers"]
    assert (integers.dtype, integers.axes) == ("uint8", ("n", "h", "d/2"))
    assert integers.number == 432 and integers.bytes == 216 and not integers.trained


def test_any_pytree():
    model = {"linear": eqx.nn.Linear(3, 2, key=KEY), "free": jnp.ones((4, 1), jnp.bfloat16), "n": 7}
    text = str(describe(model)).splitlines()
    assert text[1].split() == ["free", "4", "1", "_", "_", "bfloat16", "1", "4", "trained"]
    assert text[2].split() == ["linear.weight", "2", "3", "o", "i", "float32", "1", "6", "trained"]
    assert text[-1].split() == ["dict", "12", "12", str(8 + 32)]
