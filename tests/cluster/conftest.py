"""One real Redis server for all tests that need one; every test takes a run uid of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qtt_operator.store import EmbeddedStore


@pytest.fixture(scope="session")
def redis_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    """A living embedded server, shared by the session; never stop or restart this one."""
    with EmbeddedStore(tmp_path_factory.mktemp("redis-store")) as store:
        yield store
