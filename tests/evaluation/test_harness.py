"""The model of lm-eval-harness: against whole logits, and a task of the harness where it is installed."""

import functools
import importlib.util
import types

import jax
import numpy as np
import pytest

import rlalign as ra
from rlalign.evaluation import harness, harness_model
from rlalign.train.score import make_choice_scorer
from tests.tiny import GEMMA, QWEN3, Samples, dense_decoder, ragged_groups, random_params

installed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the extra `harness` is absent")
WORDS = "abcdefghij klmno"  # ids 1 to 16; 0 ends


class Inner:
    """What the harness asks of a tokenizer of transformers."""

    bos_token_id, name_or_path, chat_template = None, "letters/16", "a template"

    def apply_chat_template(self, chat, *, tokenize, add_generation_prompt, continue_final_message):
        assert not tokenize
        assert continue_final_message != add_generation_prompt
        return " ".join(turn["content"] for turn in chat) + " a" * add_generation_prompt


class Letters:
    inner, eos_ids = Inner(), (0,)

    def __call__(self, text):
        return self.encode(text).tolist()

    def encode(self, text):
        return np.array([1 + WORDS.index(letter) for letter in text], np.int32)

    def decode(self, ids):
        return "".join(WORDS[i - 1] for i in ids)


LETTERS = Letters()


@functools.cache
def policy():
    return ra.Decoder(QWEN3), random_params(QWEN3, scale=1.0)


def greedy(context, length):
    """What greedy decoding gives, by whole logits."""
    found = list(context)
    for _ in range(length):
        row = Samples([np.array(found)], [1]).repeated(24)
        found.append(int(whole_logits(row)[0, len(found) - 1].argmax()))
    return found[len(context) :]


def written(context, length):
    """The text of that, up to an end token."""
    best = greedy(context, length)
    return LETTERS.decode(best[: best.index(0)] if 0 in best else best)


@functools.cache
def compiled():
    decoder, params = policy()
    return jax.jit(lambda row: ra.logits(dense_decoder(decoder.config), params, row))


def whole_logits(row):
    return np.asarray(compiled()(row), np.float64)


def by_whole_logits(context, continuation):
    tokens = np.array([*context, *continuation])
    score = whole_logits(Samples([tokens], [1]).repeated(24))[0, len(context) - 1 : len(tokens) - 1]
    logp = score - np.log(np.exp(score).sum(axis=-1, keepdims=True))
    return logp[np.arange(len(continuation)), continuation].sum(), bool((score.argmax(-1) == continuation).all())


def test_continuations_are_scored_as_by_whole_logits():
    rng = np.random.default_rng(0)
    shared = rng.integers(1, 17, 6).tolist()
    pairs = [(shared, rng.integers(1, 17, size).tolist()) for size in (3, 1, 4)]
    pairs += [([0], [4]), (shared, greedy(shared, 4)), (shared[:2], greedy(shared[:2], 2)), (shared, [])]
    score = make_choice_scorer(policy()[0])
    got = harness._choices(score, policy()[1], pairs, row_length=24, at_once=4, mesh=None)
    want = [by_whole_logits(*pair) for pair in pairs[:-1]] + [(0.0, True)]
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in want], rtol=1e-5, atol=1e-6)
    assert [always for _, always in got] == [always for _, always in want]
    assert want[4][1]
    assert want[5][1]
    assert not all(always for _, always in want)


def test_long_requests_lose_their_beginning():
    rng = np.random.default_rng(1)
    context, continuation = rng.integers(1, 17, 40).tolist(), [3, 5]
    score = make_choice_scorer(policy()[0])
    ((got, _),) = harness._choices(score, policy()[1], [(context, continuation)], row_length=16, at_once=4, mesh=None)
    np.testing.assert_allclose(got, by_whole_logits(context[-14:], continuation)[0], rtol=1e-5)
    with pytest.raises(ValueError, match=r"request 0: a continuation of 16 tokens leaves no room .* row_length=16"):
        harness._choices(score, policy()[1], [([1], [2] * 16)], row_length=16, at_once=4, mesh=None)


@pytest.mark.parametrize("sizes", [{}, {"data": 2}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_the_likeliest_tokens_on_every_mesh(sizes):
    """With a softcap, which must not change the order."""
    params, samples = random_params(GEMMA), ragged_groups(2, [(4, (3, 2)), (5, (1, 4)), (2, (2, 2))])
    mesh = ra.make_mesh(**sizes) if sizes else None
    placed = params if mesh is None else ra.place_params(params, mesh)
    packed = samples.pack(row_length=12, parts=2)
    logp, likeliest = make_choice_scorer(ra.Decoder(GEMMA), mesh=mesh)(placed, packed)
    score = np.asarray(ra.logits(dense_decoder(GEMMA), params, samples.repeated(12)))
    at, mask = samples.response(packed.mask.shape[1])
    best = np.take_along_axis(score.argmax(-1), at - 1, axis=1)
    token = np.stack([np.pad(t, (0, 12 - len(t))) for t in samples.tokens])
    np.testing.assert_array_equal(likeliest, (best == np.take_along_axis(token, at, axis=1)) & mask)
    whole = score - np.log(np.exp(score).sum(-1, keepdims=True))
    want = np.take_along_axis(
        np.take_along_axis(whole, (at - 1)[..., None], 1), np.take_along_axis(token, at, 1)[..., None], 2
    )
    np.testing.assert_allclose(logp, np.where(mask, want[..., 0], 0), rtol=1e-4, atol=1e-5)


def test_generation_settings(caplog):
    read = functools.partial(harness.sample_config, eos_ids=(0,), max_gen_toks=9)
    plain, ends = read({})
    assert (plain.greedy, plain.max_new_tokens, ends) == (True, 9, [])
    assert read({"until": "Q:", "do_sample": False, "temperature": 0.7})[0].greedy
    assert read({"until": "Q:"})[1] == ["Q:"]
    drawn, _ = read({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_gen_toks": 3})
    assert (drawn.greedy, drawn.temperature, drawn.top_p, drawn.top_k, drawn.max_new_tokens) == (False, 0.7, 0.9, 5, 3)
    assert read({"temperature": 0.5, "top_k": 0})[0] == ra.SampleConfig(1, 9, eos_ids=(0,), temperature=0.5)
    assert read({"do_sample": True})[0].temperature == 1.0
    read({"num_beams": 2})
    assert "have no effect here: num_beams" in caplog.text


def test_contexts_are_answered_by_their_own_settings():
    """Greedy as by whole logits, cut at what ends them; the same question twice is two samples."""
    draw = functools.partial(ra.sample, *policy(), step=0, seed=0, mesh=None)
    run = functools.partial(harness._generate, draw, LETTERS, room=24, max_gen_toks=5)
    tokens = LETTERS("face")
    want = written(tokens, 5)
    hot = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 8}
    long = [*range(1, 16), *range(1, 16)]
    short = {"until": [want[2]]}
    asked = [(tokens, {}), (tokens, hot), (tokens, short), (tokens, hot), (long, {}), (long, short)]
    got = run(asked, at_once=2)
    assert (got[0], got[2]) == (want, want[: want.index(want[2])])
    assert got[1] != got[3]
    assert got[4] == run([(long[-19:], {}), (tokens, {})], at_once=2)[0]
    with pytest.raises(ValueError, match=r"max_gen_toks=24 leaves no room .* row_length=24"):
        run([(tokens, {"max_gen_toks": 24})], at_once=2)


@pytest.mark.parametrize(
    ("how", "message"),
    [({"row_length": 65}, r"row_length=65 must be in \[2, max_positions=64\]"), ({"at_once": 0}, "at_once=0")],
)
def test_what_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        harness_model(*policy(), LETTERS, **how)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match=r"pip install 'rlalign\[harness\]'"):
        harness_model(*policy(), LETTERS)


def request(*args):
    return types.SimpleNamespace(args=args)


@installed
def test_rolling_windows_count_each_token_once():
    """Against windows by hand: a row of 9 holds one token of context and 8 to foretell."""
    model = harness_model(*policy(), LETTERS, row_length=9)
    text = "a face had been laid"[:19].replace("n", "i").replace("t", "h")
    tokens = LETTERS(text)
    want = 0.0
    before = 0
    while before < len(tokens):
        size = min(8, len(tokens) - before)
        left = max(before + size - 9, 0) if before else 0
        context = [0] if not before else tokens[left:before]
        want += by_whole_logits(context, tokens[before : before + size])[0]
        before += size
    got = model.loglikelihood_rolling([request(text), request("")])
    np.testing.assert_allclose(got, [want, 0.0], rtol=1e-5)


@installed
@pytest.mark.filterwarnings("default")  # of the harness and what it imports
def test_tasks_of_the_harness():
    """Choices, generation and a chat template, by the harness's own counting."""
    import datasets
    import lm_eval.tasks

    docs = [{"q": "face", "choices": ["a", "bed", "cab"]}, {"q": "deaf", "choices": ["mim", "ala", "am"]}]
    values = [[by_whole_logits(*map(LETTERS, (doc["q"], text)))[0] for text in doc["choices"]] for doc in docs]
    docs[0]["label"], docs[1]["label"] = int(np.argmax(values[0])), int(np.argmin(values[1]))
    want = [written(LETTERS(doc["q"] + " a"), 4).split(" ")[0] for doc in docs]
    common = {"test_split": "test", "doc_to_text": "{{q}}", "target_delimiter": "", "doc_to_target": "{{label}}"}
    common["custom_dataset"] = lambda **_: {"test": datasets.Dataset.from_list(docs)}
    choose = {"task": "choose", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
    write = {"task": "write", "output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}
    write["generation_kwargs"] = {"until": [" "], "max_gen_toks": 4}
    nothing = lm_eval.tasks.TaskManager(include_defaults=False)  # thousands of files less to read
    run = functools.partial(
        lm_eval.simple_evaluate,
        harness_model(*policy(), LETTERS, row_length=24),
        bootstrap_iters=0,
        task_manager=nothing,
    )
    chosen = run(tasks=[choose | common | {"metric_list": [{"metric": "acc"}]}])
    assert chosen["results"]["choose"]["acc,none"] == 0.5
    got = [[value for value, _ in sample["filtered_resps"]] for sample in chosen["samples"]["choose"]]
    np.testing.assert_allclose(got, values, rtol=1e-5)
    wrote = run(tasks=[write | common], apply_chat_template=True)
    assert [sample["filtered_resps"] for sample in wrote["samples"]["write"]] == [[text] for text in want]
