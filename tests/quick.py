"""How tests compile: their programs are compiled often, run once, and are mostly tiny."""

import os
from importlib.metadata import version


def xla_flags():
    """Returns the flags of the environment and those for fast compilation.

    Without XLA's new emitters compiling takes half of the time, which JAX 0.12 has no flag for.
    """
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"]
    if version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)
