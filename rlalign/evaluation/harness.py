"""A policy as a model of lm-eval-harness: `pip install "rlalign[harness]"`.

    import lm_eval
    model = harness_model(decoder, params, load_tokenizer(folder))
    lm_eval.simple_evaluate(model=model, tasks=["hellaswag", "gsm8k"])["results"]

The continuations of one context (the choices of a question) share it in the forest: it is computed once.
"""

import functools
import importlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from rlalign.forest import bucket, pack
from rlalign.models.decoder import Decoder
from rlalign.models.tokenizer import Tokenizer
from rlalign.rewards.tasks import cut
from rlalign.rollout import SampleConfig, sample
from rlalign.train.mesh import row_shards
from rlalign.train.score import make_choice_scorer
from rlalign.types import Params

log = logging.getLogger(__name__)
Pair = tuple[Sequence[int], Sequence[int]]  # a context's tokens and its continuation's
KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


def harness_model(
    decoder: Decoder,
    params: Params,
    tokenizer: Tokenizer,
    *,
    row_length: int | None = None,
    at_once: int = 64,
    max_gen_toks: int = 256,
    seed: int = 0,
    encode: Callable[[str], Sequence[int]] | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """The model for `lm_eval.simple_evaluate(model=...)` (lm-eval-harness 0.4.9 or newer).

    Requests longer than a row lose their beginning, as with the harness's own models; rolling log-likelihoods go on in
    windows. What `until` names is cut off afterwards: a sample goes on to an end token or max_gen_toks.

    Args:
      decoder, params: the policy.
      tokenizer: of load_tokenizer, or of the same methods.
      row_length: tokens of a request and of a row of the forest; None: max_positions, at most 4096.
      at_once: requests in one forward, or sampled together.
      max_gen_toks: tokens to sample where a task does not say.
      seed: of samples; greedy answers need none.
      encode: text -> token ids; None: tokenizer.encode, which adds no special token. For models that want one in front
        (Llama, Gemma), tokenizer.inner.encode.
      mesh: where the parameters lie.

    Raises:
      ImportError: lm-eval is not installed.
      ValueError: row_length beyond the model's max_positions, or below 2; at_once < 1. Called: a continuation longer
        than a row, max_gen_toks that leave no room for a context.
    """
    limit = min(decoder.config.max_positions, 4096) if row_length is None else row_length
    if not 2 <= limit <= decoder.config.max_positions or at_once < 1:
        raise ValueError(
            f"row_length={limit} must be in [2, max_positions={decoder.config.max_positions}], and at_once={at_once} "
            "at least 1"
        )
    score = functools.partial(
        _choices, make_choice_scorer(decoder, mesh=mesh), params, row_length=limit, at_once=at_once, mesh=mesh
    )
    draw = functools.partial(sample, decoder, params, step=0, seed=seed, mesh=mesh)
    generate = functools.partial(_generate, draw, tokenizer, room=limit, at_once=at_once, max_gen_toks=max_gen_toks)
    return _model_class()(tokenizer, encode or tokenizer.encode, limit, score, generate)


def _choices(
    scorer, params: Params, pairs: Sequence[Pair], *, row_length: int, at_once: int, mesh: Mesh | None
) -> list[tuple[float, bool]]:
    """(log-prob of the continuation, whether each of its tokens is the likeliest) of each pair."""
    whole, start = [], np.zeros(len(pairs), np.int64)
    for number, (context, continuation) in enumerate(pairs):
        if len(continuation) >= row_length:
            raise ValueError(
                f"request {number}: a continuation of {len(continuation)} tokens leaves no room for a context in "
                f"row_length={row_length}: raise it"
            )
        whole.append(np.asarray([*context, *continuation][-row_length:], np.int32))
        start[number] = len(whole[-1]) - len(continuation)
    # Neighbours in this order share contexts, so that these meet in one forest.
    order = sorted(range(len(whole)), key=lambda i: whole[i].tolist())
    found: list[tuple[float, bool]] = [(0.0, True)] * len(whole)
    for begin in range(0, len(order), at_once):
        some = order[begin : begin + at_once]
        longest = max(len(whole[i]) - int(start[i]) for i in some)
        packed = pack(
            [whole[i] for i in some],
            row_length=row_length,
            response_start=start[some],
            response_length=bucket(max(longest, 1)),
            parts=row_shards(mesh),
        )
        logp, likeliest = scorer(params, packed)
        mask = np.asarray(packed.mask)
        total, greedy = logp.sum(axis=1, dtype=np.float64), (likeliest | ~mask).all(axis=1)
        for i, value, always in zip(some, total, greedy, strict=True):
            found[i] = float(value), bool(always)
    return found


def _generate(
    draw,
    tokenizer: Tokenizer,
    asked: Sequence[tuple[Sequence[int], dict]],
    *,
    room: int,
    at_once: int,
    max_gen_toks: int,
) -> list[str]:
    """The text sampled behind each context, by its own settings; those of the same settings go together."""
    groups: dict[str, list[int]] = {}
    for number, (_, settings) in enumerate(asked):
        groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(number)
    texts = [""] * len(asked)
    for members in groups.values():
        settings = asked[members[0]][1]
        config, ends = sample_config(settings, eos_ids=tokenizer.eos_ids, max_gen_toks=max_gen_toks)
        keep = room - config.max_new_tokens
        if keep < 1:
            raise ValueError(
                f"max_gen_toks={config.max_new_tokens} leaves no room for a context in row_length={room}: lower it "
                "(gen_kwargs), or raise row_length"
            )
        for begin in range(0, len(members), at_once):
            some = members[begin : begin + at_once]
            contexts = [np.asarray(asked[i][0][-keep:], np.int32) for i in some]
            # A request's key is its place among all: the harness repeats requests for several samples.
            drawn = draw(contexts, config=config, prompt_ids=some)
            for i, tokens, mask in zip(some, drawn.tokens, drawn.mask, strict=True):
                kept = [token for token in tokens[mask].tolist() if token not in config.eos_ids]
                texts[i] = cut(tokenizer.decode(kept), ends)
    return texts


def sample_config(settings: dict, *, eos_ids: Iterable[int], max_gen_toks: int) -> tuple[SampleConfig, list[str]]:
    """A task's generation settings as (SampleConfig, texts that end an answer).

    Sampled if do_sample says so, or, where it is left out, if there is a temperature; else greedy.

    >>> sample_config({"until": ["Q:"], "temperature": 0.0}, eos_ids=(2,), max_gen_toks=8)[0].greedy
    True
    """
    other = sorted(set(settings) - {*KNOWN})
    if other:
        log.warning("generation settings that have no effect here: %s", ", ".join(other))
    until = settings.get("until") or []
    temperature = float(settings.get("temperature") or 0.0)
    drawn = bool(settings.get("do_sample", temperature > 0))
    config = SampleConfig(
        1,
        int(settings.get("max_gen_toks", max_gen_toks)),
        eos_ids=tuple(eos_ids),
        temperature=(temperature or 1.0) if drawn else 1.0,
        top_k=(settings.get("top_k") or None) if drawn else None,
        top_p=(settings.get("top_p") or None) if drawn else None,
        greedy=not drawn,
    )
    return config, [until] if isinstance(until, str) else list(until)


def _model_class() -> type:
    """The subclass of the harness's own base class, which is imported here alone."""
    try:
        base = importlib.import_module("lm_eval.api.model").TemplateLM
        windows = importlib.import_module("lm_eval.utils")
    except ModuleNotFoundError as error:
        raise ImportError(f"lm-eval-harness is missing ({error}): pip install 'rlalign[harness]'") from error

    class HarnessModel(base):
        """See harness_model; the harness asks the questions."""

        def __init__(self, tokenizer: Tokenizer, encode, limit: int, score, generate):
            super().__init__()
            self.tokenizer, self.max_length = tokenizer.inner, limit
            self._tokenizer, self._encode, self._score, self._generate = tokenizer, encode, score, generate

        @property
        def eot_token_id(self) -> int:
            return self._tokenizer.eos_ids[0]

        @property
        def prefix_token_id(self) -> int:
            first = self.tokenizer.bos_token_id
            return self.eot_token_id if first is None else first

        @property
        def tokenizer_name(self) -> str:
            return str(self.tokenizer.name_or_path).replace("/", "__")

        def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
            plain = add_special_tokens is False
            return [int(i) for i in (self._tokenizer.encode(string) if plain else self._encode(string))]

        def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
            return self._score([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            pairs, owner = [], []
            for number, request in enumerate(requests):
                cuts = windows.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length - 1,  # a row holds the last token too, which nothing follows
                    context_len=1,
                )
                for window in cuts:
                    pairs.append(windows.make_disjoint_window(window))
                    owner.append(number)
            found = [value for value, _ in self._score(pairs)] if pairs else []
            return np.bincount(owner, weights=found, minlength=len(requests)).tolist()

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            return self._generate(
                [(self.tok_encode(context), settings) for context, settings in (r.args for r in requests)]
            )

    return HarnessModel
