"""What a run folder holds, and whether all of it is what was written: `rlalign check RUN_FOLDER`.

    step        saved              size   state
     300   2026-11-29 12:01    462.3 MB   intact, the best
     350   2026-11-29 12:09    462.3 MB   DAMAGED: state/d/9e21 is not what was saved (its CRC-32 differs)
    metrics.jsonl: steps 0 to 352, and a torn line, which a continued run removes
    A run that is continued here begins at step 300.

Nothing is written. A run that is going on may be asked about too, though it removes old steps meanwhile.
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from rlalign.io.checkpoint import Checkpoints
from rlalign.io.metrics import read_metrics
from rlalign.io.session import had_checkpoints


def check_run(folder: str | os.PathLike[str]) -> tuple[str, bool]:
    """Reads every checkpoint of a run against its checksums, and its metrics.

    Args:
      folder: of a run, as RunConfig.folder and its like name it.

    Returns:
      The lines above, and whether nothing is damaged or gone.

    Raises:
      ValueError: no folder of a run.
    """
    root = Path(folder)
    if not (root / "checkpoints").is_dir() and not (root / "metrics.jsonl").exists():
        raise ValueError(f"{root} has no checkpoints/ and no metrics.jsonl: give the folder of a run")
    lines, intact, steps = [f"{'step':>8}   {'saved':<16} {'size':>11}   state"], None, []
    with Checkpoints(root / "checkpoints") as checkpoints:
        mark = checkpoints.best_problem()
        best = None if mark else checkpoints.best()
        for step in checkpoints.steps():
            problem = checkpoints.problem(step)
            if step not in checkpoints.steps():
                continue  # the run has removed it since
            about = _about(checkpoints.folder / str(step), problem)
            lines.append(f"{step:>8}   {about}{', the best' * (step == best)}")
            steps.append(step)
            intact = intact if problem else step
    lines += [f"DAMAGED: {mark}"] * bool(mark)
    try:
        rows = read_metrics(root / "metrics.jsonl")
        lines.append(_about_metrics(root / "metrics.jsonl", rows))
    except ValueError as error:
        rows = []
        lines.append(f"DAMAGED: {error}")
    if intact is not None:
        lines.append(f"A run that is continued here begins at step {intact}.")
    elif not steps and not had_checkpoints(rows):
        lines.append("Nothing is saved yet: a run begins at step 0 here.")
    else:
        lines.append("No step is intact: a run is not continued here. Put one back from a copy, or use another folder.")
    return "\n".join(lines), not any("DAMAGED" in line or line.startswith("No step") for line in lines)


def _about(step: Path, problem: str | None) -> str:
    saved, size = "?", 0
    with contextlib.suppress(OSError):  # told as the problem
        saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(step.stat().st_mtime))
        size = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
    return f"{saved:<16} {size / 1e6:>8.1f} MB   {f'DAMAGED: {problem}' if problem else 'intact'}"


def _about_metrics(path: Path, rows: list[dict[str, Any]]) -> str:
    if not rows:
        return f"{path.name}: none"
    text = f"{path.name}: steps {rows[0]['step']} to {rows[-1]['step']}"
    try:
        json.loads(path.read_bytes().splitlines()[-1])
    except ValueError:
        return f"{text}, and a torn line, which a continued run removes"
    return text
