"""Fixtures of the tests on a cluster of namespaces."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multinode.cluster import BUSY, NEEDS, Cluster, missing

REASON = (
    f"needs root for namespaces, and these commands (make test-cluster installs them): {missing(NEEDS) or 'all here'}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(300 * BUSY))
        if item.path.is_relative_to(here) and item.get_closest_marker("cluster") is None:
            item.add_marker(pytest.mark.cluster)
        if item.path.is_relative_to(here) and (os.geteuid() != 0 or missing(NEEDS)):
            item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and two nodes."""
    with Cluster(tmp_path_factory.mktemp("cluster"), nodes=2) as started:
        yield started
