"""LREA as the paper writes it: loops over requests, candidates and rows, numpy float64."""

import numpy as np


def phi(x, slope):
    return np.where(x >= 0, x, slope * x)


def unit(t, keys, values, kernel, out, form, slope, total=None):
    """sum_k s_k values_k for one candidate t [d], one row at a time."""
    d = len(t)
    w1, w2, w3 = kernel[:d], kernel[d : 2 * d], kernel[2 * d :]
    result = np.zeros(d)
    for key, value in zip(keys, values, strict=True):
        if form == "joint":
            s = phi(np.concatenate([t, key, t * key]) @ kernel, slope) @ out
        else:
            s = (phi(key @ w2, slope) + phi((t * key) @ w3, slope)) @ out
        result += s * value
    if form == "split":
        result += (phi(t @ w1, slope) @ out) * total
    return result


def softmax_columns(x):
    e = np.exp(x - x.max(0))
    return e / e.sum(0)


def matrices(params, parametrisation):
    comp, decomp = (np.asarray(params[n], np.float64) for n in ("w_comp", "w_decomp"))
    if parametrisation == "stochastic":
        comp, decomp = softmax_columns(comp), softmax_columns(decomp)
    return comp, decomp


def long_history(tokens, comp, path, decomp):
    """(keys, values, total) of one history [n, d], padded or cut to the matrices' L by hand."""
    length, d = len(comp), tokens.shape[1]
    e = np.zeros((length, d))
    for i in range(1, min(length, len(tokens)) + 1):
        e[-i] = tokens[-i]
    compressed = np.zeros((comp.shape[1], d))
    for k in range(comp.shape[1]):
        for i in range(length):
            compressed[k] += comp[i, k] * e[i]
    if path == "absorbed":
        return compressed, decomp @ e, e.sum(0)
    return decomp.T @ compressed, e, e.sum(0)


def model(variables, embedded, columns, config, path=None):
    """Logits [B, C] of the whole model in evaluation; path None = DIN at full rank."""
    p = variables["params"]
    f = lambda x: np.asarray(x, np.float64)  # noqa: E731
    vectors = {k: f(v) for k, v in embedded.vectors.items()}
    mask = np.asarray(embedded.batch.behaviour_mask)
    join = lambda group, *at: np.concatenate(  # noqa: E731
        [vectors[c.key][at] for c in columns if c.group == group] or [np.zeros(0)]
    )
    b, length = mask.shape
    candidates = embedded.batch.candidate_mask.shape[1]
    logits = np.zeros((b, candidates))
    for i in range(b):
        tokens = [
            join("behaviour", i, n) @ f(p["behaviour_token"]["kernel"])
            for n in range(length)
            if mask[i, n]
        ]
        tokens = np.reshape(tokens, (-1, config.width))
        recent, older = tokens[-config.short_length :], tokens[: -config.short_length]
        if config.get("rank"):
            comp, decomp = matrices(p["long"], config.parametrisation)
            memory = long_history(older, comp, path, decomp)
        else:
            older = older[-config.long_length :]
            memory = older, older, older.sum(0)
        for c in range(candidates):
            vector = join("candidate", i, c)
            t = vector @ f(p["candidate_token"]["kernel"])
            parts = [vector, t]
            units = [("short_attention", (recent, recent, recent.sum(0)))]
            if "long_attention" in p:
                units.append(("long_attention", memory))
            for name, (keys, values, total) in units:
                w = f(p[name]["kernel"]), f(p[name]["out"])
                parts.append(unit(t, keys, values, *w, config.form, config.slope, total))
            x = np.concatenate([*parts, join("user", i), join("context", i)])
            for layer in range(len(config.head_hidden)):
                dense, norm = p["head"][f"dense_{layer}"], p["head"][f"norm_{layer}"]
                stats = variables["batch_stats"]["head"][f"norm_{layer}"]
                x = phi(x @ f(dense["kernel"]) + f(dense["bias"]), config.slope)
                deviation = np.sqrt(f(stats["variance"]) + config.batch_norm_eps)
                x = (x - f(stats["mean"])) / deviation * f(norm["scale"]) + f(norm["bias"])
            last = p["head"]["logit"]
            logits[i, c] = (x @ f(last["kernel"]) + f(last["bias"]))[0]
    return logits
