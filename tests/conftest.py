"""Tests never reach for a network, and several processes share them without doing work twice."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported anywhere
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads of many processes would starve each other


@pytest.fixture(autouse=True)
def seeded_generator() -> None:
    """Every test starts from the same state of torch's generator, whichever tests ran before it in its process."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For pytest-xdist: a file's tests run in one process, those of whole runs (test_run.py) in one for each method."""
    for item in items:
        group = item.path.stem
        if group == "test_run":
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            group = f"run of {parameters.get('method', 'simclr')}"
        item.add_marker(pytest.mark.xdist_group(group))
