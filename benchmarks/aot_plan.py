"""`rlalign plan` beside the compiler: rollout and update of whole models, for TPUs that are not there: make aot

Compiles what the plans of experiments/plans would run, and prints the closed form's GiB a device beside the program's,
one row a program of a Markdown table, and one JSON line. --write keeps the compiler's numbers for the tests. An hour
on two cores for all; --only picks a plan.
"""

import argparse
import json
import os
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax

from rlalign.plan import estimate, parse_topology, read_job
from rlalign.plan.compiled import compile_job

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "tests" / "plan" / "compiled.json"
PLANS = (  # file, topology, what is changed in the file
    ("qwen2_5_1_5b", "v5e:4x4", {}),
    ("qwen2_5_7b", "v5p:2x2x4", {}),
    ("llama_70b", "v5p:8x8x4", {}),
    ("gprs_tldr", "v5p:2x2x4", {}),
    ("gprs_math", "v5p:2x2x4", {}),
    ("gsil_zephyr", "v5p:2x2x4", {}),
    ("qwen2_5_7b", "v5e:2x2", {"fsdp": 4}),
)
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="plans whose file or topology holds this text")
    parser.add_argument("--write", action="store_true", help=f"record in {RECORD.relative_to(ROOT)}")
    asked = parser.parse_args()
    rows = []
    print("| plan | devices | program | formula, GiB | compiled, GiB | formula / compiled | seconds to compile |")
    print("|---|---|---|---|---|---|---|")
    for file, name, changes in PLANS:
        if asked.only and asked.only not in file and asked.only not in name:
            continue
        job, topology = read_job(ROOT / "experiments" / "plans" / f"{file}.toml", **changes), parse_topology(name)
        plan, programs = estimate(job, topology), compile_job(job, topology)
        for phase, program in programs.items():
            formula, told = plan.phases[phase].program / GIB, program.bytes / GIB
            ratio = "-" if program.refusal else f"{formula / told:.3f}"
            told = "refused" if program.refusal else f"{told:.2f}"
            print(
                f"| {file} | {name} | {phase} | {formula:.2f} | {told} | {ratio} | {program.seconds:.0f} |", flush=True
            )
            row = {"plan": file, "topology": name, "changes": changes, "program": phase}
            row |= {"refusal": program.refusal} if program.refusal else {"gib": round(program.bytes / GIB, 3)}
            rows.append(row | {"formula_gib": round(formula, 3), "missing_gib": round(plan.missing, 3)})
    result = {"benchmark": "aot_plan", "jax": jax.__version__, "kernels": os.environ.get("RLALIGN_KERNELS", "xla")}
    print(json.dumps(result | {"rows": rows}))
    if asked.write:
        RECORD.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
