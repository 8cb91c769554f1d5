"""Adapters against PEFT: the same outputs, and files that either reads from the other."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from hf_checkpoints import load  # noqa: E402
from hf_readers import answer, outputs  # noqa: E402

from jaxformers import (  # noqa: E402
    Dora,
    LowRank,
    from_pretrained,
    load_adapter,
    lora,
    merge,
    save_adapter,
    scan_layers,
    trainable,
    unload,
)
from jaxformers.adapters import over_root_rank  # noqa: E402

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("quick_compilation", "no_shape_checker")
TOLERANCE, ROUNDINGS = 1e-5, 3
# The adapters of PEFT: ways to choose modules, ranks and scales, and what is trained beside them.
ADAPTERS = {
    "gpt2": dict(
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        bias="all",
        rank_pattern={"c_attn": 5},
        alpha_pattern={"h.1.mlp.c_fc": 9},
    ),
    "bert_pooler": dict(
        target_modules=["dense"], use_dora=True, modules_to_save=["position_embeddings"]
    ),
    "llama": dict(
        target_modules=r".*\.(q_proj|v_proj|down_proj)",
        use_rslora=True,
        use_dora=True,
        modules_to_save=["lm_head", "embed_tokens"],
    ),
    "llama_tied": dict(target_modules=["o_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    "t5": dict(target_modules=["q", "k", "o", "wi"], layers_to_transform=[1]),
    "bert": dict(target_modules=["query", "dense"], bias="lora_only"),
    "bert_classify": dict(
        target_modules="all-linear", exclude_modules=["query"], modules_to_save=["classifier"]
    ),
    "phi3": dict(target_modules=["qkv_proj", "gate_up_proj"], use_dora=True, use_rslora=True),
    "bloom": dict(target_modules=["query_key_value"]),
    "gpt2_untied": dict(target_modules=["wte", "lm_head"], use_dora=True),
}


def adapted_by_peft(name, directory, options, where):
    """A model of torch with an adapter of any numbers, which is saved."""
    model = load(name, directory)
    config = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **options)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied tables and of fan_in_fan_out
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn(parameter.shape))
        adapted.save_pretrained(where)
    return model


def read_by_peft(name, directory, where):
    """The model of torch with a saved adapter. Nothing of the file is left over."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(name, directory)
        adapted = peft.PeftModel.from_pretrained(model, where)
        weights = peft.utils.load_peft_weights(where)
        result = peft.set_peft_model_state_dict(adapted, weights)
    assert result.unexpected_keys == [], result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    return answer(model)


@pytest.mark.few(5)
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_peft(name, made, tmp_path):
    """The outputs are those of PEFT: adapted, merged, and saved again for PEFT."""
    directory, theirs, ours = made(name), tmp_path / "theirs", tmp_path / "ours"
    reference = adapted_by_peft(name, directory, ADAPTERS[name], theirs)
    expected = answer(reference)
    # Log-probabilities of -19 have roundings of this size: those of PEFT itself say how large.
    roundings = ROUNDINGS * np.abs(expected - answer(reference, exact=True)).max()
    allowed = max(TOLERANCE, roundings)
    model = from_pretrained(directory)
    adapted = load_adapter(model, theirs)
    assert np.abs(outputs(model) - expected).max() > 0.05
    assert np.abs(outputs(adapted) - expected).max() < TOLERANCE
    assert np.abs(outputs(merge(adapted)) - expected).max() < allowed
    assert_same(unload(adapted), model)
    save_adapter(adapted, ours)
    assert np.abs(read_by_peft(name, directory, ours) - expected).max() < TOLERANCE
    assert_same(load_adapter(model, ours), adapted)


def assert_same(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(
        np.testing.assert_array_equal, *(eqx.filter(x, eqx.is_array) for x in (tree, expected))
    )


def test_gradients_of_dora():
    """The norms of the weights have none, as in the paper."""
    draw = np.random.default_rng(0).normal
    w, a, b, m, x, c = (
        draw(size=size).astype(np.float32) for size in ((5, 4), (2, 4), (5, 2), 5, (3, 4), (3, 5))
    )
    layer = torch.nn.Sequential(torch.nn.Linear(4, 5, bias=False))
    layer[0].weight.data = torch.tensor(w)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=True)
    theirs = peft.get_peft_model(layer, config)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    shapes = {(2, 4): a, (5, 2): b, (5,): m}
    for p in trained:
        p.data = torch.tensor(shapes[tuple(p.shape)])
    (theirs(torch.tensor(x)) * torch.tensor(c)).sum().backward()
    expected = {tuple(p.shape): p.grad.numpy() for p in trained}
    ours = Dora(jnp.array(w.T), jnp.array(a.T), jnp.array(b.T), jnp.array(m), scale=1.5)
    grads = jax.grad(lambda w: (w.product(jnp.array(x)) * c).sum())(ours)
    for shape, grad in {(2, 4): grads.a.T, (5, 2): grads.b.T, (5,): grads.magnitude}.items():
        np.testing.assert_allclose(grad, expected[shape], rtol=1e-5, atol=1e-5)


def is_norm(path, array):
    return path.endswith(".gain")


OURS = {
    "gpt2": dict(kind=Dora, where=lambda path, w: "wq" in path or "wv" in path or "w_in" in path),
    "llama": dict(scaling=over_root_rank, also=is_norm),
    "t5": dict(kind=LowRank),
    "bert_classify": dict(kind=Dora),
    "mixtral": dict(where=lambda path, w: "feed_forward" in path and "router" not in path),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("name", OURS)
def test_an_adapter_of_ours(name, made, tmp_path):
    """Also if queries, keys and values of one matrix have an `a` each, and some have none."""
    model = from_pretrained(made(name))
    adapted = filled(lora(model, 2, 4, **OURS[name], key=jax.random.key(0)))
    expected = outputs(adapted)
    assert np.abs(outputs(model) - expected).max() > 0.05
    save_adapter(adapted, tmp_path)
    assert np.abs(read_by_peft(name, made(name), tmp_path) - expected).max() < TOLERANCE
    again = load_adapter(scan_layers(model) if name == "llama" else model, tmp_path)
    assert np.abs(outputs(again) - expected).max() < TOLERANCE


def filled(adapted):
    trained, rest = eqx.partition(adapted, trainable(adapted))
    leaves, structure = jax.tree.flatten(trained)
    draw = np.random.default_rng(0).normal
    leaves = [x + jnp.asarray(0.05 * draw(size=x.shape), x.dtype) for x in leaves]
    return eqx.combine(jax.tree.unflatten(structure, leaves), rest)
