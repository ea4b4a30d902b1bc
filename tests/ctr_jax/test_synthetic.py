"""The synthetic generator: layout, times, probabilities, and what each effect leaves behind."""

import collections
import csv
import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from ctr_jax.data import synthetic, synthetic_impressions, synthetic_users
from ctr_jax.data.errors import DataError
from ctr_jax.data.synthetic import SyntheticConfig, generate, oracle_auc, parse_effects, read_oracle

SMALL = SyntheticConfig(users=300, behaviours=200, seed=3)
DAY = 86400
FILES = ("raw_sample.csv", "ad_feature.csv", "user_profile.csv", "behavior_log.csv")


def _read(path):
    """{column: values as they stand in the file}."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([r[name] for r in rows]) for name in rows[0]}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    out = tmp_path_factory.mktemp("raw")
    counts = generate(out, SMALL)
    return out, counts, {name: _read(out / name) for name in FILES}


def test_layout_is_that_of_the_real_files(raw):
    out, counts, tables = raw
    headers = {name: (out / name).read_text().split("\n", 1)[0] for name in FILES}
    assert headers == {
        "raw_sample.csv": "user,time_stamp,adgroup_id,pid,nonclk,clk",
        "ad_feature.csv": "adgroup_id,cate_id,campaign_id,customer,brand,price",
        "user_profile.csv": "userid,cms_segid,cms_group_id,final_gender_code,age_level,"
        "pvalue_level,shopping_level,occupation,new_user_class_level ",
        "behavior_log.csv": "user,time_stamp,btag,cate,brand",
    }
    assert all('"' not in (out / name).read_text() for name in FILES)
    samples, log = tables["raw_sample.csv"], tables["behavior_log.csv"]
    ads, people = tables["ad_feature.csv"], tables["user_profile.csv"]
    assert (len(samples["user"]), len(log["user"])) == (counts["impressions"], counts["behaviours"])
    assert set(log["btag"]) == {"pv", "cart", "fav", "buy"}
    assert set(samples["pid"]) == {"430548_1007", "430539_1007"}
    assert (samples["clk"].astype(int) + samples["nonclk"].astype(int) == 1).all()
    assert samples["clk"].astype(int).sum() == counts["clicks"]
    assert (
        "NULL" in set(ads["brand"])
        and len(set(ads["adgroup_id"])) == len(ads["brand"]) == SMALL.ads
    )
    assert set(samples["adgroup_id"]) <= set(ads["adgroup_id"])
    assert "" in set(people["pvalue_level"])  # missing values are empty there
    assert len(set(people["userid"])) == len(people["userid"]) < SMALL.users  # some have no profile
    # Categories and brands of ads also occur among the behaviours.
    assert len(set(ads["cate_id"]) & set(log["cate"])) == SMALL.categories
    assert len(set(ads["brand"]) & set(log["brand"])) > SMALL.categories
    shown = list(zip(samples["user"], samples["time_stamp"], samples["adgroup_id"], strict=True))
    assert len(set(shown)) == len(shown)
    sizes = np.array(list(collections.Counter(row[:2] for row in shown).values()))
    assert sizes.max() == 8 and sizes.min() == 1 and 2 <= sizes.mean() <= 5
    assert len(sizes) == counts["requests"]


def test_rows_are_in_no_order(raw):
    _, _, tables = raw
    for name, key in (("behavior_log.csv", "user"), ("raw_sample.csv", "time_stamp")):
        values = tables[name][key].astype(int)
        assert 0.4 < np.mean(np.diff(values) < 0) < 0.6, name


def test_times(raw):
    _, _, tables = raw
    first = synthetic_users.FIRST_DAY
    assert np.datetime64(first + 8 * 3600, "s") == np.datetime64("2017-04-22T00:00:00")
    log = tables["behavior_log.csv"]["time_stamp"].astype(int)
    inside = (log >= first) & (log < first + 22 * DAY)
    assert len(set((log[inside] - first) // DAY)) == 22
    shown = tables["raw_sample.csv"]["time_stamp"].astype(int)
    assert set((shown - first) // DAY) == set(range(14, 22))
    hours = (shown - first) % DAY // 3600
    assert hours.min() >= 7 and len(set(hours)) >= 12
    many = synthetic_impressions.Simulation(dataclasses.replace(SMALL, bad_stamps=0.01)).block(
        0, 50
    )
    time = many["behaviours"]["time"]
    share = np.mean((time < first) | (time >= first + 22 * DAY))
    assert 0.005 < share < 0.015


def test_test_users_are_nobody_else(raw):
    _, _, tables = raw
    samples = tables["raw_sample.csv"]
    late = samples["time_stamp"].astype(int) >= synthetic_users.FIRST_DAY + 21 * DAY
    test, train = set(samples["user"][late]), set(samples["user"][~late])
    assert test and not test & train
    mixed = synthetic_impressions.Simulation(dataclasses.replace(SMALL, test_users=0.0)).block(
        0, 100
    )
    day = (mixed["samples"]["time"] - synthetic_users.FIRST_DAY) // DAY
    users = mixed["samples"]["user"]
    assert set(users[day == 21]) & set(users[day < 21])


def test_sessions_are_uneven_and_far_apart():
    config = dataclasses.replace(SMALL, bad_stamps=0.0)
    for bursts in (True, False):
        block = synthetic_impressions.Simulation(dataclasses.replace(config, bursts=bursts)).block(
            0, 200
        )
        user, time = block["behaviours"]["user"], block["behaviours"]["time"]
        assert np.all(np.diff(time)[np.diff(user) == 0] >= 0)
        shares = []
        for one in range(200):
            gaps = np.diff(time[user == one])
            if len(gaps) > 60:
                shares.append(np.sort(gaps)[-16:].sum() / gaps.sum())
        # 16 cuts hold nearly all of the time between sessions, or, stretched, not much of it.
        assert (np.median(shares) > 0.85) == bursts, np.median(shares)
    sizes = synthetic_impressions.Simulation(config)
    people = synthetic_users.draw_users(config, sizes.catalogue, np.arange(200))
    assert np.percentile(
        synthetic_users.draw_sessions(config, sizes.catalogue, people).size, 90
    ) > 4 * np.percentile(synthetic_users.draw_sessions(config, sizes.catalogue, people).size, 10)


def _rows(block):
    return {
        name: sorted(zip(*(block[name][k].tolist() for k in sorted(block[name])), strict=True))
        for name in block
    }


def test_users_do_not_depend_on_their_block():
    simulation = synthetic_impressions.Simulation(dataclasses.replace(SMALL, users=40))
    whole = _rows(simulation.block(0, 40))
    pieces = [_rows(simulation.block(a, b)) for a, b in ((0, 1), (1, 17), (17, 40))]
    for name in whole:
        assert whole[name] == sorted(sum((p[name] for p in pieces), [])), name


def test_same_seed_same_bytes_whatever_the_block_size(tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, users=60)
    generate(tmp_path / "a", config)
    generate(tmp_path / "b", config)
    monkeypatch.setattr(synthetic, "BLOCK_USERS", 7)
    generate(tmp_path / "c", config)
    generate(tmp_path / "d", dataclasses.replace(config, seed=4))
    for name in FILES:
        a, b, c, d = ((tmp_path / x / name).read_bytes() for x in "abcd")
        assert a == b and a != d
        assert sorted(a.split(b"\n")) == sorted(c.split(b"\n"))
    assert oracle_auc(tmp_path / "a", "all") == oracle_auc(tmp_path / "c", "all")


def test_clicks_follow_the_probability(raw):
    out, counts, tables = raw
    oracle = read_oracle(out)
    samples = tables["raw_sample.csv"]
    for name in ("user", "time_stamp", "clk"):  # row for row
        assert (samples[name].astype(int) == oracle[name]).all()
    config = dataclasses.replace(SMALL, users=2000)
    block = synthetic_impressions.Simulation(config).block(0, 2000)["samples"]
    p, y = block["probability"], block["click"]
    assert abs(p.mean() - config.click_rate) < 0.02
    order = np.argsort(p)
    for part in np.array_split(order, 10):
        error = y[part].mean() - p[part].mean()
        assert abs(error) < 4 * np.sqrt((p[part] * (1 - p[part])).sum()) / len(part)
    logit = np.log(p / (1 - p))
    parts = sum(block[f"part/{e}"] for e in synthetic_impressions.EFFECTS)
    np.testing.assert_allclose(logit - parts, logit[0] - parts[0], atol=1e-9)


def test_oracle_auc_is_sklearns(raw):
    out, counts, _ = raw
    oracle = read_oracle(out)
    late = oracle["time_stamp"] >= synthetic_users.FIRST_DAY + 21 * DAY
    for split, rows in (("train", ~late), ("test", late), ("all", late | ~late)):
        expected = roc_auc_score(oracle["clk"][rows], oracle["probability"][rows])
        assert oracle_auc(out, split) == pytest.approx(expected, abs=1e-12)
        assert oracle_auc(out, rows=np.nonzero(rows)[0]) == oracle_auc(out, split)
    assert counts["oracle_auc"]["test"] == pytest.approx(oracle_auc(out, "test"), abs=1e-6)
    with pytest.raises(DataError, match="validation"):
        oracle_auc(out, "validation")


@pytest.mark.parametrize("effect", synthetic_impressions.EFFECTS)
def test_an_effect_moves_clicks_only_when_on(effect):
    """Regression of clicks on what the effect says: a slope of its strength, or none."""
    base = dataclasses.replace(SMALL, users=1200)
    told = synthetic_impressions.Simulation(base.only(**{effect: 2.0})).block(0, 1200)["samples"]
    value = told[f"part/{effect}"] / 2.0
    assert value.std() > 0.05
    fit = LogisticRegression(C=1e6).fit(value[:, None], told["click"])
    assert fit.coef_[0, 0] == pytest.approx(2.0, abs=0.3)
    off = synthetic_impressions.Simulation(base.only("popularity")).block(0, 1200)["samples"]
    assert effect == "popularity" or not off[f"part/{effect}"].any()


def _features(config, users):
    """Slow per-impression loops over the raw columns: what a candidate finds in the history."""
    simulation = synthetic_impressions.Simulation(config)
    block = simulation.block(0, users)
    log, samples = block["behaviours"], block["samples"]
    tells = {int(a): c for c, a in enumerate(simulation.catalogue.announcer)}
    rows = []
    for i in range(len(samples["user"])):
        own = log["user"] == samples["user"][i]
        time, category = log["time"][own], log["category"][own]
        before = time < samples["time"][i]
        time, category = time[before], category[before]
        want = simulation.catalogue.ad_category[samples["ad"][i]]
        match = category == want
        breaks = np.nonzero(np.diff(time) > 1500)[0]  # the last behaviour of every finished session
        last_end = breaks[-1] if len(breaks) else 0
        said = [tells.get(int(c), -1) == want for c in category]
        hours = (samples["time"][i] - time) / 3600 % 24
        weekend = synthetic_users.weekend_sign(time) == synthetic_users.weekend_sign(
            samples["time"][i]
        )
        rows.append(
            {
                "old count": match[:-20].sum(),
                "last20 count": match[-20:].sum(),
                "local": match[-5:-2].sum(),
                "session end": bool(len(breaks)) and any(said[max(0, last_end - 1) : last_end + 1]),
                "mid-session": sum(said[-12:]),
                "hour": (match * np.cos(np.pi * hours / 24) ** 4).sum() / (match.sum() + 1),
                "weekend": (match & weekend).sum() / (match.sum() + 1),
                "age": -np.log(samples["time"][i] - time[match][-1]) if match.any() else np.nan,
            }
        )
    return {k: np.array([float(r[k]) for r in rows]) for k in rows[0]}, samples["click"]


@pytest.mark.parametrize(
    "effect, feature",
    [
        ("interest", "old count"),
        ("transition", "session end"),
        ("local", "local"),
        ("recency", "age"),
        ("hour", "hour"),
        ("weekend", "weekend"),
    ],
)
def test_an_effect_shows_in_the_raw_history(effect, feature):
    """The feature of its mechanism sorts clicks, and does not when the effect is off."""
    base = dataclasses.replace(SMALL, users=150, behaviours=250)
    values, click = _features(base.only(**{effect: 2.5}), 150)
    known = ~np.isnan(values[feature])
    on = roc_auc_score(click[known], values[feature][known])
    assert on > 0.55, on
    off_values, off_click = _features(base.only("position", **{effect: 0.0}), 150)
    known = ~np.isnan(off_values[feature])
    assert abs(roc_auc_score(off_click[known], off_values[feature][known]) - 0.5) < 0.05
    if effect == "transition":  # what announces at the end of a session means nothing inside it
        assert abs(roc_auc_score(click, values["mid-session"]) - 0.5) < on - 0.5 - 0.02


def test_recency_is_the_logarithm_of_the_age_of_the_last_burst():
    rng = np.random.default_rng(0)
    draw = lambda n: (rng.integers(0, 3, n), rng.integers(0, 4, n))  # noqa: E731
    user, category = draw(60)
    time = 1_493_000_000 + rng.integers(0, 22 * 86400, 60)
    time[:5] -= 3 * 10**8  # outside the log
    burst = rng.random(60) < 0.6
    log = {"user": user, "category": category, "time": time, "from_burst": burst}
    of, wanted = draw(200)
    now = np.concatenate([time, 1_493_000_000 + rng.integers(0, 22 * 86400, 140)])
    found = synthetic_impressions._recency(log, of, wanted, now)
    for i in range(200):
        own = time[burst & (user == of[i]) & (category == wanted[i]) & (time < now[i])]
        age = min(now[i] - own.max(), 22 * 86400) if len(own) else 22 * 86400
        expected = 1 - math.log(1 + age / 600) / math.log(1 + 22 * 144)
        assert found[i] == pytest.approx(expected, abs=1e-12)
    assert 0 < (found == 0).mean() < 1


def test_generate_is_idempotent_and_repairs(tmp_path):
    config = dataclasses.replace(SMALL, users=60)
    counts = generate(tmp_path, config)
    stamps = {name: (tmp_path / name).stat().st_mtime_ns for name in FILES}
    assert generate(tmp_path, config) == counts
    assert stamps == {name: (tmp_path / name).stat().st_mtime_ns for name in FILES}
    (tmp_path / "raw_sample.csv").unlink()
    assert generate(tmp_path, config) == counts
    other = generate(tmp_path, dataclasses.replace(config, seed=9))
    assert (
        other != counts and json.loads((tmp_path / "synthetic.json").read_text())["counts"] == other
    )
    assert not (tmp_path / ".partial").exists()


def test_a_crash_leaves_nothing_that_passes_for_whole(tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, users=30)
    real = synthetic.os.replace

    def crash(source, target):
        if str(target).endswith("user_profile.csv"):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(synthetic.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, config)
    monkeypatch.setattr(synthetic.os, "replace", real)
    assert generate(tmp_path, config)["users"] == 30


def test_real_files_are_never_overwritten(tmp_path):
    (tmp_path / "raw_sample.csv").write_text("user,time_stamp,adgroup_id,pid,nonclk,clk\n")
    with pytest.raises(DataError, match="raw_sample.csv.*not made by this generator"):
        generate(tmp_path, SMALL)


@pytest.mark.parametrize(
    "change",
    [{"users": 0}, {"behaviours": 5.0}, {"ads": 3}, {"test_users": 1.0}, {"sessions": 100.0}],
)
def test_impossible_sizes(tmp_path, change):
    with pytest.raises(DataError):
        generate(tmp_path, dataclasses.replace(SMALL, **change))


def test_effects_by_name():
    config = parse_effects(["hour", "local=2.5"], SMALL)
    assert (config.hour, config.local, config.interest) == (SMALL.hour, 2.5, 0.0)
    assert parse_effects(["all"], SMALL) == SMALL
    assert not any(
        getattr(parse_effects(["none"], SMALL), e) for e in synthetic_impressions.EFFECTS
    )
    for bad in ("hours", "hours=1", "hour=much"):
        with pytest.raises(DataError):
            parse_effects([bad], SMALL)
    for effect in synthetic.STUDIES:
        on, off = (SMALL.study(effect, on=on) for on in (True, False))
        assert getattr(on, effect) > 0 == getattr(off, effect)
        assert dataclasses.replace(on, **{effect: 0.0}) == off


def test_command_line_needs_bounded_memory(tmp_path):
    """Four blocks of users need about the memory of one, though they write 15 MB more."""

    def peak(users):
        script = (
            "import resource, sys; from absl import app;"
            "from ctr_jax.data import synthetic; synthetic.define_flags();"
            f"sys.argv = ['x', '--out={tmp_path}/{users}', '--users={users}', '--effects=hour'];"
            "\ntry: app.run(synthetic.main)\n"
            "except SystemExit: pass\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        return int(done.stdout.split()[-1]) / 1024

    assert peak(2000) - peak(500) < 60
