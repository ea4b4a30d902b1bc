"""LREA's scoring unit: candidates against K rows, cached or a whole history; see api.py."""

from kernels.absorbed_target_attention.api import (
    FORMS,
    TILINGS,
    Memory,
    Weights,
    absorbed_target_attention,
    leaky_relu,
)

__all__ = ["FORMS", "TILINGS", "Memory", "Weights", "absorbed_target_attention", "leaky_relu"]
