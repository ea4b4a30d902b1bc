"""LASER: segmented target attention, stacked refinement, fusion (arXiv 2602.11562)."""
