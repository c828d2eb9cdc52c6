"""Which form of an operation runs. Every operation is a folder with one module a form: xla, tpu, triton."""

import functools
import importlib
import logging
import os
from collections.abc import Callable

log = logging.getLogger(__name__)
BACKENDS = {  # module of an operation's folder, whether Pallas' interpreter runs it
    "xla": ("xla", False),
    "tpu": ("tpu", False),
    "triton": ("triton", False),
    "interpret": ("tpu", True),
    "interpret_triton": ("triton", True),
}
WIDTHS = (64, 96, 128, 256)  # of a head, that the Pallas kernels are tested with
DTYPES = ("bfloat16", "float32")


def choose(name: str | None) -> str:
    """The backend called `name`; None is the environment's RLALIGN_KERNELS, or "xla".

    The environment is read when a program is traced: what is compiled already keeps its form. Where this JAX has no
    Pallas, kernels are left out: "xla", with one line in the log.

    Raises:
      ValueError: no backend has this name.
    """
    # A device is to get its kernels here once they have been measured on it.
    name = name or os.environ.get("RLALIGN_KERNELS", "xla")
    if name not in BACKENDS:
        raise ValueError(f"unknown kernel backend {name!r}: choose one of {', '.join(BACKENDS)}")
    return name if name == "xla" or _has_pallas(BACKENDS[name][0]) else "xla"


@functools.cache
def _has_pallas(module: str) -> bool:
    """Whether Pallas' part for these kernels can be imported; says so once where it cannot."""
    try:
        importlib.import_module(f"jax.experimental.pallas.{module}")
    except ImportError as error:
        log.warning("no Pallas for %r kernels here (%s): plain XLA runs in their place", module, error)
        return False
    return True


def check_heads(backend: str, width: int, dtype) -> None:
    """Refuse heads that a Pallas kernel is not tested with.

    Raises:
      ValueError: `backend` is a Pallas kernel and takes no heads of this width or type.
    """
    if backend != "xla" and (width not in WIDTHS or dtype.name not in DTYPES):
        raise ValueError(
            f"the kernels of backend {backend!r} take heads of width {', '.join(map(str, WIDTHS))} in "
            f"{' or '.join(DTYPES)}; got width {width} in {dtype}: use backend='xla'"
        )


def check_softcap(softcap: float | None) -> None:
    """Refuse a soft cap that is no cap.

    Raises:
      ValueError: it is not positive.
    """
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}: None is no cap")


def load(operation: str, backend: str, function: str) -> Callable:
    """A function of an operation's form, imported when it is first used: Pallas takes half a second."""
    module, interpret = BACKENDS[backend]
    found = getattr(importlib.import_module(f"rlalign_kernels.{operation}.{module}"), function)
    return functools.partial(found, interpret=True) if interpret else found
