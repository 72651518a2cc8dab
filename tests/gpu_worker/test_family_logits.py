"""Goal: for every family, logits through a store equal those of transformers' own model that holds
our dequantised and compensated weights, and the comparison can see a wrong expert.

Method: `benchmarks.families.measure`, the function that also writes the table.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.families import TOLERANCE, TOP_K, FamilyDifference, measure, table
from tests.tiny_checkpoints import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers_own_model(family: str, tmp_path: Path) -> None:
    row = measure(family, tmp_path)
    assert set(row.by_top_n) == set(range(TOP_K + 1))
    assert row.worst <= TOLERANCE, row
    # Negative controls: one expert 1 % off is seen, and restoring is not a no-op.
    assert row.control > 10 * TOLERANCE, row
    assert row.effect > 100 * TOLERANCE, row


def test_the_table_has_a_row_per_family_and_its_worst_value() -> None:
    row = FamilyDifference("mixtral", {0: 1e-7, 1: 2e-7, 2: 3e-7}, control=0.01, effect=0.2)
    assert table([row]).splitlines()[-1] == (
        "| mixtral | 1.0e-07 | 2.0e-07 | 3.0e-07 | 1.0e-02 | 2.0e-01 |"
    )
    assert row.worst == 3e-7
