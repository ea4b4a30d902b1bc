"""What of the planted structure can be seen, and through what: probes without a model.

    python -m benchmarks.synthetic_probe --study=demo|effects|all --users=4000 --behaviours=300

Hand-made features of (history, candidate), each group standing for one mechanism, go into
scikit-learn's histogram gradient boosting; training and test users are disjoint. Cells are
(AUC - .5) / (oracle AUC - .5) on the test day. The probe knows the announcing map and reads the
candidate's category by identity, which a model has to learn, so these are near the ceiling of what
the history shows. "effects" trains, for each effect, all features with and without the groups
that it is seen through (REMOVED), and again with the effect off.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
from absl import app, flags
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from ctr_jax.data.synthetic import SyntheticConfig, generate, oracle_auc
from ctr_jax.data.synthetic_impressions import Simulation
from ctr_jax.data.synthetic_users import FIRST_DAY, TEST_DAY, TIME_ZONE

LENGTH, CHUNKS, ENDS, WINDOW = 512, 16, 2, 5
# effect: the groups of features taken away, one row each. A mechanism is one group; but time, hour
# and weekend are weighted counts over the whole history as well, which show interests without the
# global group: the second row of interest takes all four, and leaves nothing that sees it all. The
# age of the last match (time) shows the burst before a request: hence the second row of local.
REMOVED = {
    "interest": (("global",), ("global", "time", "hour", "weekend")),
    "transition": (("ends",),),
    "local": (("window",), ("window", "time")),
    "recency": (("time",),),
    "hour": (("hour",),),
    "weekend": (("weekend",),),
}


def load(raw_dir: Path) -> dict[str, np.ndarray]:
    """The raw files as arrays: impressions [N], histories [U, LENGTH] right-aligned."""
    samples, ads, people, log = (
        pa.csv.read_csv(raw_dir / f"{name}.csv")
        for name in ("raw_sample", "ad_feature", "user_profile", "behavior_log")
    )

    def column(table: pa.Table, name: str) -> np.ndarray:
        return table[name].to_numpy()

    out = {name: column(samples, name) for name in ("user", "time_stamp", "adgroup_id", "clk")}
    out["pid"] = (column(samples, "pid") == "430548_1007").astype(int)
    order = np.argsort(column(ads, "adgroup_id"))
    place = np.searchsorted(column(ads, "adgroup_id")[order], out["adgroup_id"])
    out["cate_id"] = column(ads, "cate_id")[order][place]
    order = np.argsort(column(people, "userid"))
    known = column(people, "userid")[order]
    place = np.minimum(np.searchsorted(known, out["user"]), len(known) - 1)
    for name, source in (("gender", "final_gender_code"), ("age_level", "age_level")):
        out[name] = np.where(known[place] == out["user"], column(people, source)[order][place], -1)
    order = np.lexsort((column(log, "time_stamp"), column(log, "user")))
    order = order[column(log, "time_stamp")[order] >= FIRST_DAY]
    out["log_user"], out["log_time"], out["log_cate"] = (
        column(log, name)[order] for name in ("user", "time_stamp", "cate")
    )
    return out


def histories(data: dict[str, np.ndarray], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(categories, times) [rows, LENGTH] strictly before each impression; 0 is padding."""
    users, first = np.unique(data["log_user"], return_index=True)
    place = np.searchsorted(users, data["user"][rows])
    start = first[place]
    span = np.int64(1) << 33
    code = data["log_user"].astype(np.int64) * span + data["log_time"]
    end = np.searchsorted(
        code, data["user"][rows].astype(np.int64) * span + data["time_stamp"][rows]
    )
    index = end[:, None] - LENGTH + np.arange(LENGTH)
    valid = index >= start[:, None]
    index = np.where(valid, index, 0)
    return np.where(valid, data["log_cate"][index], 0), np.where(valid, data["log_time"][index], 0)


def features(data, announced_of: dict[int, int], rows: np.ndarray) -> dict[str, np.ndarray]:
    """{"group/name": [rows]} of candidate against history."""
    cate, time = histories(data, rows)
    now, want = data["time_stamp"][rows][:, None], data["cate_id"][rows][:, None]
    valid, match = time > 0, cate == want
    age = np.where(valid, now - time, 1)
    gap = np.where(valid[:, 1:] & valid[:, :-1], time[:, 1:] - time[:, :-1], -1)
    gap = np.concatenate([np.where(valid[:, :1], 2**31, -1), gap], axis=1)
    gap[np.arange(len(gap)), np.argmax(valid, axis=1)] = 2**31  # the first behaviour is a cut
    cut = gap >= np.maximum(-np.sort(-gap, axis=1)[:, CHUNKS - 1 : CHUNKS], 1)
    fixed = valid & (np.arange(LENGTH) % max(1, LENGTH // CHUNKS // 2) == 0)
    said = np.zeros(int(max(cate.max(), max(announced_of))) + 1, np.int64)
    said[list(announced_of)] = list(announced_of.values())
    tells = said[cate] == want
    hour = (age / 3600) % 24
    same_week = _weekend(time) == _weekend(now)
    out = {
        "window/last5": match[:, -WINDOW:].sum(1),
        "window/last9": match[:, -9:].sum(1),
        "last20/count": match[:, -20:].sum(1),
        "last20/tells": tells[:, -20:].sum(1),
        "last20/age": np.where(match[:, -20:], np.log2(age[:, -20:]), 30).min(1),
        "global/count": match.sum(1),
        "global/share": match.sum(1) / np.maximum(valid.sum(1), 1),
    }
    chunk = np.cumsum(cut, axis=1)
    seen = np.zeros((len(rows), CHUNKS + 2), bool)
    np.logical_or.at(seen, (np.nonzero(match)[0], np.minimum(chunk[match], CHUNKS + 1)), True)
    out["global/chunks"] = seen.sum(1)
    current = (chunk == chunk[:, -1:]) & valid
    out["global/current"] = (match & current).sum(1)
    for name, starts in (("ends", cut), ("fixed", fixed)):
        near = np.zeros_like(valid)
        ends = np.concatenate([starts[:, 1:], np.ones((len(rows), 1), bool)], axis=1) & valid
        for back in range(ENDS):
            near |= np.concatenate([ends[:, back:], np.zeros((len(rows), back), bool)], axis=1)
        near[:, -ENDS:] = False
        rank = np.cumsum((near & valid)[:, ::-1], axis=1)[:, ::-1]
        for k, (low, high) in enumerate(((0, 2), (2, 4), (4, 6), (6, 99))):
            part = near & (rank > low) & (rank <= high)
            out[f"{name}/tells{k}"] = (tells & part).sum(1)
        out[f"{name}/matches"] = (match & near).sum(1)
    out["anywhere/tells"] = tells.sum(1)
    out["time/age"] = np.where(match, np.log2(age), 30).min(1)
    out["time/tells"] = np.where(tells, np.log2(age), 30).min(1)
    for days in (0.5, 1, 2, 4, 8):
        out[f"time/{days}"] = (match * 2.0 ** (-age / 86400 / days)).sum(1)
    for power in (1, 4):
        kernel = np.cos(np.pi * hour / 24) ** (2 * power) * match
        out[f"hour/{power}"] = kernel.sum(1)
        out[f"hour/share{power}"] = kernel.sum(1) / (match.sum(1) + 0.5)
    out["weekend/count"] = (match & same_week).sum(1)
    out["weekend/share"] = out["weekend/count"] / (match.sum(1) + 0.5)
    return out


def _weekend(time: np.ndarray) -> np.ndarray:
    weekday = ((time + TIME_ZONE) // 86400 + 4) % 7
    return (weekday == 0) | (weekday == 6)


def prepare(config: SyntheticConfig) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, float]:
    """(features [N] by "group/name", labels, is_test, oracle AUC) of a configuration."""
    with tempfile.TemporaryDirectory() as folder:
        generate(folder, config)
        data, oracle = load(Path(folder)), oracle_auc(folder)
    catalogue = Simulation(config).catalogue
    announced_of = dict(
        zip(
            catalogue.category_id[catalogue.announcer].tolist(),
            catalogue.category_id[: config.categories].tolist(),
            strict=True,
        )
    )
    test = data["time_stamp"] >= FIRST_DAY + TEST_DAY * 86400
    label = data["clk"]
    blocks = np.array_split(np.arange(len(label)), max(1, len(label) // 4000))
    parts = [features(data, announced_of, rows) for rows in blocks]
    table = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    gender, age = data["gender"], data["age_level"]
    for name, key in (
        ("ad", data["adgroup_id"]),
        ("cate", data["cate_id"]),
        ("gender", data["cate_id"] * 8 + gender),
        ("age", data["cate_id"] * 16 + age),
    ):
        table[f"none/{name}"] = _encode(key, label, ~test, data["user"])
    table["none/pid"] = data["pid"]
    return table, label, test, oracle


def _encode(key: np.ndarray, label: np.ndarray, train: np.ndarray, user: np.ndarray) -> np.ndarray:
    """Smoothed click rate of each key; that of a training row comes from the other users' folds."""
    _, code = np.unique(key, return_inverse=True)
    fold = np.where(train, user % 5, 5)
    out = np.zeros(len(key))
    for k in range(6):
        others = train & (fold != k)
        clicks, shown = np.bincount(code, label * others), np.bincount(code, others)
        rate = (clicks + 20 * label[train].mean()) / (shown + 20)
        out[fold == k] = rate[code[fold == k]]
    return out


def score(table, label, test, oracle, groups) -> float:
    """(AUC - .5) / (oracle - .5) of gradient boosting on the groups' features."""
    names = [n for n in table if n.split("/")[0] in groups]
    x = np.stack([table[n] for n in names], axis=1)
    model = HistGradientBoostingClassifier(
        max_iter=150, learning_rate=0.08, max_leaf_nodes=15, l2_regularization=5.0, random_state=0
    )
    model.fit(x[~test], label[~test])
    auc = roc_auc_score(label[test], model.predict_proba(x[test])[:, 1])
    return (auc - 0.5) / (oracle - 0.5)


def demo(config: SyntheticConfig) -> None:
    table, label, test, oracle = prepare(config)
    rate, rows = label.mean(), f"{(~test).sum()} + {test.sum()}"
    print(f"impressions {rows}, click rate {rate:.3f}, oracle AUC {oracle:.4f}")
    everything = {n.split("/")[0] for n in table} - {"fixed", "anywhere"}
    ladder = {
        "no history": {"none"},
        "last 5": {"none", "window"},
        "last 20": {"none", "window", "last20"},
        "all, counts alone": {"none", "window", "last20", "global"},
        "all, every mechanism": everything,
    }
    ladder |= {f"  without {g}": everything - {g} for g in ("global", "ends", "window", "time")}
    ladder |= {f"  without {g}": everything - {g} for g in ("hour", "weekend")}
    for name, groups in ladder.items():
        print(f"{name:24s} {score(table, label, test, oracle, groups):.3f}", flush=True)


def effects(config: SyntheticConfig, names: list[str]) -> None:
    print(f"{'effect':12s}{'':5s}{'oracle':>8s}{'none':>8s}{'all':>8s}{'without':>9s}{'lost':>8s}")
    for effect in names:
        for on in (True, False):
            table, label, test, oracle = prepare(config.study(effect, on))
            everything = {n.split("/")[0] for n in table} - {"fixed", "anywhere"}
            everything -= {"last20"}  # would show what the removed groups are to show
            none, full = (score(table, label, test, oracle, g) for g in ({"none"}, everything))
            for removed in REMOVED[effect]:
                share = score(table, label, test, oracle, everything - set(removed))
                print(
                    f"{effect:12s}{'on' if on else 'off':5s}{oracle:8.4f}{none:8.3f}{full:8.3f}"
                    f"{share:9.3f}{full - share:8.3f}  {', '.join(removed)}",
                    flush=True,
                )
        if effect == "transition":
            table, label, test, oracle = prepare(config.study(effect, True))
            fixed = (everything - {"ends"}) | {"fixed"}
            share = score(table, label, test, oracle, fixed)
            print(f"  fixed chunks in place of time chunks {share:.3f}")


def main(_) -> None:
    args = flags.FLAGS
    config = dataclasses.replace(
        SyntheticConfig(),
        users=args.users,
        behaviours=args.behaviours,
        seed=args.seed,
        test_users=0.4,
    )
    if args.study in ("demo", "all"):
        demo(config)
    if args.study in ("effects", "all"):
        effects(config, args.effects or list(REMOVED))


if __name__ == "__main__":
    flags.DEFINE_enum("study", "all", ["demo", "effects", "all"], "What to print.")
    flags.DEFINE_integer("users", 4000, "Users, test users included.")
    flags.DEFINE_float("behaviours", 300.0, "Mean behaviours a user.")
    flags.DEFINE_integer("seed", 0, "Seed of the data.")
    flags.DEFINE_list("effects", None, "Effects of the study; default all of them.")
    app.run(main)
