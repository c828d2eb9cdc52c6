"""rlalign on the command line: rlalign plan CONFIG --topology v5p:2x2x4"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command: 0 is success, 1 a plan that does not fit or a damaged run, 2 a mistake in what was asked."""
    parser = argparse.ArgumentParser(prog="rlalign", description="Critic-free alignment of language models in JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_plan(commands)
    _add_check(commands)
    _add_trajectories(commands)
    _add_clinical_report(commands)
    asked = parser.parse_args(arguments)
    try:
        return asked.run(asked)
    except (OSError, ValueError) as error:
        print(f"rlalign {asked.command}: {error}", file=sys.stderr)
        return 2


def _add_plan(commands) -> None:
    about = "memory by phase and the least seconds of a step, before anything is paid for"
    plan = commands.add_parser("plan", help=about, description=about)
    plan.add_argument("config", help="a TOML or JSON file, see experiments/plans")
    plan.add_argument("--topology", required=True, help="such as v5e:4x4, v5p:2x2x4, v6e:2x2, tpu7x:2x2x1, h100:8")
    plan.add_argument("--compile", action="store_true", help="compile for it too: minutes; needs the extra tpu, no TPU")
    plan.add_argument("--json", action="store_true", help="one JSON line instead of the page")
    for text in ("prompt", "response"):
        about = f"tokens of the longest {text}, in place of the file's"
        plan.add_argument(f"--{text}-length", type=int, help=about + " (fit_offline)" * (text == "response"))
    for axis in ("data", "fsdp", "tensor"):
        plan.add_argument(f"--{axis}", type=int, help=f"devices along {axis}, in place of the file's")
    plan.set_defaults(run=_plan)


def _add_check(commands) -> None:
    about = "whether the checkpoints and metrics of a run are what was written, and where it would go on"

    def run(asked: argparse.Namespace) -> int:
        os.environ["JAX_PLATFORMS"] = "cpu"  # the accelerator may be the run's
        from rlalign.io.inspection import check_run

        text, sound = check_run(asked.folder)
        print(text)
        return int(not sound)

    check = commands.add_parser("check", help=about, description=about)
    check.add_argument("folder", metavar="RUN_FOLDER", help="with checkpoints/ and metrics.jsonl")
    check.set_defaults(run=run)


def _add_trajectories(commands) -> None:
    about = "one page of what agents did: RUN_FOLDER/trajectories.html, from its episodes.jsonl"

    def write(asked: argparse.Namespace) -> int:
        from rlalign.io.trajectories import write_trajectories

        print(write_trajectories(asked.folder))
        return 0

    trajectories = commands.add_parser("trajectories", help=about, description=about)
    trajectories.add_argument("folder", metavar="RUN_FOLDER", help="with episodes.jsonl")
    trajectories.set_defaults(run=write)


def _add_clinical_report(commands) -> None:
    about = "one page of how an asker did on held-out patients, from a file of workups; research only"

    def write(asked: argparse.Namespace) -> int:
        from rlalign.io.clinical_report import write_clinical_report

        print(write_clinical_report(asked.path, beside=asked.beside))
        return 0

    report = commands.add_parser("clinical-report", help=about, description=about)
    report.add_argument("path", metavar="FOLDER_OR_FILE", help="workups, see rlalign.io.workups; or their folder")
    report.add_argument("--beside", metavar="FILE", help="those of other askers for the same patients")
    report.set_defaults(run=write)


def _plan(asked: argparse.Namespace) -> int:
    # Before jax is imported: nothing here runs on a device, and libtpu need not look for one.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from rlalign.plan import estimate, parse_topology, read_job
    from rlalign.plan.text import as_json, missing_gib, page

    sizes = {axis: getattr(asked, axis) for axis in ("data", "fsdp", "tensor") if getattr(asked, axis) is not None}
    topology = parse_topology(asked.topology)
    lengths = {"prompt_length": asked.prompt_length, "response_length": asked.response_length}
    plan = estimate(read_job(asked.config, **lengths, **sizes), topology)
    compiled = {}
    if asked.compile:
        from rlalign.plan.compiled import compile_job

        compiled = compile_job(plan.job, topology)
    print(as_json(plan, compiled) if asked.json else page(plan, compiled))
    return int(any(lack > 0 for lack in missing_gib(plan, compiled).values()))


def plan_paper(file: str | Path, topology: str) -> int:
    """What `--preset paper` of an experiment does: the paper's run is not run but planned, all devices along fsdp.

    Prints the page, the command that compiles it, and the same numbers as one line of JSON.

    Raises:
      ValueError: a topology that does not exist.
    """
    from rlalign.plan import parse_topology

    asked = [str(file), "--topology", topology, "--fsdp", str(parse_topology(topology).devices)]
    if main(["plan", *asked]) == 2:
        return 2
    print(f'\nTo compile it too, which takes minutes: make plan ARGS="{" ".join(asked)} --compile"')
    return main(["plan", *asked, "--json"])


if __name__ == "__main__":
    sys.exit(main())
