"""An outside engine: a server of the protocol on this machine, right and wrong answers, and training from it."""

import dataclasses

import numpy as np
import pytest

import rlalign as ra
from rlalign.envs import sums
from rlalign.io.metrics import read_metrics
from rlalign.rollout import Engine, EngineError, engine_sampler, sample_from
from tests.graders import share_right
from tests.protocol import served
from tests.tiny import sums_model, sums_run

DECODER = ra.Decoder(sums_model(16))
HOW = ra.SampleConfig(3, sums.ANSWER_TOKENS, eos_ids=(sums.EOS,), temperature=0.7)
PROMPTS = sums.problems("train")[:4]


class Server:
    """Speaks /v1/completions; its model is ours, its weights may lie."""

    path = "/v1/completions"

    def __init__(self, params):
        self.params, self.asked, self.headers, self.spoil, self.failures = params, [], [], None, []

    def answer(self, body):
        settings = ra.SampleConfig(
            body["n"], body["max_tokens"], eos_ids=body["stop_token_ids"], temperature=body["temperature"]
        )
        prompt = [np.asarray(body["prompt"])]
        drawn = ra.sample(DECODER, self.params, prompt, seed=body["seed"] % 1000, step=0, config=settings)
        choices = []
        for g in range(body["n"]):
            kept = drawn.mask[g]
            choices.append(
                {
                    "index": g,
                    "text": "not to be read",
                    "token_ids": drawn.tokens[g][kept].tolist(),
                    "logprobs": {"token_logprobs": drawn.behaviour_logp[g][kept].tolist()},
                    "finish_reason": "stop" if drawn.stop[g] == 0 else "length",
                }
            )
        choices = choices[::-1]  # nobody promised an order
        return {"choices": choices if self.spoil is None else self.spoil(choices)}


def serving(params):
    return served(Server(params))


@pytest.fixture(scope="module")
def server():
    with serving(DECODER.init(0)) as one:
        yield one


@pytest.fixture(autouse=True)
def afresh(server, monkeypatch):
    server.asked, server.headers, server.spoil, server.failures = [], [], None, []
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def ask(server, prompts=PROMPTS, config=HOW, **how):
    engine = Engine(server.url, "policy", **how)
    return sample_from(engine, prompts, vocab=sums.VOCAB_SIZE, seed=3, step=5, config=config)


def test_ids_and_logprobs_come_as_they_were_drawn(server):
    got = ask(server)
    again = ask(server, PROMPTS[::-1])
    assert got.tokens.shape == (12, sums.ANSWER_TOKENS)
    np.testing.assert_array_equal(got.prompt, np.repeat(np.arange(4), 3))
    # Samples are a prompt's own, whatever its place in the batch.
    np.testing.assert_array_equal(got.tokens.reshape(4, 3, -1), again.tokens.reshape(4, 3, -1)[::-1])
    batch = ra.make_batch(ra.ALGORITHMS["grpo"], PROMPTS, got, np.arange(12.0), row_length=64)
    scored = ra.make_scorer(DECODER, temperature=0.7)(server.params, batch.packed)
    np.testing.assert_allclose(scored[got.mask], got.behaviour_logp[got.mask], rtol=0, atol=1e-4)
    assert not got.tokens[~got.mask].any()
    last = got.mask.sum(axis=1) - 1
    ended = got.tokens[np.arange(12), last] == sums.EOS
    np.testing.assert_array_equal(got.stop == ra.types.StopReason.EOS, ended)
    assert 0 < ended.sum() < 12 or (got.mask.sum(axis=1) == sums.ANSWER_TOKENS).any()


def test_what_is_asked(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    ask(server, config=dataclasses.replace(HOW, top_k=5, top_p=0.9), key="MY_KEY")
    body = next(body for body in server.asked if body["prompt"] == PROMPTS[0].tokens.tolist())
    want = {"model": "policy", "n": 3, "max_tokens": 4, "temperature": 0.7, "top_k": 5, "top_p": 0.9}
    want |= {"return_token_ids": True, "logprobs": 1, "stop_token_ids": [sums.EOS], "skip_special_tokens": False}
    assert {name: body[name] for name in want} == want
    assert len({body["seed"] for body in server.asked}) == 4
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_nothing_is_left_to_the_servers_defaults(server):
    """Which are those of the model's generation_config.json."""
    ask(server, PROMPTS[:1])
    plain = {"top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert {name: server.asked[0][name] for name in plain} == plain


def test_a_server_that_is_busy_is_asked_again(server):
    server.failures = [503, 500, 429]
    assert ask(server, PROMPTS[:1]).mask.any()
    assert len(server.asked) == 4


def spoiled(change):
    return lambda choices: [choice | change(choice) for choice in choices]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda choices: choices[1:], "prompt 0: 3 samples asked for, the server gave 2"),
        (spoiled(lambda c: {"token_ids": None}), "prompt 0, sample 0: the answer has no token_ids.*vLLM 0.10.2"),
        (spoiled(lambda c: {"logprobs": None}), "token_ids and 0 log-probs; one each"),
        (spoiled(lambda c: {"logprobs": {"token_logprobs": [None] * len(c["token_ids"])}}), "does the server allow"),
        (spoiled(lambda c: {"finish_reason": "abort"}), "finish_reason='abort' after .* the server gave up"),
        (spoiled(lambda c: {"finish_reason": "length", "token_ids": [3], "logprobs": {"token_logprobs": [-1.0]}}),
         "finish_reason='length' after 1 of 4 tokens: .* its context is shorter"),
        (spoiled(lambda c: {"logprobs": {"token_logprobs": [float("nan")] * len(c["token_ids"])}}), "is not finite"),
        (lambda choices: None, "prompt 0, after 1 tries: TypeError"),
        (spoiled(lambda c: {"token_ids": [99] * len(c["token_ids"])}), "up to id 99.* vocabulary of 14"),
        (spoiled(lambda c: {"token_ids": [3], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "stop"}),
         r"stopped at 3, which is not among eos_ids=\(1,\)"),
    ],
    ids=["too few", "no ids", "no logprobs", "null logprobs",
         "aborted", "short", "nan", "no choices", "another model", "another end"],
)  # fmt: skip
def test_answers_that_cannot_be_trained_on_are_refused(server, spoil, message):
    server.spoil = spoil
    with pytest.raises(EngineError, match=message):
        ask(server, PROMPTS[:1])


def test_servers_that_are_not_there_or_refuse(server, monkeypatch):
    server.failures = [400]
    with pytest.raises(EngineError, match=r"completions, prompt 0, after 1 tries: 400 .*told so"):
        ask(server, PROMPTS[:1])
    server.failures = [503] * 9
    with pytest.raises(EngineError, match="after 3 tries: 503"):
        ask(server, PROMPTS[:1], retries=2)
    server.url, url = "http://localhost:1/v1", server.url
    with pytest.raises(EngineError, match="after 2 tries: URLError"):
        ask(server, PROMPTS[:1], retries=1)
    server.url = url
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(EngineError, match="no such environment variable"):
        ask(server, PROMPTS[:1], key="NO_KEY")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Engine("localhost:8000", "m"), "must begin with http"),
        (lambda: Engine("http://x", "m", timeout=0), "timeout > 0"),
        (lambda: engine_sampler(Engine("http://x", "m"), refresh=print), "needs folder="),
        (lambda: engine_sampler(Engine("http://x", "m"), every=0), "at least 1, got 0"),
    ],
    ids=["url", "timeout", "folder", "every"],
)
def test_settings_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def settings(folder, **changes):
    usual = {"steps": 3, "eval_every": 3, "eval_prompts": 4, "checkpoint_every": 50, "recompute_logp": True}
    return sums_run(folder, **(usual | {"sampling": dataclasses.replace(HOW, temperature=1.0)} | changes))


def fit(run, sampler):
    usual = {"prompts": sums.problems("train")[:40], "eval_prompts": sums.problems("held-out")}
    return ra.fit(
        run, decoder=DECODER, params=DECODER.init(0), reward=share_right, decode=sums.decode, sampler=sampler, **usual
    )


def test_fit_trains_from_a_server_that_follows_it(tmp_path):
    """With the trainer's weights at every step its log-probs are the trainer's; with old ones they are corrected."""

    def load(folder):
        server.params = ra.load_pretrained(folder)[1]

    ratios = {}
    for every in (1, 100):
        with serving(DECODER.init(0)) as server:
            follow = engine_sampler(
                Engine(server.url, "policy"), refresh=load, folder=tmp_path / f"weights{every}", every=every
            )
            result = fit(settings(tmp_path / f"run{every}"), follow)
        kept = sorted(path.name for path in (tmp_path / f"weights{every}").iterdir())
        assert kept == {1: ["rlalign-weights-3", "rlalign-weights-4"], 100: ["rlalign-weights-1"]}[every]
        assert int(result.state.step) >= 2
        ratios[every] = [row["importance_error"] for row in read_metrics(result.folder / "metrics.jsonl")[:3]]
    assert max(ratios[1]) < 1e-4
    assert ratios[100][0] < 1e-4 < 1e-2 < ratios[100][2]


def test_fit_wants_log_probs_of_its_own(tmp_path):
    with pytest.raises(ValueError, match="set recompute_logp=True"):
        fit(settings(tmp_path, recompute_logp=False), engine_sampler(Engine("http://localhost:1", "m")))
    assert not list(tmp_path.iterdir())
