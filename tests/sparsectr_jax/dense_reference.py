"""Slow references written from the rules: pure Python integers, dense float64 attention."""

import math

import jax.numpy as jnp
import numpy as np

DAY = 86_400


def random_history(rng, length, valid, kind="random"):
    """times [L] int32 and mask [L], right-aligned."""
    if kind == "tied":
        gaps = rng.choice([0, 0, 0, 5, 5, 4000], valid)
    else:
        gaps = np.exp(rng.uniform(0, 14, valid)).astype(np.int64)
    times = np.zeros(length, np.int64)
    times[length - valid :] = 1_494_000_000 + np.cumsum(gaps)
    mask = np.arange(length) >= length - valid
    return np.where(mask, times, 0).astype(np.int32), mask


def python_chunks(times, mask, num_chunks, method="time", gaps=None):
    """Chunks of one history as lists of indices, oldest first, by loops over behaviours."""
    valid = [i for i in range(len(times)) if mask[i]]
    if not valid:
        return []
    if method == "fixed":
        size = math.ceil(len(valid) / num_chunks)
        cuts = {valid[0]} | {i for i in valid if (len(times) - i) % size == 0}
    else:
        gap = {i: int(times[i]) - int(times[i - 1]) for i in valid[1:]}
        if gaps is not None:
            gap = {i: gaps[i] for i in valid[1:]}
        # The largest first, ties to the lower index; the first behaviour always cuts.
        ranked = sorted((i for i in gap if gap[i] > 0), key=lambda i: (-gap[i], i))
        cuts = {valid[0], *ranked[: num_chunks - 1]}
    chunks = []
    for i in valid:
        if i in cuts:
            chunks.append([])
        chunks[-1].append(i)
    return chunks


def python_terms(t_i, t_j, timezone=8 * 3600):
    """(log2 bucket, half sine of the hours, weekend differs) of two times in seconds."""
    delta = abs(int(t_i) - int(t_j))
    bucket = max(delta, 1).bit_length() - 1

    def weekend(t):
        return ((int(t) + timezone) // DAY + 4) % 7 in (0, 6)

    return bucket, math.sin(math.pi * (delta // 3600 % 24) / 24), weekend(t_i) != weekend(t_j)


def visibility(times, mask, request_time, num_candidates, num_chunks, m, w, inclusive=True):
    """Masks and bias terms of one request by loops, from the visibility rules.

    Returns {branch: (visible [n, keys] bool, terms [3, n, keys])}; keys are chunks for "global"
    and all L behaviours for the others ("local" without the user key).
    """
    length = len(times)
    chunks = python_chunks(times, mask, num_chunks)
    transition = {j for chunk in chunks for j in chunk[-m:]}
    means = [
        times[c[0]] + sum(int(times[j]) - int(times[c[0]]) for j in c) // len(c) for c in chunks
    ]
    n = length + num_candidates
    query_time = [*times, *[request_time] * num_candidates]
    out = {
        "global": (np.zeros((n, num_chunks), bool), np.zeros((3, n, num_chunks))),
        "transition": (np.zeros((n, length), bool), np.zeros((3, n, length))),
        "local": (np.zeros((n, length), bool), np.zeros((3, n, length))),
    }
    for i in range(n):
        at = min(i, length)  # every candidate stands behind the whole history
        for c, chunk in enumerate(chunks):
            out["global"][0][i, c] = chunk[-1] < at
            out["global"][1][:, i, c] = python_terms(query_time[i], means[c])
        first = at - w + 1 if at < length else length - w
        for j in range(length):
            if mask[j]:
                seen = j <= at if inclusive or at == length else j < at
                out["transition"][0][i, j] = j in transition and seen
                out["local"][0][i, j] = first <= j <= at
            terms = python_terms(query_time[i], times[j])
            out["transition"][1][:, i, j] = out["local"][1][:, i, j] = terms
    return out


def dense_branches(q, k, v, chunk_k, chunk_v, user_k, user_v, slopes, rules, scale=None):
    """The three branches as dense masked attention over every key.

    Args:
      q [B, n, H, K], k, v [B, L, H, K], ...; rules: `visibility` stacked over B.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def attend(keys, values, visible, terms):
        logits = jnp.einsum("bnhk,bjhk->bhnj", q, keys) * scale
        logits = logits - jnp.einsum("rh,brnj->bhnj", slopes, terms)
        weights = jnp.where(visible[:, None], jnp.exp(logits), 0)
        total = weights.sum(-1, keepdims=True)
        return jnp.einsum("bhnj,bjhk->bnhk", weights / jnp.where(total > 0, total, 1), values)

    with_user = [
        jnp.pad(rules["local"][0], ((0, 0), (0, 0), (1, 0)), constant_values=True),
        jnp.pad(rules["local"][1], ((0, 0), (0, 0), (0, 0), (1, 0))),
    ]
    return (
        attend(chunk_k, chunk_v, *rules["global"]),
        attend(k, v, *rules["transition"]),
        attend(
            jnp.concatenate([user_k[:, None], k], 1),
            jnp.concatenate([user_v[:, None], v], 1),
            *with_user,
        ),
    )
