"""One thread per process: ranks share the cores, and results do not depend on how many there are."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent / "support"))
import order
import thirty
from thirty import pytest_terminal_summary  # noqa: F401  (a hook)

torch.set_num_threads(1)

# Deterministic, so that a red build is red again on the next machine; `--hypothesis-profile=explore` draws afresh and for
# longer.
settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True)
settings.register_profile("explore", max_examples=3000, deadline=None)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, help="how many cases tests/execution/test_properties.py draws")
    parser.addoption("--cases-report", type=Path, help="where to write the table of tests/support/thirty.py")
    parser.addoption(
        "--flash-sources", type=Path, help="folder with the flash-attn packages' sources for tests/kernels/test_flash.py"
    )


@pytest.hookimpl(trylast=True)  # after what was not asked for has gone
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    thirty.pytest_collection_modifyitems(items)
    order.spread(items, getattr(config, "workerinput", {}).get("workercount", 1))
