"""Mixed precision: a model computed in bfloat16 from parameters that stay float32.

`config.dtype = "bfloat16"` rounds what enters a model, its parameters and the looked-up vectors;
modules compute in the type of what they are given, sums and softmax statistics in float32 as
written where they are. Tables, moments, gradients of parameters, statistics of batch normalisation,
the loss and the metrics stay float32.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

from ctr_jax import config
from ctr_jax.sharding import path_name

DTYPES = {name: jnp.dtype(name) for name in config.DTYPES}
# Parameters that are never rounded: slopes meet time differences, the last layer makes the logit.
PRECISE = (r"(^|/)slopes$", r"(^|/)logit/")


def rounded(tree, dtype: str):
    """`tree` with its float32 leaves in `dtype`, a name in DTYPES; gradients come back in float32.

    Raises:
      ConfigError: no such dtype.
    """
    if dtype not in DTYPES:
        raise config.ConfigError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")

    def leaf(path, x):
        precise = x.dtype != jnp.float32 or any(re.search(p, path_name(path)) for p in PRECISE)
        return x if precise else x.astype(DTYPES[dtype])

    return jax.tree_util.tree_map_with_path(leaf, tree)
