"""The induction heads of a real decoder are those that it continues repeated text with.

    python tests/induction_heads.py SmolLM2-135M-Instruct.Q4_1.gguf

Rows are random tokens, twice, in which nothing but the first half says what comes in the second.
`induction_scores` finds heads by where they look, on other rows. Without these heads the loss in
the second half rises far more than without as many others of the same layers, and the loss in the
first half stays. `ablate_heads` says the same of single heads, in the median, since heads that
prepare what induction heads read count as well. The status is 1 if any of this does not hold.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers import from_pretrained, patch
from jaxformers.inspect import KeptHeads, ablate_heads, induction_scores

LENGTH, ROWS, FROM = 25, 2, 0.3


def losses(model, tokens):
    """Returns the mean loss of the first half and of the second, nats per token."""
    log_probs = model(tokens)[:, :-1]
    each = -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
    return each[:, : LENGTH - 1].mean(), each[:, LENGTH:].mean()


def without(model, heads):
    """Returns the model without the heads that are True in an array (layers, heads)."""
    path = "decoder.layers.{}.self_attention.head_outputs"
    kept = [KeptHeads(jnp.asarray(~row, jnp.float32)) for row in heads]
    return patch(model, {path.format(i): kept[i] for i, row in enumerate(heads) if row.any()})


def others_of_the_same_layers(heads, rng):
    """Returns as many heads in each layer, drawn among those that are False."""
    drawn = np.zeros_like(heads)
    for i, row in enumerate(heads):
        drawn[i, rng.choice(np.flatnonzero(~row), row.sum(), replace=False)] = True
    return drawn


def main():
    parser = argparse.ArgumentParser(description="the induction heads of a real decoder")
    parser.add_argument("path", help="a GGUF file or a directory of a decoder")
    model = from_pretrained(parser.parse_args().path)
    half = jax.random.randint(jax.random.key(7), (ROWS, LENGTH), 0, model.vocab_size)
    tokens = jnp.concatenate([half, half], axis=1)

    scores = np.asarray(induction_scores(model, length=LENGTH, rows=ROWS, key=jax.random.key(0)))
    found = scores > FROM
    print(f"{found.sum()} of {found.size} heads have a score above {FROM}:")
    for layer, head in np.argwhere(found):
        print(f"  layer {layer:2} head {head}: {scores[layer, head]:.2f}")

    first, second = losses(model, tokens)
    print(f"loss of the first half {first:.2f}, of the second {second:.2f}")
    first_found, second_found = losses(without(model, found), tokens)
    print(f"  without these heads  {first_found:.2f}, {second_found:.2f}")
    rng, rises = np.random.default_rng(0), []
    for _ in range(3):
        other = losses(without(model, others_of_the_same_layers(found, rng)), tokens)
        print("  without others       {:.2f}, {:.2f}".format(*other))
        rises.append(float(other[1] - second))
    apart = second_found - second > 5 * max(rises)
    unchanged = abs(first_found - first) < 0.1 * (second_found - second)

    single = np.asarray(ablate_heads(model, lambda model: losses(model, tokens)[1]))
    medians = np.median(single[found]), np.median(single[~found])
    print("single heads, median rise of the second half: {:.3f}, others {:.3f}".format(*medians))
    if not (found.any() and apart and unchanged and medians[0] > 5 * medians[1]):
        sys.exit("the heads that look like induction heads do not act like such heads")


if __name__ == "__main__":
    main()
