"""The closed form: GiB a device by phase, operations, and the least seconds a step can take, without compiling.

    rollout   weights gathered along fsdp + caches of prompts and responses
    judging   one forward of a reward model
    scoring   one forward: of the reference, of old log-probs
    update    what the backward keeps of each layer + max(head, layer): what lives while the head's gradient is made,
              or while a layer's is

The terms are those of the programs' buffers, and the counts before them (how many copies of an MLP's activations live
at once) were read off XLA's assignments for TPUs (`make aot` compares). Every phase also holds parameters, optimizer
state and the reference, which in fit_offline is the policy itself. What is held between phases only is not in it: a
restored state beside the fresh one.
"""

import dataclasses
import math
from typing import NamedTuple

import jax

from rlalign.models.config import ModelConfig
from rlalign.models.decoder import Decoder
from rlalign.models.lora import ADAPTER, trained
from rlalign.plan.devices import Topology
from rlalign.plan.flops import forward_flops, layer_weights, update_flops
from rlalign.plan.job import Job
from rlalign.rollout.sampler import prompt_buckets
from rlalign.train.mesh import shardings
from rlalign.train.optimizer import make_optimizer, with_master_weights
from rlalign.types import Params

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
COPIES_OF_MLP = 7  # activations of an MLP that live at once in a layer's backward
COPIES_OF_FROZEN_MLP = 4  # where its weights need no gradient
COPIES_OF_WIDTH = 8  # and of the residual stream's width
COPIES_OF_LAYER = 2  # gathered weights: of this layer, and of the next, which is fetched meanwhile
COPIES_OF_HEAD = 2  # in the weights' dtype, beside its float32 gradient
COPIES_OF_LOGITS = 4  # of the newest tokens: logits, log-probs, noise and their sum


class Phase(NamedTuple):
    """One program of a step, bytes a device and the least seconds that it can take.

    Attributes:
      inputs: of its own arguments that stay: parameters, optimizer state.
      working: what it makes and drops.
      beside: what lies in memory meanwhile and is not its argument.
      seconds: of all its calls of a step, of each thing that bounds it; they overlap at best.
    """

    inputs: dict[str, float]
    working: dict[str, float]
    beside: dict[str, float]
    seconds: dict[str, float]

    @property
    def program(self) -> float:
        """Bytes of the program itself, what `--compile` measures."""
        return sum(self.inputs.values()) + sum(self.working.values())

    @property
    def total(self) -> float:
        """Bytes in use while it runs."""
        return self.program + sum(self.beside.values())

    @property
    def bound(self) -> float:
        """Seconds."""
        return max(self.seconds.values())


class Plan(NamedTuple):
    """What a step of a job needs on a topology.

    Attributes:
      parameters: of the whole model.
      tokens, repeated: of a step's updates, each batch once: prompts stored once, and repeated.
      flops: of a step on all devices, by phase.
    """

    job: Job
    topology: Topology
    parameters: int
    tokens: int
    repeated: int
    flops: dict[str, float]
    phases: dict[str, Phase]

    @property
    def missing(self) -> float:
        """GiB that the largest phase lacks on a device; <= 0 where everything fits."""
        return max(phase.total for phase in self.phases.values()) / GIB - self.topology.chip.hbm


def estimate(job: Job, topology: Topology) -> Plan:
    """The plan, by formulas alone.

    Raises:
      ValueError: a mesh of another number of devices than the topology has.
    """
    if job.devices != topology.devices:
        sizes = " x ".join(f"{name}={size}" for name, size in zip(("data", "fsdp", "tensor"), job.sizes, strict=True))
        raise ValueError(
            f"the mesh {sizes} has {job.devices} devices, {topology.name} has {topology.devices}: make them agree"
        )
    params, resident = _resident(job)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    make = {"rollout": _rollout, "judging": _judging, "scoring": _scoring, "update": _update}
    phases = {name: make[name](job, topology, resident) for name in job.load.phases}
    flops = {name: _flops(job, name) for name in phases}
    batch = job.load.phases["update"]
    return Plan(job, topology, count, batch.tokens, batch.repeated, flops, phases)


def _flops(job: Job, phase: str) -> float:
    """Operations of a phase in a step, on all devices; of the mathematics alone, recomputation not counted."""
    model = job.judge if phase == "judging" else job.model
    assert model is not None
    work = job.load.phases[phase]
    count = update_flops if phase == "update" else forward_flops
    return work.calls * count(dataclasses.replace(model, remat="none"), **work.counts(model))


def _bytes(tree: Params, job: Job, *, whole: str | None = None, dtype: str | None = None) -> float:
    """Bytes a device of a tree that lies by the sharding rules, the axis `whole` of the mesh left out."""

    def size(x, sharding) -> float:
        cut = [axis for axis in sharding.spec if axis and axis != whole]
        return (
            math.prod(x.shape)
            * (BYTES[dtype] if dtype else x.dtype.itemsize)
            / math.prod(job.mesh.shape[a] for a in cut)
        )

    return sum(map(size, jax.tree.leaves(tree), jax.tree.leaves(shardings(tree, job.mesh))))


def _resident(job: Job) -> tuple[Params, dict[str, float]]:
    """Shapes of the parameters, and bytes a device of what lies in memory in every phase."""
    params = job.params
    optimizer = with_master_weights(make_optimizer(job.run.optimizer))
    state = jax.eval_shape(optimizer.init, trained(params))
    found = {"parameters": _bytes(params, job), "optimizer": _bytes(state, job)}
    if job.judge is not None:
        found["reward model"] = _bytes(jax.eval_shape(Decoder(job.judge).init, 0), job)
    if job.model.lora:
        return params, found  # the adapter alone is copied, and the reference is the model under it
    if job.load.reference is not None:
        found["reference"] = _bytes(params, job, dtype=job.load.reference)
    if job.load.given:
        found["given parameters"] = _bytes(params, job)
    return params, found


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Bytes a device of the arrays that a forward of `tokens` tokens makes, and of one layer's weights."""

    model: ModelConfig
    tokens: int
    tensor: int

    @property
    def item(self) -> int:
        return BYTES[self.model.dtype]

    @property
    def stream(self) -> float:
        """The residual stream, whole on every device of the tensor axis."""
        return self.tokens * self.model.width * self.item

    @property
    def mlp(self) -> float:
        return self.tokens * self.model.mlp_width * self.item / self.tensor

    @property
    def heads(self) -> float:
        """Attention's output."""
        return self.tokens * self.model.heads * self.model.head_width * self.item / self.tensor

    @property
    def layer(self) -> float:
        """The weights of a layer, gathered along fsdp."""
        return layer_weights(self.model) * self.item / self.tensor

    @property
    def vocabulary(self) -> float:
        """Embedding or head, gathered along fsdp."""
        return self.model.vocab_size * self.model.width * self.item / self.tensor

    @property
    def kept(self) -> float:
        """What the backward keeps of one layer; see ModelConfig.remat."""
        c = self.model
        statistics = self.tokens * c.heads * 4 / self.tensor  # log-sum-exp of attention, float32
        kept = self.stream + self.heads + statistics
        if c.remat == "full":
            return kept
        key_values = 2 * self.tokens * c.kv_heads * c.head_width * self.item / self.tensor
        products = self.heads + key_values + self.stream + (1 + c.gated_mlp) * self.mlp
        if c.remat == "products":
            return kept + products
        wide = 2 * self.tokens * c.width * 4  # float32 inputs of both norms
        return statistics + wide + 4 * self.stream + 3 * self.heads + key_values + 3 * (1 + c.gated_mlp) * self.mlp


def _rollout(job: Job, topology: Topology, resident: dict[str, float]) -> Phase:
    c, work, sampling, chip = job.model, job.load.phases["rollout"], job.load.sampling, topology.chip
    assert sampling is not None
    count, width = prompt_buckets(work.prompts, work.prompt, job.mesh)
    prompts, steps = count // job.shards, sampling.max_new_tokens
    item, rows = BYTES[c.dtype], prompts * sampling.num_samples
    head_width = -(-c.head_width // chip.lanes) * chip.lanes
    cache = 2 * c.layers * prompts * c.kv_heads * head_width * item / job.tensor
    prefix, suffix = cache * width, cache * sampling.num_samples * steps
    gathered = _bytes(job.params, job, whole="fsdp")
    sizes = _Sizes(c, prompts * width, job.tensor)
    prefill = 2 * sizes.mlp + 4 * sizes.stream  # over before the responses' cache is filled
    logits = COPIES_OF_LOGITS * rows * c.vocab_size * 4
    weights = gathered if sampling.gather_weights and job.fsdp > 1 else COPIES_OF_LAYER * sizes.layer + sizes.vocabulary
    if job.devices == 1:
        weights = 0.0
    working = {
        "gathered weights": weights + (sizes.vocabulary if c.tied_head else 0.0),
        "caches": prefix + max(suffix, prefill),
        "activations": logits,
    }
    inputs = {"parameters": resident["parameters"]}
    # A token reads the weights (of an embedding that is no head too, a row), the prompts' cache and, on average, half
    # of the responses'.
    a_token = gathered - (0.0 if c.tied_head else sizes.vocabulary) + prefix + suffix / 2
    travels = gathered - resident["parameters"]
    again = 1 if sampling.gather_weights else steps
    seconds = {
        "compute": _flops(job, "rollout") / job.devices / chip.flops,
        "memory": work.calls * (steps * a_token + gathered) / chip.bandwidth,
        "links": work.calls * again * travels / chip.links,
    }
    return Phase(inputs, working, _others(resident, inputs), seconds)


def _others(resident: dict[str, float], inputs: dict[str, float]) -> dict[str, float]:
    return {name: size for name, size in resident.items() if name not in inputs}


def _scoring(job: Job, topology: Topology, resident: dict[str, float]) -> Phase:
    """A forward over all rows of a device: they are not cut into microbatches."""
    inputs, chip = {"parameters": resident["parameters"]}, topology.chip
    seconds = {
        "compute": _flops(job, "scoring") / job.devices / chip.flops,
        "links": job.load.phases["scoring"].calls * _gathering(job, resident) / chip.links,
    }
    return Phase(inputs, _of_a_forward(job, job.model, "scoring"), _others(resident, inputs), seconds)


def _judging(job: Job, topology: Topology, resident: dict[str, float]) -> Phase:
    """A forward of the reward model over all rows of a device."""
    assert job.judge is not None
    inputs = {"reward model": resident["reward model"]}
    whole = _bytes(jax.eval_shape(Decoder(job.judge).init, 0), job, whole="fsdp")
    seconds = {
        "compute": _flops(job, "judging") / job.devices / topology.chip.flops,
        "links": (whole - resident["reward model"]) / topology.chip.links,
    }
    return Phase(inputs, _of_a_forward(job, job.judge, "judging"), _others(resident, inputs), seconds)


def _of_a_forward(job: Job, model: ModelConfig, phase: str) -> dict[str, float]:
    """What a forward without a gradient makes, over all rows of a device at once."""
    sizes = _Sizes(model, job.rows(phase) * job.run.row_length, job.tensor)
    gathered = (COPIES_OF_LAYER * sizes.layer + COPIES_OF_HEAD * sizes.vocabulary) * (job.devices > 1)
    return {"gathered weights": gathered, "activations": 3 * sizes.mlp + 4 * sizes.stream}


def _gathering(job: Job, resident: dict[str, float]) -> float:
    """Bytes that arrive at a device where every weight is gathered along fsdp once."""
    return _bytes(job.params, job, whole="fsdp") - resident["parameters"]


def _update(job: Job, topology: Topology, resident: dict[str, float]) -> Phase:
    c, run, load, chip = job.model, job.run, job.load, topology.chip
    params, work, updates = trained(job.params), load.phases["update"], load.updates
    sizes = _Sizes(c, job.rows("update") * run.row_length, job.tensor)
    inputs = {name: resident[name] for name in ("parameters", "optimizer")}
    passes = work.calls * work.parts  # forwards and backwards a step
    travels = passes * 3 * _gathering(job, resident)
    if job.tensor > 1:  # an all-reduce behind attention and behind the MLP, forward, again and backward
        times = 2 if c.remat == "none" else 3
        travels += passes * times * c.layers * 2 * 2 * sizes.stream * (job.tensor - 1) / job.tensor
    if job.data > 1:
        wide = 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(params))
        travels += updates * 2 * wide / (job.fsdp * job.tensor) * (job.data - 1) / job.data
    flops = work.calls * update_flops(c, **work.counts(c))  # with what is computed again
    seconds = {
        "compute": flops / job.devices / chip.flops,
        "memory": updates * 2 * (resident["optimizer"] + _bytes(params, job)) / chip.bandwidth,
        "links": travels / chip.links,
    }
    return Phase(inputs, _of_an_update(job, params, sizes), _others(resident, inputs), seconds)


def _of_an_update(job: Job, params: Params, sizes: _Sizes) -> dict[str, float]:
    """What a forward and backward of one part makes; `params` are those that are trained."""
    c, alone = job.model, job.devices == 1
    layers = _bytes(params.get(ADAPTER, {"layers": params.get("layers")}), job)  # gradients of the scan, stacked
    head_gradient = 0.0 if c.lora else sizes.vocabulary / sizes.item * 4
    head, whole = COPIES_OF_HEAD * sizes.vocabulary + head_gradient + 2 * sizes.stream, sizes.vocabulary
    if c.reward_head:  # the embedding alone: gathered before the layers, its gradient made behind all of theirs
        head, whole = layers + head_gradient + 2 * sizes.stream, 0.0
    layer = (
        layers
        + (COPIES_OF_FROZEN_MLP if c.lora else COPIES_OF_MLP) * sizes.mlp
        + COPIES_OF_WIDTH * sizes.stream
        + (COPIES_OF_LAYER * sizes.layer + whole) * (not alone)
    )
    return {
        "kept for the backward": c.layers * sizes.kept,
        "gradients": _bytes(params, job, dtype="float32") if job.run.microbatches > 1 else 0.0,
        "activations": max(head, layer),
    }
