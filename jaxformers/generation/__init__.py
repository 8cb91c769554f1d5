"""Decoding in one compiled program.

Read `generate` (a user's call, and what it returns), `request` (its arguments as arrays), `plan`
(its options as arrays), `loop` (prefill, then one `while_loop`). A model takes part by `forward`,
`logits_of` and its cache. `processors` and `sampling` change logits; `beams` and `speculative` are
the other two loops; `prompts` brings tokens into shape; `scoring` gives the probabilities of given
text.
"""
