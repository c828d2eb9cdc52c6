"""DDXPlus's files: what is read, what is drawn and what is known of it, on files made up here."""

import itertools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from rlalign.clinical import ddxplus
from rlalign.clinical.inquiry import told_tests

STATS = {
    "Rhume": {"prior": 0.6, "findings": {"toux": 0.8, "fievre": 0.3, "douleur": {"tête": 0.7, "nulle_part": 0.3}}},
    "Grippe": {"prior": 0.3, "findings": {"toux": 0.6, "fievre": 0.9}},
    "Asthme": {"prior": 0.1, "findings": {"toux": 0.5, "fam": 0.7, "douleur": {"thorax": 1.0}}},
}


def binary(name):
    return {"question_en": f"{name}?", "default_value": 0, "possible-values": [], "data_type": "B"}


@pytest.fixture
def folder(tmp_path):
    evidences = {name: binary(name) for name in ("toux", "fievre", "fam")}
    evidences["douleur"] = {
        "question_en": "Where?",
        "default_value": "nulle_part",
        "possible-values": ["nulle_part", "tête", "thorax"],
        "data_type": "M",
    }
    conditions = {name: {"cond-name-eng": name.upper(), "icd10-id": "j00"} for name in STATS}
    for name, content in zip(ddxplus.FILES, (conditions, evidences, STATS), strict=True):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def test_what_is_read(folder):
    world = ddxplus.read_ddxplus(folder, questions="all")
    assert world.diseases == ("ASTHME", "GRIPPE", "RHUME")
    assert world.icd == ("J00",) * 3
    assert [world.answers[i] for i in world.first] == [(0, "0"), (1, "0"), (2, "0"), (3, "nulle_part")]
    np.testing.assert_allclose(world.prior, [0.1, 0.3, 0.6])
    table = [
        [0.5, 0.5, 1, 0, 0.3, 0.7, 0, 0, 1],
        [0.4, 0.6, 0.1, 0.9, 1, 0, 1, 0, 0],
        [0.2, 0.8, 0.7, 0.3, 1, 0, 0.3, 0.7, 0],
    ]
    np.testing.assert_allclose(world.table, table, atol=3e-6)
    asked = ddxplus.read_ddxplus(folder)
    assert (len(asked.questions), len(asked.answers), asked.rules.horizon) == (3, 6, 10)


def test_patients_are_drawn_from_the_tables(folder):
    world = ddxplus.read_ddxplus(folder, questions="all")
    cases = world.sample(40_000, 0)
    disease = cases.gold.argmax(axis=1)
    np.testing.assert_allclose(np.bincount(disease) / 40_000, world.prior, atol=0.01)
    for d in range(3):
        seen = (cases.column[disease == d][:, :, None] == np.arange(9)).any(axis=1).mean(axis=0)
        np.testing.assert_allclose(seen, world.table[d], atol=0.03)
    assert (cases.told.sum(axis=1) <= 1).all()
    said = cases.column[cases.told]
    assert set(said) <= {1, 3, 5}  # a complaint is something that is there
    present = (cases.column[:, :3] == world.first[:3] + 1).any(axis=1)
    np.testing.assert_array_equal(cases.told.any(axis=1), present)
    again = world.sample(40_000, 0)
    assert all((a == b).all() for a, b in zip(cases, again, strict=True))


def test_the_posterior_and_its_gain_are_those_of_bayes(folder):
    world = ddxplus.read_ddxplus(folder, questions="all")
    posterior, cases = world.posterior(), world.sample(50, 1)
    state = posterior.start(cases)
    told = np.asarray(told_tests(cases))
    for n in range(50):
        p = world.prior * np.prod([world.table[:, cases.column[n, k]] for k in told[n] if k >= 0], axis=0)
        np.testing.assert_allclose(posterior.probabilities(state)[n], p / p.sum(), rtol=1e-4, atol=1e-6)
    gain = posterior.gain(state, cases)
    entropy = lambda p: -sum(x * math.log(x) for x in p if x > 0)
    ends = [*world.first[1:], 9]
    for n, k in itertools.product(range(5), range(4)):
        p = np.asarray(posterior.probabilities(state)[n], float)
        after = 0.0
        for answer in range(world.first[k], ends[k]):
            both = p * world.table[:, answer]
            after += both.sum() * entropy(both / both.sum())
        assert gain[n, k] == pytest.approx(entropy(p) - after, abs=1e-4)
    learned = posterior.learn(state, cases, jnp.full((50, 2), -1))
    np.testing.assert_array_equal(learned, state)


def test_files_that_do_not_belong_together(folder):
    (folder / ddxplus.FILES[2]).write_text(json.dumps({k: v for k, v in STATS.items() if k != "Rhume"}))
    with pytest.raises(
        ValueError, match=r"^release_conditions.json and ddxplus_bed_stats_4.json differ in 'Rhume': take"
    ):
        ddxplus.read_ddxplus(folder)
    with pytest.raises(FileNotFoundError):
        ddxplus.read_ddxplus(folder / "elsewhere")
