"""The real programs of a job, compiled ahead of time for devices that are not there, by libtpu."""

import time
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from rlalign.forest import pack
from rlalign.plan.devices import Topology
from rlalign.plan.job import Job
from rlalign.rollout.sampler import trace_sample
from rlalign.train.mesh import make_mesh, shardings
from rlalign.train.optimizer import make_optimizer
from rlalign.train.step import init_state, make_train_step
from rlalign.types import Batch, TrainState


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
    """Rollout and update of the job, compiled; needs libtpu (the extra `tpu`) and minutes, but no TPU.

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

    def rollout():
        asked = {"prompts": job.run.prompts_per_step, "longest": job.prompt_length}
        return trace_sample(job.decoder, state.params, **asked, config=job.run.sampling, mesh=mesh)

    def update():
        step = make_train_step(job.decoder, job.algorithm, optimizer, mesh=mesh, microbatches=job.run.microbatches)
        return step.trace(state, _batch(job))

    return {"rollout": _compile(rollout), "update": _compile(update)}


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
    run, rng = job.run, np.random.default_rng(0)
    samples, response = run.sampling.num_samples, run.sampling.max_new_tokens
    draw = lambda *shape: rng.integers(0, job.model.vocab_size, shape)
    prompts = draw(-(-run.prompts_per_step // run.minibatches), job.prompt_length)
    whole = [np.concatenate([p, draw(response)]) for p in prompts for _ in range(samples)]
    parts = run.microbatches * job.shards  # of one optimizer step
    packed = pack(
        whole,
        row_length=run.row_length,
        response_start=[job.prompt_length] * len(whole),
        parts=parts,
        num_rows=job.rows[0] * parts,
    )
    numbers = np.zeros(packed.mask.shape, np.float32)
    reference = numbers if job.algorithm.needs_reference else None
    return Batch(packed, advantage=numbers[:, 0], old_logp=numbers, ref_logp=reference, weight=numbers[:, 0])
