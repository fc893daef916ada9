"""The desks as both doors call them, on a database of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import settings as effort

from server.db import Database
from tests.handlers.desk import Desk

effort.register_profile("unhurried", deadline=None)
effort.load_profile("unhurried")


@pytest.fixture
def desk(database: Database) -> Desk:
    return Desk(database)
