"""How much runs: what CI has time for, or, with SKIPVISION_ALL_TESTS=1 (`make test-all`), everything."""

import os

import pytest

FULL = bool(os.environ.get("SKIPVISION_ALL_TESTS"))
only_in_full = pytest.mark.skipif(not FULL, reason="takes long: set SKIPVISION_ALL_TESTS=1")
