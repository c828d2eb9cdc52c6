"""What a run folder holds, and whether all of it is what was written: `rlalign check RUN_FOLDER`.

    step        saved              size   state
     300   2026-11-29 12:01    462.3 MB   intact, the best
     350   2026-11-29 12:09    462.3 MB   DAMAGED: state/d/9e21 is not what was saved (its CRC-32 differs)
    metrics.jsonl: steps 0 to 352, and a torn line, which a continued run removes
    A run that is continued here begins at step 300.

Nothing is written. A run that is going on may be asked about too, though it removes old steps meanwhile.
"""

import json
import os
import time
from pathlib import Path

from rlalign.io.checkpoint import Checkpoints
from rlalign.io.metrics import read_metrics


def check_run(folder: str | os.PathLike[str]) -> tuple[str, bool]:
    """Reads every checkpoint of a run against its checksums, and its metrics.

    Args:
      folder: of a run, as OfflineConfig.folder and its like name it.

    Returns:
      The lines above, and whether there is a checkpoint and nothing is damaged.

    Raises:
      ValueError: no folder of a run; metrics that are damaged before their last line, as a continued run raises it.
    """
    root = Path(folder)
    if not (root / "checkpoints").is_dir():
        raise ValueError(f"{root} has no checkpoints/: give the folder of a run")
    lines, intact, sound = [f"{'step':>8}   {'saved':<16} {'size':>11}   state"], None, True
    with Checkpoints(root / "checkpoints") as checkpoints:
        steps = checkpoints.steps()
        best = None
        if problem := checkpoints.best_problem():
            sound = False
            lines.append(f"DAMAGED: {problem}")
        else:
            best = checkpoints.best()
        for step in steps:
            problem = checkpoints.problem(step)
            place = checkpoints.folder / str(step)
            size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
            saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(place.stat().st_mtime))
            state = f"DAMAGED: {problem}" if problem else "intact"
            lines.append(f"{step:>8}   {saved} {size / 1e6:>8.1f} MB   {state}{', the best' if step == best else ''}")
            sound, intact = sound and not problem, intact if problem else step
    lines.append(_about_metrics(root / "metrics.jsonl"))
    if intact is None:
        lines.append("No step is intact: a run is not continued here. Put one back from a copy, or use another folder.")
    else:
        lines.append(f"A run that is continued here begins at step {intact}.")
    return "\n".join(lines), sound and intact is not None


def _about_metrics(path: Path) -> str:
    rows = read_metrics(path)
    if not rows:
        return f"{path.name}: none"
    last = path.read_bytes().splitlines()[-1]
    text = f"{path.name}: steps {rows[0]['step']} to {rows[-1]['step']}"
    return text if _is_whole(last) else f"{text}, and a torn line, which a continued run removes"


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
