"""Where things are: the repository, the files that tests read, and reference files that may be beside the checkout."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent
FIXTURES = TESTS / "fixtures"
SHARED = REPOSITORY.parent / "shared"  # tests that need it are skipped where it is not
