"""What a run of a language model says before it begins."""

import pytest

from common.data.store import Record
from common.errors import UserError
from tests.language import language_run
from tests.training import textbook_records
from torch_impl.train_glm4 import Trainer


def without(records: list[Record], name: str) -> list[Record]:
    return [
        Record(record.material_id, record.crystal, properties={**record.properties, name: None})
        for record in records
    ]


def test_property_that_no_row_has() -> None:
    records = textbook_records()
    with pytest.raises(UserError) as caught:
        Trainer(language_run("mine.csv"), without(records, "band_gap"), records)
    assert str(caught.value) == (
        "mine.csv: no row has a band_gap, so that nothing is learned of it; "
        "leave it out of train.questions"
    )
    none = language_run("mine.csv", questions=["none", "formation_energy"])
    Trainer(none, without(records, "band_gap"), records)
