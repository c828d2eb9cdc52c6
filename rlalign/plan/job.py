"""What a plan is about: a run, its model, its mesh and its longest prompt, read from a file.

    pretrained = "path/to/Qwen2.5-7B-Instruct" # a Hugging Face folder: of it config.json alone is read
    prompt_length = 1024                       # tokens of the longest prompt
    steps = 1000                               # and every other field of RunConfig, with tables
    sampling = { num_samples = 8, ... }        # sampling and optimizer
    [mesh]
    fsdp = 16
    [decoder]                                  # fields of ModelConfig that replace the folder's, or, without one, all
    remat = "full"
    [judge]                                    # a reward model on the same mesh: pretrained, decoder or both, likewise
    pretrained = "path/to/a/sequence/classifier"

TOML or JSON; the config.json that `fit` leaves in a run's folder is one too, but for the mesh and the prompt_length.
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
import numpy as np
from jax.sharding import AbstractMesh

from rlalign.algorithms import ALGORITHMS, Algorithm
from rlalign.bins import assign_rows
from rlalign.forest import bucket
from rlalign.io.config import RunConfig
from rlalign.io.runner import check_run, resolve
from rlalign.models.config import LoraConfig, ModelConfig, RopeScaling
from rlalign.models.decoder import Decoder
from rlalign.models.lora import add_lora
from rlalign.models.pretrained import load_config
from rlalign.rollout.config import SampleConfig
from rlalign.train.mesh import AXES, check_mesh
from rlalign.train.optimizer import OptimizerConfig
from rlalign.types import Params

# What `fit` writes beside a run's settings and a plan does not need.
IGNORED = ("algorithm_settings", "reference_sha256", "prompts_sha256", "mixture", "model", "device", "versions")


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that could be started.

    Args:
      run: its configuration.
      model: the policy; with model.lora, an adapter alone is trained.
      prompt_length: tokens of the longest prompt.
      data, fsdp, tensor: sizes of the mesh.
      judge: the reward model of fit(judge=make_judge(...)), if there is one.

    Raises:
      ValueError: whatever `fit` would refuse, and an empty eos_ids: responses that never end fill the longest one.
    """

    run: RunConfig
    model: ModelConfig
    prompt_length: int
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    judge: ModelConfig | None = None

    def __post_init__(self):
        for name in ("prompt_length", *AXES):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an int, at least 1")
        if not self.run.sampling.eos_ids:
            raise ValueError("sampling.eos_ids is empty: no response would ever end; name the model's end tokens")
        check_mesh(self.decoder, self.mesh)
        if self.judge is not None:
            check_mesh(Decoder(self.judge), self.mesh)
        prompt = [np.zeros(self.prompt_length, np.int32)]
        resolve(self.run, ALGORITHMS[self.run.algorithm])
        check_run(self.run, self.decoder, prompt, prompt, self.mesh)

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

    @property
    def algorithm(self) -> Algorithm:
        """As the run uses it."""
        return resolve(self.run, ALGORITHMS[self.run.algorithm])

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

    @functools.cached_property
    def rows(self) -> tuple[int, int]:
        """(rows a part, samples a part) of a batch whose prompts and responses are all of the longest."""
        run, samples = self.run, self.run.sampling.num_samples
        count, parts = run.prompts_per_step * samples, run.minibatches * run.microbatches * self.shards
        shared = np.where(np.arange(count) % samples, self.prompt_length, 0)
        length = np.full(count, self.prompt_length + run.sampling.max_new_tokens)
        found = assign_rows(length, shared, row_length=run.row_length, unit=np.arange(count), parts=parts)
        rows = max(bucket(max(map(len, found))), (run.num_rows or 0) // parts)
        most = max(sum(map(len, part)) for part in found)
        return rows, most if parts == 1 else max(bucket(most), bucket(-(-5 * count // (4 * parts))))


def read_job(path: str | Path, *, prompt_length: int | None = None, **mesh: int) -> Job:
    """The job that a file describes; a prompt_length and sizes of the mesh that are given replace the file's.

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
    if prompt_length is None:
        raise ValueError(f"{path}: prompt_length is missing: the tokens of the longest prompt (or --prompt-length)")
    model = _model(path, folder, _table(values, "decoder", path), "decoder")
    judge = _judge(path, values.pop("judge", None))
    run = _build(RunConfig, {"folder": "runs/planned", **values}, str(path))
    return Job(run, model, prompt_length, **sizes, judge=judge)


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
