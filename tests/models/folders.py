"""Tiny Hugging Face folders whose weights follow from a seed, for the recorder and for the tests."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FIXTURES = Path(__file__).parent / "fixtures"


def weights(seed: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """f32 tensors in (-0.3, 0.3), norms about 1. Raw PCG64 words: NumPy promises that stream for all its versions."""
    stream, out = np.random.PCG64(seed), {}
    for name in sorted(shapes):
        words = np.asarray(stream.random_raw(int(np.prod(shapes[name]))), np.uint64)
        value = ((words >> np.uint64(48)).astype(np.float32) / 2**16 - 0.5) * 0.6
        out[name] = (value + ("norm" in name and name.endswith("weight"))).astype(np.float32).reshape(shapes[name])
    return out


def write_folder(folder: Path, config: Mapping, tensors: Mapping[str, np.ndarray], *, shards: int = 1) -> Path:
    """config.json and the tensors, in one file or in an index and its shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    parts = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in parts.items() for name in members}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
