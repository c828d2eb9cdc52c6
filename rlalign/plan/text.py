"""A plan as a page of text, or as one line."""

import json

from rlalign.io.config import OfflineConfig
from rlalign.plan.compiled import Compiled
from rlalign.plan.estimate import BYTES, GIB, Plan
from rlalign.plan.job import Job
from rlalign.plan.workload import Work

ROWS = ("parameters", "given parameters", "optimizer", "reference", "reward model")  # what stays
ROWS += ("gathered weights", "caches", "kept for the backward", "gradients", "activations")
MARGIN = 0.1  # share of a device's memory that the formulas may err by


def page(plan: Plan, compiled: dict[str, Compiled]) -> str:
    """What `rlalign plan` prints."""
    lines = [*_about(plan), "", *_memory(plan, compiled), "", *_verdict(plan, compiled), "", *_time(plan)]
    return "\n".join(lines)


def _about(plan: Plan) -> list[str]:
    job, run, c = plan.job, plan.job.run, plan.job.model
    sizes = " x ".join(f"{name} {size}" for name, size in zip(("data", "fsdp", "tensor"), job.sizes, strict=True))
    rows = f"{job.rows('update')} x {run.row_length} tokens"
    cut = plan.parameters * BYTES[c.dtype] / (job.fsdp * job.tensor)
    held = plan.phases["update"].inputs["parameters"]
    whole = []
    if held > 1.1 * cut:
        whole.append(
            f"fsdp={job.fsdp} and tensor={job.tensor} do not divide all of the model's sizes: {held / GIB:.2f} GiB of "
            f"parameters lie on each device, {cut / GIB:.2f} would"
        )
    adapter = f", adapter of rank {c.lora.rank}" if c.lora else ""
    return [
        f"{plan.parameters / 1e9:.2f} billion parameters in {c.dtype}, {c.layers} layers, remat {c.remat}{adapter}; "
        f"{run.algorithm}",
        f"{plan.topology.name}: {plan.topology.devices} devices of {plan.topology.chip.hbm} GiB; mesh {sizes}",
        f"a step: {_asked(job.load.phases['update'])}: {plan.tokens:,} tokens stored, {plan.repeated:,} if prompts "
        f"were repeated; a device sees {rows} at a time",
        *_prepared(job),
        *whole,
    ]


def _asked(work: Work) -> str:
    count, kinds = len(work.responses), sorted(set(work.responses), reverse=True)
    each = f"x {count} responses of {kinds[0]}" if count > 1 else f"and a response of {kinds[0]}"
    if len(kinds) > 1:
        each = f"and responses of {' and '.join(map(str, work.responses))}"
    return f"{work.prompts} prompts of {work.prompt} {each}"


def _prepared(job: Job) -> list[str]:
    """What fit_offline does once an iteration."""
    if not isinstance(job.run, OfflineConfig):
        return []
    done = [done for phase, done in (("rollout", "answered"), ("scoring", "scored")) if phase in job.load.phases]
    how = f"{job.run.prepare_size} examples at a time; the seconds below are a step's share"
    return [f"once an iteration all are {' and '.join(done)}, {how}"] if done else []


def _line(name: str, cells: list[str]) -> str:
    return f"{name:<24}" + "".join(f"{cell:>12}" for cell in cells)


def _gib(size: float | None) -> str:
    return "" if not size else f"{size / GIB:.2f}"


def _memory(plan: Plan, compiled: dict[str, Compiled]) -> list[str]:
    phases = plan.phases
    lines = [_line("GiB a device", list(phases))]
    for row in ROWS:
        sizes = [{**p.inputs, **p.working, **p.beside}.get(row) for p in phases.values()]
        if any(sizes):
            lines.append(_line(row, [_gib(size) for size in sizes]))
    lines.append(_line("in all", [_gib(p.total) for p in phases.values()]))
    if compiled:
        told = {name: "refused" if c.refusal else _gib(c.bytes) for name, c in compiled.items()}
        lines.append(_line("the program alone", [_gib(p.program) for p in phases.values()]))
        lines.append(_line("  as compiled", [told.get(name, "") for name in phases]))
    return lines


def missing_gib(plan: Plan, compiled: dict[str, Compiled]) -> dict[str, float]:
    """GiB that each phase lacks, by the compiler where it was asked; infinite where it refused."""
    room = plan.topology.chip.hbm
    found = {}
    for name, phase in plan.phases.items():
        program = compiled[name].bytes if name in compiled else phase.program
        found[name] = (program + sum(phase.beside.values())) / GIB - room
    return found


def _verdict(plan: Plan, compiled: dict[str, Compiled]) -> list[str]:
    lacks = missing_gib(plan, compiled)
    name = max(lacks, key=lacks.__getitem__)
    worst, by = plan.phases[name], "the compiler" if name in compiled else "formula"
    refused = [f"{phase}: {c.refusal}" for phase, c in compiled.items() if c.refusal]
    if lacks[name] <= 0:
        near = -lacks[name] < MARGIN * plan.topology.chip.hbm and name not in compiled
        doubt = "; too near to be sure: --compile, or leave more room" if near else ""
        return [f"fits: {-lacks[name]:.2f} GiB free in its largest phase, the {name}, by {by}{doubt}"]
    shares = {**worst.inputs, **worst.working, **worst.beside}
    always = {**worst.inputs, **worst.beside}
    size = plan.missing if refused else lacks[name]
    missing = f"DOES NOT FIT: {size:.2f} GiB missing on each device in the {name}"
    if sum(always.values()) / GIB > plan.topology.chip.hbm:
        named, size = " and ".join(always), sum(always.values())
        why, remedy = f"{named} alone are {size / GIB:.2f} GiB, whatever the batch", "optimizer"
    else:
        remedy = max(shares, key=shares.__getitem__)
        why = f"the largest share is {remedy}, {shares[remedy] / GIB:.2f} GiB"
    return [f"{missing}: {why}", f"What helps: {REMEDIES[remedy]}", *refused]


REMEDIES = {
    "given parameters": "keep_params = false, which uses up what `fit` is given",
    "parameters": "more fsdp or tensor, that is, more devices; or LoRA on a smaller model",
    "optimizer": "more fsdp or tensor; an adapter ([decoder.lora]); narrower moments (optimizer.mu_dtype)",
    "reference": 'reference_dtype = "bfloat16"; an adapter, whose reference is the model under it',
    "reward model": "more fsdp or tensor; a smaller one, or one in bfloat16",
    "gathered weights": "more tensor; or sampling.gather_weights = false, which is slow",
    "caches": "fewer prompts_per_step or num_samples, or a smaller prepare_size; more data, fsdp or tensor",
    "kept for the backward": 'more microbatches; decoder.remat = "full"',
    "gradients": "more fsdp or tensor",
    "activations": "more microbatches, or a smaller prepare_size where examples are scored; more tensor",
}


def _time(plan: Plan) -> list[str]:
    phases = plan.phases
    lines = [_line("least seconds", list(phases))]
    for bound in ("compute", "memory", "links"):
        lines.append(_line(bound, [f"{p.seconds[bound]:.3f}" if bound in p.seconds else "" for p in phases.values()]))
    whole = sum(p.bound for p in phases.values())
    flops = sum(plan.flops.values())
    shares = ", ".join(f"{name} {value / flops:.0%}" for name, value in plan.flops.items() if value)
    return [
        *lines,
        f"a step takes at least {whole:.2f} s: at most {plan.tokens / whole:,.0f} stored tokens/s, "
        f"{plan.repeated / whole:,.0f} with every response's own prompt",
        f"{flops / plan.tokens / 1e9:.1f} GFLOP a stored token ({shares}), recomputation not counted; the seconds are "
        "bounds from data sheets, not forecasts",
    ]


def as_json(plan: Plan, compiled: dict[str, Compiled]) -> str:
    """The same numbers as one line."""
    gib = lambda sizes: {name: round(size / GIB, 3) for name, size in sizes.items()}
    phases = {
        name: {
            "gib": gib({**p.inputs, **p.working, **p.beside}),
            "total_gib": round(p.total / GIB, 3),
            "program_gib": round(p.program / GIB, 3),
            "least_seconds": {k: round(v, 4) for k, v in p.seconds.items()},
        }
        for name, p in plan.phases.items()
    }
    for name, c in compiled.items():
        phases[name] |= {"compile_seconds": round(c.seconds, 1)}
        phases[name] |= {"refusal": c.refusal} if c.refusal else {"compiled_gib": round(c.bytes / GIB, 3)}
    return json.dumps(
        {
            "plan": plan.topology.name,
            "model": f"{plan.parameters / 1e9:.2f} billion parameters",
            "mesh": dict(zip(("data", "fsdp", "tensor"), plan.job.sizes, strict=True)),
            "missing_gib": round(plan.missing, 3),
            "fits": all(lack <= 0 for lack in missing_gib(plan, compiled).values()),
            "phases": phases,
            "flops_a_token": round(sum(plan.flops.values()) / plan.tokens),
        }
    )
