"""The tests' Hugging Face Hub: started, and made the only one, before any Hugging Face library is imported."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
from fake_hub import TOKEN, FakeHub
from reliability import Reliability


HUB = FakeHub().__enter__()
HF_HOME = tempfile.mkdtemp(prefix="mcdi_hf_tests_")
atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)

# The libraries read these once, on import: changed later, some of them would still call the real Hub. Settings of the
# person who runs the tests (another cache, offline mode) would lead past the fake one.
for name in [name for name in os.environ if name.startswith("HF_")]:
    del os.environ[name]
os.environ.update(
    HF_ENDPOINT=HUB.url,
    HF_TOKEN=TOKEN,
    HF_HOME=HF_HOME,
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1",
    OMP_NUM_THREADS="1",  # on tensors this small, several threads spend their time waiting for each other
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", metavar="FILE", help="write what became of faults and hostile inputs, as JSON")


@pytest.fixture(scope="session")
def reliability(request: pytest.FixtureRequest) -> Iterator[Reliability]:
    """Counts what becomes of faults and hostile inputs."""
    counted = Reliability()
    yield counted
    if path := request.config.getoption("--reliability"):
        counted.write(path)


@pytest.fixture(scope="session")
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether to try everything, as `make reliability` does, or a sample of it."""
    return request.config.getoption("--reliability") is not None


@pytest.fixture
def hub() -> FakeHub:
    """The Hub that every client of this process talks to, emptied."""
    HUB.clear()
    return HUB


@pytest.fixture(scope="session")
def collected(tmp_path_factory: pytest.TempPathFactory):
    """Trajectories of a tiny backbone and data set, made once for all tests that read them."""
    from scripts import Collected  # not above: it imports Hugging Face libraries

    return Collected.make(tmp_path_factory.mktemp("collected"))
