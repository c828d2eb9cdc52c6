"""Episodes and their rows: what is sampled from, when it ends, and that advantages and gradients are right."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlalign as ra
from rlalign.algorithms import ALGORITHMS
from rlalign.envs.episodes import Episode, Episodes, play
from rlalign.envs.prompting import Turn, bare, rebuilt, transcript
from rlalign.envs.protocol import End, Observation
from rlalign.envs.rows import advantage_parts, episode_batch, group_metrics, of_steps, rows_of
from rlalign.envs.words import EOS, Words
from rlalign.envs.worlds import Worlds
from rlalign.types import Rollouts
from tests import oracles
from tests.envs.corridor import Corridor

WORDS = Words(["at", "go", "to", "left", "right", "raise", "now", "did", *map(str, range(8))])
MODEL = ra.ModelConfig(
    vocab_size=len(WORDS),
    width=16,
    layers=1,
    heads=2,
    kv_heads=2,
    head_width=8,
    mlp_width=32,
    max_positions=96,
    tied_head=True,
    qk_norm=True,
)
DECODER = ra.Decoder(MODEL)
SETTINGS = Episodes(copies=4, max_steps=5, max_prompt=60, sampling=ra.SampleConfig(1, 2, eos_ids=(EOS,)))
TASKS = [3, 8, 8]  # two of them alike


def render(shown, taken, observation):
    before = " ".join(f"{turn.observation.text} did {turn.action}" for turn in shown)
    return f"{observation.task} {taken} {before} now {observation.text}"


REBUILT = rebuilt(lambda text: WORDS.encode(text.replace("hang", "raise")), history=2, render=render)
APPENDED = transcript(
    lambda seen: WORDS.encode(f"{seen.task} now {seen.text}"),
    lambda seen, ended: np.append(np.array([EOS][ended:], np.int32), WORDS.encode(f"now {seen.text}")),
)


class Silent(Corridor):
    """Says nothing of what can be done."""

    def seen(self):
        return super().seen()._replace(admissible=())


class Scripted:
    """A sampler that says what a table says, and remembers what it was asked."""

    def __init__(self, *rounds):
        self.rounds, self.asked = list(rounds), []

    def __call__(self, decoder, params, prompts, *, seed, step, config, mesh):
        self.asked.append([WORDS.decode(p.tokens) for p in prompts])
        tokens = np.zeros((len(prompts), config.max_new_tokens), np.int32)
        mask = np.zeros(tokens.shape, bool)
        says = self.rounds[len(self.asked) - 1]
        for row in range(len(prompts)):
            ids = np.append(WORDS.encode(says[row % len(says)]), EOS)[: config.max_new_tokens]
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
        zero = np.zeros(tokens.shape, np.float32)
        stop = 1 - (tokens == EOS).any(axis=1).astype(np.int32)
        return Rollouts(tokens, mask, zero, zero, stop, np.arange(len(prompts), dtype=np.int32))


def played(sampler, tasks=(0,), form=REBUILT, config=SETTINGS, world=Corridor, **arguments):
    with Worlds(world, copies=12, arguments=arguments) as worlds:
        how = {"form": form, "parse": bare, "decode": WORDS.decode, "config": config, "seed": 0, "step": 0}
        return play(DECODER, None, worlds, list(tasks), sampler=sampler, **how)


def either(answer, admissible):
    """Some action, whatever the answer is."""
    return admissible[sum(map(ord, answer)) % 2], answer in admissible


@functools.cache
def sampled(form=REBUILT, tasks=tuple(TASKS)):
    params = DECODER.init(0)
    with Worlds(Corridor, copies=12, arguments={"length": 2, "horizon": 4}) as worlds:
        how = {"form": form, "parse": either, "decode": WORDS.decode, "config": SETTINGS, "seed": 5, "step": 2}
        return play(DECODER, params, worlds, list(tasks), **how)


def test_answers_are_one_of_what_is_admissible():
    with Worlds(Corridor, copies=12, arguments={"length": 2, "horizon": 4}) as worlds:
        how = {"form": REBUILT, "parse": bare, "decode": WORDS.decode, "config": SETTINGS, "seed": 5, "step": 2}
        found = play(DECODER, DECODER.init(0), worlds, list(TASKS), write=WORDS.encode, **how)
    turns = [turn for episode in found for turn in episode.turns]
    assert {turn.text for turn in turns} == {"left", "right"}
    assert all(turn.valid for turn in turns)
    rows = rows_of(found, SETTINGS, write=WORDS.encode, vocab_size=len(WORDS))
    batch = episode_batch(dataclasses.replace(of_steps(ALGORITHMS["gigpo"]), kl_coef=0.0), rows, row_length=64)
    table, state = batch.allowed
    forest, node = batch.packed.forest, batch.packed.node
    hidden, head = jax.jit(DECODER.apply)(DECODER.init(0), forest), DECODER.head(DECODER.init(0))
    logp, _ = ra.token_logprobs(hidden, head, forest, node, allowed=(table, state))
    np.testing.assert_allclose(np.where(batch.packed.mask, logp, 0), batch.old_logp, atol=2e-5)
    with Worlds(Silent, copies=12) as worlds, pytest.raises(ValueError, match=r"^strings\[0\] is empty"):
        play(DECODER, DECODER.init(0), worlds, list(TASKS), write=WORDS.encode, **how)


def test_episodes_end_each_in_its_own_way_and_cost_nothing_afterwards():
    rounds = [["right", "left", "raise", "right"], ["right", "left", "right"], ["right", "left", "left"]]
    rounds += [["left", "left"], ["left"] * 2]
    sampler = Scripted(*rounds)
    found = played(sampler, config=dataclasses.replace(SETTINGS, max_steps=5), length=3)
    assert [e.end for e in found] == [End.WON, End.STEP_LIMIT, End.RAISED, End.STEP_LIMIT]
    assert [len(e.turns) for e in found] == [3, 5, 0, 5]
    assert [len(asked) for asked in sampler.asked] == [4, 3, 3, 2, 2]
    assert [e.reward for e in found] == [10, 0, 0, 0]
    assert found[0].score == 1
    assert "out of order" in found[2].reason
    assert [t.action for t in found[0].turns] == ["right", "right", "right"]
    assert sampler.asked[2][0] == "go to 3 2 at 0 did right at 1 did right now at 2"
    assert all(t.valid for t in found[0].turns)


def test_horizon_invalid_actions_and_answers_without_an_end():
    sampler = Scripted(["go to", "left", "did", "right"], *[["left"]] * 5)
    found = played(sampler, horizon=2)
    assert {e.end for e in found} == {End.TRUNCATED}
    first = [e.turns[0] for e in found]
    assert [t.valid for t in first] == [False, True, False, True]
    assert [t.stop for t in first] == [1, 0, 0, 0]
    assert first[0].action == "go to"
    assert len(first[0].response) == 2


def test_a_prompt_that_no_longer_fits_ends_the_episode():
    found = played(Scripted(*[["left"]] * 5), form=APPENDED, config=dataclasses.replace(SETTINGS, max_prompt=14))
    assert {e.end for e in found} == {End.TOO_LONG}
    assert [len(e.turns) for e in found] == [2] * 4
    with pytest.raises(
        ValueError,
        match="the first prompt of task 0 has 6 tokens, those of the others are too long too, and max_prompt is 5",
    ):
        played(Scripted(["left"]), form=APPENDED, config=dataclasses.replace(SETTINGS, max_prompt=5))


def test_an_answer_depends_on_task_copy_and_turn_alone():
    """Not on the batch: the first group alone, or behind another."""
    alone, behind = sampled(tasks=(3,)), sampled(tasks=(8, 3))[4:]
    for one, other in zip(alone, behind, strict=True):
        assert [t.text for t in one.turns] == [t.text for t in other.turns]
        np.testing.assert_array_equal(one.turns[0].logp, other.turns[0].logp)
    assert len({tuple(t.text for t in e.turns) for e in alone}) > 1


class AnyOrder(Worlds):
    """Answers of copies in another order each time, as workers give them."""

    def reset(self, seeds):
        return dict(reversed(super().reset(seeds).items()))

    def step(self, actions):
        return dict(sorted(super().step(actions).items(), key=lambda item: (item[0] * 7) % 5))


def test_no_order_of_answers_changes_an_episode():
    """A task that comes twice in a batch, too: its groups have answers of their own, whoever is first or lost."""
    params = DECODER.init(0)
    how = {"form": REBUILT, "parse": either, "decode": WORDS.decode, "config": SETTINGS, "seed": 5, "step": 2}
    arguments = {"length": 2, "horizon": 4}
    with (
        Worlds(Corridor, copies=12, arguments=arguments) as one,
        AnyOrder(Corridor, copies=12, arguments=arguments) as other,
    ):
        found = [play(DECODER, params, worlds, TASKS, **how) for worlds in (one, other)]
        again = play(DECODER, params, one, TASKS, attempt=1, **how)
    texts = [[[t.text for t in e.turns] for e in episodes] for episodes in (*found, again)]
    assert texts[0] == texts[1]
    assert texts[0][4:8] != texts[0][8:], "the same task, other answers"
    assert texts[0] != texts[2], "another attempt"


def test_rows_hold_the_steps_and_nothing_else():
    config = dataclasses.replace(SETTINGS, penalty=0.25)
    episodes = sampled()
    rows = rows_of(episodes, config)
    assert rows.count == sum(len(e.turns) for e in episodes)
    assert len(rows.prompts) == 64 > rows.count, "12 episodes of at most 5 steps, in a bucket"
    assert rows.rewards.valid.sum() == rows.count
    row = 0
    for number, episode in enumerate(episodes):
        for t, turn in enumerate(episode.turns):
            assert (rows.group[row], rows.trajectory[row], rows.step[row]) == (episode.group, number, t)
            np.testing.assert_array_equal(rows.prompts[row].tokens, turn.prompt)
            assert rows.rollouts.tokens[row, rows.rollouts.mask[row]].tolist() == turn.response.tolist()
            assert rows.penalty[row] == (0 if turn.valid else 0.25)
            row += 1
    seen = [turn.observation for e in episodes for turn in e.turns]
    for i in range(rows.count):
        for j in range(rows.count):
            if rows.group[i] == rows.group[j]:
                assert (rows.anchor[i] == rows.anchor[j]) == (seen[i].anchor == seen[j].anchor)


@pytest.mark.parametrize(("anchor", "same"), [("state", False), ("observation", True), ("history", False)])
def test_what_makes_steps_comparable_is_a_choice(anchor, same):
    """The corridor's own anchor counts steps; its text does not: at 0 after "left" is at 0 again."""
    found = played(Scripted(*[["left"]] * 5), config=dataclasses.replace(SETTINGS, anchor=anchor))
    rows = rows_of(found, dataclasses.replace(SETTINGS, anchor=anchor))
    assert (rows.anchor[0] == rows.anchor[1]) == same
    assert rows.anchor[0] == rows.anchor[5], "the first steps of two copies"
    near = dataclasses.replace(SETTINGS, anchor="observation", similarity=0.5)
    assert len(set(rows_of(found, near).anchor[: rows.count])) == 1


def test_a_lost_episode_is_in_no_cluster():
    """Its text resembles two that do not resemble each other: first, it would join them."""
    text = {0: "abcdef", 1: "abcxyz", 2: "uvwdef"}
    ends = {0: End.HUNG, 1: End.WON, 2: End.WON}
    zero = np.zeros(1, np.float32)

    def episode(number):
        seen = Observation(text[number], "leave")
        turn = Turn(seen, np.array([3]), np.array([EOS]), zero, zero, 0, "left", "left", True, 0.0)
        return Episode(0, 0, (turn,), ends[number], "", 0.0, None)

    near = dataclasses.replace(SETTINGS, anchor="observation", similarity=0.5)
    anchor = rows_of([episode(n) for n in range(3)], near).anchor
    assert anchor[1] != anchor[2]
    ends[0] = End.WON
    anchor = rows_of([episode(n) for n in range(3)], near).anchor
    assert anchor[1] == anchor[2], "not lost, it is the first of their cluster"


@pytest.mark.parametrize("name", ["gigpo", "grpo", "rloo", "hgpo"])
def test_advantages_of_whole_rollouts_equal_the_oracle(x64, name):
    episodes = sampled()
    lost = [*episodes[:5], episodes[5]._replace(end=End.HUNG), *episodes[6:]]
    rows = rows_of(lost, SETTINGS)
    algorithm = dataclasses.replace(of_steps(ALGORITHMS[name]), kl_coef=0.0)
    batch = episode_batch(algorithm, rows, row_length=64)
    case = {"reward": np.nan_to_num(rows.rewards.reward), "valid": rows.rewards.valid, "num_groups": len(rows.prompts)}
    case |= {k: getattr(rows, k) for k in ("group", "trajectory", "step", "anchor", "past", "penalty")}
    given = [case[k] for k in ("reward", "group")]
    how = {k: case[k] for k in ("num_groups", "trajectory", "step", "valid", "penalty")}
    want = {
        "gigpo": lambda: oracles.ADVANTAGES["gigpo"](case),
        "hgpo": lambda: oracles.ADVANTAGES["hgpo"](case),
        "grpo": lambda: oracles.per_trajectory(oracles.group_relative, *given, **how),
        "rloo": lambda: oracles.per_trajectory(oracles.leave_one_out, *given, **how),
    }[name]()
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(batch.advantage, want, 1e-9, 1e-9)
    assert (batch.advantage[rows.trajectory == 5] == 0).all()
    if name == "gigpo":
        parts = advantage_parts(algorithm, rows)
        np.testing.assert_allclose(parts["episode"] + parts["step"], batch.advantage, 1e-5, 1e-5)
        figures = group_metrics(algorithm, rows)
        want = oracles.step_metrics(parts, **{k: case[k] for k in ("group", "anchor", "valid")})
        for key, value in figures.items():
            assert value == pytest.approx(want[key], abs=1e-5)


def test_a_transcript_is_a_path_of_the_forest_with_the_gradient_of_its_rows():
    """Turns are stored once; the gradient is that of a batch in which every row repeats its whole prompt."""
    params, rows = DECODER.init(1), rows_of(sampled(APPENDED), SETTINGS)
    algorithm = dataclasses.replace(of_steps(ALGORITHMS["gigpo"]), kl_coef=0.0, entropy_coef=0.0)
    rows = rows._replace(rewards=rows.rewards._replace(reward=rows.rewards.reward + 0.1 * rows.step))
    batch = episode_batch(algorithm, rows, row_length=96)
    stored = int((np.asarray(batch.packed.forest.visible_until) > 0).sum())
    repeated = sum(len(p.tokens) for p in rows.prompts[: rows.count]) + int(rows.rollouts.mask.sum())
    assert stored < 0.45 * repeated
    whole = [
        np.concatenate([p.tokens, t[m]])
        for p, t, m in zip(rows.prompts, rows.rollouts.tokens, rows.rollouts.mask, strict=True)
    ]
    apart = [
        ra.pack([w], row_length=96, response_start=[len(p.tokens)], response_length=2)
        for w, p in zip(whole, rows.prompts, strict=True)
    ]
    forest = jax.tree.map(lambda *x: np.concatenate(x), *[one.forest for one in apart])
    node = np.concatenate([np.where(one.node >= 0, one.node + 96 * i, -1) for i, one in enumerate(apart)])
    unpacked = batch._replace(packed=batch.packed._replace(forest=forest, node=node))
    np.testing.assert_array_equal(batch.packed.mask, np.concatenate([one.mask for one in apart]))

    @jax.jit
    def loss(params, batch):
        logp, _ = ra.token_logprobs(
            DECODER.apply(params, batch.packed.forest), DECODER.head(params), batch.packed.forest, batch.packed.node
        )
        return algorithm.loss(logp, batch.old_logp, batch.advantage, batch.packed.mask, aggregate="token")[0]

    arrays = lambda b: jax.tree.map(jnp.asarray, b._replace(weight=None))
    one, other = (jax.grad(loss)(params, arrays(b)) for b in (batch, unpacked))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 1e-5 * float(jnp.abs(b).max()))
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(one)) > 1e-3


def test_what_does_not_learn_from_episodes_is_refused():
    with pytest.raises(ValueError, match="this algorithm learns from pairs: use gigpo, grpo, rloo"):
        of_steps(ALGORITHMS["dpo"])
    with pytest.raises(ValueError, match="needs weight, which episodes do not give"):
        of_steps(ALGORITHMS["gprs_weight"])
    with (
        pytest.raises(ValueError, match="1 tasks x 4 copies are 4, the worlds have 1"),
        Worlds(Corridor, copies=1) as w,
    ):
        play(DECODER, None, w, [0], form=REBUILT, parse=bare, decode=WORDS.decode, config=SETTINGS, seed=0, step=0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"copies": 0}, "copies must be an int of at least 1, got 0"),
        ({"copies": 1.5}, "copies must be an int of at least 1, got 1.5"),
        ({"sampling": ra.SampleConfig(2, 2, eos_ids=(1,))}, "sampling.num_samples=2: a step has one answer; copies=4"),
        ({"penalty": -1.0}, "penalty must be >= 0, got -1.0"),
        ({"anchor": "place"}, "anchor must be 'state', 'observation' or 'history', got 'place'"),
        ({"similarity": 0.9}, "similarity=0.9 with anchor='state': it compares texts"),
    ],
)
def test_settings_are_checked_when_they_are_made(change, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(SETTINGS, **change)


def test_what_is_valid_is_said_by_the_environment_where_the_parser_does_not_know():
    def valid(world, parse):
        with Worlds(world, copies=4, arguments={"length": 3, "horizon": 4}) as worlds:
            how = {"form": REBUILT, "parse": parse, "decode": WORDS.decode, "config": SETTINGS, "seed": 5, "step": 0}
            script = Scripted(["left", "now", "right", ""], ["left"] * 4, ["left"] * 4, ["left"] * 4)
            episodes = play(DECODER, DECODER.init(0), worlds, [1], sampler=script, **how)
        return [episode.turns[0].valid for episode in episodes]

    assert valid(Corridor, bare) == [True, False, True, False]  # by what is admissible
    assert valid(Silent, bare) == [True, False, True, False]  # by info.valid; nothing is no action
    assert valid(Silent, lambda answer, admissible: (answer, True)) == [True] * 4  # the parser has said so
