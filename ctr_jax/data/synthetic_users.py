"""Simulated users: who they are, when they come, what they do and when they are shown ads.

A day has four slots that may hold a session. A session is a run of bursts (runs of behaviours in
one category), then a tail of browsing; its last two behaviours name, through a map that is
nowhere in the raw files, the category that the next session's requests take up. docs/synthetic.md
says which part of the click probability depends on which of this, and why.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ctr_jax.data.synthetic_catalogue import Catalogue
from ctr_jax.data.synthetic_random import gumbel, hashed_uniform, mix, normal

FIRST_DAY = 1492790400  # 2017-04-22 00:00 at +8 h, the first second of the real behaviour log
TIME_ZONE = 8 * 3600
NUM_DAYS, FIRST_IMPRESSION_DAY, TEST_DAY = 22, 14, 21
SLOTS_PER_DAY, FIRST_HOUR, SLOT_HOURS = 4, 7, 4
BURST_LENGTH = 6  # mean number of behaviours in a burst
TAIL = 6  # behaviours after the last burst of a session; the last two announce
LEAD = 12  # a request has at least so many behaviours of its own session before it
MAX_REQUESTS_PER_SESSION = 6
BTAGS = ("pv", "cart", "fav", "buy")
BTAG_SHARES = np.cumsum([0.94, 0.03, 0.02, 0.01])
PIDS = ("430548_1007", "430539_1007")
AFFINITY = np.linspace(1.25, 0.75, 6)  # of a user's interests, strongest first
HOUR_CONCENTRATION, WEEKEND_CONCENTRATION = 4.0, 2.0


@dataclasses.dataclass
class Users:
    """[U] arrays, and [U, K] ones for the K interests (indices of categories)."""

    key: np.ndarray
    is_test: np.ndarray
    has_profile: np.ndarray
    profile: dict[str, np.ndarray]
    interests: np.ndarray
    hours: np.ndarray
    weekend: np.ndarray


@dataclasses.dataclass
class Sessions:
    """[S] arrays sorted by (user, start); `user` counts from the block's first."""

    user: np.ndarray
    key: np.ndarray
    day: np.ndarray
    start: np.ndarray
    size: np.ndarray
    first: np.ndarray  # row of its first behaviour
    topics: np.ndarray  # [S, 2] the categories its bursts are mostly about
    announced: np.ndarray
    decoyed: np.ndarray  # the category that its last decoy names, -1 if it has none


def draw_users(config: Any, catalogue: Catalogue, number: np.ndarray) -> Users:
    seed = mix(np.array([config.seed], np.uint64))
    key = mix(seed ^ mix(number.astype(np.uint64)))
    column = key[:, None]

    def level(stream: str, count: int, first: int = 0, missing: float = 0.0) -> np.ndarray:
        value = first + (hashed_uniform(key, stream, 0) * count).astype(np.int64)
        return np.where(hashed_uniform(key, stream, 1) < missing, -1, value)

    profile = {
        "cms_segid": level("segid", 97),
        "cms_group_id": level("group", 13),
        "final_gender_code": level("gender", 2, 1),
        "age_level": level("age", 7),
        "pvalue_level": level("pvalue", 3, 1, missing=0.5),
        "shopping_level": level("shopping", 3, 1),
        "occupation": level("occup", 2),
        "new_user_class_level": level("class", 4, 1, missing=0.3),
    }
    k = len(AFFINITY)
    popular = np.log(catalogue.popularity) + gumbel(
        column, "interest", np.arange(len(catalogue.popularity))
    )
    interests = np.argsort(-popular, axis=1)[:, :k]
    slots = np.arange(k)
    # Spread over the day and balanced over the week, so that no habit is every user's habit.
    turn = hashed_uniform(column, "phase", k) + np.argsort(gumbel(column, "phase", slots)) / k
    hours = FIRST_HOUR + (turn % 1) * SLOTS_PER_DAY * SLOT_HOURS
    weekend = np.where(np.argsort(gumbel(column, "weekend", slots), axis=1) % 2 == 0, 1, -1)
    return Users(
        key=key,
        is_test=hashed_uniform(key, "test", 0) < config.test_users,
        has_profile=hashed_uniform(key, "test", 1) >= 0.03,
        profile=profile,
        interests=interests,
        hours=hours,
        weekend=weekend,
    )


def draw_sessions(config: Any, catalogue: Catalogue, users: Users) -> Sessions:
    key = users.key[:, None]
    slots = np.arange(NUM_DAYS * SLOTS_PER_DAY)
    day = slots // SLOTS_PER_DAY
    is_weekend = np.isin(day % 7, (0, 1))  # 2017-04-22 is a Saturday
    rate = config.sessions / (NUM_DAYS * SLOTS_PER_DAY)
    rate = rate * np.where(is_weekend, 1.5, 0.8) * np.exp(0.25 * normal(key, "active", 0))
    rate = np.where(users.is_test[:, None] & (day == TEST_DAY), np.maximum(rate, 0.5), rate)
    active = hashed_uniform(key, "slot", slots) < rate
    active[:, 0] |= ~active.any(axis=1)
    user, slot = np.nonzero(active)
    key = users.key[user]
    size_mean = config.behaviours / config.sessions
    spread = 0.8  # of the log-normal sizes: bursts of 3 to 150 behaviours in one history
    size = size_mean * np.exp(spread * normal(key, "size", slot) - spread**2 / 2)
    size = np.clip(size, 3, 8 * size_mean + 3).astype(np.int64)
    # A slot's first two hours hold the start, so sessions of one user never overlap.
    offset = (slot % SLOTS_PER_DAY) * SLOT_HOURS + FIRST_HOUR
    start = day[slot] * 86400 + offset * 3600
    start = FIRST_DAY + start + (hashed_uniform(key, "start", slot) * 7200).astype(np.int64)
    topics = _topics(config, catalogue, users, user, slot, start)
    announced = catalogue.sample_category(hashed_uniform(key, "announce", slot), flat=True)
    return Sessions(
        user=user,
        key=mix(key + slot.astype(np.uint64)),
        day=day[slot],
        start=start,
        size=size,
        first=np.cumsum(size) - size,
        topics=topics,
        announced=announced,
        decoyed=np.full(len(user), -1),
    )


def _topics(config: Any, catalogue: Catalogue, users: Users, user, slot, start) -> np.ndarray:
    """[S, 2] categories of a session: two of the user's interests, or any two."""
    key = users.key[user]
    if not (config.interest or config.hour or config.weekend or config.recency):
        picks = [hashed_uniform(key, "topic", 2 * slot + i) for i in range(2)]
        return np.stack([catalogue.sample_category(p) for p in picks], axis=1)
    k = len(AFFINITY)
    score = np.log(AFFINITY) + gumbel(key[:, None], "topic", slot[:, None] * k + np.arange(k))
    if config.hour:
        score = score + HOUR_CONCENTRATION * hour_match(start[:, None], users.hours[user])
    if config.weekend:
        match = users.weekend[user] * weekend_sign(start)[:, None]
        score = score + WEEKEND_CONCENTRATION * match
    top = np.argsort(-score, axis=1)[:, :2]
    return np.take_along_axis(users.interests[user], top, axis=1)


def draw_requests(
    config: Any, catalogue: Catalogue, users: Users, sessions: Sessions
) -> dict[str, np.ndarray]:
    """One row per request: its session and the number of the session's behaviours before it."""
    test = users.is_test[sessions.user]
    eligible = sessions.day >= FIRST_IMPRESSION_DAY
    if config.test_users:
        eligible &= test == (sessions.day == TEST_DAY)
    room = sessions.size - TAIL - LEAD  # requests come before the tail
    count = np.clip(1 + room // 5, 0, MAX_REQUESTS_PER_SESSION) * eligible * (room >= 0)
    session = np.repeat(np.arange(len(count)), count)
    order = np.arange(len(session)) - np.repeat(np.cumsum(count) - count, count)
    # Strata of equal width: requests of a session are four behaviours apart, now and then three.
    width = (room[session] + 1) / np.maximum(count[session], 1)
    place = hashed_uniform(sessions.key[session], "place", order)
    free = np.maximum(width - 4, 1)
    position = LEAD + np.floor(order * width + place * free).astype(np.int64)
    position = np.minimum(position, (sessions.size - TAIL)[session])
    return {"session": session, "position": position, "order": order}


def draw_behaviours(config: Any, catalogue: Catalogue, users: Users, sessions: Sessions, requests):
    session = np.repeat(np.arange(len(sessions.size)), sessions.size)
    rows = len(session)
    position = np.arange(rows) - sessions.first[session]
    key = sessions.key[session]
    at = sessions.first[requests["session"]] + requests["position"]  # next row after a request

    # Bursts; the three behaviours that a request's local window can use belong to one.
    begins = hashed_uniform(key, "burst", position) < 1 / BURST_LENGTH
    begins[at - 3] = begins[at - 4] = False
    begins |= position == 0
    burst = np.maximum.accumulate(np.where(begins, np.arange(rows), 0))  # row where it began
    kind = hashed_uniform(key, "kind", position[burst])
    # Ads turn up while the user explores: the burst before a request is seldom a topic.
    current = np.zeros(rows, bool)
    current[burst[at - 3]] = True
    exploring = current & (hashed_uniform(key, "explore", position) < 0.75)
    kind = np.where(exploring[burst], 1.0, kind)
    stray = catalogue.sample_category(hashed_uniform(key, "stray", position[burst]))
    topics = sessions.topics[session]
    burst_category = np.where(kind < 0.55, topics[:, 0], np.where(kind < 0.9, topics[:, 1], stray))

    # Noise: in bursts, in the tail, and on the two pages that lead to an ad.
    draw = hashed_uniform(key, "noise", position)
    category, quiet = burst_category.copy(), draw < config.noise
    remaining = sessions.size[session] - position
    quiet |= (remaining <= TAIL) & (position >= np.minimum(3, sessions.size[session] // 2))
    quiet[at - 1] = quiet[at - 2] = True
    noise = catalogue.sample_noise(hashed_uniform(key, "which", position))
    category[quiet] = noise[quiet]

    # Announcing categories also turn up in mid-session and mean nothing there.
    decoy_begins = (hashed_uniform(key, "decoy", position) < config.decoys) & (remaining > TAIL)
    named = catalogue.sample_category(hashed_uniform(key, "decoys", position), flat=True)
    decoy = catalogue.announcer[named]
    second = np.zeros(rows, bool)
    second[1:] = decoy_begins[:-1] & (hashed_uniform(key, "pair", position)[1:] < 0.8)
    previous = np.concatenate([decoy[:1], decoy[:-1]])
    is_decoy = (decoy_begins | second) & (remaining > 2)
    is_decoy[at - 1] = is_decoy[at - 2] = False
    # What a decoy of a session names, to be among the candidates as often as what is announced.
    sessions.decoyed[session[decoy_begins]] = named[decoy_begins]
    category = np.where(is_decoy, np.where(decoy_begins, decoy, previous), category)
    announces = (remaining <= 2) & (hashed_uniform(key, "says", position) < 0.9)
    announcement = catalogue.announcer[sessions.announced[session]]
    category = np.where(announces, announcement, category)

    # Times: a few seconds to minutes apart; room for the request; zero gaps do happen.
    pause = np.minimum(35.0, 4500.0 / sessions.size)[session]
    if not config.bursts:  # sessions stretched until the next one begins: no gap stands out
        following = np.append(sessions.start[1:], 0)
        limit = (FIRST_DAY + (sessions.day + 1) * 86400) - 60
        same = np.append(sessions.user[1:] == sessions.user[:-1], False)
        held = sessions.day >= FIRST_IMPRESSION_DAY  # its requests stay on their day
        until = np.where(same, following - 60, limit)
        until = np.where(held, np.minimum(until, limit), until)
        pause = ((until - sessions.start) / (sessions.size + 1) * 0.9)[session]
        gap = np.floor(pause * (0.75 + 0.5 * hashed_uniform(key, "gap", position)))
    else:
        gap = np.floor(-pause * np.log1p(-hashed_uniform(key, "gap", position)))
        gap = np.minimum(gap, 8 * pause)
    gap[at] = np.maximum(gap[at], 4)
    gap[sessions.first] = 0
    elapsed = np.cumsum(gap)
    time = sessions.start[session] + (elapsed - elapsed[sessions.first][session]).astype(np.int64)

    inside = hashed_uniform(sessions.key[requests["session"]], "asked", requests["order"])
    requests["time"] = time[at - 1] + 1 + np.floor(inside * (gap[at] - 2)).astype(np.int64)
    requests["user"] = sessions.user[requests["session"]]
    requests["burst"] = burst_category[at - 3]
    requests["earlier"] = burst_category[sessions.first[requests["session"]]]
    bad = hashed_uniform(key, "stamp", position) < config.bad_stamps
    brand = catalogue.sample_brand(category, hashed_uniform(key, "brand", position))
    behaviours = {
        "user": sessions.user[session],
        "time": np.where(bad, time - (1 + position % 5) * 10**8, time),
        "btag": np.searchsorted(BTAG_SHARES[:-1], hashed_uniform(key, "btag", position)),
        "category": category,
        "brand": brand,
        "session": session,
        "from_burst": category == burst_category,
    }
    return behaviours, requests


def hour_match(time: np.ndarray, preferred: np.ndarray) -> np.ndarray:
    """Cosine of the clock distance between `time` (seconds) and `preferred` (hours, local)."""
    clock = (time + TIME_ZONE) % 86400 / 3600
    return np.cos(2 * np.pi * (clock - preferred) / 24)


def weekend_sign(time: np.ndarray) -> np.ndarray:
    """+1 on Saturdays and Sundays of local time, else -1."""
    weekday = ((time + TIME_ZONE) // 86400 + 4) % 7  # 0 is Sunday: 1970-01-01 was a Thursday
    return np.where((weekday == 0) | (weekday == 6), 1, -1)
