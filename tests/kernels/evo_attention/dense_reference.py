"""The two calls of the op as dense masked attention in float64; masks and terms by loops."""

import jax.numpy as jnp
import numpy as np

from kernels.evo_attention import NEVER, Band, Prefix, Recent
from tests.sparsectr_jax.dense_reference import python_terms, random_history

FLOATS = (
    "q", "k", "v", "global_k", "global_v", "transition_k", "transition_v", "user_k", "user_v",
    "slopes", "candidate_q", "recent_k", "recent_v",
)  # fmt: skip


def case(seed, valid, length, candidates, heads, width, slots, window):
    """(floats, integers) of both calls: arrays by name, for len(valid) requests.

    Args:
      valid: behaviours of each request. slots: of the global and the transition branch.
    """
    rng = np.random.default_rng(seed)
    histories = [random_history(rng, length, n, rng.choice(["random", "tied"])) for n in valid]
    times, mask = (np.stack(x) for x in zip(*histories, strict=True))
    size, last = len(valid), min(window, length)
    shapes = {
        "q": (size, length), "k": (size, length), "v": (size, length),
        "global_k": (size, slots[0]), "global_v": (size, slots[0]),
        "transition_k": (size, slots[1]), "transition_v": (size, slots[1]),
        "user_k": (size,), "user_v": (size,), "candidate_q": (size, candidates),
        "recent_k": (size, last), "recent_v": (size, last),
    }  # fmt: skip
    floats = {n: rng.normal(size=(*shape, heads, width)) for n, shape in shapes.items()}
    floats["slopes"] = rng.normal(size=(3, heads)) * 0.3
    integers = {"times": times, "mask": mask}
    integers["request_time"] = (times.max(1) + rng.integers(1, 10**6, size)).astype(np.int32)
    for name, number in zip(("global", "transition"), slots, strict=True):
        position = np.sort(rng.integers(-1, length, (size, number)), 1)
        unused = (rng.random((size, number)) < 0.2) | (np.array(valid) == 0)[:, None]
        integers[f"{name}_position"] = np.where(unused, NEVER, position).astype(np.int32)
        at = np.take_along_axis(times, np.clip(position, 0, length - 1), 1)
        integers[f"{name}_time"] = at + rng.integers(0, 5000, at.shape).astype(np.int32)
    return floats, integers


def arguments(floats, integers):
    """The positional arguments of behaviour_branches and of candidate_branches."""
    prefixes = [
        Prefix(floats[f"{n}_k"], floats[f"{n}_v"], integers[f"{n}_time"], integers[f"{n}_position"])
        for n in ("global", "transition")
    ]
    user = floats["user_k"], floats["user_v"]
    times, mask, last = integers["times"], integers["mask"], floats["recent_k"].shape[1]
    recent = (times[:, times.shape[1] - last :], mask[:, times.shape[1] - last :])
    return (
        (floats["q"], *prefixes, Band(floats["k"], floats["v"], *user), floats["slopes"], times,
         mask),
        (floats["candidate_q"], *prefixes, Recent(floats["recent_k"], floats["recent_v"], *user,
         *recent), floats["slopes"], integers["request_time"]),
    )  # fmt: skip


def rules(integers, candidates, window):
    """Per call and branch (visible [B, n, keys], terms [3, B, n, keys]); local: the user first."""
    times, mask, request = integers["times"], integers["mask"], integers["request_time"]
    size, length = times.shape
    last = min(window, length)
    out = []
    for queries, keys in ((length, length), (candidates, last)):
        number = {"global": integers["global_time"].shape[1], "local": 1 + keys,
                  "transition": integers["transition_time"].shape[1]}  # fmt: skip
        call = {
            n: (np.zeros((size, queries, s), bool), np.zeros((3, size, queries, s)))
            for n, s in number.items()
        }
        is_candidate = keys != length or queries != length
        for b in range(size):
            for i in range(queries):
                at = NEVER if is_candidate else i
                time = request[b] if is_candidate else times[b, i]
                for name in ("global", "transition"):
                    visible, terms = call[name]
                    for s in range(number[name]):
                        visible[b, i, s] = integers[f"{name}_position"][b, s] < at
                        terms[:, b, i, s] = python_terms(time, integers[f"{name}_time"][b, s])
                visible, terms = call["local"]
                visible[b, i, 0] = True
                first = length - last if is_candidate else 0
                for j in range(keys):
                    inside = is_candidate or i - window < j <= i
                    if inside and mask[b, first + j]:
                        visible[b, i, 1 + j] = True
                        terms[:, b, i, 1 + j] = python_terms(time, times[b, first + j])
        out.append([call[n] for n in ("global", "transition", "local")])
    return out


def branches(floats, rules):
    """All six outputs [B, n, H, K]: three of behaviours, three of candidates."""

    def attend(q, k, v, visible, terms):
        logits = jnp.einsum("bnhk,bjhk->bhnj", q, k) * q.shape[-1] ** -0.5
        logits = logits - jnp.einsum("rh,rbnj->bhnj", floats["slopes"], terms)
        weights = jnp.where(visible[:, None], jnp.exp(logits), 0)
        total = weights.sum(-1, keepdims=True)
        return jnp.einsum("bhnj,bjhk->bnhk", weights / jnp.where(total > 0, total, 1), v)

    out = []
    for q, local, call in (("q", "", rules[0]), ("candidate_q", "recent_", rules[1])):
        keys = [(floats[f"{n}_k"], floats[f"{n}_v"]) for n in ("global", "transition")]
        keys.append(
            tuple(
                jnp.concatenate([floats[f"user_{x}"][:, None], floats[f"{local}{x}"]], 1)
                for x in "kv"
            )
        )
        out += [attend(floats[q], *kv, *rule) for kv, rule in zip(keys, call, strict=True)]
    return out
