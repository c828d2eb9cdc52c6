"""The real programs of a job, compiled ahead of time for devices that are not there, by libtpu."""

import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from rlalign.forest import pack
from rlalign.plan.devices import Topology
from rlalign.plan.job import Job
from rlalign.rollout.sampler import trace_sample
from rlalign.train.mesh import make_mesh, shardings
from rlalign.train.offline import LEARNT_FROM, make_offline_batch
from rlalign.train.optimizer import make_optimizer
from rlalign.train.step import init_state, make_train_step
from rlalign.types import Batch, Prompt, TrainState


class Compiled(NamedTuple):
    """A program.

    Attributes:
      bytes: that a device needs for it at most, arguments too; more than it has where XLA refused the program.
      seconds: of tracing, lowering and compilation.
      refusal: what XLA said when it refused; "" where it did not.
    """

    bytes: float
    seconds: float
    refusal: str = ""


def compile_job(job: Job, topology: Topology) -> dict[str, Compiled]:
    """Rollout, where there is one, and update, compiled; needs libtpu (the extra `tpu`) and minutes, but no TPU.

    Raises:
      ValueError: a topology of GPUs, whose compiler wants a GPU.
    """
    if topology.chip.lanes == 1:
        raise ValueError(f"--compile is for TPUs, {topology.name} has none: leave it out for the closed form")
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--compile needs the compiler of TPUs, which is not here ({reason}): use `make plan`, or install the "
            "extra tpu"
        ) from error
    mesh = make_mesh(data=job.data, fsdp=job.fsdp, tensor=job.tensor, devices=devices)
    optimizer = make_optimizer(job.run.optimizer)
    shapes = jax.eval_shape(lambda params: init_state(job.decoder, params, optimizer), job.params)
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    state: TrainState = jax.tree.map(place, shapes, shardings(shapes, mesh))

    load = job.load

    def rollout():
        work = load.phases["rollout"]
        asked = {"prompts": work.prompts, "longest": work.prompt, "config": load.sampling}
        return trace_sample(job.decoder, state.params, **asked, mesh=mesh)

    def update():
        step = make_train_step(job.decoder, load.algorithm, optimizer, mesh=mesh, microbatches=job.run.microbatches)
        return step.trace(state, _batch(job))

    programs = {"rollout": rollout, "update": update}
    return {name: _compile(trace) for name, trace in programs.items() if name in load.phases}


def _compile(trace) -> Compiled:
    begin = time.perf_counter()
    lowered = trace().lower(lowering_platforms=("tpu",))
    try:
        used = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(float("inf"), time.perf_counter() - begin, str(error).splitlines()[0])
    # Arguments and temporary arrays at the worst moment. temp_size_in_bytes is more: XLA compiles programs whose
    # arguments and temp_size are beyond the device's memory.
    return Compiled(used.peak_memory_in_bytes, time.perf_counter() - begin)


def _batch(job: Job) -> Batch:
    """Of one optimizer step: random prompts and responses of the longest."""
    run, algorithm, work, rng = job.run, job.load.algorithm, job.load.phases["update"], np.random.default_rng(0)
    draw = lambda *shape: rng.integers(0, job.model.vocab_size, shape)
    minibatches = work.parts // run.microbatches
    prompts = draw(-(-work.prompts // minibatches), work.prompt)
    responses = [[draw(length) for length in work.responses] for _ in prompts]
    parts = run.microbatches * job.shards
    rows: dict[str, Any] = {"row_length": run.row_length, "parts": parts, "num_rows": job.rows("update") * parts}
    numbers = np.zeros((len(prompts) * len(work.responses), max(work.responses)), np.float32)
    reference = numbers if algorithm.needs_reference else None
    if algorithm.data != "rollouts":
        kind = LEARNT_FROM[algorithm.data]
        examples = [kind(Prompt(0, p), *answers) for p, answers in zip(prompts, responses, strict=True)]
        return make_offline_batch(algorithm, examples, ref_logp=reference, **rows)
    whole = [np.concatenate([p, r]) for p, answers in zip(prompts, responses, strict=True) for r in answers]
    packed = pack(whole, response_start=np.full(len(whole), work.prompt), **rows)
    return Batch(packed, advantage=numbers[:, 0], old_logp=numbers, ref_logp=reference, weight=numbers[:, 0])
