"""How tests compile: cheaply, but where they read what XLA made of a program, as users do."""

import os
from importlib.metadata import version

# Compiling is most of the tests' time. LLVM at its lowest level takes half of it, and of the rest
# XLA's older emitter of fusions, where jaxlib still has it, half again; it fuses a little less.
# The demo runs as users do, and so does `XLA_FLAGS= make test`.
CHEAP = "--xla_backend_optimization_level=0"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    CHEAP += " --xla_cpu_use_fusion_emitters=false"


def compiled_as_usual(lowered):
    """The compiled program that users' CPUs run, but for LLVM's level."""
    is_old = "fusion_emitters=false" in os.environ["XLA_FLAGS"]
    return lowered.compile({"xla_cpu_use_fusion_emitters": True} if is_old else {})
