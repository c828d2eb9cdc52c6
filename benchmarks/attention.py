"""forest_attention beside the repeated batch and PyTorch, on the accelerator at hand: make bench-kernels EXTRA=cuda

    PYTHONPATH=kernels python3 benchmarks/attention.py      where jax is installed already, and PyTorch for its forms
    PYTHONPATH=kernels python3 benchmarks/attention.py --preset smoke      the whole script on a CPU, a small shape

First every form is compared on a small shape with the whole mask in float32, output and gradients. Then it is timed on
the shapes of kernels/rlalign_kernels/attention/shapes.py, forward and forward + backward: ours on the forest, ours and
cuDNN's causal attention on the batch that repeats the prompt, PyTorch's FlexAttention with the forest's mask and its
flash attention on the repeated batch. Tile lists and block masks are made before the clock starts, as a training step
makes them once for all layers. A repeated batch that does not fit is run in equal pieces, and their times are added.

Prints a Markdown table and one JSON line. TFLOP/s count the pairs of tokens that a form has to look at (4 H D a pair
forward, 14 with the backward), `share` is of the device's peak, `gain` the time of the fastest repeated form over this
one's, alpha what the pairs promise. What cannot run here is listed with its reason; the exit code is 1 if it is one of
ours, or if a result is wrong.
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory beside JAX

import forms_jax
import jax
import jax.numpy as jnp
import numpy as np
from timing import in_pieces, median_ms, peak_tflops

from rlalign_kernels.attention.blocks import tile_of
from rlalign_kernels.attention.reference import reference_attention
from rlalign_kernels.attention.shapes import MEASURED, GroupShape, group, masked

FLOPS = {"forward": 4, "both": 14}  # a pair of tokens, times H D: 2 products forward, 5 backward, 2 operations each
TOLERANCE = 2e-2  # of the norm of a bfloat16 result


@dataclasses.dataclass(frozen=True)
class Preset:
    """What is measured, what is compared with the whole mask before, and how long a number may take."""

    shapes: dict[str, GroupShape]
    checked: GroupShape
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    repeats: int = 7
    least_ms: float = 30.0

    @property
    def head(self) -> dict[str, int]:
        """What a form is told about heads."""
        return {"group": self.heads // self.kv_heads, "width": self.width}

    def sizes(self, until: np.ndarray) -> list[tuple[int, ...]]:
        """Shapes of q, k, v and a cotangent."""
        return [(*until.shape, h, self.width) for h in (self.heads, self.kv_heads, self.kv_heads, self.heads)]


PRESETS = {
    "full": Preset(MEASURED, GroupShape(384, 128, 3)),
    "smoke": Preset({"smoke": GroupShape(40, 24, 2)}, GroupShape(40, 24, 2), 4, 1, 64, repeats=1, least_ms=0),
}


def forest(shape: GroupShape) -> np.ndarray:
    """visible_until i32[1, P + G R]."""
    return np.array([masked(group(shape.prompt, *[shape.response] * shape.samples))[0]], np.int32)


def repeated(shape: GroupShape, samples: int) -> np.ndarray:
    """visible_until i32[samples, P + R]: causal rows."""
    length = shape.prompt + shape.response
    return np.full((samples, length), length, np.int32)


class Copies:
    """From a forest to the batch that repeats its prompt, and back."""

    def __init__(self, shape: GroupShape):
        P, R, G = shape
        self.place = np.array([[*range(P), *range(P + g * R, P + (g + 1) * R)] for g in range(G)])
        self.first = ((np.arange(G)[:, None] == 0) | (np.arange(P + R)[None] >= P))[:, :, None, None]

    def repeat(self, x: np.ndarray) -> np.ndarray:
        """[1, P + G R, ...] -> [G, P + R, ...]."""
        return x[0][self.place]

    def once(self, x: np.ndarray) -> np.ndarray:
        """A repeated array whose copies of a prompt are 0, but the first."""
        return np.where(self.first, x, 0)

    def fold(self, x: np.ndarray) -> np.ndarray:
        """The transpose of repeat: the sum over a token's copies."""
        out = np.zeros((1, self.place.max() + 1, *x.shape[2:]), x.dtype)
        np.add.at(out[0], self.place, x)
        return out


def expected(preset: Preset, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Output and gradients by the whole mask in float32."""
    until = jnp.asarray(forest(preset.checked))
    with jax.default_matmul_precision("highest"):
        out, pull = jax.vjp(lambda q, k, v: reference_attention(q, k, v, until), *map(jnp.asarray, arrays[:3]))
        return [np.asarray(x) for x in (out, *pull(jnp.asarray(arrays[3])))]


def error(preset: Preset, framework, form, arrays: list[np.ndarray], reference: list[np.ndarray]) -> float:
    """The largest ||x - reference|| / ||reference|| among a form's output and gradients."""
    is_repeated, build = form
    until, copies = forest(preset.checked), Copies(preset.checked)
    q, k, v, grad = arrays
    if is_repeated:
        until = repeated(preset.checked, preset.checked.samples)
        q, k, v, grad = (*(copies.repeat(x) for x in (q, k, v)), copies.once(copies.repeat(grad)))
    run = framework.runs(
        *build(until, preset.head), *(framework.tensor(np.ascontiguousarray(x)) for x in (q, k, v, grad))
    )
    out, *gradients = (framework.array(x) for x in run["both"]())
    if is_repeated:
        out, gradients = copies.fold(copies.once(out)), [copies.fold(x) for x in gradients]
    pairs = zip((out, *gradients), reference, strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


def timed(preset: Preset, framework, form, shape: GroupShape, name: str) -> dict:
    """Milliseconds of one pass of a form, and what they mean."""
    is_repeated, build = form

    def measure(pieces: int) -> float:
        until = repeated(shape, shape.samples // pieces) if is_repeated else forest(shape)
        arrays = [framework.random(seed, size) for seed, size in enumerate(preset.sizes(until))]
        run = framework.runs(*build(until, preset.head), *arrays)[name]
        return median_ms(run, framework.wait, repeats=preset.repeats, least_ms=preset.least_ms)

    ms, pieces = in_pieces(measure, shape.samples if is_repeated else 1)
    pairs = shape.repeated_pairs if is_repeated else shape.pairs
    tflops = FLOPS[name] * preset.heads * preset.width * pairs / ms / 1e9
    return {"pass": name, "ms": round(ms, 3), "tflops": round(tflops, 1), "pieces": pieces}


def compare(rows: list[dict]) -> None:
    """Fill in the gain over the fastest repeated form of the same shape and pass."""
    for row in rows:
        same = [x for x in rows if (x["shape"], x["pass"]) == (row["shape"], row["pass"]) and x["repeated"]]
        best = min((x["ms"] for x in same), default=None)
        row["gain"] = None if best is None else round(best / row["ms"], 3)


def table(rows: list[dict], shapes: dict[str, GroupShape]) -> str:
    """The measurements in Markdown."""
    lines = ["| P, R, G | pass | form | ms | TFLOP/s | share | gain | alpha |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        shape = ", ".join(map(str, shapes[row["shape"]]))
        share = "-" if row["share"] is None else f"{row['share']:.1%}"
        name = f"{row['form']} ({row['pieces']} pieces)" if row["pieces"] > 1 else row["form"]
        cells = (shape, row["pass"], name, row["ms"], row["tflops"], share, row["gain"] or "-", row["alpha"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def frameworks() -> tuple[dict, dict]:
    """name -> module of forms, and name -> why it is not there."""
    try:
        import forms_torch
    except ImportError as reason:
        return {"jax": forms_jax}, {"torch": f"not installed: {reason}"}
    if jax.default_backend() != "cpu" and not forms_torch.ON_GPU:
        return {"jax": forms_jax}, {"torch": "sees no GPU"}
    return {"jax": forms_jax, "torch": forms_torch}, {}


def measured(preset: Preset, only: list[str] | None) -> dict:
    """Errors, times and what could not run."""
    found, absent = frameworks()
    platform, kind = jax.default_backend(), jax.devices()[0].device_kind
    peak, rng, errors, rows = peak_tflops(kind), np.random.default_rng(0), {}, []
    drawn = (jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in preset.sizes(forest(preset.checked)))
    arrays = [np.asarray(x, np.float32) for x in drawn]
    reference = expected(preset, arrays)
    forms = [(framework, *form) for framework in found.values() for form in framework.forms(platform).items()]
    for framework, name, form in forms:
        if only and name not in only:
            continue
        try:
            errors[name] = round(error(preset, framework, form, arrays, reference), 5)
            for (key, shape), which in itertools.product(preset.shapes.items(), FLOPS):
                row = timed(preset, framework, form, shape, which)
                share = None if peak is None else round(row["tflops"] / peak, 4)
                alpha = round(shape.repeated_pairs / shape.pairs, 3)
                rows.append({"shape": key, "form": name, "repeated": form[0], **row, "share": share, "alpha": alpha})
                print(rows[-1], file=sys.stderr, flush=True)
        except Exception as reason:  # noqa: BLE001 - a form that fails must not take the others' numbers with it
            absent[name] = f"{type(reason).__name__}: {(str(reason).strip().splitlines() or [''])[0][:200]}"
    compare(rows)
    longest = max(shape.tokens for shape in preset.shapes.values())
    return {
        "benchmark": "attention",
        "device": kind,
        "peak_tflops": peak,
        **{name: module.VERSION for name, module in found.items()},
        "heads": preset.heads,
        "kv_heads": preset.kv_heads,
        "width": preset.width,
        "dtype": "bfloat16",
        "tile": tile_of(forms_jax.OURS[platform][0], longest, **preset.head, dtype="bfloat16")._asdict(),
        "errors": errors,
        "absent": absent,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--form", action="append", help="measure this one only; may be given again")
    flags = parser.parse_args()
    preset = PRESETS[flags.preset]
    result = measured(preset, flags.form)
    print(table(result["rows"], preset.shapes))
    for name, reason in result["absent"].items():
        print(f"not measured: {name}: {reason}")
    print(json.dumps(result))
    missing = set(forms_jax.OURS[jax.default_backend()]) & set(result["absent"])
    wrong = {name: error for name, error in result["errors"].items() if not error <= TOLERANCE}
    if missing or wrong:
        sys.exit(f"ours that did not run: {sorted(missing)}; wrong by more than {TOLERANCE}: {wrong}")


if __name__ == "__main__":
    main()
