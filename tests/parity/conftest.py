"""TRL and PyTorch are only in the environment of `make parity`; elsewhere nothing here is collected."""

import importlib.util
import warnings

import pytest

if importlib.util.find_spec("trl") is None:  # `make parity` then finds no test at all, which is an error
    collect_ignore_glob = ["test_*.py"]
else:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say of each other while they are imported
        from tests.parity import trl_side  # noqa: F401


def pytest_addoption(parser):
    parser.addoption("--write", action="store_true", help="write the table of docs/parity.md anew")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A comparison that is skipped is a comparison that failed."""
    report = yield
    if report.skipped:
        report.outcome = "failed"
    return report
