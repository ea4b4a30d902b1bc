"""What simulated users are shown and how likely they click: the second half of the simulation.

`Simulation.block(first, last)` draws users first..last-1 in one vectorised pass. Every random
number is a hash of (seed, stream, user, index), so a user does not depend on who is drawn with
him: any block size gives the same users, and memory is that of one block.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ctr_jax.data.synthetic_catalogue import Catalogue, draw_catalogue
from ctr_jax.data.synthetic_random import hashed_uniform, mix
from ctr_jax.data.synthetic_users import (
    AFFINITY,
    Sessions,
    Users,
    draw_behaviours,
    draw_requests,
    draw_sessions,
    draw_users,
    hour_match,
    weekend_sign,
)

GROUP_SIZES = np.cumsum([0.03, 0.10, 0.17, 0.24, 0.20, 0.12, 0.08, 0.06])
ANNOUNCEMENT_WEIGHTS = (1.0, 0.6, 0.3)  # of the last three finished sessions
RECENCY_UNIT, RECENCY_SPAN = 600, 22 * 86400  # seconds: where the logarithm bends, where it ends
EFFECTS = (
    "interest",
    "transition",
    "local",
    "recency",
    "hour",
    "weekend",
    "popularity",
    "position",
    "profile",
)


class Simulation:
    """The simulated world of one configuration (ctr_jax.data.synthetic.SyntheticConfig)."""

    def __init__(self, config: Any):
        self.config = config
        self.catalogue: Catalogue = draw_catalogue(config)
        self.intercept = 0.0
        pilot = self.block(0, min(config.users, 256))["samples"]
        # The intercept that gives the wanted click rate, by bisection over the pilot's logits.
        low, high = -20.0, 20.0
        for _ in range(60):
            middle = (low + high) / 2
            rate = (
                np.mean(1 / (1 + np.exp(-(pilot["logit"] + middle)))) if len(pilot["logit"]) else 0
            )
            low, high = (middle, high) if rate < config.click_rate else (low, middle)
        self.intercept = low

    def block(self, first: int, last: int) -> dict[str, dict[str, np.ndarray]]:
        """Users first..last-1 (dense numbers): {"profiles", "behaviours", "samples"}: columns.

        Categories, brands and ads are indices into the catalogue; "samples" also holds "logit",
        "probability", "click" and the parts of the logit as "part/<effect>".
        """
        world = (self.config, self.catalogue)
        users = draw_users(*world, np.arange(first, last))
        sessions = draw_sessions(*world, users)
        requests = draw_requests(*world, users, sessions)
        behaviours, requests = draw_behaviours(*world, users, sessions, requests)
        samples = draw_impressions(*world, self.intercept, users, sessions, requests, behaviours)
        for table in (behaviours, samples):
            table["user"] = table["user"] + first
        users.profile["user"] = np.arange(first, last)
        profiles = {k: v[users.has_profile] for k, v in users.profile.items()}
        public = ("user", "time", "btag", "category", "brand")
        return {
            "profiles": profiles,
            "behaviours": {k: behaviours[k] for k in public},
            "samples": samples,
        }


def draw_impressions(
    config: Any,
    catalogue: Catalogue,
    intercept: float,
    users: Users,
    sessions: Sessions,
    requests,
    behaviours,
):
    """The impressions: candidates of every request, with the parts of their click logit."""
    key = mix(users.key[requests["user"]] ^ requests["time"].astype(np.uint64))
    size = 1 + np.searchsorted(GROUP_SIZES[:-1], hashed_uniform(key, "size", 0))
    request = np.repeat(np.arange(len(size)), size)
    order = np.arange(len(request)) - np.repeat(np.cumsum(size) - size, size)
    key, user = key[request], requests["user"][request]
    session, time = requests["session"][request], requests["time"][request]

    # Where a candidate comes from: what the user likes, is doing, announced, or anything.
    pick = hashed_uniform(key, "pick", order)
    interest = (pick * len(AFFINITY)).astype(np.int64)
    previous = [_previous(sessions, session, back) for back in range(1, 4)]
    said = np.stack([np.where(p >= 0, sessions.announced[p], -1) for p in previous], axis=1)
    decoyed = np.stack([np.where(p >= 0, sessions.decoyed[p], -1) for p in previous], axis=1)
    which = np.searchsorted([0.5, 0.8], pick)
    anything = catalogue.sample_category(pick, flat=True)
    announced = np.take_along_axis(said, which[:, None], axis=1)[:, 0]
    decoyed = np.take_along_axis(decoyed, which[:, None], axis=1)[:, 0]
    sources = (
        users.interests[user, interest],
        requests["burst"][request],
        requests["earlier"][request],
        np.where(announced >= 0, announced, anything),
        np.where(decoyed >= 0, decoyed, anything),
    )
    source = np.searchsorted([0.44, 0.51, 0.55, 0.69, 0.83], hashed_uniform(key, "source", order))
    category = np.choose(source, (*sources, anything))
    ad = catalogue.sample_ad(category, hashed_uniform(key, "ad", order))
    # An ad is shown once per request.
    code = request * np.int64(len(catalogue.ad_category)) + ad
    keep = np.zeros(len(code), bool)
    keep[np.unique(code, return_index=True)[1]] = True
    key, user, session, time, order = (a[keep] for a in (key, user, session, time, order))
    category, ad, said, request = category[keep], ad[keep], said[keep], request[keep]

    liked = users.interests[user] == category[:, None]
    slot_of_day = hour_match(time[:, None], users.hours[user])
    of_week = users.weekend[user] * weekend_sign(time)[:, None]
    pid = (hashed_uniform(key, "pid", 0) < 0.38).astype(np.int64)
    parts = {
        "interest": (liked * AFFINITY).sum(axis=1),
        "transition": ((said == category[:, None]) * ANNOUNCEMENT_WEIGHTS).max(axis=1),
        "local": (requests["burst"][request] == category).astype(float),
        "recency": _recency(behaviours, user, category, time),
        "hour": (liked * slot_of_day).sum(axis=1),
        "weekend": (liked * of_week).sum(axis=1).astype(float),
        "popularity": catalogue.ad_quality[ad],
        "position": np.array([0.5, -0.5])[pid],
        "profile": catalogue.lean_gender[category]
        * (users.profile["final_gender_code"][user] - 1.5)
        + catalogue.lean_age[category] * (users.profile["age_level"][user] - 3) / 4,
    }
    parts = {name: getattr(config, name) * value for name, value in parts.items()}
    logit = sum(parts.values()) + intercept
    probability = 1 / (1 + np.exp(-logit))
    return {
        "user": user,
        "time": time,
        "ad": ad,
        "pid": pid,
        "click": (hashed_uniform(key, "click", order) < probability).astype(np.int64),
        "probability": probability,
        "logit": logit,
        **{f"part/{name}": value for name, value in parts.items()},
    }


def _previous(sessions: Sessions, session: np.ndarray, back: int) -> np.ndarray:
    """The session `back` before each of `session` of the same user, -1 where there is none."""
    index = session - back
    same = (index >= 0) & (sessions.user[np.maximum(index, 0)] == sessions.user[session])
    return np.where(same, index, -1)


def _recency(behaviours, user, category, time) -> np.ndarray:
    """1 (a moment ago) .. 0 (at the start of the log, or never) by the logarithm of the age of the
    last behaviour of a burst in `category`, this session's included."""

    def row(user, category):
        return (user * np.int64(1 << 20) + category) << 31  # and a time in seconds below it

    used = behaviours["from_burst"]
    codes = row(behaviours["user"][used], behaviours["category"][used]) + behaviours["time"][used]
    codes.sort()
    prefix = row(user, category)
    code = codes[np.maximum(np.searchsorted(codes, prefix + time) - 1, 0)]
    seen = (code >= prefix) & (code < prefix + time)
    age = np.where(seen, prefix + time - code, RECENCY_SPAN)
    age = np.minimum(age, RECENCY_SPAN)  # stamps outside the log are years off
    return 1 - np.log1p(age / RECENCY_UNIT) / np.log1p(RECENCY_SPAN / RECENCY_UNIT)
