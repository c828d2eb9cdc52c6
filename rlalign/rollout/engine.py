"""Rollouts from an outside engine: a vLLM or SGLang server, over OpenAI's completions protocol.

    engine = Engine("http://localhost:8000/v1", "policy")
    sampler = engine_sampler(engine, refresh=reload_weights, folder="runs/weights")
    ra.fit(config, ..., sampler=sampler)              # config.recompute_logp=True

Token ids go in and come out: nothing is decoded and encoded again. The engine's log-probs are those of other kernels,
in another precision, perhaps of weights some steps old. They become `behaviour_logp`; the trainer computes old_logp
itself (recompute_logp) and weighs the difference by truncated importance sampling, Algorithm.correction.

What the servers need (vLLM 0.10.2, SGLang of 2026-07, or newer), for log-probs after temperature, top-k and top-p:

    vllm serve FOLDER --served-model-name policy --logprobs-mode processed_logprobs --generation-config vllm
    python -m sglang.launch_server --model-path FOLDER --served-model-name policy --sampling-defaults openai
"""

import concurrent.futures
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlalign.models.decoder import Decoder
from rlalign.models.export import save_pretrained
from rlalign.models.lora import ADAPTER, merge_lora, trained
from rlalign.rollout.config import SampleConfig
from rlalign.rollout.endpoint import Engine, EngineError, choices
from rlalign.rollout.sampler import check_prompts, own_ids
from rlalign.types import Params, Rollouts, StopReason

AT_ONCE = 64  # requests in flight


def engine_sampler(
    engine: Engine,
    *,
    refresh: Callable[[str], object] | None = None,
    folder: str | os.PathLike[str] | None = None,
    source: str | os.PathLike[str] | None = None,
    every: int = 1,
) -> Callable[..., Rollouts]:
    """A function that takes what `sample` takes and asks the engine, for `fit(sampler=...)` or a loop of your own.

    Args:
      engine: the server.
      refresh: called with a folder where the newest weights lie, to make the server load them; on SGLang
        POST /update_weights_from_disk. None: the server's weights stay what they are.
      folder: where the weights are saved for it, each time in a folder of their own, of which two stay; needed with
        refresh. Adapters are merged.
      source: the folder that the model came from, whose config and tokenizer are copied; see save_pretrained.
      every: refresh when so many calls had new parameters, evaluations too: the server's weights are less than so many
        updates old.

    Returns:
      sampler(decoder, params, prompts, *, seed, step, config, prompt_ids=None, mesh=None) -> Rollouts. Its `logp` are
      the engine's too, so old log-probs must be recomputed. Samples repeat only as far as the engine's do for a seed.

    Raises:
      ValueError: refresh without folder. The sampler: EngineError, NotImplementedError in several processes.
    """
    if refresh is not None and folder is None:
        raise ValueError("refresh needs folder=: where the weights lie for the server to load")
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    loaded, known, changes = 0, None, 0

    def sampler(
        decoder, params, prompts, *, seed: int, step: int, config: SampleConfig, prompt_ids=None, mesh=None
    ) -> Rollouts:
        nonlocal loaded, known, changes
        del mesh
        if jax.process_count() > 1:
            raise NotImplementedError("an outside engine answers one process: sample in it, and send the rollouts on")
        leaf = jax.tree.leaves(trained(params))[0]
        known, changes = leaf, changes + (leaf is not known)
        if refresh is not None and folder is not None and (not loaded or changes >= every):
            loaded, changes = loaded + 1, 0
            refresh(str(_saved(Path(folder), loaded, decoder, params, source)))
        return sample_from(
            engine, prompts, vocab=decoder.config.vocab_size, seed=seed, step=step, config=config, prompt_ids=prompt_ids
        )

    return sampler


def _saved(folder: Path, number: int, decoder: Decoder, params: Params, source) -> Path:
    """A folder of these weights; the one before stays, for a server that still reads it."""
    if ADAPTER in params:
        decoder, params = merge_lora(decoder, params)
    target = folder / f"rlalign-weights-{number}"
    for old in sorted(folder.glob("rlalign-weights-*"), key=lambda path: path.stat().st_mtime)[:-1]:
        shutil.rmtree(old)
    shutil.rmtree(target, ignore_errors=True)  # of a run that was stopped here
    save_pretrained(target, decoder, params, source=source)
    return target


def sample_from(
    engine: Engine,
    prompts: Sequence,
    *,
    vocab: int,
    seed: int,
    step: int,
    config: SampleConfig,
    prompt_ids: Sequence[int] | None = None,
) -> Rollouts:
    """config.num_samples responses to each prompt; see `sample` for the arguments.

    Args:
      vocab: tokens that the model has.

    Raises:
      EngineError: no answer, or one without token ids, log-probs or the number of samples asked for.
      ValueError: an empty prompt or a token outside the vocabulary, by its index.
    """
    tokens = check_prompts(prompts, vocab)
    ids = own_ids(prompts) if prompt_ids is None else prompt_ids
    size = (len(tokens), config.num_samples, config.max_new_tokens)
    token, mask, logp = np.zeros(size, np.int32), np.zeros(size, bool), np.zeros(size, np.float32)
    stop = np.zeros(size[:2], np.int32)

    def fill(i: int) -> None:
        body = _request(engine, tokens[i], config, seed=seed, step=step, own=int(ids[i]))
        given = choices(engine, "completions", body, f"prompt {i}")
        if len(given) != config.num_samples:
            raise EngineError(f"prompt {i}: {config.num_samples} samples asked for, the server gave {len(given)}")
        for g, choice in enumerate(sorted(given, key=lambda choice: choice.get("index", 0))):
            drawn, scored = _drawn(choice, config, vocab, f"prompt {i}, sample {g}")
            token[i, g, : len(drawn)], logp[i, g, : len(drawn)], mask[i, g, : len(drawn)] = drawn, scored, True
            ended = bool(drawn) and drawn[-1] in config.eos_ids
            stop[i, g] = StopReason.EOS if ended else StopReason.MAX_TOKENS

    with concurrent.futures.ThreadPoolExecutor(min(AT_ONCE, len(tokens))) as pool:
        list(pool.map(fill, range(len(tokens))))  # list: raises what a thread raised
    rows = lambda x: x.reshape(-1, *x.shape[2:])
    owner = np.repeat(np.arange(len(tokens), dtype=np.int32), config.num_samples)
    return Rollouts(rows(token), rows(mask), rows(logp), rows(logp), rows(stop), owner)


def _request(engine: Engine, prompt: np.ndarray, config: SampleConfig, *, seed: int, step: int, own: int) -> dict:
    """The body of POST /completions. Servers derive a seed for each of n samples from the one given."""
    body: dict[str, Any] = {
        "model": engine.model,
        "prompt": prompt.tolist(),
        "n": config.num_samples,
        "max_tokens": config.max_new_tokens,
        "temperature": 0.0 if config.greedy else config.temperature,
        "seed": zlib.crc32(f"{seed} {step} {own}".encode()) >> 1,
        "logprobs": 1,
        "return_token_ids": True,
        "stop_token_ids": list(config.eos_ids),
        "skip_special_tokens": False,
        # Said even where nothing is cut: servers fill in what is left out from the model's generation_config.json.
        "top_k": -1 if config.top_k is None else config.top_k,
        "top_p": 1.0 if config.top_p is None else config.top_p,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    return body


def _drawn(choice: dict, config: SampleConfig, vocab: int, where: str) -> tuple[list[int], list[float]]:
    """Token ids of one sample and the log-prob of each."""
    ids, scored = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
    if ids is None:
        raise EngineError(
            f"{where}: the answer has no token_ids, and text encoded again may be other tokens: use a server that "
            "knows return_token_ids (vLLM 0.10.2, SGLang of 2026-07, or newer)"
        )
    if scored is None or len(scored) != len(ids) or any(x is None for x in scored):
        raise EngineError(
            f"{where}: {len(ids)} token_ids and {0 if scored is None else len(scored)} log-probs; one each is needed: "
            "does the server allow logprobs=1?"
        )
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length") or (reason == "length" and len(ids) < config.max_new_tokens):
        raise EngineError(
            f"{where}: finish_reason={reason!r} after {len(ids)} of {config.max_new_tokens} tokens: the server gave "
            "up, or its context is shorter than the prompt and max_new_tokens"
        )
    if not np.isfinite(scored).all():
        raise EngineError(f"{where}: a log-prob is not finite: {scored}")
    if len(ids) > config.max_new_tokens or any(not 0 <= i < vocab for i in ids):
        raise EngineError(
            f"{where}: {len(ids)} tokens up to id {max(ids)}, asked for at most {config.max_new_tokens} of a "
            f"vocabulary of {vocab}: is {choice.get('model', 'the served model')} the one that is trained?"
        )
    if reason == "stop" and (not ids or ids[-1] not in config.eos_ids):
        raise EngineError(
            f"{where}: the server stopped at {ids[-1] if ids else 'nothing'}, which is not among eos_ids="
            f"{config.eos_ids}: give SampleConfig the model's own (load_tokenizer(folder).eos_ids)"
        )
    early = [k for k, i in enumerate(ids[:-1]) if i in config.eos_ids]
    if early:  # as a server does that was told to ignore ends
        ids, scored = ids[: early[0] + 1], scored[: early[0] + 1]
    return list(map(int, ids)), list(map(float, scored))
