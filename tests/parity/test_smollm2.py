"""A real model, SmolLM2-135M-Instruct, in PyTorch and here: the same tokens, logits and continuations."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlalign as ra
from rlalign.types import TokenForest

FOLDER = Path(__file__).parents[2] / "models" / "smollm2-135m-instruct"
QUESTIONS = (
    "What is 6 + 7?",
    "Name three colours.",
    "Who wrote Hamlet?",
    "Write one sentence about the sea.",
    "Is 17 a prime number?",
)
NEW = 24


@pytest.fixture(scope="module")
def ours():
    if not (FOLDER / "config.json").is_file():
        pytest.fail(f"{FOLDER} is missing: `make parity` and `make smollm2` write it")
    return ra.load_tokenizer(FOLDER), *ra.load_pretrained(FOLDER)


@pytest.fixture(scope="module")
def theirs():
    return AutoTokenizer.from_pretrained(FOLDER), AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def talk(question):
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def prompts(ours):
    return [ours[0].chat(talk(question)) for question in QUESTIONS]


def test_prompts_are_tokenised_alike(prompts, theirs):
    for question, tokens in zip(QUESTIONS, prompts, strict=True):
        want = theirs[0].apply_chat_template(talk(question), add_generation_prompt=True, return_dict=True)["input_ids"]
        np.testing.assert_array_equal(tokens, want)


def test_logits(ours, prompts, theirs):
    """Of whole prompts, in float32; they reach 30."""
    _, decoder, params = ours
    for tokens in prompts[:2]:
        column = np.arange(len(tokens))[None]
        forest = TokenForest(*(jnp.asarray(x) for x in (tokens[None], column, column - 1, 0 * column + len(tokens))))
        got = jax.jit(ra.logits, static_argnums=0)(decoder, params, forest)
        with torch.no_grad():
            want = theirs[1](torch.tensor(tokens[None].astype(np.int64))).logits.numpy()
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_greedy_continuations(ours, prompts, theirs):
    tokenizer, decoder, params = ours
    how = ra.SampleConfig(1, NEW, eos_ids=tokenizer.eos_ids, greedy=True)
    answers = ra.sample(decoder, params, prompts, seed=0, step=0, config=how)
    for tokens, drawn, mask in zip(prompts, answers.tokens, answers.mask, strict=True):
        with torch.no_grad():
            whole = theirs[1].generate(torch.tensor(tokens[None].astype(np.int64)), max_new_tokens=NEW, do_sample=False)
        assert drawn[mask].tolist() == whole[0, len(tokens) :].tolist()


def test_the_forest_scores_as_the_repeated_batch(ours, prompts):
    tokenizer, decoder, params = ours
    sampled = ra.sample(
        decoder, params, prompts[:2], seed=0, step=0, config=ra.SampleConfig(3, 8, eos_ids=tokenizer.eos_ids)
    )
    lengths = sampled.mask.sum(axis=1)
    texts = [
        np.concatenate([prompts[p], row[:n]]) for p, row, n in zip(sampled.prompt, sampled.tokens, lengths, strict=True)
    ]
    start = [len(prompts[p]) for p in sampled.prompt]
    score = ra.make_scorer(decoder)
    shared = score(params, ra.pack(texts, row_length=160, response_start=start, response_length=8))
    for n, text in enumerate(texts):
        alone = ra.pack([text], row_length=64, response_start=[start[n]], response_length=8)
        np.testing.assert_allclose(shared[n], score(params, alone)[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(shared[sampled.mask], sampled.logp[sampled.mask], rtol=0, atol=1e-4)
