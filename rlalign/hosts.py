"""What the processes of one run do together: join, put and fetch arrays, agree. With one process all of it is plain.

Every process runs the same script on the same data, and the devices of all make one mesh: rollouts and training are
one SPMD program. What a host does with Python objects (packing, the order of the prompts) each does by itself, with the
same result; what may differ between them (rewards, a signal that asks to stop) is exchanged.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlalign.checks import differences

# In the errors of collectives, on CPUs, GPUs and from JAX's coordination service.
SIGNS_OF_LOSS = ("Gloo", "NCCL", "UNAVAILABLE", "heartbeat", "oordination service")
REASON_BYTES = 400  # of the text that says why a reward is invalid, between processes


def join(
    coordinator: str | None = None, *, processes: int | None = None, process: int | None = None, patience: int = 30
) -> None:
    """Make this process one of a run; call it before anything else touches JAX.

    Args:
      coordinator: "host:port" of process 0. None reads RLALIGN_COORDINATOR, RLALIGN_PROCESSES and RLALIGN_PROCESS;
        where those are not set either, TPU pods, Slurm, Open MPI and Kubernetes tell JAX by themselves.
      processes, process: how many there are, and which this is, from 0.
      patience: seconds without a sign of life after which a process counts as dead; the others then end with a message
        that says so, rather than wait for ever.

    Raises:
      ValueError: some of the three are given, and some are not; a process outside the run.
      RuntimeError: JAX was used already, or the others did not come within 300 s.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    if all(value is None for value in given.values()):
        given = {name: os.environ.get(f"RLALIGN_{name.upper()}") for name in given}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < 3:
        raise ValueError(f"{given} lacks {', '.join(missing)}: give all three, or none where the cluster tells them")
    how: dict[str, Any] = {}
    if not missing:
        count, number = int(given["processes"] or 0), int(given["process"] or 0)
        if not 0 <= number < count:
            raise ValueError(f"process={number} of processes={count}: they are numbered from 0 to {count - 1}")
        how = {"coordinator_address": given["coordinator"], "num_processes": count, "process_id": number}
    # Read by CPUs only, where XLA has no collectives of its own between processes.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # At its end a process waits so long for the others: one that fails must not keep those that wait for it.
    jax.distributed.initialize(**how, heartbeat_timeout_seconds=patience, shutdown_timeout_seconds=patience)


def first() -> bool:
    """Whether this process writes what the run writes once: metrics, samples, the report."""
    return jax.process_index() == 0


def put(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array of all devices from host data that every process holds alike; each places its own shards only."""
    if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def fetch(tree: Any) -> Any:
    """Whole arrays on the host, as NumPy. Those that lie on several hosts must be asked for by all processes."""

    def whole(x: Any) -> Any:
        here = not isinstance(x, jax.Array) or x.is_fully_addressable
        return jax.device_get(x) if here else np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)


def share(count: int) -> slice:
    """This process's block of `count` things; the blocks of all processes follow each other."""
    size = -(-count // jax.process_count())
    return slice(min(size * jax.process_index(), count), min(size * (jax.process_index() + 1), count))


def together(mine: np.ndarray, count: int) -> np.ndarray:
    """[count, ...] of all processes, from the rows that each found for its `share`."""
    if jax.process_count() == 1:
        return mine
    size = -(-count // jax.process_count())
    padded = np.zeros((size, *mine.shape[1:]), mine.dtype)
    padded[: len(mine)] = mine
    # As bytes: JAX would narrow float64.
    every = np.asarray(multihost_utils.process_allgather(padded.view(np.uint8).reshape(size, -1)))
    rows = np.ascontiguousarray(every.reshape(-1, every.shape[-1])[:count])
    return rows.view(mine.dtype).reshape(count, *mine.shape[1:])


def texts_together(mine: tuple[str, ...], count: int) -> tuple[str, ...]:
    """The same for texts, cut at REASON_BYTES."""
    if jax.process_count() == 1:
        return mine
    cut = [text.encode()[:REASON_BYTES].ljust(REASON_BYTES, b"\0") for text in mine]
    rows = together(np.frombuffer(b"".join(cut), np.uint8).reshape(len(mine), REASON_BYTES), count)
    return tuple(bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows)


def agree(asked: bool) -> bool:
    """Whether any process was asked; all learn it at the same place of the program."""
    if jax.process_count() == 1:
        return asked
    return bool(np.any(multihost_utils.process_allgather(np.array([asked]))))


def of_first(value: float) -> float:
    """Process 0's value, in all of them."""
    if jax.process_count() == 1:
        return value
    sent = multihost_utils.broadcast_one_to_all(np.frombuffer(np.float64(value).tobytes(), np.uint8))
    return float(np.frombuffer(np.asarray(sent).tobytes(), np.float64)[0])


def check_same_everywhere(values: Mapping[str, Any]) -> None:
    """Refuse processes that were started differently: they would wait for each other for ever, or train on a mixture.

    Args:
      values: nested settings and hashes, plain enough for JSON.

    Raises:
      ValueError: in every process; names those that differ from process 0, and in what.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(values).encode()
    longest = int(np.max(multihost_utils.process_allgather(np.array([len(text)]))))
    padded = np.frombuffer(text.ljust(longest), np.uint8)
    first = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
    mine = [f"{name}: {theirs} there, {own} here" for name, (theirs, own) in differences(first, values).items()]
    every = texts_together(("; ".join(mine),), jax.process_count())
    told = [f"process {k} differs from process 0 in {text}" for k, text in enumerate(every) if text]
    if told:
        raise ValueError(f"start all processes with the same settings, model, data and mesh: {'. '.join(told)}")


@contextlib.contextmanager
def failing_together(continues: str) -> Iterator[None]:
    """Tells, below the traceback of an error inside, what it means for the processes of a run."""
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1:
            lost = any(sign in str(error) for sign in SIGNS_OF_LOSS)
            error.add_note(
                "a collective failed: another process of this run has ended or cannot be reached; its log says why"
                if lost
                else "the other processes of this run end too, as soon as they miss this one"
            )
            error.add_note(f"start all of them again to continue: {continues}")
        raise


def check_shared(folder: Path) -> None:
    """Refuse a folder that is another one on another host: checkpoints would be in pieces.

    Raises:
      ValueError: in every process.
    """
    if jax.process_count() == 1:
        return
    probe = folder / ".process-0-was-here"
    if first():
        probe.touch()
    wait_for_all("touch")
    deadline = time.monotonic() + 10  # network file systems show a new file late
    while not probe.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    missing = agree(not probe.exists())
    if first():
        probe.unlink()
    if missing:
        raise ValueError(f"{folder} of process 0 is not that of every process: use a file system that all hosts share")


def wait_for_all(name: str) -> None:
    """Returns when every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"rlalign.{name}")
