"""LASER by its definition, one candidate and one segment at a time, in float64."""

import math

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x, p):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6) * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def softmax(logits):
    weights = np.exp(logits - max(logits))
    return weights / weights.sum()


def segments_of(length, w):
    """Positions of each segment, oldest first; the newest is full, the first may be short."""
    out, end = [], length
    while end > 0:
        out.insert(0, list(range(max(end - w, 0), end)))
        end -= w
    return out


def segmented(p, candidate, x, mask, config):
    """candidate [d], x [L, d], mask [L] -> ([S, d], [S] bool)."""
    h, k, d = config["num_heads"], config["key_width"], len(candidate)
    out, seen = [], []
    for positions in segments_of(len(x), config["segment"]):
        heads = []
        for head in range(h):
            cut = slice(head * k, (head + 1) * k)
            query = candidate @ p["query"][:, cut]
            valid = [i for i in positions if mask[i]]
            scores = [
                query @ (x[i] @ p["key"][head]) / math.sqrt(k) + p["bias"][head] for i in valid
            ]
            if config["gate"] == "softmax":
                gates = softmax(np.array(scores)) if scores else []
            else:
                gates = [sigmoid(s) for s in scores]
            value = p["value"][head]
            z = np.zeros(d // h)
            for gate, i in zip(gates, valid, strict=True):
                z = z + gate * (x[i] @ value)
            heads.append(z / config["segment"] if config["pool"] == "mean" else z)
        z = dense(np.concatenate(heads), p["out"])
        if config["ffn_multiplier"]:
            normed = layer_norm(z, p["ffn_norm"]) if config["norm"] else z
            z = z + dense(gelu(dense(normed, p["ffn_in"])), p["ffn_out"])
        out.append(z)
        seen.append(bool(valid))
    return np.array(out), np.array(seen)


def stacked(p, candidate, segments, seen, num_layers, h):
    """candidate [d], segments [S, d], seen [S] -> [d]."""
    u, d = candidate, len(candidate)
    kept = segments[seen]
    for i in range(num_layers):
        layer, heads = p[f"layer_{i}"], []
        for head in range(h):
            cut = slice(head * (d // h), (head + 1) * (d // h))
            query = u @ layer["query"][:, cut]
            if len(kept):
                logits = kept @ layer["key"][head] @ query / math.sqrt(d // h)
                heads.append(softmax(logits) @ (kept @ layer["value"][head]))
            else:
                heads.append(np.zeros(d // h))
        u = layer_norm(u + dense(np.concatenate(heads), layer["out"]), layer["norm"])
        u = layer_norm(
            u + dense(gelu(dense(u, layer["ffn_in"])), layer["ffn_out"]), layer["ffn_norm"]
        )
    return u


def fusion(p, u, segments, seen, candidate, profile, config):
    """-> [d]."""
    d, t, r = len(u), config["fusion_tokens"], config["recent"]
    if config["fusion"] == "none":
        return u
    salient = segments[seen].max(0) if seen.any() else np.zeros(d)
    recent = []
    for back in range(r, 0, -1):
        at = len(segments) - back
        recent.append(segments[at] if at >= 0 and seen[at] else np.zeros(d))
    groups = dense(profile, p["profile"]).reshape(t - r - 3, d)
    x = np.array([u, salient, *recent, candidate, *groups])
    if config["fusion"] == "mlp":
        return dense(gelu(dense(x.reshape(-1), p["mlp_in"])), p["mlp_out"])
    for i in range(config["fusion_blocks"]):
        block, mixed = p[f"block_{i}"], np.zeros_like(x)
        width = d // t
        for token in range(t):
            for part in range(t):
                mixed[token, part * width : (part + 1) * width] = x[
                    part, token * width : (token + 1) * width
                ]
        s = np.array([layer_norm(row, block["mix_norm"]) for row in mixed + x])
        out = []
        for token in range(t):
            hidden = gelu(s[token] @ block["in_kernel"][token] + block["in_bias"][token])
            y = hidden @ block["out_kernel"][token] + block["out_bias"][token]
            out.append(layer_norm(y + s[token], block["ffn_norm"]))
        x = np.array(out)
    return x.mean(0)


def interest(params, candidate, x, mask, times, request_time, profile, config):
    """The whole interest of one candidate of one request: -> [d]."""
    x = x.copy()
    if config["token_norm"]:
        candidate = layer_norm(candidate, params["target_norm"])
    for i in range(len(x)):
        if config["token_norm"]:
            x[i] = layer_norm(x[i], params["behaviour_norm"])
        if config["recency"] and mask[i]:
            age = max(int(request_time) - int(times[i]), 1)
            x[i] = x[i] + params["recency"]["table"][age.bit_length() - 1]
    p = params["candidates"]
    segments, seen = segmented(p["segmented"], candidate, x, mask, config)
    layers = config["num_layers"]
    u = stacked(p.get("stacked"), candidate, segments, seen, layers, config["num_heads"])
    return fusion(p.get("fusion"), u, segments, seen, candidate, profile, config)
