"""Decoding in one compiled program.

Read `generate` (what a user's call becomes), `plan` (its options as arrays), `loop` (prefill, then
one `while_loop`), `steps` (how the loop drives a model it does not know). `sampling` and
`constraints` change logits; `beams` and `speculative` are the other two loops; `prompts` brings
what the user gave into shape; `scoring` gives the probabilities of given text.
"""
