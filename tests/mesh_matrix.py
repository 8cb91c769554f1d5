"""Every kind of model on every mesh of 8 devices, which takes long: `.ci/slow` runs it.

`python mesh_matrix.py` prints a line for each check: its name and "ok", or the error. Names of
checks run these alone.
"""

import sys
from functools import partial

import numpy as np
from sharded_checks import (
    KEY,
    MESHES,
    SEQUENCES,
    case,
    check_gradients,
    decoder,
    distance,
    mesh_of,
    rows,
    run,
)

from jaxformers import AdamW, fit
from jaxformers.sharding import shard

MODELS = "default", "llama", "rematerialized", "packed", "adapters", "quantized", "experts"
MODELS = *MODELS, "translation", "masked"
GENERATIVE = "default", "llama", "adapters", "quantized", "experts", "translation"
EVERY = tuple(MESHES | SEQUENCES)


def check_training(name):
    """20 steps are those of one device, within what another order of sums gives there."""
    model, loss, batch = case(name)
    batches = [
        {key: np.roll(x, i, 1) if key in ("tokens", "src") else x for key, x in batch.items()}
        for i in range(3)
    ]
    options = dict(loss=loss, steps=20, key=KEY, progress=False)
    # Gradients that are zero but for rounding would move weights by the whole rate.
    optimizer = AdamW(1e-3, eps=1e-5)
    one = fit(model, optimizer, batches, **options).model
    other = fit(model, optimizer, batches, accumulate=2, **options).model
    allowed = 4 * distance(one, other)
    assert 0 < allowed < 1e-4 < distance(one, model), (allowed, distance(one, model))
    for mesh in EVERY:
        got = fit(model, optimizer, batches, mesh=mesh_of(mesh), **options).model
        assert distance(got, one) < allowed, (mesh, distance(got, one), allowed)


def check_tokens(name):
    """Decoding gives the tokens of one device."""
    model, prompt = case(name)[0], rows(9, 4, 5)
    ways = [dict(num_beams=3)]
    if name == "llama":
        ways += [dict(), dict(key=KEY, temperature=0.8), dict(draft_model=decoder(1))]
    if name == "translation":
        ways[0]["start_token"] = 1
    expected = [np.asarray(model.generate(prompt, 6, **way)) for way in ways]
    for mesh in EVERY:
        spread = shard(model, mesh_of(mesh))
        for way, tokens in zip(ways, expected, strict=True):
            if "draft_model" in way:
                way = way | {"draft_model": shard(way["draft_model"], mesh_of(mesh))}
            assert np.array_equal(spread.generate(prompt, 6, **way), tokens), (mesh, way)


CHECKS = {f"gradients_{name}": partial(check_gradients, name, EVERY) for name in MODELS}
CHECKS |= {f"training_{name}": partial(check_training, name) for name in MODELS}
CHECKS |= {f"tokens_{name}": partial(check_tokens, name) for name in MODELS if name in GENERATIVE}


if __name__ == "__main__":
    sys.exit(run(CHECKS, sys.argv[1:] or CHECKS))
