"""TWIN, HSTU and Transformer as their formulas read: float64, one row and one pair at a time."""

import math

import numpy as np


def params_of(variables):
    def double(tree):
        if isinstance(tree, dict):
            return {k: double(v) for k, v in tree.items()}
        return np.asarray(tree, np.float64)

    return double(dict(variables["params"]))


def layer_norm(x, p=None):
    out = (x - x.mean()) / math.sqrt(x.var() + 1e-6)
    return out if p is None else out * p["scale"] + p["bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(scores):
    weights = np.exp(np.asarray(scores) - max(scores))
    return weights / weights.sum()


def requests(tokens):
    """Per request: [(place, time, vector) of its valid behaviours], their length L, the
    candidates, the request's time."""
    batch = tokens.batch
    for b, mask in enumerate(batch.behaviour_mask):
        rows = [
            (i, int(batch.behaviour_time[b, i]), tokens.behaviours[b, i].astype(np.float64))
            for i in range(len(mask))
            if mask[i]
        ]
        candidates = [c.astype(np.float64) for c in tokens.candidates[b]]
        yield rows, len(mask), candidates, int(batch.request_time[b])


def twin(variables, tokens, heads=2, top_k=3):
    p, out = params_of(variables), []
    for rows, _, candidates, _ in requests(tokens):
        out.append([])
        for q in candidates:
            found = []
            for h in range(heads):
                width = len(q) // heads
                part = slice(h * width, (h + 1) * width)
                query = q @ p["q"]["kernel"][:, part]
                scored = [
                    (query @ (x @ p["k"]["kernel"][:, part]) / math.sqrt(width), place, x)
                    for place, _, x in rows
                ]
                scored = sorted(scored, key=lambda s: s[:2], reverse=True)[:top_k]
                total = np.zeros(width)
                if scored:
                    for a, (_, _, x) in zip(softmax([s[0] for s in scored]), scored, strict=True):
                        total += a * (x @ p["v"][h])
                found.append(total)
            out[-1].append(np.concatenate(found) @ p["out"]["kernel"])
    return np.array(out)


def hstu(variables, tokens, heads=2, length=13, layers=2):
    """`length`: n."""
    p, out = params_of(variables), []
    for rows, size, candidates, request_time in requests(tokens):
        # A row is (its place, its time, the next item's time, its vector).
        after = [time for _, time, _ in rows[1:]] + [request_time]
        history = [(*rows[j][:2], after[j], rows[j][2]) for j in range(len(rows))]
        targets = [(size, request_time, request_time, q) for q in candidates]
        for i in range(layers):
            layer = p[f"layer_{i}"]
            targets = [_hstu_row(layer, q, [*history, q], heads, length) for q in targets]
            history = [
                _hstu_row(layer, row, history[: j + 1], heads, length)
                for j, row in enumerate(history)
            ]
        out.append([x for *_, x in targets])
    return np.array(out)


def _hstu_row(p, row, visible, heads, n):
    place, time, later, x = row
    d = len(x)

    def projected(x):
        y = layer_norm(x)
        u, q = np.split(silu(y @ p["uq"]["kernel"]), 2)
        v, k = np.split(silu(y @ p["vk"]["kernel"]), 2)
        return u, v, q, k

    u, _, q, _ = projected(x)
    attended = np.zeros(d)
    for other, other_time, _, y in visible:
        _, v, _, k = projected(y)
        seconds = max(abs(later - other_time), 1)
        bucket = min(int(math.log(seconds) / 0.301), 128)
        bias = p["position"][place - other] + p["time"][bucket]
        for h in range(heads):
            part = slice(h * d // heads, (h + 1) * d // heads)
            attended[part] += silu(q[part] @ k[part] + bias) / n * v[part]
    gated = layer_norm(attended) * u
    return place, time, later, x + gated @ p["out"]["kernel"] + p["out"]["bias"]


def transformer(variables, tokens, heads=2, length=13, layers=2):
    """`length`: rows of the position table."""
    p, out = params_of(variables), []
    for rows, size, candidates, _ in requests(tokens):
        history = [x + p["position"][length - (size - place)] for place, _, x in rows]
        targets = [q + p["position"][length] for q in candidates]
        for i in range(layers):
            layer = p[f"layer_{i}"]
            targets = [_transformer_row(layer, q, [*history, q], heads) for q in targets]
            history = [
                _transformer_row(layer, x, history[: j + 1], heads) for j, x in enumerate(history)
            ]
        out.append([layer_norm(x, p["norm"]) for x in targets])
    return np.array(out)


def _transformer_row(p, x, visible, heads):
    d = len(x)
    q = layer_norm(x, p["norm"]) @ p["q"]["kernel"]
    pairs = [np.split(layer_norm(y, p["norm"]) @ p["kv"]["kernel"], 2) for y in visible]
    attended = np.zeros(d)
    for h in range(heads):
        part = slice(h * d // heads, (h + 1) * d // heads)
        scores = [q[part] @ k[part] / math.sqrt(d // heads) for k, _ in pairs]
        for a, (_, v) in zip(softmax(scores), pairs, strict=True):
            attended[part] += a * v[part]
    x = x + attended @ p["out"]["kernel"]
    hidden = layer_norm(x, p["ffn_norm"]) @ p["up"]["kernel"] + p["up"]["bias"]
    hidden = np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in hidden])
    return x + hidden @ p["down"]["kernel"] + p["down"]["bias"]
