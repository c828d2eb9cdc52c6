"""One step of fit_offline and what its iterations prepare: the counterpart of Runner."""

import functools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlalign import hosts
from rlalign.algorithms import ALGORITHMS, Algorithm, try_out
from rlalign.io.canary import canary_of
from rlalign.io.checkpoint import Checkpoints
from rlalign.io.config import OfflineConfig, check_horizon
from rlalign.io.files import fingerprint
from rlalign.io.iteration import Examples, Iterations, Prepared, is_truncated
from rlalign.io.mixture import entries_at_step
from rlalign.io.session import restore
from rlalign.io.updates import Clock, Updates, in_rows
from rlalign.models.decoder import Decoder
from rlalign.rollout import sample
from rlalign.train.mesh import AnyMesh, row_shards
from rlalign.train.offline import LEARNT_FROM, RESPONSES, make_offline_batch
from rlalign.train.optimizer import make_schedule
from rlalign.train.step import init_state, make_train_step
from rlalign.types import Batch, Demonstration, Params, TrainState

log = logging.getLogger(__name__)
Evaluate = Callable[[Decoder, Params], Mapping[str, float]]
_KINDS = "Demonstrations or Preferences"


class Learner:
    """The parts of a run, compiled once: what an iteration prepares, one training step, one evaluation."""

    def __init__(
        self,
        config: OfflineConfig,
        algorithm: Algorithm,
        decoder: Decoder,
        examples,
        *,
        optimizer,
        mesh,
        sampler,
        evaluate,
        decode,
    ):
        self.config, self.algorithm, self.decoder, self.examples = config, algorithm, decoder, examples
        self.optimizer, self.eval, self.decode = optimizer, evaluate, decode or str
        self.length = config.steps_per_iteration(len(examples))
        self.prepared: Prepared | None = None
        update = make_train_step(decoder, algorithm, optimizer, mesh=mesh, microbatches=config.microbatches)
        rate = config.optimizer.learning_rate
        self.update = Updates(update, max_bad_steps=config.max_bad_steps, learning_rate=rate)
        self.kept = self.update.kept
        self.kept["reference"] = ""  # the hash of what the iteration began with
        self.schedule = make_schedule(config.optimizer)
        self.parts = config.microbatches * row_shards(mesh)
        self.response_length = _longest_response(config, examples)
        self.canary, self.still = None, loss_at_reference(algorithm)
        if config.canary:
            self.canary = canary_of(config.generation, decoder.config.dtype, engine=sampler is not sample)
        how = {"mesh": mesh, "sampler": sampler, "response_length": self.response_length, "canary": self.canary}
        self.iterations = Iterations(config, Path(config.folder) / "iterations", decoder, algorithm, **how)

    def chosen(self, step: int) -> np.ndarray:
        """The numbers of a step's examples."""
        config = self.config
        return entries_at_step(self.examples, config.examples_per_step, seed=config.seed, step=step)

    def evaluate(self, state: TrainState, step: int, samples: Path) -> dict[str, float]:
        """What the caller's function finds; the answers that the report shows are the iterations'."""
        del step, samples
        found = {} if self.eval is None else self.eval(self.decoder, state.params)
        return {f"eval_{name}": float(value) for name, value in found.items()}

    def step(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """Where an iteration begins, what it learns from; one batch of examples and the update from it."""
        clock, metrics, begins = Clock(), {}, step % self.length == 0
        if begins:
            self.kept["reference"] = fingerprint(state.params)
            state = self._renewed(state)
        with clock("prepare"):
            if begins or self.prepared is None:
                self.prepared = self._prepare(state, step)
        if begins:
            metrics = self._about_answers(self.prepared, step)
        state, learnt = self._learn(state, step, self.prepared, clock)
        return state, metrics | learnt

    def _renewed(self, state: TrainState) -> TrainState:
        """The same parameters with an optimizer that begins anew; the old one's state is let go before."""
        for leaf in jax.tree.leaves(state.opt_state):
            leaf.delete()
        return init_state(self.decoder, state.params, self.optimizer, copy=False)._replace(
            step=state.step, skipped=state.skipped
        )

    def _prepare(self, state: TrainState, step: int) -> Prepared:
        """What the iteration of `step` learns from; see Iterations.prepare."""
        first = step - step % self.length
        chosen = np.unique(np.concatenate([self.chosen(s) for s in range(first, first + self.length)]))
        began_with = functools.partial(self._began_with, state, step)
        number = first // self.length
        return self.iterations.prepare(number, self.examples, chosen.tolist(), self.kept["reference"], began_with)

    def _began_with(self, state: TrainState, step: int) -> Params:
        """The parameters that its iteration began with: those at hand at its first step, else a checkpoint's."""
        begins, folder = step - step % self.length, Path(self.config.folder)
        if step == begins:
            return state.params
        with Checkpoints(folder / "checkpoints") as checkpoints:
            found, meta = restore(checkpoints, begins, state)
        if meta["step"] != begins or fingerprint(found.params) != self.kept["reference"]:
            raise ValueError(
                f"{folder} lost files of iterations/, and checkpoint {begins}, which could make them anew, is not "
                f"intact either: remove the checkpoints after step {begins}, or the folder"
            )
        return found.params

    def _about_answers(self, prepared: Prepared, step: int) -> dict[str, Any]:
        """Of the generated answers: how long they are, and the shares that have no end or copy the demonstration."""
        if not prepared.stop:
            return {}
        pairs = [prepared.pair(i) for i in prepared.stop]
        shown = list(prepared.stop)[: self.config.samples_shown]
        if hosts.first():
            with (Path(self.config.folder) / "samples.jsonl").open("a", encoding="utf-8") as file:
                for i in shown:
                    answer = [int(t) for t in prepared.pair(i).rejected]
                    cut = is_truncated(prepared, i)
                    row = {"step": step, "prompt": self.examples[i].prompt.text, "split": "generated"}
                    row |= {"completion": self.decode(answer), "stop": "max_tokens" if cut else "eos"}
                    file.write(json.dumps(row) + "\n")
        return {
            "response_length": float(np.mean([len(pair.rejected) for pair in pairs])),
            "truncated_share": float(np.mean([is_truncated(prepared, i) for i in prepared.stop])),
            "copied_share": float(np.mean([np.array_equal(pair.chosen, pair.rejected) for pair in pairs])),
        }

    def _learn(
        self, state: TrainState, step: int, prepared: Prepared, clock: Clock
    ) -> tuple[TrainState, dict[str, Any]]:
        with clock("pack"):
            chosen = self.chosen(step)
            batch = self._batch(chosen, prepared)
        with clock("update"):
            state, metrics = self.update(state, batch)
        if "accuracy" in metrics:  # of pairs; held-out answers have another
            metrics["pair_accuracy"] = metrics.pop("accuracy")
        repeated = sum(_tokens(prepared.examples[i]) for i in chosen)
        metrics |= {
            "tokens_stored": int(np.sum(np.asarray(batch.packed.forest.visible_until) > 0)),
            "tokens_repeated": repeated,
            "tokens_per_second": repeated / sum(clock.seconds.values()),
            "learning_rate": float(np.asarray(self.schedule(step % self.length))),
            "reference_forwards": self.iterations.forwards,
        }
        if self.canary is not None:
            with clock("canary"):
                about = {"still": self.still if step % self.length == 0 else None, "metrics": metrics}
                responses = [response for i in chosen for response in _responses(prepared.examples[i])]
                sizes = np.array([len(response) for response in responses])
                found = self.canary.learnt(step=step, length=sizes, mask=batch.packed.mask, **about)
            metrics["alarms"] = len(found) + self.iterations.alarms
            self.iterations.alarms = 0
        return state, metrics | {f"seconds_{phase}": value for phase, value in clock.seconds.items()}

    def _batch(self, chosen: np.ndarray, prepared: Prepared) -> Batch:
        """The batch in num_rows rows, or, where its examples share too little for that, in the next bucket of rows."""
        ref_logp = None
        if prepared.ref_logp:
            ref_logp = np.concatenate([prepared.ref_logp[i] for i in chosen])
        valid = None
        if self.config.truncated == "drop":
            valid = np.array([not is_truncated(prepared, i) for i in chosen])
        pack = functools.partial(
            make_offline_batch,
            self.algorithm,
            [prepared.examples[i] for i in chosen],
            row_length=self.config.row_length,
            parts=self.parts,
            response_length=self.response_length,
            ref_logp=ref_logp,
            valid=valid,
        )
        return in_rows(pack, self.config.num_rows)


def loss_at_reference(algorithm: Algorithm) -> float | None:
    """The loss of a policy that is its reference: all log-ratios are 0. None where there is no reference."""
    if not algorithm.needs_reference:
        return None
    zero = jnp.zeros(2)
    second = zero if algorithm.data == "pairs" else jnp.array([True, False])
    return float(algorithm.loss(zero, second, valid=jnp.ones(2, bool))[0])


def _responses(example: Any) -> list[np.ndarray]:
    return [np.asarray(getattr(example, name)) for name in RESPONSES[type(example)]]


def _tokens(example: Any) -> int:
    """Tokens of an example whose prompt is repeated for every response."""
    return sum(len(np.asarray(example.prompt)) + len(response) for response in _responses(example))


def _longest_response(config: OfflineConfig, examples: Examples) -> int:
    generated = 0 if config.generation is None else config.generation.max_new_tokens
    return max(generated, *(len(response) for example in examples for response in _responses(example)))


def check_offline(
    config: OfflineConfig, decoder: Decoder, algorithm: Algorithm, examples: Examples, mesh: AnyMesh | None
) -> None:
    """Refuses, before anything is written or sampled, what would fail later.

    Raises:
      ValueError: an algorithm, examples, generation and a model that do not go together; what does not fit into a row,
        the vocabulary or the parts; several processes without a mesh over the devices of all.
    """
    named = f"algorithm={config.algorithm!r}"
    if algorithm.data not in LEARNT_FROM:
        fitting = ", ".join(name for name, entry in ALGORITHMS.items() if entry.data in LEARNT_FROM)
        raise ValueError(f"{named} learns from {algorithm.data}: use fit, or one of {fitting}")
    if not len(examples):
        raise ValueError("examples is empty: give at least one")
    kinds = {type(example) for example in examples}
    if len(kinds) > 1 or not kinds <= set(RESPONSES):
        raise ValueError(f"examples are {', '.join(sorted(k.__name__ for k in kinds))}: give one kind, {_KINDS}")
    demonstrations = kinds == {Demonstration}
    if config.generation is None and LEARNT_FROM[algorithm.data] not in kinds:
        remedy = "give generation=SampleConfig(1, ...), so that the policy answers for itself" * demonstrations
        remedy = remedy or "leave out the rejected responses"
        raise ValueError(
            f"{named} learns from {algorithm.data}, and the examples are {kinds.pop().__name__}s: {remedy}"
        )
    if config.generation is not None and (algorithm.data == "demonstrations" or not demonstrations):
        what = f"{named} learns from demonstrations alone" if demonstrations else "the examples are pairs already"
        raise ValueError(f"generation is given, and {what}: leave generation at None")
    if config.generation is not None and algorithm.score == "reward":
        raise ValueError(f"{named} trains a reward model, which cannot answer prompts: give Preferences")
    if jax.process_count() > 1 and (not isinstance(mesh, Mesh) or set(mesh.devices.flat) != set(jax.devices())):
        raise ValueError(
            f"{jax.process_count()} processes train as one, on a mesh of all their {jax.device_count()} devices: "
            "fit_offline(..., mesh=make_mesh(...)) with sizes that multiply to that"
        )
    parts = config.microbatches * row_shards(mesh)
    if parts > config.examples_per_step or (config.num_rows is not None and config.num_rows % parts):
        raise ValueError(
            f"examples_per_step={config.examples_per_step} and num_rows={config.num_rows} for {parts} parts "
            "(microbatches * data * fsdp): give at least as many examples, and rows that divide"
        )
    length = config.steps_per_iteration(len(examples))
    check_horizon(config.optimizer, length, "epochs * examples / examples_per_step, an iteration")
    _check_lengths(config, decoder, examples)
    try_out(algorithm)


def _check_lengths(config: OfflineConfig, decoder: Decoder, examples: Examples) -> None:
    vocab = decoder.config.vocab_size
    limits = (("row_length", config.row_length), ("the model's max_positions", decoder.config.max_positions))
    new = 0 if config.generation is None else config.generation.max_new_tokens
    for number, example in enumerate(examples):
        prompt, responses = np.asarray(example.prompt), _responses(example)
        for tokens in (prompt, *responses):
            if tokens.ndim != 1 or not tokens.size or not 0 <= tokens.min() <= tokens.max() < vocab:
                raise ValueError(
                    f"examples[{number}] holds {tokens.dtype}{list(tokens.shape)} {tokens!s:.60}: prompt and responses "
                    f"are 1-D, not empty, of ids in [0, {vocab})"
                )
        need = len(prompt) + max(new, *(len(response) for response in responses))
        for what, limit in limits:
            if need > limit:
                raise ValueError(
                    f"examples[{number}] needs {need} tokens (prompt {len(prompt)}, the longest response or "
                    f"max_new_tokens {need - len(prompt)}), and {what} is {limit}: raise it, or drop the example"
                )
    beyond = [i for i in (config.generation.eos_ids if config.generation else ()) if not 0 <= i < vocab]
    if beyond:
        raise ValueError(f"generation.eos_ids holds {beyond[0]}, the vocabulary has {vocab}")
