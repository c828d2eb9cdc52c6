"""What makes a run this run, besides its settings: compared when it is continued, and between its processes."""

import dataclasses
import functools
import hashlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlalign.algorithms import Algorithm
from rlalign.io.files import fingerprint
from rlalign.io.mixture import Mixture
from rlalign.models.decoder import Decoder
from rlalign.models.lora import frozen, without_lora
from rlalign.models.tokenizer import Tokenizer
from rlalign.train.score import Judge
from rlalign.types import Params, Prompt


def run_identity(
    decoder: Decoder, algorithm: Algorithm, params: Params, prompts: Sequence[Prompt], judge: Any
) -> dict[str, Any]:
    """Plain values of everything that a checkpoint does not hold and the numbers depend on."""
    # The reference, the model under an adapter.
    fixed = algorithm.needs_reference or frozen(params)
    settings = {f.name: getattr(algorithm, f.name) for f in dataclasses.fields(algorithm) if f.name != "about"}
    return {
        "decoder": dataclasses.asdict(decoder.config),
        "algorithm_settings": {name: plain(value) for name, value in settings.items()},
        "reference_sha256": fingerprint(without_lora(params)) if fixed else None,
        "prompts_sha256": _tokens(prompts),
        "mixture": prompts.recipe() if isinstance(prompts, Mixture) else None,
        "judge": plain(judge),
    }


def everywhere(prompts: Sequence[Prompt], eval_prompts: Sequence[Prompt], mesh: Mesh | None) -> dict[str, Any]:
    """What the processes of a run must agree on besides that, though a run that is continued may change it."""
    named = repr([(int(p.id), p.text) for p in (*prompts, *eval_prompts) if isinstance(p, Prompt)])
    return {
        "prompt_ids_sha256": hashlib.sha256(named.encode()).hexdigest(),
        "eval_prompts_sha256": _tokens(eval_prompts),
        "mesh": None if mesh is None else dict(mesh.shape),
        "reward_workers": None,  # each host may have its own number
    }


def _tokens(prompts: Sequence[Prompt]) -> str:
    tokens = hashlib.sha256()
    for p in prompts:
        tokens.update(np.asarray(p, np.int64).tobytes() + b"|")
    return tokens.hexdigest()


def plain(value: Any) -> Any:
    """Functions by name, arrays by value, dataclasses by the fields that they compare; else its type."""
    if isinstance(value, Judge):
        known = {"decoder": dataclasses.asdict(value.decoder.config), "row_length": value.row_length}
        return known | {"reward_model_sha256": fingerprint(value.params), "encode": plain(value.encode)}
    if isinstance(value, Tokenizer):
        return {"tokenizer_sha256": value.sha256()}
    if isinstance(value, types.MethodType):
        return {"function": value.__qualname__, "of": plain(value.__self__)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, functools.partial):
        named = {name: plain(given) for name, given in value.keywords.items()}
        return {"function": plain(value.func), "arguments": [plain(given) for given in value.args], **named}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return np.asarray(value).tolist() if value.size <= 64 else fingerprint(value)
    if dataclasses.is_dataclass(value):
        return {"type": type(value).__qualname__} | {
            f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare
        }
    if not hasattr(value, "__qualname__"):
        return type(value).__qualname__
    name = f"{value.__module__}.{value.__qualname__}"
    if "<" in name and hasattr(value, "__code__"):  # a lambda or a local function: its name says too little
        name += f" {hashlib.sha256(repr(_code(value.__code__)).encode()).hexdigest()[:12]}"
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        if held:
            # Functions by name alone: they may hold themselves.
            named = lambda x: x.__qualname__ if isinstance(x, types.FunctionType) else plain(x)
            return {"function": name, "holds": [named(x) for x in held]}
    return name


def _code(code: types.CodeType) -> tuple:
    """What a function does, without the addresses that the code inside it has in its repr."""
    return code.co_code, code.co_names, [_code(x) if isinstance(x, types.CodeType) else x for x in code.co_consts]
