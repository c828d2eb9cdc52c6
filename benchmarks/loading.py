"""load_pretrained beside transformers' from_pretrained on one folder: seconds, CPU seconds and memory.

    make bench-loading                         # a folder of 4 GiB, in the environment of `make parity`, which has both
    python benchmarks/loading.py --gib 0.5 --repeats 1

The folder is a Llama of random bfloat16 weights in four files, written once to a temporary place. Both load it in
float32 and in bfloat16, in turn, each time in a process of its own, imports done, from a page cache that is warm. One
weight of every page is read afterwards: transformers leaves bfloat16 where the file is mapped. `memory` is the peak of
a process's own memory (RssAnon and RssShmem, every 10 ms) less what it held before, over the size of the weights.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LOADERS = {
    "rlalign": """
import jax, numpy as np, rlalign as ra
ra.load_pretrained, jax.devices()  # imports and the device are not what is measured
def load():
    params = ra.load_pretrained(FOLDER, dtype=DTYPE)[1]
    for x in jax.tree.leaves(params):
        np.asarray(x).reshape(-1)[::1024].copy()
    return sum(x.nbytes for x in jax.tree.leaves(params)), params
""",
    "transformers": """
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
def load():
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=getattr(torch, DTYPE))
    for x in model.parameters():
        x.data.reshape(-1)[::1024].clone()
    return sum(x.numel() * x.element_size() for x in model.parameters()), model
""",
}
MEASURE = """
import json, threading, time
def own():
    fields = dict(line.split(':') for line in open('/proc/self/status') if line.startswith('Rss'))
    return (int(fields['RssAnon'].split()[0]) + int(fields['RssShmem'].split()[0])) * 1024
before = peak = own()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.01):
        peak = max(peak, own())
watcher = threading.Thread(target=watch); watcher.start()
wall, cpu = time.perf_counter(), time.process_time()
size, kept = load()
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
done.set(); watcher.join()
peak = max(peak, own())
print(json.dumps({'seconds': wall, 'cpu_seconds': cpu, 'peak': peak - before, 'size': size}))
"""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama of about so many GiB in bfloat16."""

    gib: float

    def config(self) -> dict:
        layers = max(1, round((self.gib * 2**30 / 2 - 2 * 32000 * 2048) / (4 * 2048**2 + 3 * 2048 * 5632)))
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": layers,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }


def write(folder: Path, shape: Shape) -> int:
    """The folder, by save_pretrained; returns its bytes."""
    import jax

    import rlalign as ra
    from rlalign.models.families import from_hugging_face

    config = from_hugging_face(shape.config())
    decoder = ra.Decoder(config)
    params = jax.jit(decoder.init, static_argnums=0)(0)
    ra.save_pretrained(folder, decoder, params, shard_bytes=int(shape.gib * 2**30 / 4))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        writer = f"import sys; sys.path[:0] = {sys.path!r}; import loading; from pathlib import Path\n"
        writer += f"print(loading.write(Path({str(folder)!r}), loading.Shape({flags.gib})))"
        size = int(subprocess.run([sys.executable, "-c", writer], check=True, capture_output=True, text=True).stdout)
        for path in folder.glob("*.safetensors"):
            path.read_bytes()
        for dtype in ("bfloat16", "float32"):
            found: dict[str, list[dict]] = {name: [] for name in LOADERS}
            for _ in range(flags.repeats):
                for name, loader in LOADERS.items():
                    script = f"FOLDER, DTYPE = {str(folder)!r}, {dtype!r}\n{loader}{MEASURE}"
                    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
                    found[name].append(json.loads(said.stdout.splitlines()[-1]))
                    print(name, dtype, found[name][-1], file=sys.stderr, flush=True)
            for name, runs in found.items():
                median = lambda key, runs=runs: statistics.median(run[key] for run in runs)
                rows.append(
                    {
                        "loader": name,
                        "dtype": dtype,
                        "seconds": round(median("seconds"), 2),
                        "cpu_seconds": round(median("cpu_seconds"), 2),
                        "memory": round(median("peak") / median("size"), 3),
                    }
                )
    peak = max(row["memory"] for row in rows if row["loader"] == "rlalign")
    ours = [row for row in rows if row["loader"] == "rlalign"]
    print(
        json.dumps(
            {
                "benchmark": "loading",
                "gib": round(size / 2**30, 2),
                "seconds": ours[0]["seconds"],
                "cpu_seconds": ours[0]["cpu_seconds"],
                "peak_gib": round(peak * size / 2**30, 2),
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
