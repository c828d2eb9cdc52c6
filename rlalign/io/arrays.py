"""Arrays and a JSON record in a folder, by Orbax: what checkpoints are made of. Any thread may call, one at a time."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from rlalign.types import TrainState

RECORD = "metadata"  # the record's file, in meta/


class Arrays:
    """Writes and reads such folders; several processes make the same calls. Close it when done."""

    def __init__(self):
        items = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler(RECORD)}
        self._orbax = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**items))

    def write(self, folder: Path, state: TrainState, record: Mapping[str, Any]) -> None:
        """Fills a folder that does not exist; raises OSError or ValueError, as Orbax reports what failed."""
        with _quiet():
            items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(record)))
            self._orbax.save(folder, args=items)

    def record(self, folder: Path) -> dict[str, Any]:
        """The record alone; unlike the others it may be asked for by one of several processes."""
        return json.loads((folder / "meta" / RECORD).read_bytes())

    def state(self, folder: Path, like: TrainState) -> TrainState:
        """The arrays, where those of `like` lie; without a sharding there, on the first device."""
        with _quiet():
            args = ocp.args.Composite(state=ocp.args.StandardRestore(jax.tree.map(_abstract, like)))
            return self._orbax.restore(folder, args=args).state

    def close(self) -> None:
        """Frees Orbax's threads."""
        self._orbax.close()


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax tells its life through absl's logger; what matters to a user is raised, or warned of by who calls.

    What others log there meanwhile passes: a save may be going on behind them.
    """
    logger = logging.getLogger("absl")
    of_others = _OfOthers()
    logger.addFilter(of_others)
    try:
        yield
    finally:
        logger.removeFilter(of_others)


class _OfOthers(logging.Filter):
    """Passes what does not come from Orbax's own files; an object each time, so that two at once end by themselves."""

    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname
