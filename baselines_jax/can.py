"""CAN: the candidate is a small network that the behaviours go through (Bian et al., WSDM 2022).

    W_1 [16, 8], W_2 [8, 4] = the candidate's vector P of 160 numbers, cut and reshaped
    h_1 = tanh(e_l^k W_1),  h_2 = h_1 W_2                  for k = 1, 2, 3, e^k elementwise
    out = the sums of h_1 and h_2 of every k over the valid behaviours l, side by side

for every pair of a candidate's column, which gives P, and a behaviour's, which gives e (co-action
unit; widths, orders and the order of `out` are those of the published code, DeepRec's modelzoo/CAN,
whose layers have no bias). P and e have tables of their own, apart from each other's and from those
of the model beside them. All k go through one network ("order_indep" is off there).

`pairs` names the columns: "cate" pairs the candidates' cate with the behaviours', "adgroup:cate"
two of different names. By default all pairs of one vocabulary.

The base model beside it is a sum of the behaviours or DIEN in the published code; here it is DIN's
unit over the whole history, which is what CAN is compared with. `attention_hidden` = () leaves it
out.

The sum over l of h_2 is the sum of h_1 times W_2, so the last layer costs nothing that grows with
L. Candidates go through in tiles (ctr_jax/query_tiles.py): [B, C, L, 8] is not made.

Initial values. TensorFlow's default, which the published code leaves, draws both tables from
U(+-sqrt(6 / (V + width))), and a batch normalisation of all that goes into the head takes the scale
out again. Our head has none, and a sum of many behaviours would be large or small by V and L. Here
P starts near 0 (SUAN's table: U(+-1e-6)) and e does not: so `out` starts at 0 like a model without
it, the gradient of W_1 is of the size of e from the first step, those of e and W_2 follow W_1, and
a row that no training example touches adds nothing. With e as small as P it learns as well, by
Adam, and later.

Axis letters: B requests, C candidates, L history, d model width, i and o the inputs and outputs of
a layer, k orders, T candidates and S behaviours of a tile.
"""

from __future__ import annotations

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ctr_jax import history_model
from ctr_jax.din_attention import DINAttention
from ctr_jax.features import Column, DataColumn, DataSpec
from ctr_jax.history_model import Tokens
from ctr_jax.query_tiles import over_tiles
from ctr_jax.request_tiles import in_tiles
from kernels import dispatch
from kernels.softmax import accumulation_dtype


def default_config() -> ConfigDict:
    """DeepRec's network of 16, 8 and 4, orders 1 to 3, beside LongCTR's DIN."""
    config = history_model.default_config("baselines_jax.can")
    config.pairs = ()  # "name" or "candidate's:behaviour's"; () = all of one vocabulary
    config.micro_widths = (16, 8, 4)  # of e, then of the outputs of each layer
    config.micro_bias = False
    config.orders = 3
    config.parameter_scale = 1e-6  # standard deviation of P's initial values
    config.input_scale = 0.1  # and of e's
    config.attention_hidden = (64,)  # of DIN's unit; () = none
    config.activation = "dice"  # dice | relu
    return config


def build(config: ConfigDict, spec: DataSpec) -> tuple[nn.Module, tuple[Column, ...]]:
    """The module of config.model and the columns it reads.

    Raises:
      ValueError: the sizes do not fit, the activation does not exist, or there is no such pair.
    """
    widths = tuple(config.micro_widths)
    if len(widths) < 2 or min(widths) < 1 or config.orders < 1:
        raise ValueError("micro_widths must be two widths or more, all of them and orders >= 1")
    if min(config.parameter_scale, config.input_scale) <= 0:
        raise ValueError("parameter_scale and input_scale must be > 0: nothing trains from 0")
    if config.activation not in ("dice", "relu"):
        raise ValueError(f"activation must be dice or relu, got {config.activation!r}")

    def column(c: DataColumn, role: str, width: int, scale: float) -> Column:
        return Column(
            c.group, c.name, f"{c.vocabulary}:can_{role}", width, f"{c.name}:can_{role}", scale
        )

    number = sum(_sizes(widths, config.micro_bias))
    pairs = [
        (
            column(candidate, "parameters", number, config.parameter_scale),
            column(behaviour, "inputs", widths[0], config.input_scale),
        )
        for candidate, behaviour in _pairs(config, spec)
    ]
    interest = CAN(
        tuple((p.key, e.key) for p, e in pairs),
        widths,
        config.micro_bias,
        config.orders,
        tuple(config.attention_hidden),
        config.activation,
    )
    own = tuple(dict.fromkeys(itertools.chain(*pairs)))
    return history_model.build(config, spec, interest, own)


def _pairs(config: ConfigDict, spec: DataSpec) -> list[tuple[DataColumn, DataColumn]]:
    """Of a candidate's column and a behaviour's."""
    candidates, behaviours = (
        {
            c.name: c
            for c in spec.group(group)
            if c.kind == "id" and f"{group}/{c.name}" not in config.exclude
        }
        for group in ("candidate", "behaviour")
    )
    if not config.pairs:
        pairs = [
            (c, b)
            for c in candidates.values()
            for b in behaviours.values()
            if c.vocabulary == b.vocabulary
        ]
        if not pairs:
            raise ValueError(
                f"CAN needs a pair of a candidate's and a behaviour's column, and {spec.name!r} "
                "has none of one vocabulary that is not excluded; name some in pairs"
            )
        return pairs
    pairs = []
    for pair in config.pairs:
        first, _, second = pair.partition(":")
        second = second or first
        if first not in candidates or second not in behaviours:
            raise ValueError(
                f"pairs has {pair!r}; the id columns of {spec.name!r} are {sorted(candidates)} of "
                f"candidates and {sorted(behaviours)} of behaviours"
            )
        pairs.append((candidates[first], behaviours[second]))
    return pairs


def _sizes(widths: tuple[int, ...], bias: bool) -> list[int]:
    """Of each layer how much of P it takes."""
    return [(i + bias) * o for i, o in itertools.pairwise(widths)]


class CAN(nn.Module):
    """The interest.

    Attributes:
      pairs: (key of P's column, key of e's) of each pair.
      widths, bias: micro_widths and micro_bias of the config.
      orders: the largest k.
      hidden, activation: of DIN's unit; no hidden = no unit.
      tile_bytes: as in ctr_jax/query_tiles.py.
    """

    pairs: tuple[tuple[str, str], ...]
    widths: tuple[int, ...] = (16, 8, 4)
    bias: bool = False
    orders: int = 3
    hidden: tuple[int, ...] = (64,)
    activation: str = "dice"
    tile_bytes: int = 0

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool) -> jax.Array:
        """Tokens -> [B, C, d and pairs x orders x the sum of the layers' widths]."""
        batch, own = tokens.batch, tokens.own
        run = functools.partial(_co_action, self.widths, self.bias, self.orders, self.tile_bytes)
        vectors = tuple(tuple(own[key] for key in pair) for pair in self.pairs)
        mask = batch.behaviour_mask
        # On a mesh each device goes through its own requests; elsewhere this is a plain call.
        found = in_tiles(run, vectors, mask, (), dispatch.requests_of_a_device(len(mask)))
        if not self.hidden:
            return found
        unit = DINAttention(self.hidden, self.activation, name="din")
        attended = unit(tokens.candidates, tokens.behaviours, mask, batch.candidate_mask, train)
        return jnp.concatenate([attended, found], -1)


def _co_action(widths, bias, orders, tile_bytes, pairs, mask, shared):
    """Of each pair P [B, C, number] and e [B, L, i]; mask [B, L] -> [B, C, all outputs]."""
    del shared
    p, e = ([jnp.swapaxes(x, 1, 2) for x in side] for side in zip(*pairs, strict=True))
    exact = accumulation_dtype(e[0].dtype)

    def attend(p, keys, first):
        """P [number, T] of each pair, (e [i, S] of each, mask [S]) -> [all outputs, T]."""
        del first
        e, mask = keys
        return jnp.concatenate(
            [_micro(_layers(p, widths, bias), orders, e, mask) for p, e in zip(p, e, strict=True)]
        )

    widest = sum(widths[1:-1]) or 1
    found = over_tiles(
        attend,
        p,
        (e, mask),
        query_bytes=len(p) * orders * widest * mask.shape[1] * exact.itemsize,
        tile_bytes=tile_bytes,
    )
    return jnp.swapaxes(found, 1, 2)


def _layers(p, widths, bias):
    """P [number, T] -> of each layer the matrix [i, o, T], and the bias [o, T] or None."""
    parts = jnp.split(p, np.cumsum(_sizes(widths, bias))[:-1])
    return [
        (part[: i * o].reshape(i, o, -1), part[i * o :] if bias else None)
        for part, (i, o) in zip(parts, itertools.pairwise(widths), strict=True)
    ]


def _micro(layers, orders, e, mask):
    """The networks of T candidates over e [i, S], mask [S] -> [orders x outputs, T]."""
    exact = dict(preferred_element_type=accumulation_dtype(e.dtype))
    e = jnp.where(mask, e, 0)
    h = jnp.stack([functools.reduce(jnp.multiply, [e] * k) for k in range(1, orders + 1)], 1)

    def total(h):  # without bias h is 0 where e is, with one it is not
        return jnp.sum(jnp.where(mask, h, 0), -1, dtype=accumulation_dtype(h.dtype))

    sums = []
    *hidden, (last, last_bias) = layers
    for number, (matrix, bias) in enumerate(hidden):
        equation = "iot,itks->otks" if number else "iot,iks->otks"
        h = jnp.einsum(equation, matrix, h, **exact)
        h = jnp.tanh(h if bias is None else h + bias[..., None, None])
        sums.append(total(h))
    # The last layer has no tanh: of the sum of its inputs.
    out = jnp.einsum("iot,itk->otk" if hidden else "iot,ik->otk", last, total(h), **exact)
    if last_bias is not None:
        out += last_bias[..., None] * jnp.sum(mask)
    out = jnp.concatenate([*sums, out])
    out = jnp.transpose(out, (2, 0, 1)).reshape(-1, out.shape[1])
    return out.astype(e.dtype)
