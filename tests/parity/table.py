"""How far apart the two libraries are, case by case, and the table of docs/parity.md."""

import functools
import importlib.metadata
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rlalign import losses
from rlalign.algorithms import Algorithm
from tests.conftest import enable_x64
from tests.parity.cases import BATCHES, CASES, GROUPS, ROWS, Case

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
BEGIN, END = "<!-- measured: make parity ARGS=--write -->", "<!-- end -->"


def objective(case: Case, logp, batch):
    """(loss, advantage) of ours, as the train step would put them together."""
    if not isinstance(case.ours, Algorithm):
        return case.ours(batch, logp), None
    ours, mask = case.ours, batch["mask"]
    reward = batch["reward"] if batch["reward"].shape[1] > 1 else batch["reward"][:, 0]
    advantage = ours.advantage(reward, batch["group"], num_groups=GROUPS, valid=batch["valid"])
    # TRL's mean over rows counts those without a token.
    how = {
        "aggregate": ours.aggregate,
        "max_length": ours.max_length,
        "denominator": None if ours.aggregate == "token" else ROWS,
    }
    weight = None
    if case.importance is not None:
        weight, _ = losses.importance_weight(batch["old_logp"], batch["behaviour_logp"], mask, **case.importance)
    loss, _ = ours.loss(logp, batch["old_logp"], advantage, mask, weight=weight, **how)
    kl = losses.kl_estimate(logp, batch["ref_logp"], mask, kind=ours.kl_kind)
    if case.kl_ratio is not None:
        log_ratio = jnp.where(mask, logp - batch["old_logp"], 0)
        if case.kl_ratio == "sequence":
            log_ratio = jnp.sum(log_ratio, axis=1, keepdims=True) / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        kl = kl * jnp.exp(log_ratio)
    return loss + ours.kl_coef * losses.aggregate_tokens(kl, mask, **how), advantage


def apart(ours, theirs):
    """Largest difference over largest number."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    largest = np.max(np.abs(theirs))
    return float(np.max(np.abs(ours - theirs)) / max(largest, np.finfo(float).tiny))


@functools.cache
def measure(name):
    """The worst of all batches, in float64: {"advantage", "loss", "gradient"}; "advantage" where there is one."""
    case, worst, moved = CASES[name], {}, 0
    slope = jax.jit(jax.value_and_grad(functools.partial(objective, case), has_aux=True))
    rng = np.random.default_rng(list(name.encode()))
    for distance in np.geomspace(1e-4, 1, BATCHES):  # from nothing clipped to nearly all
        batch = case.batch(rng, distance)
        advantage, loss, gradient = case.theirs(case.settings, batch)
        with enable_x64():
            arrays = {k: jnp.asarray(v) for k, v in batch.items() if k != "logp"}
            (got, got_advantage), got_gradient = slope(jnp.asarray(batch["logp"]), arrays)
        found = {"loss": apart(got, loss), "gradient": apart(got_gradient, gradient)}
        if advantage is not None:
            found["advantage"] = apart(got_advantage, advantage)
        worst = {k: max(v, worst.get(k, 0.0)) for k, v in found.items()}
        moved += bool(np.any(gradient))
    assert moved > BATCHES / 2, f"{name}: only {moved} of {BATCHES} batches have a gradient"
    return worst


def call(f):
    """A partial as it would be written."""
    if not hasattr(f, "keywords"):
        return f.__name__
    return f"{f.func.__name__}({', '.join(f'{k}={v!r}' for k, v in f.keywords.items())})"


def written(case):
    if case.text:
        return case.text
    ours = case.ours
    parts = [call(ours.advantage), call(ours.loss), f"aggregate={ours.aggregate!r}"]
    if ours.max_length is not None:
        parts.append(f"max_length={ours.max_length}")
    if ours.kl_coef > 0:
        parts.append(f"kl_coef={ours.kl_coef}" + (f" times the ratio of the {case.kl_ratio}" if case.kl_ratio else ""))
    if case.importance is not None:
        parts.append(call(functools.partial(losses.importance_weight, **case.importance)))
    return ", ".join(parts)


def versions(*names):
    return ", ".join(f"{name} {importlib.metadata.version(name).partition('+')[0]}" for name in names)


def rows(measured):
    """The lines of the table; with the numbers left out if not `measured`."""
    yield "| case | TRL | rlalign | advantage | loss | gradient |"
    yield "|---|---|---|---|---|---|"
    for name, case in CASES.items():
        theirs = ", ".join(f"{k}={v!r}" for k, v in case.settings.items())
        found = measure(name) if measured else {}
        numbers = [f"{found[k]:.0e}" if k in found else "" for k in ("advantage", "loss", "gradient")]
        yield f"| {name} | `{theirs}` | `{written(case)}` | {' | '.join(numbers)} |"


def committed():
    return PAGE.read_text().split(BEGIN)[1].split(END)[0]


def settled(text):
    """What must not change unnoticed: the libraries' versions and every row but its numbers."""
    stamp = re.search(r"torch [\w.]+, trl [\w.]+", text)
    lines = [re.sub(r"(\| [\d.e+-]* ){3}\|$", "|", line) for line in text.splitlines() if line.startswith("|")]
    return [stamp and stamp.group(0), *lines]


def section(measured):
    stamp = versions("rlalign", "jax", "numpy", "torch", "trl")
    text = f"Measured with {stamp}; {BATCHES} random batches a row, float64.\n"
    return "\n" + text + "\n" + "\n".join(rows(measured)) + "\n"


def write():
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + section(measured=True) + END + rest.split(END)[1])
