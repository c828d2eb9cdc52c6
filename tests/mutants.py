"""Mutation score of the advantages, the losses and the log-probs: how many of 150 a quick subset notices.

    make mutants                       all 150, two at a time; ARGS="--processes 8" for more
    make mutants ARGS="17 42"          these alone, with what the tests said

cosmic-ray changes one operator, comparison, constant, decorator or condition of one file in a copy of the tree; the
subset runs in a process of its own and stops at its first failure. Left out of the draw is what no test could or any
run would notice:

* annotations, the * of a signature, f-strings (messages) and the arguments of warnings;
* arithmetic turned into bits and bits into arithmetic, which arrays refuse;
* == turned into `is`, which Python itself warns of. `is None` is turned into `is not None` alone.

Seven minutes on two cores: 137 of 150 killed. docs/mutants.md has the reason of each survivor.
"""

import argparse
import ast
import concurrent.futures
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOGPROBS = ("rlalign/logprobs.py", *(f"kernels/rlalign_kernels/logprobs/{x}.py" for x in ("api", "statistics", "xla")))
FILES = (*sorted((ROOT / "rlalign/advantages").glob("*.py")), *sorted((ROOT / "rlalign/losses").glob("*.py")))
FILES = (*(str(f.relative_to(ROOT)) for f in FILES), *LOGPROBS)
SEED, COUNT, LIMIT = 0, 150, 300  # LIMIT: seconds after which a mutant counts as killed; it may loop for ever
QUICK = {  # no plugin of pytest, bytecode, no cache that one process would only write, XLA's quickest way to a program
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "PYTHONDONTWRITEBYTECODE": "",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
}
BOUNDS = "tests/test_core_quickly.py::test_bounds_are_allowed"
TESTS = {  # the subset, by what it calls
    "groups": (
        "tests/advantages/test_groups.py::test_bad_input_is_refused_by_name",
        "tests/advantages/test_groups.py::test_unknown_options_are_refused",
        "tests/test_core_quickly.py::test_advantages_of_groups",
    ),
    "steps": (
        "tests/advantages/test_steps.py::test_bad_input_is_refused_by_name",
        "tests/advantages/test_steps.py::test_bad_input_of_the_helpers",
        "tests/advantages/test_steps.py::test_anchors_equal_the_oracle",
        "tests/test_core_quickly.py::test_advantages_of_steps",
    ),
    "tokens": (
        "tests/advantages/test_tokens.py::test_bad_input_is_refused_by_name",
        "tests/advantages/test_tokens.py::test_bad_lengths_are_refused",
        "tests/advantages/test_tokens.py::test_the_length_penalty_at_its_corners",
        "tests/test_core_quickly.py::test_advantages_of_tokens",
    ),
    "policy": (
        "tests/losses/test_policy.py::test_bad_input_is_refused_by_name",
        "tests/losses/test_policy.py::test_bad_input_of_the_other_losses",
        "tests/losses/test_estimates.py::test_bad_input_is_refused_by_name",
        "tests/test_core_quickly.py::test_losses_of_tokens",
    ),
    "pairs": (
        "tests/losses/test_pairs.py::test_bad_input_is_refused_by_name",
        "tests/test_core_quickly.py::test_losses_of_pairs",
    ),
    "logprobs": (
        "tests/test_logprobs.py::test_refusals_name_the_argument",
        "tests/kernels/test_logprobs.py::test_refusals_name_the_argument[vocab alone]",
        "tests/test_logprobs.py::test_default_chunk",
        "tests/test_core_quickly.py::test_log_probs",
        "tests/test_core_quickly.py::test_statistics_of_slices_join",
        "tests/test_logprobs.py::test_the_first_token_of_the_batch_may_be_a_parent",
    ),
}
CALLERS = {  # whose tests can notice a change in this file, the likeliest first; the others never run its lines
    "groups": ("groups", "tokens", "steps"),
    "aggregate": ("policy", "pairs"),
    "estimates": ("policy",),
    **dict.fromkeys(("api", "statistics", "xla"), ("logprobs",)),
}
ARITHMETIC, BITS = {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"}, {"BitOr", "BitAnd", "BitXor"}


def telling(operator: str) -> bool:
    """Whether a replacement can be told from the original by its results, not by its mere form."""
    kind, _, change = operator.removeprefix("core/").partition("_")
    pair = set(change.split("_"))
    if kind == "ReplaceBinaryOperator":
        return pair <= ARITHMETIC or pair <= BITS
    if kind == "ReplaceComparisonOperator":
        return not pair & {"Is", "IsNot"} or pair == {"Is", "IsNot"}
    return kind not in ("VariableReplacer", "VariableInserter")  # these two ask for names


def silent(source: str) -> list[tuple]:
    """(start, end) of what is no behaviour, as (line, column)."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        parts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.JoinedStr):
            parts.append(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
            parts.append(node)
        spans += [((p.lineno, p.col_offset), (p.end_lineno, p.end_col_offset)) for p in parts if p is not None]
    return spans


def everything():
    """(file, operator, occurrence, line) of every mutant there is."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    for file in FILES:
        source = (ROOT / file).read_text()
        quiet, tree = silent(source), get_ast(source)
        for name in sorted(filter(telling, operator_names())):
            operator = get_operator(name)()
            nodes = [(node, start) for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node)]
            for occurrence, (node, start) in enumerate(nodes):
                if node.parent.type != "parameters" and not any(a <= start < b for a, b in quiet):
                    yield file, name, occurrence, start[0]


def run(tree: Path, number: int, file: str, name: str, occurrence: int) -> tuple[bool, list[str], str]:
    """(survived, the lines changed, what pytest said) of one mutant in a copy of the repository."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (ROOT / file).read_text()
    mutant = mutate_code(source, get_operator(name)(), occurrence)
    changed = [b.strip() for a, b in zip(source.splitlines(), mutant.splitlines(), strict=False) if a != b]
    (tree / file).write_text(mutant)
    os.utime(tree / file, (number + 1, number + 1))  # a time of its own, or Python would run the last one's bytecode
    said, code = judge(tree, CALLERS.get(Path(file).stem, (Path(file).stem,)))
    shutil.copy2(ROOT / file, tree / file)
    return code == 0, changed or ["a line is gone"], said


def judge(tree: Path, parts) -> tuple[str, int]:
    """What those parts of the subset say of a tree, and pytest's exit code."""
    nodes = [BOUNDS, *(node for part in parts for node in TESTS[part])]
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *nodes]
    setting = os.environ | QUICK | {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'kernels'}"}
    try:
        done = subprocess.run(command, cwd=tree, env=setting, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"nothing in {LIMIT} s", 1
    return done.stdout + done.stderr, done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, help="mutants to run, by their number; none: all")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    population = list(everything())
    drawn = dict(enumerate(random.Random(SEED).sample(population, COUNT)))
    chosen = {k: drawn[k] for k in args.numbers or drawn}
    print(f"{len(population)} mutants, {len(chosen)} to run")
    with tempfile.TemporaryDirectory(prefix="rlalign-mutants-") as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for k in range(args.processes):
            for part in ("rlalign", "kernels", "tests", "pyproject.toml"):
                copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
                Path(folder, str(k)).mkdir(exist_ok=True)
                copy(ROOT / part, Path(folder, str(k), part))
            trees.put(Path(folder, str(k)))
        judge(trees.queue[0], TESTS)  # writes the bytecode
        start = time.perf_counter()
        said, code = judge(trees.queue[0], TESTS)
        print(f"the subset without a mutant: {time.perf_counter() - start:.1f} s")
        if code != 0:
            sys.exit(said)

        def one(number: int) -> bool:
            tree = trees.get()
            file, name, occurrence, line = drawn[number]
            survived, changed, said = run(tree, number, file, name, occurrence)
            trees.put(tree)
            if survived or args.numbers:
                what = "survived" if survived else "killed"
                print(f"{number:3} {what}  {file}:{line}  {name.removeprefix('core/')}  {' / '.join(changed)}")
            if args.numbers:
                print(said[-3000:])
            sys.stdout.flush()
            return survived

        with concurrent.futures.ThreadPoolExecutor(args.processes) as pool:
            survivors = sum(pool.map(one, chosen))
    print(f"killed {len(chosen) - survivors} of {len(chosen)}: {100 * (1 - survivors / len(chosen)):.1f} %")


if __name__ == "__main__":
    main()
