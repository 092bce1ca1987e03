"""What `uni-mdm evaluate` takes as known to a network."""

from pathlib import Path

from common.checkpoint import load_checkpoint, save_checkpoint
from common.commands.evaluate import _known_rows
from common.data.store import write_records
from common.precedents import precedents_file
from tests.training import textbook_records, tiny_run


def test_known_to_a_fine_tuned_network_is_what_it_starts_from(tmp_path: Path) -> None:
    """The former rows as well, which are not in its own data."""
    records = textbook_records()
    data = tmp_path / "few.parquet"
    write_records(records[:2], data)
    config = tiny_run(data)
    for companions, count, name in (
        ({}, 2, str(data)),
        (precedents_file(records, "all", "few"), len(records), f"train and {data}"),
    ):
        save_checkpoint(
            tmp_path / "final",
            config=config.model_dump(mode="json"),
            model={},
            extra={"training_rows": 2, "data": [("train", 25505), (str(data), 2)]},
            companions=companions,
        )
        found, told = _known_rows(load_checkpoint(tmp_path / "final"), config, 1)
        assert told == name
        ids = {record.material_id for record in found}
        assert ids == {record.material_id for record in records[:count]}
