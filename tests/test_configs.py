"""Every page of configs/ gives a config, for each of its variants, and says no to others."""

import dataclasses
import importlib
from pathlib import Path

import jax
import pytest

from benchmarks import quality
from configs import (
    baselines_alibaba,
    baselines_amazon,
    baselines_movielens,
    baselines_taobao,
    lrea_industrial,
    sparsectr_alibaba,
)
from ctr_jax import sharding, steps
from ctr_jax.data.expected import expected_spec
from ctr_jax.data.synthetic import STUDIES, SyntheticConfig

PAGES = sorted(
    p.stem for p in (Path(__file__).parent.parent / "configs").glob("*.py") if p.stem != "__init__"
)


@pytest.mark.parametrize("page", PAGES)
def test_the_page_gives_a_config_and_names_its_command(page):
    module = importlib.import_module(f"configs.{page}")
    config = module.get_config()
    assert config.name and config.data.builder and config.model.module
    assert f"train.py --config=configs/{page}.py" in module.__doc__


@pytest.mark.parametrize("page", PAGES)
def test_every_page_can_be_planned_without_its_data(page, tmp_path):
    config = importlib.import_module(f"configs.{page}").get_config()
    config.data.raw_dir = str(tmp_path)  # nothing there
    spec, source = expected_spec(config, {})
    assert source == "config.expected_rows" and spec.vocabularies.keys() >= {
        c.vocabulary for c in spec.columns if c.kind == "id"
    }
    with jax.set_mesh(mesh := sharding.make_mesh(data=1, table=1)):
        experiment = steps.bind(config, spec, mesh, total_steps=1)
        assert steps.state_shapes(experiment)["tables"]


@pytest.mark.parametrize("page", PAGES)
def test_a_variant_that_does_not_exist_is_refused(page):
    with pytest.raises((ValueError, TypeError)):
        importlib.import_module(f"configs.{page}").get_config("no_such_variant")


@pytest.mark.parametrize("row", baselines_alibaba.ROWS)
@pytest.mark.parametrize(
    "page",
    [
        baselines_alibaba,
        baselines_movielens,
        *(pytest.param(p, marks=pytest.mark.slow) for p in (baselines_amazon, baselines_taobao)),
    ],
)
def test_every_baseline_can_be_planned(page, row, tmp_path):
    config = page.get_config(row)
    config.data.raw_dir = str(tmp_path)
    assert row in config.name
    with jax.set_mesh(mesh := sharding.make_mesh(data=1, table=1)):
        experiment = steps.bind(config, expected_spec(config, {})[0], mesh, total_steps=1)
        assert steps.state_shapes(experiment)["tables"]


@pytest.mark.parametrize("variant", sparsectr_alibaba.EFFECTS)
def test_an_effect_variant_plants_that_effect_or_not(variant):
    config = sparsectr_alibaba.get_config(variant)
    effect, _, state = variant.partition("_")
    generated = SyntheticConfig(**config.data.generate)
    assert getattr(generated, effect) == (STUDIES[effect][0] if state == "on" else 0)
    other = sparsectr_alibaba.get_config(f"{effect}_{'off' if state == 'on' else 'on'}")
    fields = dataclasses.asdict(SyntheticConfig(**other.data.generate))
    differing = {k for k, v in dataclasses.asdict(generated).items() if fields[k] != v}
    assert differing == {effect}
    assert other.data.raw_dir != config.data.raw_dir


@pytest.mark.parametrize(
    "page, variant",
    [(sparsectr_alibaba, v) for v in ("demo", "hour_on", "interest_off")]
    + [(lrea_industrial, v) for v in ("", "demo")],
)
def test_a_variant_of_generated_files_plans_for_the_users_it_generates(page, variant):
    config = page.get_config(variant)
    assert config.expected_rows.user_id == config.data.generate.users


@pytest.mark.parametrize("study", quality.studies())
def test_every_row_of_a_study_changes_fields_that_exist(study):
    for row in quality.studies()[study].values():
        path, _, variant = row["config"].partition(":")
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        config = module.get_config(variant) if variant else module.get_config()
        config.lock()
        config.update_from_flattened_dict(row["changes"])
        for name, value in row["changes"].items():
            at = config
            for part in name.split("."):
                at = at[part]
            assert at == value


def test_results_add_up_and_print_with_their_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "ROOT", tmp_path)
    path = tmp_path / "benchmarks" / "results" / "quality_kuairand.json"
    for seed, auc in ((0, 0.7), (1, 0.72)):
        test = {"auc": auc, "gauc_user": 0.6, "logloss": 0.5}
        quality._add(path, "DIN", seed, {"test": test, "examples_per_second": 1000.0})
    text = quality.table("kuairand")
    assert "| DIN | 2 | 0.7100 ± 0.0141 | 0.6000 ± 0.0000 | 0.5000 ± 0.0000 |  | 1,000 |" in text
    assert "SparseCTR" not in text  # a row without runs is left out
