"""What is planted in simulated users: weekends, noise before a request, the order of interests."""

import dataclasses
import datetime

import numpy as np
import pytest

from ctr_jax.data import synthetic_impressions, synthetic_users
from ctr_jax.data.synthetic import SyntheticConfig

CONFIG = SyntheticConfig(users=600, behaviours=200, seed=3)
CHINA = datetime.timezone(datetime.timedelta(hours=8))


@pytest.fixture(scope="module")
def simulated():
    """Users, sessions, requests, behaviours; every request's row in the behaviours."""
    world = (CONFIG, synthetic_impressions.Simulation(CONFIG).catalogue)
    users = synthetic_users.draw_users(*world, np.arange(CONFIG.users))
    sessions = synthetic_users.draw_sessions(*world, users)
    requests = synthetic_users.draw_requests(*world, users, sessions)
    behaviours, requests = synthetic_users.draw_behaviours(*world, users, sessions, requests)
    at = sessions.first[requests["session"]] + requests["position"]
    return users, sessions, requests, behaviours, at


@pytest.mark.parametrize(
    "day, sign",
    [
        ("2017-04-22", 1),  # the log's first day, a Saturday
        ("2017-04-23", 1),
        ("2017-04-24", -1),
        ("2017-05-12", -1),
        ("2017-05-13", 1),  # its last, the day of the test split
        ("2024-02-29", -1),
        ("2024-03-02", 1),
    ],
)
def test_weekend_sign_of_known_days(day, sign):
    for clock in ("00:00:00", "07:59:59", "08:00:00", "23:59:59"):
        moment = datetime.datetime.fromisoformat(f"{day}T{clock}").replace(tzinfo=CHINA)
        assert synthetic_users.weekend_sign(np.array([int(moment.timestamp())])) == [sign]


def test_weekend_sign_of_every_hour_of_the_log():
    times = synthetic_users.FIRST_DAY + 3600 * np.arange(22 * 24)
    days = [datetime.datetime.fromtimestamp(int(t), CHINA).isoweekday() for t in times]
    expected = np.where(np.array(days) >= 6, 1, -1)
    np.testing.assert_array_equal(synthetic_users.weekend_sign(times), expected)


def test_the_two_behaviours_before_a_request_are_noise(simulated):
    _, _, requests, behaviours, at = simulated
    assert len(at) > 1000
    of_burst = [behaviours["from_burst"][at - back].mean() for back in range(1, 6)]
    own = [(behaviours["category"][at - back] == requests["burst"]).mean() for back in range(1, 6)]
    assert max(of_burst[:2]) < 0.1 and max(own[:2]) < 0.1  # a noise category may be the burst's
    # The window's other three are the burst's, but for noise, decoys and the request before.
    assert min(own[2:4]) > 0.6 and own[4] > 0.45


def test_the_first_interest_is_the_strongest(simulated):
    users = simulated[0]
    strengths = np.array([1.25, 1.15, 1.05, 0.95, 0.85, 0.75])
    alone = synthetic_impressions.Simulation(CONFIG.only(interest=2.0))
    samples = alone.block(0, CONFIG.users)["samples"]
    category = alone.catalogue.ad_category[samples["ad"]]
    for i, strength in enumerate(strengths):
        liked = users.interests[samples["user"], i] == category
        assert liked.any()
        np.testing.assert_allclose(samples["part/interest"][liked], 2.0 * strength)
    liked = (users.interests[samples["user"]] == category[:, None]).any(axis=1)
    assert not samples["part/interest"][~liked].any()
    # Without habits of hour and weekend, a session's first topic is drawn by strength.
    plain = dataclasses.replace(CONFIG, hour=0.0, weekend=0.0)
    sessions = synthetic_users.draw_sessions(plain, alone.catalogue, users)
    of_topic = users.interests[sessions.user] == sessions.topics[:, :1]
    np.testing.assert_allclose(of_topic.mean(axis=0), strengths / 6, atol=0.02)
