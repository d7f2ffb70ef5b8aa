import pytest
from kinds import PIPELINES, SUPPORTS, Made


@pytest.fixture(scope="session")
def made(request: pytest.FixtureRequest) -> Made:
    """The tiny pipeline of the kind of backbone that a test asks for, its backbone, and a support set."""
    return *PIPELINES[request.param](), SUPPORTS[request.param]
