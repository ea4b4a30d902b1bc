"""LREA (SIGIR 2025): low-rank target attention over long histories, absorbed for serving."""
