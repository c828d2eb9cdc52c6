"""The shape of the library, read from its source: imports, docstrings, fixed names, what must not be there."""

import ast
import doctest
import importlib
import importlib.machinery
import importlib.util
import inspect
import math
import subprocess
import sys
from pathlib import Path

import pytest

import rlalign

ROOT = Path(__file__).parents[1]
CORE = (  # the pure maths, module by module
    *("types", "checks", "compat", "forest", "bins", "logprobs"),
    *("advantages", "advantages.groups", "advantages.anchors", "advantages.steps", "advantages.tokens"),
    *("losses", "losses.aggregate", "losses.policy", "losses.estimates", "losses.pairs"),
    *("algorithms", "algorithms.algorithm", "algorithms.registry", "algorithms.parity", "algorithms.page"),
)

DOCTESTED = (
    "envs.sums",
    "envs.clinic",
    "envs.house",
    "envs.shop",
    "envs.words",
    "envs.prompting",
    "io.mixture",
    "io.experiment",
    "clinical.workup",
    "evaluation.disclosure",
)

# Arrows point to a lower tier. Among models, rollout and train, see ALLOWED.
TIERS = [
    {"types", "checks", "compat", "hosts"},
    {"forest", "bins", "advantages", "losses", "logprobs"},
    {"algorithms", "strings"},
    {"models", "rollout", "train"},
    {"rewards", "envs", "clinical"},
    {"evaluation"},
    {"io"},
    {"plan"},
    {"cli"},
]
TIER = {name: level for level, names in enumerate(TIERS) for name in names}
ALLOWED = [  # (from, to) inside the tier of models, rollout and train
    ("rlalign.rollout", "rlalign.models"),
    ("rlalign.rollout", "rlalign.train.mesh"),
    ("rlalign.train", "rlalign.models"),
    # Where to put what they read or make; imported inside the function.
    ("rlalign.models.pretrained", "rlalign.train.mesh"),
    ("rlalign.models.lora", "rlalign.train.mesh"),
]


TYRO = ("experiments", "benchmarks")  # the folders whose scripts take flags


def sources(*folders):
    """module name -> parsed source, of every Python file below."""
    found = {}
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / "kernels" if folder == "kernels" else ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(file.read_text())
    return found


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(tree):
    """Dotted names that a module imports, wherever it does; `from a import b` is a.b. Not those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ("." * node.level + f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names)
        else:
            yield from imports(node)


def below(name, package):
    return name == package or name.startswith(package + ".")


def complaint(module, target):
    """Why `module` must not import `target`; None if it may."""
    root = target.split(".")[0]
    if target.startswith("."):
        return "a relative import: write the whole name"
    if root in ("experiments", "benchmarks", "tests", "kernels"):
        return f"nothing imports {root}"
    if root == "tyro" and module.split(".")[0] not in TYRO:
        return f"only {' and '.join(TYRO)} import tyro"
    if below(module, "rlalign_kernels"):
        standard = root in sys.stdlib_module_names
        return None if standard or root in ("jax", "rlalign_kernels") else "kernels import jax only"
    if not below(module, "rlalign") or module == "rlalign":
        return None
    part = module.split(".")[1]
    if part not in TIER:
        return f"{part} has no place in TIERS"
    if root == "rlalign":
        return _complaint_inside(module, target)
    if (
        TIER[part] <= TIER["algorithms"]
        and root not in sys.stdlib_module_names
        and root not in ("jax", "numpy", "rlalign_kernels")
    ):
        return "the core imports jax, numpy and the kernels only"
    return None


def _complaint_inside(module, target):
    if target.count(".") < 1 or target.split(".")[1] not in TIER:
        return "inside the library, name the module that defines it"
    here, there = module.split(".")[1], target.split(".")[1]
    if TIER[there] > TIER[here]:
        return f"{there} is above {here}"
    if TIER[there] == TIER[here] == TIER["models"] and here != there:
        fits = any(below(module, a) and below(target, b) for a, b in ALLOWED)
        return None if fits else f"{here} and {there} are side by side"
    return None


def test_every_import_points_down():
    wrong = []
    for module, tree in sources("rlalign", "kernels", "experiments", "benchmarks").items():
        for target in imports(tree):
            reason = complaint(module, target)
            if reason:
                wrong.append(f"{module} imports {target}: {reason}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("rlalign.losses", "def f():\n    from rlalign.train.step import init_state", "train is above losses"),
        ("rlalign.algorithms", "import rlalign.models.decoder", "models is above algorithms"),
        ("rlalign.train.step", "from rlalign.rollout import sample", "side by side"),
        ("rlalign.rollout.sampler", "from rlalign.train.step import init_state", "side by side"),
        ("rlalign.rollout.sampler", "from rlalign.train.mesh import ROWS", None),
        ("rlalign.models.decoder", "from rlalign.train.mesh import ROWS", "side by side"),
        ("rlalign.rewards.items", "try:\n    from rlalign.io import files\nexcept E: pass", "io is above rewards"),
        ("rlalign.losses", "from rlalign import pack", "name the module"),
        ("rlalign.losses", "from .advantages import x", "relative import"),
        ("rlalign.losses", "import flax", "the core imports jax, numpy and the kernels only"),
        ("rlalign.losses", "from rlalign.compat import x\nimport functools, jax.numpy", None),
        ("rlalign.newcomer", "import jax", "no place in TIERS"),
        ("rlalign.io.config", "import tyro", "only experiments and benchmarks import tyro"),
        ("experiments.quickstart", "import tyro\nimport rlalign as ra", None),
        ("benchmarks.update", "import experiments.quickstart", "nothing imports experiments"),
        ("rlalign_kernels.attention.xla", "import numpy", "kernels import jax only"),
        ("rlalign_kernels.attention.xla", "from rlalign.types import x", "kernels import jax only"),
        ("rlalign_kernels.attention.xla", "import functools, jax.numpy", None),
        ("rlalign.types", "if TYPE_CHECKING:\n    from rlalign.io import loop", None),
    ],
)
def test_the_import_rules_themselves(module, source, reason):
    found = [complaint(module, target) for target in imports(ast.parse(source))]
    assert (reason is None) == (not any(found))
    assert reason is None or any(reason in text for text in found if text)


@pytest.mark.parametrize(
    "modules", ["rlalign", "rlalign.types", "rlalign.envs.sums", "rlalign.rewards.tasks", "rlalign.rewards.clinical"]
)
def test_reward_workers_need_not_wait_for_jax(modules):
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def definitions(tree):
    return {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def undocumented(module, tree):
    return [
        f"{module}.{name}"
        for name, node in definitions(tree).items()
        if not name.startswith("_") and not ast.get_docstring(node)
    ]


def test_every_public_name_of_the_core_has_a_docstring():
    trees = sources("rlalign")
    missing = [m for m in CORE if not ast.get_docstring(trees[f"rlalign.{m}"])]
    missing += [name for m in CORE for name in undocumented(m, trees[f"rlalign.{m}"])]
    assert not missing, missing
    probe = ast.parse("class A:\n    pass\ndef f(): ...\ndef _g(): ...\ndef h():\n    'text'")
    assert undocumented("m", probe) == ["m.A", "m.f"]


def defined(name, module, trees):
    """The definition behind `from module import name`, through packages that hand it on; None for plain values."""
    found = definitions(trees[module]).get(name)
    if found is None:
        for node in trees[module].body:
            if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
                return defined(name, node.module, trees)
    return found


def test_the_index_names_what_exists_and_documents_it():
    trees = sources("rlalign")
    written = ast.get_docstring(trees["rlalign"])
    assert written
    for name, home in rlalign._HOME.items():
        value, node = getattr(rlalign, name), defined(name, home, trees)
        assert value is getattr(importlib.import_module(home), name)
        assert (node is None) == (not callable(value)), name
        assert node is None or ast.get_docstring(node), f"{home}.{name} has no docstring"


def test_the_index_agrees_with_its_imports_for_type_checkers():
    tree = sources("rlalign")["rlalign"]
    (block,) = [node for node in tree.body if is_type_checking(node)]
    shown = {alias.name: node.module for node in block.body for alias in node.names}
    assert shown == rlalign._HOME
    assert sorted(rlalign.__all__) == sorted(shown)
    assert set(shown) <= set(dir(rlalign))


def test_unknown_names_of_the_index_are_attribute_errors():
    with pytest.raises(AttributeError, match=r"^module 'rlalign' has no attribute 'Trainer'$"):
        rlalign.Trainer  # noqa: B018
    assert rlalign.losses is importlib.import_module("rlalign.losses")


class Fixed:
    """The signatures that people outside the repository call. Keywords with defaults may be added, nothing else."""

    class types:
        def TokenForest(token, position, parent, visible_until): ...
        def Packed(forest, node, mask): ...
        def Batch(packed, advantage=None, old_logp=None, ref_logp=None, weight=None, pair=None): ...
        def Rollouts(tokens, mask, logp, behaviour_logp, stop, prompt): ...
        def TrainState(params, opt_state, step, skipped): ...

    class forest:
        def pack(
            sequences,
            *,
            row_length,
            response_start=None,
            loss_mask=None,
            unit=None,
            parts=1,
            num_rows=None,
            response_length=None,
        ): ...
        def split(packed, parts): ...

    class advantages:
        def group_relative(reward, group, *, num_groups, valid=None, scale="std", ddof=1, eps=1e-6): ...
        def leave_one_out(reward, group, *, num_groups, valid=None): ...
        def group_preference(reward, group, *, num_groups, valid=None, weight=None): ...
        def discounted_return(reward, trajectory, step, *, gamma, valid=None): ...
        def group_in_group(
            reward,
            *,
            group,
            trajectory,
            step,
            anchor,
            num_groups,
            gamma=0.95,
            step_weight=1.0,
            scale="std",
            episode_stat="trajectory",
            valid=None,
            penalty=None,
            eps=1e-6,
        ): ...
        def anchor_ids(anchors, group, *, similarity=None): ...

    class losses:
        def policy_gradient(
            logp,
            old_logp,
            advantage,
            mask,
            *,
            weight=None,
            clip="ppo",
            clip_low=0.2,
            clip_high=0.2,
            dual_clip=None,
            ratio="token",
            aggregate="token",
            max_length=None,
            denominator=None,
        ): ...
        def kl_estimate(logp, ref_logp, mask, *, kind="k1"): ...
        def density_ratio(
            logratio_real,
            logratio_generated,
            *,
            valid=None,
            link="bernoulli",
            scale=1.0,
            shift=0.0,
            max_logit=math.inf,
        ): ...
        def spin(logratio_real, logratio_generated, *, scale, valid=None): ...

    class logprobs:
        def token_logprobs(hidden, head, forest, node, *, temperature=1.0, softcap=None, allowed=None, chunk=None): ...

    class models:
        def load_pretrained(folder, *, dtype=None, mesh=None): ...
        def logits(decoder, params, forest): ...

    class rollout:
        def sample(decoder, params, prompts, *, seed, step, config, prompt_ids=None): ...

    class train:
        def init_state(decoder, params, optimizer): ...
        def make_train_step(decoder, algorithm, optimizer, *, mesh=None, microbatches=1, axis_name=None): ...


class Kernels:
    def forest_attention(
        q, k, v, visible_until, *, backend=None, scale=None, position=None, window=None, softcap=None
    ): ...


class Methods:
    def init(self, seed): ...
    def apply(self, params, forest): ...
    def head(self, params): ...


def stubs(holder):
    return {name: value for name, value in vars(holder).items() if not name.startswith("__")}


def departure(fixed, actual):
    """How a signature departs from the fixed one; None if it does not."""
    fixed, actual = inspect.signature(fixed).parameters, inspect.signature(actual).parameters
    positional = [p for p in fixed.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    for want, got in zip(positional, actual.values(), strict=False):
        if (want.name, want.default, want.kind) != (got.name, got.default, got.kind):
            return f"{got} stands where {want} should"
    for name, want in fixed.items():
        if name not in actual or (want.default, want.kind) != (actual[name].default, actual[name].kind):
            return f"{want} is {actual.get(name, 'missing')}"
    needed = [p.name for p in actual.values() if p.name not in fixed and p.default is p.empty]
    return f"{needed} must have defaults" if needed else None


FIXED = [
    *(
        (f"rlalign.{module}", name, stub)
        for module, holder in stubs(Fixed).items()
        for name, stub in stubs(holder).items()
    ),
    *(("rlalign_kernels", name, stub) for name, stub in stubs(Kernels).items()),
]


@pytest.mark.parametrize(("module", "name", "stub"), FIXED, ids=lambda x: x if isinstance(x, str) else "")
def test_fixed_signatures(module, name, stub):
    assert departure(stub, getattr(importlib.import_module(module), name)) is None


def test_fixed_methods_and_fields():
    decoder = importlib.import_module("rlalign.models").Decoder
    for name, stub in stubs(Methods).items():
        assert departure(stub, getattr(decoder, name)) is None
    assert next(iter(inspect.signature(decoder).parameters)) == "config"
    fields = inspect.signature(importlib.import_module("rlalign.algorithms").Algorithm).parameters
    assert {"advantage", "loss", "kl_coef", "entropy_coef", "temperature"} <= set(fields)
    settings = inspect.signature(importlib.import_module("rlalign.rollout").SampleConfig).parameters
    defaults = {"temperature": 1.0, "top_k": None, "top_p": None, "greedy": False}
    assert {k: settings[k].default for k in defaults} == defaults
    needed = {k for k, p in settings.items() if p.default is p.empty}
    assert needed == {"num_samples", "max_new_tokens", "eos_ids"}


def test_the_comparison_of_signatures_itself():
    fixed = lambda a, b=1, *, c, d=None: None
    assert departure(fixed, lambda a, b=1, *, c, d=None, e=2: None) is None
    for other in (
        lambda a, c, b=1, *, d=None: None,
        lambda a, b=2, *, c, d=None: None,
        lambda a, b=1, *, d=None: None,
        lambda a, b=1, *, c, d=0: None,
        lambda a, b=1, *, c, e, d=None: None,
        lambda b, a=1, *, c, d=None: None,
        lambda a, b=1, c=None, d=None: None,
    ):
        assert departure(fixed, other)


def test_kernels_is_a_source_root_and_no_package(tmp_path):
    """transformers imports a package of that name; any real one must win over our folder, which runs nothing."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT / "kernels")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    path = [str(ROOT), str(ROOT / "kernels"), str(tmp_path)]  # theirs comes last
    found = importlib.machinery.PathFinder.find_spec("kernels", path)
    assert Path(found.origin) == tmp_path / "kernels" / "__init__.py"
    inner = {p.name for p in (ROOT / "kernels").iterdir() if p.is_dir() and not p.name.startswith((".", "__"))}
    assert inner == {"rlalign_kernels"}


FORBIDDEN = {"eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"}


def forbidden(tree):
    """Calls that would run what a file holds, and imports of the modules that do."""
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [name for name in imports(tree) if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "torch")]
    risky = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code")
    ]
    return sorted({*calls} & FORBIDDEN) + names + [r for r in risky if not r.endswith("=False")]


def test_nothing_that_is_read_is_executed():
    found = {module: forbidden(tree) for module, tree in sources("rlalign", "kernels").items()}
    assert not {module: names for module, names in found.items() if names}
    probe = "import pickle\neval('1')\nnp.load(f, allow_pickle=True)\njax.eval_shape(f)\nnp.load(f, allow_pickle=False)"
    assert forbidden(ast.parse(probe)) == ["eval", "pickle", "allow_pickle=True"]


# Where what a user's function raises costs its item alone; workers are processes of their own.
GUARDS = {"rlalign.rewards.items", "rlalign.rewards.worker", "rlalign.envs.worlds", "rlalign.envs.worker"}


def swallowing(tree):
    """Handlers of every exception, interrupts included or not, that do not raise again; suppress() of those too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = "BaseException" if node.type is None else ast.unparse(node.type)
            again = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            if not again and {"Exception", "BaseException", "KeyboardInterrupt"} & set(caught.strip("()").split(", ")):
                found.append(caught)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            found += [name for name in map(ast.unparse, node.args) if name in ("Exception", "BaseException")]
    return found


def test_nothing_but_the_guards_swallows_every_exception():
    found = {module: swallowing(tree) for module, tree in sources("rlalign", "kernels").items()}
    assert {module for module, caught in found.items() if caught} <= GUARDS
    interrupts = {module for module, caught in found.items() if {"BaseException", "KeyboardInterrupt"} & set(caught)}
    assert interrupts <= {"rlalign.rewards.worker", "rlalign.envs.worker"}
    probe = "try: f()\nexcept: pass\ntry: f()\nexcept (OSError, Exception): pass\ntry: f()\nexcept Exception: raise"
    assert swallowing(ast.parse(probe)) == ["BaseException", "(OSError, Exception)"]


@pytest.mark.parametrize("name", [*CORE, *DOCTESTED])
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"rlalign.{name}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
    if name in ("checks", "forest", "advantages.groups", "advantages.anchors", "advantages.steps", "advantages.tokens"):
        assert result.attempted > 0
