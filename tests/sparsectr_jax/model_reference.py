"""The whole of SparseCTR in float64, one request and one query at a time, from the paper's text.

What dense_reference.py knows of times, chunks and terms is used from there; of sparsectr_jax there
is nothing here but the names of its parameters.

Axis letters: L history, C candidates, d model width, H heads, K head width, R branches.
"""

import math

import jax
import numpy as np

from tests.sparsectr_jax.dense_reference import python_chunks, python_terms

HOUR = 3600


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def swish(x):
    return x * sigmoid(x)


ACTIVATIONS = {"relu": lambda x: np.maximum(x, 0), "swish": swish, "tanh": np.tanh}


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def dense(x, params):
    return x @ params["kernel"] + params.get("bias", 0)


def mlp(x, params):
    """Two layers with swish between them: eqs. 4 and 5, and the user token."""
    return dense(swish(dense(x, params["dense_0"])), params["dense_1"])


def rms_norm(x, params, config):
    square = (x * x).mean(-1, keepdims=True)
    if config.block == "suan":
        return x / (np.sqrt(square) + config.norm_eps) * params["scale"]
    return x / np.sqrt(square + config.norm_eps) * params["scale"]


def swiglu(x, params, config):
    """Eq. 2; the hidden width is what the config says."""
    assert params["w1"]["kernel"].shape == (config.width, config.ffn_multiplier * config.width)
    assert ("bias" in params["w1"]) == (config.block == "suan")
    return dense(swish(dense(x, params["w1"])) * dense(x, params["w2"]), params["w3"])


def bias(query_time, key_time, slopes, config):
    """RelTemporal [H] (eqs. 12-15), by the switches."""
    shift = int(config.timezone_hours * HOUR)
    bucket, hours, weekend = python_terms(query_time, key_time, shift)
    if config.time_bucket == "suan":
        bucket = int(math.log(max(abs(int(query_time) - int(key_time)), 1)) / 0.301)
    if config.hour_form == "clock":
        of_day = [(int(t) + shift) // HOUR % 24 for t in (query_time, key_time)]
        hours = math.sin(math.pi * abs(of_day[0] - of_day[1]) / 24)
    parts = ((bucket, config.rel_time), (hours, config.rel_hour), (weekend, config.rel_weekend))
    return -sum(slope * term for slope, (term, on) in zip(slopes, parts, strict=True) if on)


def aggregated(rows, name, params, config):
    """Keys, or values, of a chunk's behaviours [n, H, K] made one [H, K] (eqs. 4 and 5)."""

    def by_mlp(x):  # [..., H, K]
        if config.aggregate_scope == "head":
            return mlp(x, params[name])
        flat = x.reshape(*x.shape[:-2], -1)
        return mlp(flat, params[name]).reshape(x.shape)

    mean = rows.mean(0)
    return {
        "mean": lambda: mean,
        "mean_mlp": lambda: by_mlp(mean),
        "mean_residual": lambda: mean + by_mlp(mean),
        "mlp_mean": lambda: by_mlp(rows).mean(0),
    }[config.aggregate]()


def pooled(k, rows, params):
    """The same for attn_pool: weights from the keys k [n, H, K], a softmax per head."""
    weights = np.stack([softmax(k[:, h] @ w) for h, w in enumerate(params["pool"])], 1)
    return (weights[..., None] * rows).sum(0)


def similarity_gaps(x):
    """{i: 1 - cos(x_i, x_{i-1})} of a block's input [L, d]."""
    norms = np.linalg.norm(x, axis=-1)
    return {i: 1 - x[i] @ x[i - 1] / (norms[i] * norms[i - 1]) for i in range(1, len(x))}


def attend(q, keys, slopes, query_time, config):
    """One query [H, K] over a list of (key, value, time or None for the user): [H, K]."""
    if not keys:
        return np.zeros_like(q)
    width = config.width if config.logit_scale == "model" else q.shape[-1]
    logits = np.stack(
        [
            (q * k).sum(-1) / math.sqrt(width)
            + (0 if time is None else bias(query_time, time, slopes, config))
            for k, _, time in keys
        ]
    )
    weights = np.stack([softmax(x) for x in logits.T], 1)
    return sum(w[:, None] * v for w, (_, v, _) in zip(weights, keys, strict=True))


def fused(branches, seen, kernel, config):
    """Eqs. 9 and 10: R branches [H, K], which of them had a key, and W [R, H, K, R] -> [H, K]."""
    outputs = np.stack(branches)
    logits = np.einsum("rhk,rhks->hs", outputs, kernel)  # eq. 9 per head
    if config.gate == "literal":
        logits = logits.sum(0, keepdims=True)
    if config.mask_empty_branches:
        if not any(seen):
            return np.zeros_like(branches[0])
        logits = np.where(seen, logits, -np.inf)
    alpha = np.stack([softmax(x) for x in logits])  # [H or 1, R]
    return np.einsum(
        "hr,rhk->hk", np.broadcast_to(alpha, (outputs.shape[1], len(branches))), outputs
    )


def attention(x, candidates, user, request, params, config):
    """Updates of normalised tokens [L, d] and [C, d] (eqs. 3-11); padding gets 0.

    Args:
      user: [d]. request: (times [L], mask [L], request time, gaps for "sim" or None).
    """
    times, mask, request_time, gaps = request
    length, heads, slopes = len(x), config.num_heads, params["slopes"]

    def project(name, rows):
        return dense(rows, params[name]).reshape(*rows.shape[:-1], heads, -1)

    q = project("query", np.concatenate([x, candidates]))
    k, v = project("key", x), project("value", x)
    chunks = python_chunks(times, mask, config.num_chunks, config.chunking, gaps)
    chunk_keys = []
    for c in chunks:
        mean_time = int(times[c[0]]) + sum(int(times[j]) - int(times[c[0]]) for j in c) // len(c)
        if config.aggregate == "attn_pool":
            pair = (pooled(k[c], rows[c], params["aggregate"]) for rows in (k, v))
        else:
            aggregates = params.get("aggregate")  # "mean" has none
            pair = (aggregated(k[c], "mlp_k", aggregates, config),
                    aggregated(v[c], "mlp_v", aggregates, config))  # fmt: skip
        chunk_keys.append((*pair, mean_time))
    behaviour_keys = list(zip(k, v, times, strict=True))
    user_key = project("key", user), project("value", user), None
    transition = sorted(j for c in chunks for j in c[-config.num_transition :])
    used = (config.use_global, config.use_transition, config.use_local)

    updates = np.zeros((length + len(candidates), config.width))
    for i in range(length + len(candidates)):
        is_candidate = i >= length  # it stands behind the whole history
        if not is_candidate and not mask[i]:
            continue
        newest = length - 1 if is_candidate else i
        itself = is_candidate or config.transition_inclusive
        seen_chunks = [
            key for c, key in zip(chunks, chunk_keys, strict=True) if is_candidate or c[-1] < i
        ]
        seen_transition = [behaviour_keys[j] for j in transition if j < i or (j == i and itself)]
        recent = range(max(newest - config.local_window + 1, 0), newest + 1)
        seen_recent = [user_key] + [behaviour_keys[j] for j in recent if mask[j]]
        time = request_time if is_candidate else times[i]
        seen = [
            keys
            for keys, on in zip((seen_chunks, seen_transition, seen_recent), used, strict=True)
            if on
        ]
        found = [attend(q[i], keys, slopes, time, config) for keys in seen]
        out = fused(found, [bool(keys) for keys in seen], params["gate"]["kernel"], config)
        updates[i] = dense(out.reshape(-1), params["output"])
    return updates[:length], updates[length:]


def block(streams, user, request, params, config, drop):
    """Tokens [L, d] and [C, d] after one block (3.3)."""
    normed = [rms_norm(x, params["norm_1"], config) for x in streams]
    user = rms_norm(user, params["norm_1"], config)
    updates = attention(*normed, user, request, params["attention"], config)
    out = []
    for place, x, z, update in zip((0, 2), streams, normed, updates, strict=True):
        update = drop(place, update)
        if config.block == "suan":
            h = rms_norm(z + update, params["norm_2"], config)
            ffn = swiglu(h, params["ffn"], config)
        else:
            h = x + update
            ffn = swiglu(rms_norm(h, params["norm_2"], config), params["ffn"], config)
        out.append(h + drop(place + 1, ffn))
    return out


def request_logits(config, params, columns, vectors, request, drop):
    """Logits [C] of one request (3.2, 3.3, 3.6).

    Args:
      vectors: {column key: [L, w], [C, w] or [w]}. request: (times, mask, request time).
      drop: (block, place, tokens [n, d]) -> tokens.
    """

    def of(group):
        return [vectors[c.key] for c in columns if c.group == group]

    of_requests = params["requests"]
    x = dense(np.concatenate(of("behaviour"), -1), params["behaviour_token"])
    candidates = np.concatenate(of("candidate"), -1)
    context = np.concatenate(of("context"))
    context = np.broadcast_to(context, (len(candidates), len(context)))
    candidates = dense(np.concatenate([candidates, context], -1), of_requests["candidate_token"])
    e_u, user = None, of_requests["user_token"]
    if of("user"):
        e_u = np.concatenate(of("user"))
        user = mlp(e_u, user)
    for i in range(config.num_layers):
        gaps = similarity_gaps(x) if config.chunking == "sim" else None
        at = (x, candidates), user, (*request, gaps), of_requests[f"block_{i}"], config
        x, candidates = block(*at, lambda place, tokens, i=i: drop(i, place, tokens))

    # eq. 17
    z = np.maximum(dense(candidates, of_requests["head_candidate"]), 0)
    if e_u is not None:
        z = z * sigmoid(dense(e_u, of_requests["head_user"]))
    head = of_requests["head"]
    assert len(head) == len(config.head_hidden) + 1
    for i in range(len(config.head_hidden)):
        z = ACTIVATIONS[config.head_activation](dense(z, head[f"dense_{i}"]))
    return dense(z, head["logit"])[:, 0]


def logits(config, variables, columns, embedded, drop=lambda request, layer, place, x: x):
    """Logits [B, C] of a batch.

    Args:
      drop: the dropout of tokens [n, d] of a request at a place of a layer (SparseBlock).
    """
    params = jax.tree.map(np.float64, variables["params"])
    vectors = {key: np.float64(x) for key, x in embedded.vectors.items()}
    batch = embedded.batch
    return np.stack(
        [
            request_logits(
                config,
                params,
                columns,
                {key: x[r] for key, x in vectors.items()},
                (batch.behaviour_time[r], batch.behaviour_mask[r], batch.request_time[r]),
                lambda layer, place, x, r=r: drop(r, layer, place, x),
            )
            for r in range(batch.shape[0])
        ]
    )
