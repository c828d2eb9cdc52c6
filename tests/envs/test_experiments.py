"""The experiments of agents: what they compare is comparable, what they hold out is held out, and they run."""

import dataclasses
import json
from pathlib import Path

import pytest

import rlalign as ra

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import from_scratch
    import gigpo_house
    import gigpo_shop
    import one_loss

    return {"scratch": from_scratch, "house": gigpo_house, "shop": gigpo_shop, "loss": one_loss}


def test_algorithms_that_are_compared_differ_in_their_advantages_alone(modules):
    ours = {name: modules["loss"].objective(name, scale="std") for name in ("gigpo", "grpo", "rloo", "hgpo")}
    apart = {"advantage", "needs", "optional", "grouped"}
    for algorithm in ours.values():
        for field in {field.name for field in dataclasses.fields(algorithm)} - apart:
            assert getattr(algorithm, field) == getattr(ra.ALGORITHMS["gigpo"], field), field
    assert len({str(algorithm.advantage) for algorithm in ours.values()}) == 4
    assert "trajectory" in ours["grpo"].needs
    assert modules["loss"].objective("grpo", scale="none", kl_coef=0.5).kl_coef == 0.5
    with pytest.raises(ValueError, match="scale='none': the advantages of rloo have no scale to choose"):
        modules["loss"].objective("rloo", scale="none")


@pytest.mark.parametrize("level", [1, 2, 3])
def test_no_purchase_that_is_held_out_is_trained_on(modules, level):
    train, held_out = modules["shop"].split(level)
    shop = modules["shop"].Shop(**modules["shop"].LEVELS[level])
    asked = [{shop.reset(seed).task for seed in seeds} for seeds in (train, held_out)]
    assert not asked[0] & asked[1]
    assert len(asked[1]) == len(held_out) > (10 if level == 1 else 60)


def test_settings_that_cannot_work_are_refused_at_once(modules, tmp_path):
    settings, world = modules["house"].GigpoHouse, modules["house"].WORLD
    for wrong in ({"copies": 1}, {"steps": 0}, {"noise": 2}, {"warm_tasks": 9999}, {"algorithms": ()}, {"seeds": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            settings(**wrong)
    for wrong, text in (
        ({"level": 9}, "level=9, Chores in a House has 1, 2, 3, 4, 5"),
        ({"minibatches": 9999}, "parts"),
    ):
        with pytest.raises(ValueError, match=text):
            modules["scratch"].one_run(world, settings(folder=str(tmp_path), **wrong))
    assert not list(tmp_path.iterdir())


def test_a_sweep_writes_what_it_found(modules, tmp_path):
    scratch, folder = modules["scratch"], tmp_path / "sweep"
    given = {"preset": "smoke", "folder": str(folder), "seeds": 1, "level": 1}
    config = scratch.with_preset(modules["shop"].GigpoShop(**given), scratch.PRESETS)
    found = scratch.sweep(modules["shop"].WORLD, config)
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(found))
    json.dumps(found, allow_nan=False)
    assert [run["algorithm"] for run in found["runs"]] == ["gigpo", "grpo"]
    for run in found["runs"]:
        assert set(run["success"]) == {"0", "1", "2"}
        assert run["environment_steps"] >= found["environment_steps_compared_at"] > 0
    equal = found["success_at_equal_environment_steps"]
    assert set(equal) == set(found["curves"]) == {"gigpo", "grpo"}
    assert equal["gigpo"]["low"] is None
    assert "environment steps" in (folder / "curves.svg").read_text()
    again = scratch.sweep(modules["shop"].WORLD, config)  # everything is there
    assert json.dumps(again["runs"]) == json.dumps(found["runs"])
