"""A Hugging Face folder to a decoder and its parameters: config.json and safetensors, read tensor by tensor.

Names, shapes and dtypes of the whole folder are checked before the first tensor is read. Then each leaf of the
parameters is filled layer by layer and handed to JAX before the next begins: a CPU takes the leaf over as it
is, and before other devices the host never holds more than two leaves, one of them empty yet.
"""

import contextlib
import json
import math
import mmap
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from rlalign.models.config import ModelConfig
from rlalign.models.decoder import Decoder
from rlalign.models.families import from_hugging_face
from rlalign.models.leaves import (
    Leaf,
    embedding_and_head,
    from_stored,
    leaves,
    options,
    stored_shape,
    stored_view,
    tensor_names,
    used_shape,
)
from rlalign.types import Params

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_AGAIN = "download the folder again"
_STRIP, _COLUMNS, _PAD = 512, 64, 16  # rows read at once, columns turned at once, columns between rows
# Written by old releases of transformers; config.json says the same.
_IGNORED = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
_STORED = ("F32", "BF16", "F16", "F64")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def load_pretrained(
    folder: str | Path, *, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[Decoder, Params]:
    """The decoder and the parameters of a Hugging Face folder: config.json and *.safetensors.

    Args:
      folder: a local folder with config.json and model.safetensors, or model.safetensors.index.json and its shards.
      dtype: of parameters and activations: "float32", "bfloat16" or "float64"; None takes config.json's.
      mesh: where to put the parameters, sharded; None leaves them on the default device.

    Returns:
      Decoder of the folder's config, and its params: a nested dict as `leaves.py` spells it, layers stacked on axis 0.

    Raises:
      FileNotFoundError: no folder, config.json, weights or shard.
      ValueError: a config.json that is not supported; pickled weights; a truncated file; tensors that are missing,
        unexpected, twice there, of another shape or not finite. The text names file, tensor and remedy.
    """
    folder = Path(folder)
    config = load_config(folder, dtype=dtype)
    if config.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError("dtype='float64' needs 64-bit JAX: set JAX_ENABLE_X64=1")
    wanted = leaves(config)
    params: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        tensors = _Tensors(folder, stack)
        _check_tensors(tensors, wanted, config)
        stored = jnp.dtype(config.dtype)
        shapes = [(len(tensor_names(leaf, config)), *used_shape(leaf, config)) for leaf in wanted.values()]
        # The pages of the next leaf are touched while this one is read: that is half of the time.
        pool = stack.enter_context(ThreadPoolExecutor(1))
        memory = [pool.submit(_fresh, shapes[0], stored)]
        for (path, leaf), following in zip(wanted.items(), [*shapes[1:], None], strict=True):
            out = memory.pop().result()
            if following is not None:
                memory.append(pool.submit(_fresh, following, stored))
            *parents, last = path.split("/")
            node = params
            for name in parents:
                node = node.setdefault(name, {})
            node[last] = _place(path, _read_leaf(tensors, leaf, config, out), mesh)
    return Decoder(config), params


def load_config(folder: str | Path, *, dtype: str | None = None) -> ModelConfig:
    """What config.json of a Hugging Face folder says; needs no weights.

    Raises:
      FileNotFoundError, ValueError: as load_pretrained.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; download the model first: rlalign.models.download(NAME, DIR)"
        )
    return from_hugging_face(_read_json(folder / "config.json"), dtype=dtype)


def _place(path: str, value: np.ndarray, mesh: jax.sharding.Mesh | None) -> jax.Array:
    """One leaf on the devices; the mesh's rules see it under its path."""
    if mesh is None:
        return jax.device_put(value, may_alias=True)
    from rlalign.train.mesh import place_params  # here, because mesh.py imports the decoder

    tree: Any = value
    for name in reversed(path.split("/")):
        tree = {name: tree}
    return jax.tree.leaves(jax.block_until_ready(place_params(tree, mesh)))[0]


class _Tensors:
    """The tensors of a folder by name, whatever file they lie in."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        files, index = _weight_files(folder)
        self.folder = folder
        self.file: dict[str, str] = {}
        self._handle = {file: _open(folder / file, stack) for file in files}
        for file, handle in self._handle.items():
            for name in handle.keys():  # noqa: SIM118, a handle is no dict
                if name in self.file:
                    raise ValueError(f"{folder}: tensor {name!r} lies in {self.file[name]} and in {file}; {_AGAIN}")
                self.file[name] = file
        if index is not None:
            _check_index(folder / _INDEX, index, self.file)

    def where(self, name: str) -> str:
        return f"{self.folder / self.file[name]}: tensor {name!r}"

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle[self.file[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        return self._handle[self.file[name]].get_slice(name).get_dtype()

    def rows(self, name: str) -> Any:
        """What gives rows of a tensor as they are asked for: rows[start:stop]."""
        return self._handle[self.file[name]].get_slice(name)

    def read(self, name: str) -> np.ndarray:
        return self._handle[self.file[name]].get_tensor(name)


def _check_index(path: Path, index: Mapping[str, str], found: Mapping[str, str]) -> None:
    for name in sorted(index.keys() | found.keys()):
        if index.get(name) != found.get(name):
            raise ValueError(
                f"{path} places tensor {name!r} in {index.get(name, 'no file')}, but it lies in "
                f"{found.get(name, 'no file')}; {_AGAIN}"
            )


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the safetensors files, and the index's {tensor: file} if there is one."""
    single, index = ((folder / name).exists() for name in (_SINGLE, _INDEX))
    if single and index:
        raise ValueError(f"{folder} holds both {_SINGLE} and {_INDEX}; remove the one that does not belong")
    if single:
        return [_SINGLE], None
    if not index:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise ValueError(
                f"{folder} holds pickled weights only ({', '.join(pickles)}), and reading a pickle runs its code; "
                "where you trust the file and have torch, convert it with "
                "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
            )
        raise FileNotFoundError(f"{folder} holds neither {_SINGLE} nor {_INDEX}; {_AGAIN}")
    weight_map = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / _INDEX} has no 'weight_map'; {_AGAIN}")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{folder / _INDEX}: {file!r} is not the name of a file in the folder; {_AGAIN}")
    return sorted(set(weight_map.values())), weight_map


def _open(path: Path, stack: contextlib.ExitStack) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {_AGAIN}")
    try:
        return stack.enter_context(safe_open(path, framework="numpy"))
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file at all, such as a Git LFS pointer ({error}); {_AGAIN}"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {_AGAIN}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise ValueError(f"{path} is not JSON ({error}); {_AGAIN}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object; {_AGAIN}")
    return value


def _check_tensors(tensors: _Tensors, there: Mapping[str, Leaf], config: ModelConfig) -> None:
    """Each tensor that the config calls for is there, in its shape, and none besides."""
    wanted = set()
    for leaf in there.values():
        stored = stored_shape(leaf, config)
        for name in tensor_names(leaf, config):
            wanted.add(name)
            if name not in tensors.file:
                raise ValueError(
                    f"{tensors.folder}: tensor {name!r} is missing from {', '.join(sorted(set(tensors.file.values())))}"
                    f"; complete the download, or correct config.json if the model has none"
                )
            if tensors.dtype(name) not in _STORED:
                raise ValueError(
                    f"{tensors.where(name)} is stored as {tensors.dtype(name)}; rlalign reads {', '.join(_STORED)}: "
                    "use the unquantized checkpoint"
                )
            if tensors.shape(name) != stored:
                raise ValueError(
                    f"{tensors.where(name)} has shape {list(tensors.shape(name))}, config.json says {list(stored)}; "
                    "the two do not belong together: download the folder again or correct config.json"
                )
    for name in sorted(tensors.file.keys() - wanted):
        if name.endswith(_IGNORED):
            continue
        embedding, head = embedding_and_head(config)
        if name == head and config.tied_head:
            _check_tied(tensors, embedding, head)
            continue
        raise ValueError(
            f"{tensors.where(name)} is not part of the model that config.json describes ({config.layers} layers"
            f"{''.join(f', {option}={value}' for option, value in options(config).items())}); correct config.json"
        )


def _check_tied(tensors: _Tensors, embedding: str, head: str) -> None:
    """A tied checkpoint may store the head as well, if it is the embedding."""
    if not np.array_equal(tensors.read(head), tensors.read(embedding)):
        raise ValueError(
            f"{tensors.where(head)} differs from the embedding, though config.json says tie_word_embeddings; set that "
            "to false to use it"
        )


def _read_leaf(tensors: _Tensors, leaf: Leaf, config: ModelConfig, out: np.ndarray) -> np.ndarray:
    """`out` filled with one leaf, its layers on axis 0."""
    names = tensor_names(leaf, config)

    def fill(row: np.ndarray, name: str) -> None:
        target, source = stored_view(leaf, config, row), tensors.rows(name)
        if target is None or target.ndim == 1:  # one of three leaves in a tensor, or a short one
            whole = from_stored(leaf, config, tensors.read(name))
            target, source = (x[None] if x.ndim == 1 else x for x in (row, whole))
        # Through memory that was used before, its rows beside a power of two: otherwise those of a strip that is turned
        # meet in the same lines of the cache.
        strip = np.empty((min(_STRIP, len(target)), *target.shape[1:-1], target.shape[-1] + _PAD), out.dtype)
        for start in range(0, len(target), _STRIP):
            part = strip[: min(_STRIP, len(target) - start), ..., : target.shape[-1]]
            with np.errstate(over="ignore"):  # what overflows is infinite, and named below
                np.copyto(part, source[start : start + len(part)], casting="unsafe")
            if not _finite(part):
                raise ValueError(f"{tensors.where(name)} holds NaN or infinity; {_AGAIN}")
            _move(target[start : start + len(part)], part)

    for row, name in zip(out, names, strict=True):
        fill(row, name)
    return out if "{}" in leaf.tensor else out[0]


def _fresh(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros whose pages are there already, at the beginning of one: a CPU's JAX takes them over in place of copying.

    NumPy would ask for huge pages, whose first touch takes seven times as long on some virtual machines.
    """
    memory = np.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), np.uint8)
    memory[:: mmap.PAGESIZE] = 0
    return memory.view(dtype).reshape(shape)


def _move(target: np.ndarray, part: np.ndarray) -> None:
    """target[...] = part, of its dtype, a few columns at a time: where it is turned, rows of few pages are written."""
    target, part = (x.view(f"u{x.itemsize}") for x in (target, part))  # integers: NumPy moves them faster than bfloat16
    columns = part.shape[-1] if target.strides[-1] == target.itemsize else _COLUMNS
    for start in range(0, part.shape[-1], columns):
        np.copyto(target[..., start : start + columns], part[..., start : start + columns])


def _finite(x: np.ndarray) -> bool:
    if x.dtype != jnp.bfloat16:
        return bool(np.isfinite(x).all())
    # By its bits, ten times as fast: infinity and NaN are the largest of either sign.
    return x.view(np.int16).max() < 0x7F80 and x.view(np.uint16).max() < 0xFF80
