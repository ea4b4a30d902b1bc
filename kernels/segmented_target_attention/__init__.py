"""LASER's segmented target attention: gates and segment sums for all candidates; see api.py."""

from kernels.segmented_target_attention.api import segmented_target_attention

__all__ = ["segmented_target_attention"]
