"""Eight simulated CPU devices, no silent broadcasting, and float64 for the tests that ask for it."""

import atexit
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile

# Most of the time goes into compiling tiny programs, so LLVM leaves them as they are. The killed runs of tests/faults
# start processes of their own, optimised as usual.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        # Later releases have no choice of emitters, and compile more slowly.
        "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "",
    ]
)
os.environ["JAX_PLATFORMS"] = "cpu"
# The same tiny programs are built by many tests: each is compiled once a session, whichever process needs it first.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="rlalign-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
if importlib.util.find_spec("hypothesis"):  # the environment of tests/parity has none
    from hypothesis import HealthCheck, settings

    # A busy machine is no failure: benchmarks tell of speed.
    settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("untimed")


def enable_x64():
    """A context in which float64 is float64."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64 as context

    return context()


def pytest_collection_modifyitems(items):
    """The folders with the longest files first, so that no process is left alone with one at the end."""
    long = ("faults", "train", "io", "models")
    items.sort(key=lambda item: not any(part in long for part in item.path.parts))


@pytest.fixture
def x64():
    """float64 for one test."""
    with enable_x64():
        yield
