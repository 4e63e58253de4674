"""A plain `pytest` runs each benchmark once, as a test; `pytest --benchmark-only` times them."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("benchmark_only"):
        config.option.benchmark_disable = True
