"""What experiments share: presets leave flags that were given, results are those of the settings asked for."""

import dataclasses
import json

import pytest

from rlalign.io.experiment import earlier_result, with_preset


@dataclasses.dataclass(frozen=True)
class Flags:
    preset: str = "laptop"
    steps: int = 100
    rates: tuple = (1, 2)
    folder: str = "runs/a"


PRESETS = {"smoke": {"steps": 2, "folder": "runs/smoke"}, "laptop": {}}


def test_a_preset_leaves_what_was_given():
    assert with_preset(Flags("smoke"), PRESETS) == Flags("smoke", 2, (1, 2), "runs/smoke")
    assert with_preset(Flags("smoke", steps=8), PRESETS).steps == 8
    assert with_preset(Flags(steps=8), PRESETS) == Flags(steps=8)


def test_a_result_is_that_of_the_settings(tmp_path):
    path = tmp_path / "result.json"
    assert earlier_result(path, Flags()) is None
    path.write_text(json.dumps({**dataclasses.asdict(Flags()), "accuracy": 0.5}))
    found = earlier_result(path, Flags())
    assert found is not None
    assert found["accuracy"] == 0.5
    with pytest.raises(
        ValueError, match=r"result\.json is the result of steps=100, asked for is 3: give another --folder"
    ):
        earlier_result(path, Flags(steps=3))
    assert earlier_result(path, Flags(steps=3), ignore=("steps",)) == found
