"""Operations in C for the CPU, for the places where those of XLA take the time.

They are optional. The sources in `source/` are compiled once by the C compiler of the machine into
the user's cache directory, and a test in a process of its own compares the result with JAX before
it is used. Where there is no compiler, where something disagrees, on other devices, under `vmap`,
under differentiation (but for products of many rows) and on meshes, the functions of JAX run that
compute the same. `python -m jaxformers.native` says which is the case.
"""
