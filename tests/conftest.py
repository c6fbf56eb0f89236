"""What every test runs under: shapes checked as they come, fresh memory filled with NaN, a way to the real data."""

import os
from pathlib import Path

import jaxtyping
import pytest

jaxtyping.install_import_hook("everlong", "typechecking.check")

import torch  # noqa: E402
import variants  # noqa: E402

torch.use_deterministic_algorithms(True)  # with it, `torch.empty` is filled with NaN
torch.utils.deterministic.fill_uninitialized_memory = True
torch.set_num_threads(1)  # the tests themselves run side by side


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data."""
    folder = Path(os.environ.get("EVERLONG_TEST_DATA", Path(__file__).parents[1] / ".." / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set EVERLONG_TEST_DATA")
    return folder


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests as well")
    parser.addoption("--mixer", help="check the laws of mixers for this one alone, given as package.module:Class")


def pytest_configure(config):
    variants.CHOSEN = config.getoption("--mixer")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="slow: run by `make test-all`")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)
