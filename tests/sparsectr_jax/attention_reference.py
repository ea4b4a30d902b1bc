"""Every attention and encoding of one request, by loops in float64, from the rules alone.

Requests come without padding: whatever the model makes of padded ones, it has to be this.
"""

import math

import numpy as np

from tests.sparsectr_jax.dense_reference import python_chunks, python_terms

TABLE_LENGTH = 30  # config.length of the tests


def softmax_sum(logits, values):
    """Over a list of (logit, value [K]); 0 of an empty one."""
    if not logits:
        return np.zeros_like(values[0]) if values else 0.0
    logits = np.array(logits)
    weights = np.exp(logits - logits.max())
    return (weights / weights.sum()) @ np.array(values)


def t5_bucket(distance):
    """From the rule: 16 exact, the others by logarithm up to 128 (Raffel et al. 2020)."""
    if distance < 16:
        return distance
    return min(31, 16 + int(math.log(distance / 16) / math.log(128 / 16) * 16))


def time_bucket(seconds):
    return min(128, int(np.float32(math.log(max(abs(int(seconds)), 1))) / np.float32(0.301)))


class Encoding:
    """encoding(params) of H heads; places are (time, index), the query's time the next item's."""

    def __init__(self, kind, params, heads, rel=(True, True, True)):
        self.kind, self.params, self.heads, self.rel = kind, params, heads, rel

    def bias(self, h, query, key):
        (t_i, next_time, i), (t_j, j) = query, key
        if self.kind == "rel_temporal":
            terms = python_terms(t_i, t_j)
            return -sum(
                s * x for s, x, on in zip(self.params["slopes"][:, h], terms, self.rel, strict=True)
                if on
            )  # fmt: skip
        if self.kind == "hstu":
            bucket = time_bucket(int(next_time) - int(t_j))
            return self.params["position"][i - j] + self.params["time"][bucket]
        if self.kind == "t5":
            return self.params["t5"][h, t5_bucket(i - j)]
        if self.kind == "alibi":
            return -(2 ** (-8 * (h + 1) / self.heads)) * (i - j)
        return 0.0

    def turn(self, x, i):
        """x [K], pairs as complex numbers."""
        if self.kind != "rope":
            return x
        frequency = 10_000.0 ** (-2 * np.arange(len(x) // 2) / len(x))
        z = (x[0::2] + 1j * x[1::2]) * np.exp(1j * i * frequency)
        return np.stack([z.real, z.imag], -1).reshape(-1)


class Request:
    """One request: x_b [n, d], x_c [C, d], x_u [d], times [n] and the candidates' time."""

    def __init__(self, config, params, x_b, x_c, x_u, times, request_time):
        self.config, self.p = config, params
        self.heads, self.width = config.num_heads, config.width // config.num_heads
        self.x_b, self.x_c, self.x_u = x_b, x_c, x_u
        self.times, self.n = [int(t) for t in times], len(times)
        self.request_time = int(request_time)
        rel = (config.rel_time, config.rel_hour, config.rel_weekend)
        self.encoding = Encoding(config.encoding, params, self.heads, rel)
        if config.attention != "nsa":
            self.k, self.v = self.project("key", x_b), self.project("value", x_b)

    def project(self, name, x):
        return (x @ self.p[name]["kernel"]).reshape(*x.shape[:-1], self.heads, self.width)

    def queries(self):
        """(x [d], its place) of the behaviours and the candidates."""
        following = [*self.times, self.request_time][1:]
        for i in range(self.n):
            yield self.x_b[i], (self.times[i], following[i], i)
        for x in self.x_c:
            yield x, (self.request_time, self.request_time, self.n)

    def attend(self, h, x, query, keys, user=None):
        """Keys are (k [K], v [K], place); `user` (k, v) has no bias, and for RoPE stands at n."""
        q = self.encoding.turn(self.project("query", x)[h], query[2])
        logits, values = [], []
        for k, v, place in keys:
            dot = q @ self.encoding.turn(k, place[1]) / math.sqrt(self.width)
            logits.append(dot + self.encoding.bias(h, query, place))
            values.append(v)
        if user is not None:
            logits.append(q @ self.encoding.turn(user[0], self.n) / math.sqrt(self.width))
            values.append(user[1])
        return softmax_sum(logits, values) if logits else np.zeros(self.width)

    def row(self, h, j):
        return self.k[j, h], self.v[j, h], (self.times[j], j)

    def output(self):
        """[n + C, d] of the configured attention."""
        attention = getattr(self, self.config.attention)
        out = [attention(x, query) for x, query in self.queries()]
        return np.array(out).reshape(-1, self.config.width) @ self.p["output"]["kernel"]

    # ---- the attentions: one query -> [H, K] ----

    def full(self, x, query):
        seen = [j for j in range(self.n) if j <= query[2]]
        return [self.attend(h, x, query, [self.row(h, j) for j in seen]) for h in range(self.heads)]

    def dilated(self, x, query):
        w, s, i = self.config.local_window, self.config.dilated_stride, query[2]
        near = w + (1 if i == self.n else 0)  # a candidate sees w behaviours, none being itself
        seen = [j for j in range(self.n) if j <= i and (j > i - near or (i - j) % s == 0)]
        return [self.attend(h, x, query, [self.row(h, j) for j in seen]) for h in range(self.heads)]

    def kernel(self, x, query):
        out = []
        for h in range(self.heads):
            e_k, e_v = (
                self.p["kernel"][name][TABLE_LENGTH - self.n :] for name in ("key", "value")
            )
            k, v = e_k.T @ self.k[:, h], e_v.T @ self.v[:, h]
            logits = k @ self.project("query", x)[h] / math.sqrt(self.width)
            out.append(softmax_sum(list(logits), list(v)))
        return out

    def evo(self, x, query):
        """Aggregate "mean", gate "literal"."""
        config, i = self.config, query[2]
        chunks = python_chunks(self.times, [True] * self.n, config.num_chunks)
        over = [c for c in chunks if c[-1] < i]
        transition = [j for c in chunks for j in c[-config.num_transition :] if j <= i]
        first = i - config.local_window + (1 if i < self.n else 0)
        local = [j for j in range(self.n) if first <= j <= i]
        user_k, user_v = self.project("key", self.x_u), self.project("value", self.x_u)
        branches = []
        for h in range(self.heads):
            means = [
                (
                    self.k[c, h].mean(0),
                    self.v[c, h].mean(0),
                    (self.mean_time(c), (c[0] + c[-1]) // 2),
                )
                for c in over
            ]
            branches.append([
                self.attend(h, x, query, means),
                self.attend(h, x, query, [self.row(h, j) for j in transition]),
                self.attend(h, x, query, [self.row(h, j) for j in local], (user_k[h], user_v[h])),
            ])  # fmt: skip
        branches = np.array(branches)  # [H, R, K]
        gate = np.einsum("hrk,rhks->s", branches, self.p["gate"]["kernel"])
        seen = np.array([bool(over), bool(transition), True])
        gate = np.where(seen, np.exp(gate - gate.max()), 0)
        return np.einsum("r,hrk->hk", gate / gate.sum(), branches)

    def mean_time(self, rows):
        start = self.times[rows[0]]
        return start + sum(self.times[j] - start for j in rows) // len(rows)

    def runs(self, h):
        """Of the compressed keys: (k, v, place), the last behaviour, and the run's l places."""
        config, p = self.config, self.p["nsa"]
        of_branch = [self.project(f"compressed_{name}", self.x_b) for name in ("key", "value")]
        out = []
        for last in range(self.n - 1, -1, -config.nsa_stride):
            places = list(range(last - config.nsa_block + 1, last + 1))
            rows = [j for j in places if j >= 0]
            found = []
            for x, name in zip(of_branch, ("key", "value"), strict=True):
                of_place = zip(places, p[f"place_{name}"], strict=True)
                joined = [x[j, h] + e if j >= 0 else np.zeros(self.width) for j, e in of_place]
                mlp = p[f"mlp_{name}"]
                y = np.concatenate(joined) @ mlp["dense_0"]["kernel"] + mlp["dense_0"]["bias"]
                y = np.maximum(y, 0) @ mlp["dense_1"]["kernel"] + mlp["dense_1"]["bias"]
                found.append(y)
            place = (self.mean_time(rows), (rows[0] + rows[-1]) // 2)
            out.append(((*found, place), last, places))
        return out

    def row_of(self, branch, h, j):
        k, v = (self.project(f"{branch}_{name}", self.x_b[j])[h] for name in ("key", "value"))
        return k, v, (self.times[j], j)

    def nsa(self, x, query):
        config, i = self.config, query[2]
        block, stride = config.nsa_block, config.nsa_stride
        p = self.p["nsa"]["gate"]
        gate = 1 / (1 + np.exp(-(x @ p["kernel"] + p["bias"]))).reshape(3, self.heads)
        out = []
        for h in range(self.heads):
            runs = [r for r in self.runs(h) if r[1] < i]
            compressed = self.attend(h, x, query, [r[0] for r in runs])
            # The weights again, spread over the pieces of s places, then summed by block.
            weights = [
                self.attend(h, x, query, [(r[0][0], float(r is one), r[0][2]) for r in runs])
                for one in runs
            ]
            on_block = {}
            for weight, (_, _, places) in zip(weights, runs, strict=True):
                for j in places[::stride]:
                    number = (self.n - 1 - j) // block  # from the newest
                    on_block[number] = on_block.get(number, 0) + float(weight)
            own = (self.n - 1 - i) // block  # -1 of a candidate
            most = (self.n - 1) // block
            always = {b for b in (own + 1, most) if own < b <= most}
            others = [b for b in range(own + 1, most + 1) if b not in always]
            others.sort(key=lambda b: -on_block.get(b, 0))
            chosen = [*always, *others[: config.nsa_top - 1 - len(always)]]
            seen = [
                j for j in range(self.n) if j <= i and (self.n - 1 - j) // block in (*chosen, own)
            ]
            selected = self.attend(h, x, query, [self.row_of("selected", h, j) for j in seen])
            w = config.local_window
            first = i - w + (1 if i < self.n else 0)
            near = [j for j in range(self.n) if first <= j <= i]
            window = self.attend(h, x, query, [self.row_of("window", h, j) for j in near])
            out.append(gate[:, h] @ np.array([compressed, selected, window]))
        return out
