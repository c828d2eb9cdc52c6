"""How kernels are timed on an accelerator, and what it could do at most."""

import statistics
import time
from collections.abc import Callable
from typing import Any

# Dense bfloat16 TFLOP/s by a part of the device's kind; the first part that fits counts. NVIDIA: the data sheets of
# H100 and H200 (half of the figures "with sparsity") and of A100; TPUs: cloud.google.com/tpu/docs, a page a version.
PEAKS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v6 lite": 918,
}


def peak_tflops(kind: str) -> int | None:
    """Of a device's kind; None where the table does not know it."""
    return next((peak for part, peak in PEAKS.items() if part in kind), None)


MOST_MS = 5e3  # for the repeats of one number: a slow form is measured fewer times, once at least


def median_ms(run: Callable[[], Any], wait: Callable[[Any], Any], *, repeats: int, least_ms: float) -> float:
    """Median milliseconds of one run(), warmed up.

    Each repeat queues as many runs as fill `least_ms` and waits for the last, so that what launching costs the host is
    hidden behind the device's work.
    """

    def mean_ms(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            out = run()
        wait(out)
        return (time.perf_counter() - begin) * 1e3 / calls

    wait(run())
    once = mean_ms(1)
    calls = max(1, min(100, int(least_ms / once)))
    repeats = max(1, min(repeats, int(MOST_MS / (calls * once))))
    return statistics.median(mean_ms(calls) for _ in range(repeats))


def in_pieces(measure: Callable[[int], float], pieces: int) -> tuple[float, int]:
    """(measure(n) * n, n) for the smallest number of equal pieces, 1, 2, 4 ... `pieces`, that fits into memory."""
    n = 1
    while True:
        try:
            return measure(n) * n, n
        except RuntimeError as error:
            full = "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()
            if not full or 2 * n > pieces:
                raise
        n *= 2
