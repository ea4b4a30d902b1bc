"""EvoAttention: SparseCTR's three sparse branches with RelTemporal (SparseCTR 3.4 and 3.5)."""

from kernels.evo_attention.api import behaviour_branches, candidate_branches
from kernels.evo_attention.arguments import NEVER, Band, Prefix, Recent
from kernels.evo_attention.rel_temporal import RelTemporal, floor_log2

__all__ = [
    "NEVER",
    "Band",
    "Prefix",
    "Recent",
    "RelTemporal",
    "behaviour_branches",
    "candidate_branches",
    "floor_log2",
]
