"""Files of questions and answers: what is in them, how they are parted, and what they share."""

import base64
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from common.crystal.structure import Crystal, Site
from common.data.cli import app
from common.data.store import Record, fingerprint, write_records
from common.errors import UserError
from common.language.analogues import AnalogueIndex
from common.language.dataset import (
    PARTS,
    Drop,
    Form,
    Reference,
    make_prompt_set,
    prompt_rows,
    read_ids,
    write_prompts,
)
from common.language.prompt import INSTRUCTION, Symmetry, parse_answer, parse_question
from common.prior_fit import fit_prior

ALKALI, HALOGEN = (3, 11, 19, 37, 55), (9, 17, 35, 53)


def salt(name: str, cation: int, anion: int, swap: bool = False, group: int = 225) -> Record:
    """Rock salt (225) or the CsCl type (221), in either of two settings."""
    letters = "ba" if swap else "ab"
    sites = (Site(cation, letters[0]), Site(anion, letters[1]))
    crystal = Crystal(group, sites, 5.0 * np.eye(3))
    return Record(name, crystal, None, {"band_gap": 1.234, "formation_energy": None})


def salts() -> list[Record]:
    """Twenty formulas, each in both types."""
    return [
        salt(f"mp-{cation}-{anion}-{group}", cation, anion, group=group)
        for cation in ALKALI
        for anion in HALOGEN
        for group in (225, 221)
    ]


def test_rows_come_back() -> None:
    records = salts()
    for target, value in (("band_gap", 1.23), (None, None)):
        rows = list(prompt_rows(records, target))
        assert [row["id"] for row in rows] == [record.material_id for record in records]
        for row, record in zip(rows, records, strict=True):
            assert row["instruction"] == INSTRUCTION
            question = parse_question(row["input"])
            assert (question.value, question.target) == (value, target if value else None)
            assert {z: 4 * n for z, n in question.formula} == record.crystal.formula_counts or (
                record.crystal.space_group == 221
            )
            assert parse_answer(row["output"]) == Symmetry.of_crystal(record.crystal)


def test_rows_with_analogues() -> None:
    """Every second question tells of the other polymorph, and none of its own answer."""
    records = salts()
    index = AnalogueIndex(fit_prior(records), 2)
    for place, row in enumerate(prompt_rows(records, None, index)):
        told = parse_question(row["input"]).analogues
        other = Symmetry.of_crystal(records[place ^ 1].crystal)
        assert told.known == ((other,) if place % 2 else ())
        assert parse_answer(row["output"]) in [analogue.symmetry for analogue in told.similar]


def test_formulas_stay_together() -> None:
    made = make_prompt_set(salts(), [], (0.6, 0.2, 0.2))
    formulas = [{record.reduced_formula for record in made.parts[part]} for part in PARTS]
    assert all(formulas)
    assert len(set.union(*formulas)) == sum(map(len, formulas)) == 20
    assert sum(len(records) for records in made.parts.values()) == 40


def test_what_is_shared_is_counted_and_left_out() -> None:
    records = salts()
    unseen = [
        records[0],
        salt("other-1", 11, 17, swap=True),  # in the data under another id
        salt("other-2", 19, 9, group=216),  # another polymorph of a formula in the data
    ]
    reference = Reference.of_records("unseen", unseen)
    for drop, dropped, ids, formulas, same in (
        (Drop.id, 1, 0, 5, 1),
        (Drop.symmetry, 2, 0, 4, 0),
        (Drop.formula, 6, 0, 0, 0),
    ):
        made = make_prompt_set(records, [reference], drop=drop)
        shared = made.overlaps["unseen"].values()
        assert made.dropped == dropped
        assert sum(len(rows) for rows in made.parts.values()) == 40 - dropped
        assert sum(overlap.ids for overlap in shared) == ids
        assert sum(overlap.formula for overlap in shared) == formulas
        assert sum(overlap.symmetry or 0 for overlap in shared) == same
        report = made.report()
        left_out = {"rows": dropped, "shared": drop.value, "without_property": 0}
        assert report["left_out"] == left_out
        assert report["parts"]["train"]["fingerprint"] == fingerprint(made.parts["train"])
    with pytest.raises(UserError, match="no row is left"):
        make_prompt_set(records[:1], [reference])


def test_files(tmp_path: Path) -> None:
    made = make_prompt_set(salts(), [], (0.6, 0.2, 0.2))
    rows = {part: list(prompt_rows(own, "band_gap")) for part, own in made.parts.items()}
    paths = write_prompts(made, rows, tmp_path / "lines", "band_gap", Form.jsonl)
    assert [path.name for path in paths] == [
        "train.jsonl",
        "val.jsonl",
        "test.jsonl",
        "report.json",
    ]
    lines = paths[0].read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows["train"]
    assert json.loads(paths[-1].read_text())["target"] == "band_gap"
    listed = write_prompts(made, rows, tmp_path / "list", None, Form.mindformers)
    loaded = json.loads(listed[1].read_text(encoding="utf-8"))
    assert [row["output"] for row in loaded] == [row["output"] for row in rows["val"]]
    assert {tuple(row) for row in loaded} == {("instruction", "input", "output")}


def test_ids_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "test.txt"
    path.write_text("mp-1, ClNa\n\nmp-2\nmp-3,Na2O2\nmp-4,O2\n")
    reference = read_ids(path)
    assert reference.ids == {"mp-1", "mp-2", "mp-3", "mp-4"}
    assert reference.formulas == {"NaCl", "Na2O2", "O2"}  # as records have them
    assert reference.symmetries is None
    made = make_prompt_set(salts(), [reference])
    assert sum(overlap.formula for overlap in made.overlaps["test.txt"].values()) == 2
    assert made.report()["overlaps"]["test.txt"]["train"]["symmetry"] is None
    for content in (b"\n\n", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"test\.txt"):
            read_ids(path)
    with pytest.raises(UserError, match="cannot read"):
        read_ids(tmp_path / "absent.txt")


def test_command(tmp_path: Path) -> None:
    records = salts()
    data, unseen = tmp_path / "data.parquet", tmp_path / "unseen.parquet"
    write_records(records, data)
    write_records(records[:3], unseen)
    ids = tmp_path / "ids.txt"
    ids.write_text(f"{records[5].material_id}\n")
    arguments = ["prompts", data, data, "--out", tmp_path / "out", "--target", "none"]
    arguments += ["--against", unseen, "--against", ids, "--drop", "symmetry"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None, result.output
    assert "4 rows were left out" in " ".join(result.output.split())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sum(part["rows"] for part in report["parts"].values()) == 36
    first = json.loads((tmp_path / "out" / "train.jsonl").read_text().splitlines()[0])
    assert first["input"].endswith("\nProperty: none")


def test_rows_without_the_property_are_left_out(tmp_path: Path) -> None:
    records = salts()
    records[0] = Record(records[0].material_id, records[0].crystal)
    data, out = tmp_path / "data.parquet", tmp_path / "out"
    write_records(records, data)
    (tmp_path / "ids.txt").write_text(f"{records[1].material_id}\n")
    arguments = ["prompts", str(data), "--out", str(out), "--against", str(tmp_path / "ids.txt")]
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None, result.output
    assert f"{data}: 1 of 40 rows have no band_gap and are left out\n" in result.output
    lines = [line for part in PARTS for line in (out / f"{part}.jsonl").read_text().splitlines()]
    assert sorted(json.loads(line)["id"] for line in lines) == sorted(
        record.material_id for record in records[2:]
    )
    assert all("Band gap" in json.loads(line)["input"] for line in lines)
    left_out = {"rows": 1, "shared": "id", "without_property": 1}
    assert json.loads((out / "report.json").read_text())["left_out"] == left_out
    with pytest.raises(UserError, match="no row has a formation_energy"):
        make_prompt_set(records, [], target="formation_energy")


# What MindFormers makes of its form


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of the command, none of whose rows are left out."""
    folder = tmp_path_factory.mktemp("listed")
    write_records(salts(), folder / "data.parquet")
    (folder / "unseen.txt").write_text("absent\n")
    arguments = ["prompts", folder / "data.parquet", "--out", folder / "out"]
    arguments += ["--against", folder / "unseen.txt", "--format", "mindformers"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None, result.output
    return [folder / "out" / f"{part}.json" for part in PARTS]


@pytest.mark.skipif(
    importlib.util.find_spec("mindformers") is None,
    reason="MindFormers is not installed: scripts/install.sh",
)
@pytest.mark.parametrize(
    ("handler", "blank", "answer"),
    [
        ("AlpacaInstructDataHandler", " ", "ASSISTANT: {output}</s>"),
        ("CodeAlpacaInstructDataHandler", "\n", "{output}"),
    ],
)
def test_mindformers_reads_its_form(
    listed: list[Path], tmp_path: Path, handler: str, blank: str, answer: str
) -> None:
    """By its own loader, handlers and tokenizer: the question is read, the answer learned."""
    from ms_impl.glm4 import prepare_mindformers

    prepare_mindformers()
    from mindformers.dataset.dataloader import build_dataset_loader

    # Ranks of GLM-4's tokenizer that join no bytes, so that tokens are the text itself.
    ranks = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    (tmp_path / "tokenizer.model").write_text("\n".join(ranks))
    tokenizer = {"type": "ChatGLM4Tokenizer", "vocab_file": str(tmp_path / "tokenizer.model")}
    loader = build_dataset_loader(
        {
            "type": "HFDataLoader",
            "path": "json",
            "data_files": [str(path) for path in listed],
            "split": "train",
            "cache_dir": str(tmp_path / "cache"),
            "handler": [{"type": handler, "seq_length": 1400, "tokenizer": tokenizer}],
            "python_multiprocessing": False,
        }
    )
    question = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:" + blank
    rows = prompt_rows(salts(), "band_gap")
    expected = [(question.format_map(row), answer.format_map(row)) for row in rows]
    found = []
    for tokens, labels in loader.create_tuple_iterator(num_epochs=1, output_numpy=True):
        text, learned = (bytes(i for i in ids if 0 <= i < 256).decode() for ids in (tokens, labels))
        assert text.endswith(learned)
        asked = text.removesuffix(learned)
        found.append((asked[asked.index("### Instruction") :], learned))
    assert sorted(found) == sorted(expected)
