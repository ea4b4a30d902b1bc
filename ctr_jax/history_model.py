"""Models that turn a history into a vector per candidate: tokens, interest, head; the interest is
given.

The baselines of LASER's table and LASER itself are this frame with another `interest`: a module

    __call__(tokens: Tokens, train: bool) -> [B, C, k], or ([B, C, k], {name: scalar})

The scalars are auxiliary losses, which config.loss.weights weighs. An interest that has none, keeps
no state and draws no random numbers, and whose requests do not see each other, may say `takes_tiles
= True`; `loops_over_requests = True` besides where it goes through them one after the other by
itself (query_tiles.py): on a mesh each device then goes through its own.

`short_length` most recent behaviours also go through a DIN unit of their own, in every model alike:
LASER's Base is a model of length 100 to which a long sequence is added (how Base reads
its 100 is not published, so that is decided here). 0 leaves it out.

Axis letters: B requests, C candidates, L history, d model width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ctr_jax.batch import EmbeddedBatch, RequestBatch
from ctr_jax.din_attention import DINAttention
from ctr_jax.embedding import sum_of_rows
from ctr_jax.features import Column, DataSpec, default_columns, require
from ctr_jax.head import MLPHead, check_head
from ctr_jax.layers import token_dot_general
from ctr_jax.request_tiles import in_tiles
from ctr_jax.tokens import BehaviourToken
from kernels import dispatch

# Tokens of the requests that go through an interest at a time. Elsewhere: all requests.
TILE_BYTES = {"cpu": 1 << 20}


def default_config(module: str) -> ConfigDict:
    """The fields that every model of this frame has."""
    config = ConfigDict()
    config.module = module
    config.embedding_width = 32
    config.exclude = ()  # columns left out, as "group/name"
    config.width = 128  # d; behaviours and candidates are projected to it, without bias
    config.short_length = 0  # behaviours of the short branch; 0 = none
    config.head_hidden = (512, 256, 128)
    config.base_rate = 0.5
    return config


@flax.struct.dataclass
class Tokens:
    """What an interest is made of.

    Attributes:
      candidates: [B, C, d].
      behaviours: [B, L, d], L >= 1; exactly zero where not batch.behaviour_mask.
      profile: [B, p], the user and context vectors side by side; p may be 0.
      batch: RequestBatch, for masks and times.
      common: for an interest that says `compares = True`, ([B, C, s], [B, L, s]): the vectors of
        `common_columns` side by side, without gradients. Candidates and behaviours are projected
        each by its own matrix; here, and nowhere else, equal items have equal vectors.
      own: {Column.key: vectors} of `HistoryModel.own`, of behaviours [B, L, w].
      seeds: [B, C] uint32 in training where the interest's `dropout` is above 0, else None. What a
        candidate drops depends on its seed alone, whatever goes through together.
    """

    candidates: jax.Array
    behaviours: jax.Array
    profile: jax.Array
    batch: RequestBatch
    common: tuple[jax.Array, jax.Array] | None = None
    own: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    seeds: jax.Array | None = None


def check_length(tokens: Tokens, longest: int) -> None:
    """For interests with a row of parameters per place or distance.

    Raises:
      ValueError: the history is longer than config.model.length.
    """
    length = tokens.behaviours.shape[1]
    if length > longest:
        raise ValueError(
            f"histories of {length} behaviours (config.history_length, or the longest of "
            f"config.length_buckets), but config.model.length={longest}"
        )


class HistoryModel(nn.Module):
    """The frame.

    Attributes:
      config: fields of `default_config`.
      columns: what `build` chose.
      interest: the module above, or None for a model without it.
      own: columns that only the interest reads, and not in tiles of requests.
    """

    config: ConfigDict
    columns: tuple[Column, ...]
    interest: Any
    own: tuple[Column, ...] = ()

    takes_rows = True

    @nn.compact
    def __call__(self, embedded: EmbeddedBatch, train: bool) -> tuple[jax.Array, dict]:
        """EmbeddedBatch -> (logits [B, C], out); out has "losses" and "interest"."""
        # Trained with histories, its parameters are of a head that reads an interest.
        if not embedded.batch.shape[1] and self.has_variable("params", "behaviour_token"):
            embedded = _with_padding(embedded)
        config, batch = self.config, embedded.batch
        size, length, candidates = batch.shape
        dtype = jnp.result_type(*embedded.vectors.values())

        def join(group: str) -> jax.Array:
            vectors = [embedded.vectors[c.key] for c in self.columns if c.group == group]
            return jnp.concatenate(vectors, -1) if vectors else jnp.zeros((size, 0), dtype)

        # ---- tokens ----
        candidate = join("candidate")
        profile = jnp.concatenate([join("user"), join("context")], -1)
        token = dict(use_bias=False, dot_general=token_dot_general, name="candidate_token")
        query = nn.Dense(config.width, **token)(candidate)
        parts = [
            candidate,
            query,
            jnp.broadcast_to(profile[:, None], (size, candidates, profile.shape[-1])),
        ]
        interest, losses = None, {}
        if length:  # initialised with none it is a model of the candidate and the profile
            # Whatever stands in padding, its token is an exact zero.
            mask = batch.behaviour_mask
            keys = tuple(c.key for c in self.columns if c.group == "behaviour")
            behaviours = BehaviourToken(config.width, keys, name="behaviour_token")(embedded, mask)

            # ---- interest ----
            if config.short_length:
                recent, seen = (x[:, -config.short_length :] for x in (behaviours, mask))
                short = DINAttention(name="short")
                parts.append(short(query, recent, seen, batch.candidate_mask, train))
            if self.interest is not None:
                compares = getattr(self.interest, "compares", False)
                common = _common(embedded, self.columns) if compares else None
                own = {c.key: _read(embedded, c.key) for c in self.own}
                seeds = None
                if train and getattr(self.interest, "dropout", 0):
                    seeds = jax.random.bits(self.make_rng("dropout"), (size, candidates))
                tokens = Tokens(query, behaviours, profile, batch, common, own, seeds)
                interest = self._interest(tokens, train)
                if isinstance(interest, tuple):
                    interest, losses = interest
                parts.append(interest)

        # ---- prediction ----
        head = MLPHead(config.head_hidden, base_rate=config.base_rate, name="head")
        logits = head(jnp.concatenate(parts, -1))
        return logits, {"losses": losses, "interest": interest}

    def _interest(self, tokens: Tokens, train: bool) -> jax.Array:
        """The interest [B, C, d]; on a CPU of a few requests at a time, in its caches."""
        size, length, _ = tokens.batch.shape
        row = tokens.behaviours.shape[-1] * tokens.behaviours.dtype.itemsize
        most = TILE_BYTES.get(dispatch.platform(), size * length * row) // (length * row)
        if getattr(self.interest, "loops_over_requests", False):
            most = min(most, dispatch.requests_of_a_device(size))
        tiled = max(1, most) < size and getattr(self.interest, "takes_tiles", False)
        if not tiled or self.is_initializing():
            return self.interest(tokens, train)
        run = functools.partial(_of_requests, self.interest.clone(parent=None), train)
        requests = (tokens.candidates, tokens.behaviours, tokens.profile)
        params = self.variables["params"][self.interest.name]
        return in_tiles(run, requests, (tokens.batch, tokens.seeds), params, most)


def common_columns(columns: Iterable[Column]) -> tuple[tuple[str, str], ...]:
    """(key of the candidates', key of the behaviours') of what both have: one name, one table."""
    columns = tuple(columns)
    pairs = {(c.source, c.table): c.key for c in columns if c.group == "behaviour" and c.table}
    return tuple(
        (c.key, pairs[c.source, c.table])
        for c in columns
        if c.group == "candidate" and (c.source, c.table) in pairs
    )


def require_common(columns: Iterable[Column], spec: DataSpec, model: str) -> None:
    """Raises ValueError unless there are `common_columns`."""
    if not common_columns(columns):
        raise ValueError(
            f"{model} compares candidates with behaviours by the columns that both have, and "
            f"{spec.name!r} has none of one name and vocabulary that is not excluded"
        )


def _common(embedded: EmbeddedBatch, columns: Iterable[Column]) -> tuple[jax.Array, jax.Array]:
    """`Tokens.common`."""
    embedded = jax.lax.stop_gradient(embedded)
    sides = zip(*common_columns(columns), strict=True)
    return tuple(jnp.concatenate([_read(embedded, key) for key in keys], -1) for keys in sides)


def _read(embedded: EmbeddedBatch, key: str) -> jax.Array:
    """The vectors of a column."""
    if key in embedded.rows:
        return sum_of_rows({key: embedded.rows[key]}, {key: embedded.slots[key]})
    return embedded.vectors[key]


def _with_padding(embedded: EmbeddedBatch) -> EmbeddedBatch:
    """The same requests with one behaviour of padding [B, 1] where they have none, [B, 0]."""

    def padded(x, value=0):
        return jnp.pad(x, ((0, 0), (1, 0), *[(0, 0)] * (x.ndim - 2)), constant_values=value)

    batch = embedded.batch
    batch = batch.replace(
        behaviour=jax.tree.map(padded, batch.behaviour),
        behaviour_time=padded(batch.behaviour_time),
        behaviour_mask=padded(batch.behaviour_mask),
    )
    vectors = {
        k: padded(x) if k.startswith("behaviour/") else x for k, x in embedded.vectors.items()
    }
    slots = {k: padded(x, len(embedded.rows[k])) for k, x in embedded.slots.items()}
    return embedded.replace(batch=batch, vectors=vectors, slots=slots)


def _of_requests(interest, train, requests, fixed, params):
    batch, seeds = fixed
    return interest.apply({"params": params}, Tokens(*requests, batch, seeds=seeds), train)


def build(
    config: ConfigDict, spec: DataSpec, interest: Any, own: tuple[Column, ...] = ()
) -> tuple[nn.Module, tuple[Column, ...]]:
    """The frame around `interest`, and the columns it reads: all of the data set less
    `config.exclude`, and `own`, which are the interest's alone (`Tokens.own`).

    Raises:
      ValueError: sizes are not positive, base_rate is no rate, or the data set lacks behaviour or
        candidate columns.
    """
    if config.width < 1 or config.short_length < 0:
        raise ValueError("width must be >= 1 and short_length >= 0")
    check_head(config.head_hidden, config.base_rate)
    columns = default_columns(spec, config.embedding_width, exclude=config.exclude)
    require(columns, spec, config.module)
    return HistoryModel(config, columns, interest, own), columns + own
