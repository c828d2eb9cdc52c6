"""What a run gives to its programs, and what it holds meanwhile: all in which the loops differ for a plan."""

from typing import NamedTuple

import numpy as np

from rlalign.algorithms import ALGORITHMS, Algorithm
from rlalign.bins import assign_rows
from rlalign.envs.rows import of_steps
from rlalign.forest import bucket
from rlalign.io.agents import check_agent
from rlalign.io.config import AgentConfig, OfflineConfig, RunConfig
from rlalign.io.learner import check_offline
from rlalign.io.runner import check_run, resolve
from rlalign.models.config import ModelConfig
from rlalign.models.decoder import Decoder
from rlalign.plan.flops import mean_pairs
from rlalign.rollout.config import SampleConfig
from rlalign.train.mesh import AnyMesh
from rlalign.train.offline import LEARNT_FROM
from rlalign.train.optimizer import make_optimizer
from rlalign.train.step import make_train_step
from rlalign.types import Demonstration, Preference, Prompt


class Work(NamedTuple):
    """What a program is given in one call: prompts and responses that are all of the longest.

    Attributes:
      prompts: how many.
      prompt: tokens of each, stored once for its responses.
      responses: tokens of each response to it.
      calls: of the program, a step; a fraction where one call serves several steps.
      parts: into which a device's rows are cut: an update sees one after the other, any other program all at once.
      num_rows: rows of the whole batch at least; None for those that it needs.
      together: whether a prompt's responses lie in one part, as those of a pair do.
    """

    prompts: int
    prompt: int
    responses: tuple[int, ...]
    calls: float = 1.0
    parts: int = 1
    num_rows: int | None = None
    together: bool = False

    @property
    def tokens(self) -> int:
        """Stored."""
        return self.prompts * (self.prompt + sum(self.responses))

    @property
    def repeated(self) -> int:
        """Tokens if every response had a prompt of its own."""
        return self.prompts * (len(self.responses) * self.prompt + sum(self.responses))

    def counts(self, model: ModelConfig) -> dict[str, float]:
        """Tokens, visible pairs and response tokens, as forward_flops takes them."""
        pairs = self.prompts * mean_pairs(model, self.prompt, self.responses)
        return {"tokens": self.tokens, "pairs": pairs, "responses": self.prompts * sum(self.responses)}

    def rows(self, row_length: int, shards: int) -> int:
        """Rows of each of shards * parts parts."""
        each, parts = len(self.responses), shards * self.parts
        number = np.arange(self.prompts * each)
        found = assign_rows(
            self.prompt + np.tile(self.responses, self.prompts),
            np.where(number % each, self.prompt, 0),
            row_length=row_length,
            unit=number // each if self.together else number,
            parts=parts,
        )
        return max(bucket(max(map(len, found))), (self.num_rows or 0) // parts)


class Workload(NamedTuple):
    """A run as its plan sees it.

    Attributes:
      algorithm: as the run uses it.
      phases: the work of each of its programs, by name: rollout, judging, scoring, update, those that there are.
      updates: optimizer steps a step.
      sampling: of the rollout.
      reference: dtype of a frozen reference that is held besides the policy; None for none.
      given: whether the parameters that the run was given are held besides.
    """

    algorithm: Algorithm
    phases: dict[str, Work]
    updates: int
    sampling: SampleConfig | None
    reference: str | None
    given: bool


def of_fit(run: RunConfig, decoder: Decoder, prompt: int, mesh: AnyMesh, *, judged: bool) -> Workload:
    """A step of `fit`: one rollout batch, judged where there is a reward model, and the updates from it.

    Raises:
      ValueError: whatever `fit` would refuse, and an empty eos_ids.
    """
    _check_ends("sampling", run.sampling)
    algorithm, prompts = resolve(run, ALGORITHMS[run.algorithm]), [_zeros(prompt)]
    check_run(run, decoder, prompts, prompts, mesh)
    _check_head(run, decoder, algorithm)
    responses = (run.sampling.max_new_tokens,) * run.sampling.num_samples
    cut = {"parts": run.minibatches * run.microbatches, "num_rows": run.num_rows}
    batch = Work(run.prompts_per_step, prompt, responses, **cut)
    calls = {
        "rollout": 1,
        "judging": int(judged),
        "scoring": algorithm.needs_reference + run.recompute_logp,
        "update": run.epochs,
    }
    narrow = run.reference_dtype not in (None, decoder.config.dtype)
    return Workload(
        algorithm,
        {name: batch._replace(calls=n) for name, n in calls.items() if n},
        updates=run.epochs * run.minibatches,
        sampling=run.sampling,
        reference=(run.reference_dtype or decoder.config.dtype) if algorithm.needs_reference else None,
        given=run.keep_params and (narrow or not algorithm.needs_reference),
    )


def of_fit_offline(run: OfflineConfig, decoder: Decoder, prompt: int, response: int | None, mesh: AnyMesh) -> Workload:
    """A step of `fit_offline`: one update, and its share of what the iteration prepared.

    The reference answers and scores prepare_size examples at a time, each once an iteration, before the first update,
    and is the policy of that moment: it takes no memory of its own.

    Args:
      response: tokens of the examples' longest response; None for generation.max_new_tokens.

    Raises:
      ValueError: whatever `fit_offline` would refuse, an empty eos_ids, and no longest response where nothing is
        generated.
    """
    generation, algorithm = run.generation, ALGORITHMS[run.algorithm]
    if generation is not None:
        _check_ends("generation", generation)
    response = response or (generation and generation.max_new_tokens)
    if response is None:
        raise ValueError(
            "response_length is missing: the tokens of the examples' longest response (or --response-length); it can "
            "be left out only where generation is given"
        )
    pairs = generation is None and LEARNT_FROM.get(algorithm.data) is Preference
    tokens = np.zeros(response, np.int32)
    example = Preference(_zeros(prompt), tokens, tokens) if pairs else Demonstration(_zeros(prompt), tokens)
    check_offline(run, decoder, algorithm, [example], mesh)
    _check_head(run, decoder, algorithm)
    responses = (response, response) if pairs else (response,)
    calls = run.examples_per_step / (max(run.epochs, 1) * run.prepare_size)
    phases: dict[str, Work] = {}
    if generation is not None:
        answers = (generation.max_new_tokens,)
        responses += answers
        phases["rollout"] = Work(run.prepare_size, prompt, answers, calls=calls)
    if algorithm.needs_reference:
        phases["scoring"] = Work(run.prepare_size, prompt, responses, calls=calls, together=True)
    cut = {"parts": run.microbatches, "num_rows": run.num_rows}
    phases["update"] = Work(run.examples_per_step, prompt, responses, together=True, **cut)
    return Workload(algorithm, phases, updates=1, sampling=generation, reference=None, given=run.keep_params)


def of_fit_agent(run: AgentConfig, decoder: Decoder, prompt: int, mesh: AnyMesh) -> Workload:
    """A step of `fit_agent` whose episodes all take max_steps, with prompts of `prompt` tokens that share nothing.

    The reference scores what an update sees at a time.

    Raises:
      ValueError: whatever `fit_agent` would refuse, and an empty eos_ids.
    """
    episodes, cut = run.episodes, run.minibatches * run.microbatches
    _check_ends("episodes.sampling", episodes.sampling)
    algorithm, copies = of_steps(ALGORITHMS[run.algorithm]), run.tasks_per_step * episodes.copies
    check_agent(run, decoder, algorithm, copies, [0], [1], mesh)
    _check_head(run, decoder, algorithm)
    answer, steps = (episodes.sampling.max_new_tokens,), copies * episodes.max_steps
    phases = {"rollout": Work(copies, prompt, answer, calls=episodes.max_steps)}
    if algorithm.needs_reference:
        phases["scoring"] = Work(-(-steps // cut), prompt, answer, calls=cut)
    phases["update"] = Work(steps, prompt, answer, calls=run.epochs, parts=cut, num_rows=run.num_rows)
    return Workload(
        algorithm,
        phases,
        updates=run.epochs * run.minibatches,
        sampling=episodes.sampling,
        reference=decoder.config.dtype if algorithm.needs_reference else None,
        given=run.keep_params and not algorithm.needs_reference,
    )


def _zeros(prompt: int) -> Prompt:
    return Prompt(0, np.zeros(prompt, np.int32))


def _check_ends(name: str, sampling: SampleConfig) -> None:
    if not sampling.eos_ids:
        raise ValueError(f"{name}.eos_ids is empty: no response would ever end; name the model's end tokens")


def _check_head(run: RunConfig | OfflineConfig | AgentConfig, decoder: Decoder, algorithm: Algorithm) -> None:
    """What both refuse when they make their train step: a reward head, or none, where the algorithm wants the other."""
    make_train_step(decoder, algorithm, make_optimizer(run.optimizer), microbatches=run.microbatches)
