"""What is told of the references' properties."""

import numpy as np
import pytest

from common.crystal.structure import Crystal, Site
from common.data.store import Record
from common.errors import UserError
from common.evaluate.run import Told

CRYSTAL = Crystal(225, (Site(11, "a"), Site(17, "b")), 5.64 * np.eye(3))
RECORDS = [
    Record(
        f"m-{i}", CRYSTAL, None, {"band_gap": None if i == 3 else float(i), "formation_energy": -1}
    )
    for i in range(8)
]


def test_true_values() -> None:
    told = Told.of(RECORDS, ("band_gap",), "true", 0)
    assert told.values[2] == {"band_gap": 2.0}
    assert told.values[3] == {}
    assert told.describe("composition") == "composition, band_gap (7 of 8 rows)"


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_values(seed: int) -> None:
    """The same values, none at its place; rows without one stay without."""
    told = Told.of(RECORDS, ("band_gap", "formation_energy"), "shuffled", seed)
    values = [one.get("band_gap") for one in told.values]
    own = [record.properties["band_gap"] for record in RECORDS]
    assert values[3] is None
    assert sorted(v for v in values if v is not None) == [0, 1, 2, 4, 5, 6, 7]
    assert all(a != b for a, b in zip(values, own, strict=True) if b is not None)
    assert [one["formation_energy"] for one in told.values] == [-1] * 8
    assert told == Told.of(RECORDS, ("band_gap", "formation_energy"), "shuffled", seed)
    assert told.describe("x") == ("x, shuffled band_gap (7 of 8 rows), shuffled formation_energy")


def test_one_value_cannot_be_shuffled() -> None:
    with pytest.raises(UserError, match="no other"):
        Told.of(RECORDS[:1], ("band_gap",), "shuffled", 0)


def test_another_seed_shuffles_otherwise() -> None:
    deals = {str(Told.of(RECORDS, ("band_gap",), "shuffled", seed).values) for seed in range(5)}
    assert len(deals) > 1


def test_nothing_told() -> None:
    told = Told.of(RECORDS, ("band_gap",), "null", 0)
    assert told.values == ({},) * 8
    assert told.describe("true symmetry") == "true symmetry"
