"""Kernels of attention: functions `(q, k, v, mask) -> outputs` that compute the same.

`plain.py` makes all scores at once, `blockwise.py` those of some queries at a time, `flash.py`
holds no more than one block of them, and `choice.py` takes the fast one for the machine at hand.
"""
