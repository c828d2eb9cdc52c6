"""What a plan is about: a run, its model, its mesh and its longest prompt, read from a file.

    pretrained = "path/to/Qwen2.5-7B-Instruct" # a Hugging Face folder: of it config.json alone is read
    prompt_length = 1024                       # tokens of the longest prompt
    prompts_per_step = 64                      # and every other field of RunConfig, with tables
    sampling = { num_samples = 8, ... }        # sampling and optimizer
    [mesh]
    fsdp = 16
    [decoder]                                  # fields of ModelConfig that replace the folder's, or, without one, all
    remat = "full"
    [judge]                                    # a reward model on the same mesh: pretrained, decoder or both, likewise
    pretrained = "path/to/a/sequence/classifier"

A file with examples_per_step, which OfflineConfig requires and RunConfig lacks, in place of prompts_per_step is a run
of fit_offline:

    examples_per_step = 128                    # and every other field of OfflineConfig, with tables generation and
    response_length = 512                      # optimizer; tokens of the examples' longest response, which may be left
                                               # out where generation is given and none is longer than max_new_tokens

A file with tasks_per_step is a run of fit_agent:

    tasks_per_step = 16                        # and every other field of AgentConfig, with tables optimizer and
    [episodes]                                 # episodes, in it sampling; prompts are of its max_prompt
    copies = 8

TOML or JSON; the config.json that any of them leaves in a run's folder is one too, but for the mesh and the lengths.
"""

import dataclasses
import difflib
import functools
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import jax
from jax.sharding import AbstractMesh

from rlalign.envs.episodes import Episodes
from rlalign.io.config import AgentConfig, OfflineConfig, RunConfig
from rlalign.models.config import LoraConfig, ModelConfig, RopeScaling
from rlalign.models.decoder import Decoder
from rlalign.models.lora import add_lora
from rlalign.models.pretrained import load_config
from rlalign.plan.workload import Workload, of_fit, of_fit_agent, of_fit_offline
from rlalign.rollout.config import SampleConfig
from rlalign.train.mesh import AXES, check_mesh
from rlalign.train.optimizer import OptimizerConfig
from rlalign.types import Params

# What a run writes beside its settings and a plan does not need.
IGNORED = ("algorithm_settings", "reference_sha256", "prompts_sha256", "examples_sha256", "mixture", "decode", "reward")
IGNORED += ("eval_seeds", "worlds", "model", "device", "versions")


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that could be started.

    Args:
      run: its configuration: RunConfig of fit, OfflineConfig of fit_offline, AgentConfig of fit_agent.
      model: the policy, or a reward model that is trained; with model.lora, an adapter alone is.
      prompt_length: tokens of the longest prompt.
      data, fsdp, tensor: sizes of the mesh.
      judge: the reward model of fit(judge=make_judge(...)), if there is one.
      response_length: of fit_offline, tokens of the examples' longest response; None for generation.max_new_tokens.

    Raises:
      ValueError: whatever the run would refuse, an empty eos_ids (responses that never end fill the longest one), and
        a judge or response_length where there can be none.
    """

    run: RunConfig | OfflineConfig | AgentConfig
    model: ModelConfig
    prompt_length: int
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    judge: ModelConfig | None = None
    response_length: int | None = None

    def __post_init__(self):
        lengths = ("prompt_length",) if self.response_length is None else ("prompt_length", "response_length")
        for name in (*lengths, *AXES):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an int, at least 1")
        check_mesh(self.decoder, self.mesh)
        if self.judge is not None:
            check_mesh(Decoder(self.judge), self.mesh)
        _ = self.load

    @functools.cached_property
    def load(self) -> Workload:
        """What the run gives to its programs."""
        if isinstance(self.run, RunConfig):
            if self.response_length is not None:
                raise ValueError(
                    f"response_length={self.response_length} is for runs of fit_offline: the responses of fit are of "
                    "sampling.max_new_tokens; leave it out"
                )
            return of_fit(self.run, self.decoder, self.prompt_length, self.mesh, judged=self.judge is not None)
        if self.judge is not None:
            raise ValueError("judge is for runs of fit: the rewards of others come from elsewhere; leave it out")
        if isinstance(self.run, AgentConfig):
            longest = self.run.episodes.max_prompt
            if self.response_length is not None or self.prompt_length != longest:
                raise ValueError(
                    f"prompt_length={self.prompt_length} and response_length={self.response_length} of a run of "
                    f"fit_agent: its prompts are of episodes.max_prompt={longest}, its answers of max_new_tokens; "
                    "leave both out"
                )
            return of_fit_agent(self.run, self.decoder, self.prompt_length, self.mesh)
        return of_fit_offline(self.run, self.decoder, self.prompt_length, self.response_length, self.mesh)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Of the axes data, fsdp, tensor."""
        return self.data, self.fsdp, self.tensor

    @property
    def devices(self) -> int:
        """Of the whole mesh."""
        return self.data * self.fsdp * self.tensor

    @property
    def mesh(self) -> AbstractMesh:
        """The mesh without devices."""
        return AbstractMesh(self.sizes, AXES)

    @property
    def decoder(self) -> Decoder:
        """The model."""
        return Decoder(self.model)

    @functools.cached_property
    def params(self) -> Params:
        """Shapes of the parameters, an adapter's too."""
        plain = Decoder(dataclasses.replace(self.model, lora=None))
        params = jax.eval_shape(plain.init, 0)
        if self.model.lora is None:
            return params
        lora = self.model.lora
        return jax.eval_shape(lambda p: add_lora(plain, p, lora)[1], params)

    @property
    def shards(self) -> int:
        """Devices over which rows and prompts are cut."""
        return self.data * self.fsdp

    def rows(self, phase: str) -> int:
        """Rows that a device sees at a time in a phase over rows."""
        work = self.load.phases[phase]
        rows = work.rows(self.run.row_length, self.shards)
        return rows if phase == "update" else rows * work.parts


def read_job(
    path: str | Path, *, prompt_length: int | None = None, response_length: int | None = None, **mesh: int
) -> Job:
    """The job that a file describes; lengths and sizes of the mesh that are given replace the file's.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no TOML or JSON, a setting that nothing knows, one that is missing, or what Job refuses.
    """
    values = _parse(Path(path))
    values = {name: value for name, value in values.items() if name not in IGNORED}
    sizes = {**_table(values, "mesh", path), **mesh}
    unknown = set(sizes) - set(AXES)
    if unknown:
        raise ValueError(f"{path}: mesh has {min(unknown)!r}; its axes are {', '.join(AXES)}")
    written, folder = values.pop("prompt_length", None), values.pop("pretrained", None)
    prompt_length = written if prompt_length is None else prompt_length
    written = values.pop("response_length", None)
    response_length = written if response_length is None else response_length
    model = _model(path, folder, _table(values, "decoder", path), "decoder")
    judge = _judge(path, values.pop("judge", None))
    run = _build(_kind(values, path), {"folder": "runs/planned", **values}, str(path))
    if prompt_length is None and isinstance(run, AgentConfig):
        prompt_length = run.episodes.max_prompt
    if prompt_length is None:
        raise ValueError(f"{path}: prompt_length is missing: the tokens of the longest prompt (or --prompt-length)")
    return Job(run, model, prompt_length, **sizes, judge=judge, response_length=response_length)


# A setting that one loop requires and the others lack -> its name and configuration.
LOOPS = {
    "prompts_per_step": ("fit", RunConfig),
    "examples_per_step": ("fit_offline", OfflineConfig),
    "tasks_per_step": ("fit_agent", AgentConfig),
}


def _kind(values: Mapping[str, Any], path: str | Path) -> type[RunConfig] | type[OfflineConfig] | type[AgentConfig]:
    """Which loop's settings these are."""
    named = [name for name in LOOPS if name in values]
    if len(named) != 1:
        known = ", ".join(f"{name} (a run of {loop})" for name, (loop, _) in LOOPS.items())
        raise ValueError(f"{path} has {' and '.join(named) or 'none'} of {known}: give one of them")
    return LOOPS[named[0]][1]


def _model(path: str | Path, folder: Any, changes: Mapping[str, Any], where: str) -> ModelConfig:
    """Of a folder's config.json, changed, or of the changes alone."""
    if not isinstance(folder, str | None):
        raise ValueError(f"{path}: pretrained={folder!r} must be the path of a Hugging Face folder")
    known = {} if folder is None else dataclasses.asdict(load_config(Path(path).parent / folder))
    return _build(ModelConfig, {**known, **changes}, f"{path}: {where}")


def _judge(path: str | Path, values: Any) -> ModelConfig | None:
    """The reward model of a plan's table, or of what `fit` wrote about its judge; None for a judge that is none."""
    if not isinstance(values, Mapping) or not {"pretrained", "decoder"} & set(values):
        return None
    changes = _table(dict(values), "decoder", path)
    return _model(path, values.get("pretrained"), {**changes, "reward_head": True}, "judge")


def _parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: a plan begins with a TOML or JSON file, see experiments/plans")
    text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a JSON {type(values).__name__}, not an object")
    return values


def _table(values: dict[str, Any], name: str, path: str | Path) -> dict[str, Any]:
    """The table `name`, taken out of `values`; {} if there is none."""
    table = values.pop(name, {})
    if not isinstance(table, Mapping):
        raise ValueError(f"{path}: {name} is {table!r}, not a table")
    return dict(table)


# Fields that are dataclasses themselves.
_NESTED = {
    "sampling": SampleConfig,
    "generation": SampleConfig,
    "episodes": Episodes,
    "optimizer": OptimizerConfig,
    "rope_scaling": RopeScaling,
    "lora": LoraConfig,
}


_PLAIN = (int, float, str, bool, type(None))


def _is(value: Any, kind: type) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


def _build(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """A configuration from plain values; names what it does not know and what is missing."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = [name for name in values if name not in fields]
    if unknown:
        near = difflib.get_close_matches(unknown[0], fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(fields)}"
        raise ValueError(f"{where}: {kind.__name__} has no setting {unknown[0]!r}; {hint}")
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(f"{where}: {missing[0]} of {kind.__name__} is missing")
    plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    for name, value in plain.items():
        allowed: tuple[Any, ...] = get_args(fields[name].type) or (fields[name].type,)
        if set(allowed) <= set(_PLAIN) and not any(_is(value, kind) for kind in allowed):
            known = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
            raise ValueError(f"{where}: {name}={value!r} must be {known}")
    for name, inner in _NESTED.items():
        if isinstance(plain.get(name), Mapping):
            plain[name] = _build(inner, plain[name], f"{where}: {name}")
        elif name in plain and not (plain[name] is None and fields[name].default is None):
            raise ValueError(f"{where}: {name}={plain[name]!r} must be a table of {inner.__name__}'s settings")
    try:
        return kind(**plain)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
