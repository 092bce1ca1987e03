"""A GLM-4 of one block on textbook crystals: loss, cache, greedy text, training, folders."""

import json
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.checkpoint import (
    latest,
    load_checkpoint,
    rows_seen_by,
    save_checkpoint,
    shipped_language,
)
from common.composition import Formula
from common.data.store import Record, read_records, write_records
from common.errors import UserError
from common.language.config import LanguageRunConfig
from common.language.examples import IGNORED
from common.language.grammar import AnswerGrammar, TokenGrammar
from common.language.model import write_answers
from common.language.prompt import Question
from common.language.search import SearchRequest, rank_answers
from common.language.tokenizer import compact_tokenizer
from common.ranking import load_ranker
from common.training import Shard
from tests.language import language_run
from tests.training import textbook_records
from torch_impl import devices
from torch_impl.backend import train_language
from torch_impl.glm4 import add_dropout, answer_loss, build
from torch_impl.language_model import LanguageModel, load_language_model
from torch_impl.threads import threads_per_operation
from torch_impl.train_glm4 import Trainer

TOKENIZER = compact_tokenizer()
FORMULAS = ({11: 1, 17: 1}, {38: 1, 22: 1, 8: 3}, {6: 1})


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return textbook_records()


@pytest.fixture(scope="module")
def parquet(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("textbook") / "textbook.parquet"
    write_records(records, path)
    return path


@pytest.fixture(scope="module")
def trained(parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("run")
    train_language(language_run(parquet), out, device="cpu")
    return out


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """Two blocks with weights so large that attention matters."""
    torch.manual_seed(3)
    config = language_run().model.model_copy(update={"layers": 2})
    network = build(config.to_huggingface(TOKENIZER))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return LanguageModel(network, TOKENIZER, "random")


def prompts() -> list[list[int]]:
    return [TOKENIZER.question_ids(Question.ask(counts)) for counts in FORMULAS]


# Loss


def test_nothing_to_learn_from_or_to_watch(records: list[Record]) -> None:
    for rows, watched in (([], records), (records, [])):
        with pytest.raises(UserError, match="no crystal to"):
            Trainer(language_run(), rows, watched)


def test_rows_without_the_property(records: list[Record]) -> None:
    """They are left out of questions about it, which is said; without any there is no training."""
    run = language_run(questions=("formation_energy",))
    trainer = Trainer(run, records, records)
    assert trainer.num_rows == len(records) - 1
    wanted = f"unused: 1 of {len(records)} rows have no formation_energy and are left out"
    assert trainer.remarks == [f"{wanted} of questions about it"]
    assert np.isfinite(trainer.train_step(next(trainer.batches()))["loss"])
    assert np.isfinite(trainer.validate()["loss"])
    bare = [Record(record.material_id, record.crystal) for record in records]
    for rows, watched in ((bare, records), (records, bare)):
        with pytest.raises(UserError, match="no row has a formation_energy"):
            Trainer(run, rows, watched)
    trainer = Trainer(language_run(), bare, bare)
    assert trainer.num_rows == len(bare)
    assert len(trainer.remarks) == 2


def test_rows_longer_than_the_positions(records: list[Record]) -> None:
    """MindFormers' table of angles ends there; the longest row is named."""

    def positions(count: int) -> LanguageRunConfig:
        run = language_run()
        return run.model_copy(update={"model": run.model.model_copy(update={"positions": count})})

    row, tokens = Trainer(language_run(), records, records).data.longest
    assert Trainer(positions(tokens), records, records).data.longest == (row, tokens)
    told = f"{records[row].material_id} take {tokens} tokens, but model.positions is {tokens - 1}"
    for rows, watched in ((records, records), (records[:1], records)):
        with pytest.raises(UserError, match=told):
            Trainer(positions(tokens - 1), rows, watched)


def test_loss_is_that_of_transformers(model: LanguageModel, records: list[Record]) -> None:
    """The batch, padded and with the head on answers alone, against one example at a time."""
    trainer = Trainer(language_run(), records, records)
    data = next(trainer.batches())
    found = answer_loss(model.model, *map(torch.from_numpy, (data.tokens, data.targets)))
    wanted = 0.0
    for tokens, targets in zip(data.tokens, data.targets, strict=True):
        end = int(np.flatnonzero(targets != IGNORED)[-1]) + 2
        labels = np.full(end, IGNORED)
        labels[1:] = targets[: end - 1]
        ids = torch.from_numpy(tokens[None, :end])
        loss = model.model(input_ids=ids, labels=torch.from_numpy(labels[None])).loss
        wanted += loss.item() * (labels != IGNORED).sum()
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_gradients_of_shares_add_up(records: list[Record]) -> None:
    gradients = []
    for shards in ([Shard()], [Shard(0, 2), Shard(1, 2)]):
        sums: list[torch.Tensor] = []
        for shard in shards:
            trainer = Trainer(language_run(), records, records, shard=shard)
            data = next(trainer.batches())
            (trainer.loss(data) / data.answer_tokens).backward()
            own = [p.grad.clone() for p in trainer.parameters if p.grad is not None]
            sums = [a + b for a, b in zip(sums, own, strict=True)] if sums else own
        gradients.append(sums)
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


# Scores


def full_logits(model: LanguageModel, sequence: list[int]) -> np.ndarray:
    """After a sequence, without padding or cache."""
    with torch.no_grad():
        return model.model(input_ids=torch.tensor([sequence])).logits[0, -1].numpy()


def test_scores_with_cache(model: LanguageModel) -> None:
    """Of sequences of different lengths, some with a known beginning, some that share one."""
    questions = prompts()
    first, handles = model(questions, [None] * 3)
    longer = [
        [*questions[0], 5],
        [*questions[1], 6, 7, 8],
        [*questions[0], 9, 10],
        [*questions[2], 11],
    ]
    second, more = model(longer, [handles[0], handles[1], handles[0], None])
    longest = [[*longer[2], 12], [*longer[1], 13, 14]]
    third, _ = model(longest, [more[2], more[1]])
    for scores, sequences in ((first, questions), (second, longer), (third, longest)):
        for row, sequence in zip(scores, sequences, strict=True):
            np.testing.assert_allclose(row, full_logits(model, sequence), rtol=1e-4, atol=1e-4)


def test_ranking_needs_no_cache(model: LanguageModel) -> None:
    def forgetful(sequences, handles):
        return model(sequences, [None] * len(handles))

    requests = []
    for ids, counts, group in zip(prompts(), FORMULAS, (225, 221, 227), strict=True):
        grammar = AnswerGrammar(Formula(tuple(counts.items())), space_group=group, max_atoms=20)
        requests.append(SearchRequest(tuple(ids), TokenGrammar(grammar, TOKENIZER)))
    cached = rank_answers(requests, model, top=3, budget=200)
    plain = rank_answers(requests, forgetful, top=3, budget=200)
    for found, wanted in zip(cached, plain, strict=True):
        assert len(found.candidates) == len(wanted.candidates) > 0
        for a, b in zip(found.candidates, wanted.candidates, strict=True):
            assert (a.space_group, a.sites) == (b.space_group, b.sites)
            assert a.probability == pytest.approx(b.probability, rel=1e-3)


def test_greedy_text(model: LanguageModel) -> None:
    """Of questions of different lengths, against the likeliest token one by one."""
    answers = model.write(prompts(), limit=6)
    for question, answer in zip(prompts(), answers, strict=True):
        sequence = list(question)
        for token in answer:
            assert token == int(full_logits(model, sequence).argmax())
            sequence.append(token)
        assert len(answer) == 6 or int(full_logits(model, sequence).argmax()) == TOKENIZER.end_id


# Training


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_loss_falls(records: list[Record], precision: str) -> None:
    trainer = Trainer(language_run(steps=30, ema=0.5, precision=precision), records, records)
    before = trainer.validate()["loss"]
    for data in islice(trainer.batches(), 30):
        trainer.train_step(data)
    assert trainer.validate()["loss"] < 0.6 * before


def test_goes_on_to_the_byte(parquet: Path, trained: Path, tmp_path: Path) -> None:
    config = language_run(parquet)
    trainer = Trainer(config, read_records(parquet), read_records(parquet))
    trainer.resume(trained / "step_00000003")
    for data in islice(trainer.batches(), 3):
        trainer.train_step(data)
    saved = load_checkpoint(trained / "step_00000006", optimizer=True)
    for name, array in trainer.average_arrays().items():
        np.testing.assert_array_equal(array, saved.model[name])
    for name, array in trainer.optimizer_arrays().items():
        np.testing.assert_array_equal(array, saved.optimizer[name])


# Dropout


def test_dropout_leaves_out_a_share() -> None:
    """Of embeddings and of both parts of a block; the rest is larger, and none without training."""
    network = build(language_run().model.to_huggingface(TOKENIZER))
    names = [name for name, _ in network.named_parameters()]
    layer = network.model.layers[0]
    parts = (network.model.embed_tokens, layer.self_attn, layer.mlp)
    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: object) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    add_dropout(network, 0.25)
    for part in parts:
        part.register_forward_hook(keep)  # after the dropout's
    tokens = torch.arange(1, 401).reshape(2, 200)  # not padding, which is zero by itself
    network.eval()(input_ids=tokens)
    plain, seen = seen, []
    network.train()(input_ids=tokens)
    for before, after in zip(plain, seen, strict=True):
        assert before.all()
        assert (after == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    kept = seen[0] != 0
    torch.testing.assert_close(seen[0][kept], plain[0][kept] / 0.75)
    assert not torch.equal(seen[1] == 0, seen[2] == 0)
    assert [name for name, _ in network.named_parameters()] == names


def losses_of(config: LanguageRunConfig, records: list[Record], steps: int = 4) -> list[float]:
    trainer = Trainer(config, records, records)
    return [trainer.train_step(b)["loss"] for b in islice(trainer.batches(), steps)]


def test_dropout_changes_steps_but_no_validation(records: list[Record]) -> None:
    plain, dropping = (
        Trainer(language_run(dropout=share), records, records) for share in (0.0, 0.3)
    )
    assert dropping.validate() == plain.validate() == dropping.validate()
    data = next(plain.batches())
    assert dropping.losses(data) == plain.losses(data) == plain.loss(data).item()
    assert dropping.loss(data).item() != dropping.loss(data).item() != plain.loss(data).item()
    assert dropping.train_step(data)["loss"] != plain.train_step(data)["loss"]


def test_masks_are_other_ones_in_every_step_and_process(records: list[Record]) -> None:
    seeds = set()
    for seed in (0, 1):
        for shard in (Shard(), Shard(1, 2)):
            trainer = Trainer(language_run(dropout=0.1, seed=seed), records, records, shard=shard)
            for trainer.step in range(3):
                seeds.add(trainer.dropout_seed())
    assert len(seeds) == 12


@pytest.mark.parametrize("setting", ["gradient_checkpointing", "analogues"])
def test_dropout_goes_on_to_the_byte(parquet: Path, tmp_path: Path, setting: str) -> None:
    """Whatever was drawn from torch's generator in between, and with analogues left out."""
    changes: dict[str, object] = {"gradient_checkpointing": True}
    if setting == "analogues":
        changes = {"analogues": 2, "analogue_dropout": 0.5, "token_budget": 900}
    config = language_run(parquet, dropout=0.2, **changes)
    train_language(config, tmp_path, device="cpu")
    rows = read_records(parquet)
    trainer = Trainer(config, rows, rows)
    trainer.resume(tmp_path / "step_00000003")
    for data in islice(trainer.batches(), 3):
        torch.rand(5)
        trainer.train_step(data)
    saved = load_checkpoint(tmp_path / "step_00000006", optimizer=True)
    for name, array in trainer.average_arrays().items():
        np.testing.assert_array_equal(array, saved.model[name])
    for name, array in trainer.optimizer_arrays().items():
        np.testing.assert_array_equal(array, saved.optimizer[name])


def test_checkpointed_blocks_drop_the_same_again(records: list[Record]) -> None:
    """The gradient is that of the loss."""
    found = [
        losses_of(language_run(dropout=0.3, gradient_checkpointing=setting), records)
        for setting in (False, True)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] != pytest.approx(losses_of(language_run(), records), rel=1e-3)


def test_adapter_with_dropout(parquet: Path, trained: Path, records: list[Record]) -> None:
    """What the additions add is dropped, too; only they are trained."""
    config = adapted(parquet, trained)
    settings = config.train.model_copy(update={"dropout": 0.3})
    trainer = Trainer(config.model_copy(update={"train": settings}), records, records)
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    found = [trainer.train_step(b)["loss"] for b in islice(trainer.batches(), 3)]
    assert found != pytest.approx(losses_of(config, records, 3), rel=1e-4)
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(parameter, now[name]) for name, parameter in frozen.items())
    dropped: list[torch.Tensor] = []
    attention = trainer.model.model.layers[0].self_attn
    attention.register_forward_hook(lambda _, inputs, output: dropped.append(output[0]))
    trainer.loss(next(trainer.batches()))
    assert (dropped[0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_compiled_layers_drop(records: list[Record]) -> None:
    """While they train, and not in validation; masks depend on the step's number alone."""
    runs = [language_run(), *[language_run(dropout=0.3, compile=True)] * 2]
    plain, first, again = (Trainer(run, records, records) for run in runs)
    data = next(plain.batches())
    assert first.losses(data) == pytest.approx(plain.losses(data), rel=1e-5)
    losses = [t.train_step(data)["loss"] for t in (plain, first, again)]
    assert losses[1] == losses[2] != pytest.approx(losses[0], rel=1e-4)


def test_without_a_compiler_it_trains_all_the_same(
    records: list[Record], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As without ``train.compile``, and one of several processes says so."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    plain, other = (Trainer(language_run(compile=c), records, records) for c in (False, True))
    assert capsys.readouterr().err.startswith("train.compile: without effect, for g++ is not found")
    data = next(plain.batches())
    assert plain.train_step(data) == other.train_step(data)
    Trainer(language_run(compile=True), records, records, shard=Shard(1, 2))
    assert not capsys.readouterr().err


def test_log(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    watched = [row for row in rows if row["kind"] == "validation"]
    assert [row["step"] for row in watched] == [3, 6]
    assert all(row["answer"] > row["loss"] > 0 for row in watched)


# Adapters


@pytest.fixture(scope="module")
def adapter(parquet: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of an adapter to the finished run."""
    out = tmp_path_factory.mktemp("adapter")
    train_language(adapted(parquet, trained), out, device="cpu")
    return out


def adapted(parquet: Path, base: Path) -> LanguageRunConfig:
    config = language_run(parquet, init_from=str(base / "final"), questions=["band_gap"])
    return LanguageRunConfig.model_validate(config.model_dump() | {"lora": {"rank": 4}})


def test_peft_reads_the_adapter(trained: Path, adapter: Path) -> None:
    """It changes what the base says, as much as peft thinks."""
    base = AutoModelForCausalLM.from_pretrained(trained / "final").eval()
    ids = prompts()[1]
    before = base(input_ids=torch.tensor([ids])).logits[0, -1].detach().numpy()
    other = PeftModel.from_pretrained(base, adapter / "final").eval()
    with torch.no_grad():
        wanted = other(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
    found = load_language_model(adapter / "final")([ids], [None])[0][0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(found - before).max() > 1e-3


def test_card_of_an_adapter(adapter: Path) -> None:
    card = (adapter / "final/README.md").read_text()
    size = sum(array.size for array in load_checkpoint(adapter / "final").model.values())
    assert "\nLoRA of rank 4 on a symmetry language model: " in card
    assert f" {size:,} parameters.\n" in card


def test_adapter_has_seen_what_its_base_has(parquet: Path, adapter: Path) -> None:
    rows = len(read_records(parquet))
    for folder in (adapter / "final", adapter / "step_00000003"):
        assert rows_seen_by(folder) == ((str(parquet), rows),) * 2


def test_adapter_goes_on_to_the_byte(parquet: Path, trained: Path, adapter: Path) -> None:
    rows = read_records(parquet)
    trainer = Trainer(adapted(parquet, trained), rows, rows)
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.resume(adapter / "step_00000003")
    for data in islice(trainer.batches(), 3):
        trainer.train_step(data)
    saved = load_checkpoint(adapter / "step_00000006", optimizer=True)
    assert saved.model.keys() == trainer.average_arrays().keys()
    assert all(".lora_" in name for name in saved.model)
    for name, array in trainer.average_arrays().items():
        np.testing.assert_array_equal(array, saved.model[name])
    for name, array in trainer.optimizer_arrays().items():
        np.testing.assert_array_equal(array, saved.optimizer[name])
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(parameter, now[name]) for name, parameter in frozen.items())


def test_adapter_of_another_base(trained: Path, adapter: Path) -> None:
    with pytest.raises(UserError, match="belongs to weights"):
        load_language_model(adapter / "final", base=trained / "step_00000003")


def test_adapter_without_base() -> None:
    with pytest.raises(ValueError, match=r"train\.init_from"):
        LanguageRunConfig.model_validate(language_run().model_dump() | {"lora": {}})


def test_run_goes_on_with_its_own_base_alone(
    parquet: Path, trained: Path, adapter: Path, tmp_path: Path
) -> None:
    rows = read_records(parquet)
    config = adapted(parquet, trained)
    other = tmp_path / "final"
    shutil.copytree(trained / "step_00000003", other)
    trainer = Trainer(adapted(parquet, tmp_path), rows, rows)
    says = r"step_00000003 belongs to weights .*, but .*final holds \w+: give "
    with pytest.raises(UserError, match=says + "--fresh to start anew$"):
        trainer.resume(adapter / "step_00000003")
    trainer.shard = Shard(1, 2)  # several processes know no --fresh
    with pytest.raises(UserError, match=says + "another --out$"):
        trainer.resume(adapter / "step_00000003")
    Trainer(config, rows, rows).resume(adapter / "step_00000003")


def test_damaged_adapter_is_told(
    parquet: Path, trained: Path, adapter: Path, tmp_path: Path
) -> None:
    step = shutil.copytree(adapter / "step_00000003", tmp_path / "step_00000003")
    path = step / "adapter_config.json"
    path.write_bytes(b"[" + path.read_bytes()[1:])
    rows = read_records(parquet)
    with pytest.raises(UserError, match=r"adapter_config\.json is damaged"):
        Trainer(adapted(parquet, trained), rows, rows).resume(step)


def test_base_with_other_tokens(parquet: Path, trained: Path, tmp_path: Path) -> None:
    saved = load_checkpoint(trained / "final")
    other = TOKENIZER.files()["tokenizer.json"].replace("Space group", "Group of space")
    files = {"tokenizer.json": other.encode()}
    save_checkpoint(tmp_path / "final", config=saved.config, model=saved.model, companions=files)
    with pytest.raises(UserError, match="other tokens than this version's"):
        Trainer(adapted(parquet, tmp_path), read_records(parquet), [])


# Bases of transformers


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of one block as transformers writes it, in bfloat16 and several files."""
    folder = tmp_path_factory.mktemp("foreign") / "final"
    torch.manual_seed(1)
    network = build(language_run().model.to_huggingface(TOKENIZER)).to(torch.bfloat16)
    network.save_pretrained(folder, max_shard_size="40KB")
    TOKENIZER.save(folder)
    return folder


def narrow(parquet: Path, base: Path, **settings: object) -> LanguageRunConfig:
    config = language_run(parquet, init_from=str(base), questions=["band_gap"], **settings)
    lora = {"rank": 4, "base_precision": "bfloat16"}
    return LanguageRunConfig.model_validate(config.model_dump() | {"lora": lora})


def test_base_of_transformers(parquet: Path, foreign: Path, tmp_path: Path) -> None:
    """Its weights stay in bfloat16, the additions are float32, and belong to it alone."""
    rows = read_records(parquet)
    trainer = Trainer(narrow(parquet, foreign), rows, rows)
    kinds = {p.dtype for p in trainer.model.parameters() if not p.requires_grad}
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in trainer.parameters} == {torch.float32}
    wanted = AutoModelForCausalLM.from_pretrained(foreign, dtype="auto")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(trainer.model.state_dict()[name], wanted.state_dict()[name])
    train_language(narrow(parquet, foreign), tmp_path / "run", device="cpu")
    loaded = load_language_model(tmp_path / "run" / "final")
    assert loaded.tokenizer.head_size == TOKENIZER.head_size
    other = tmp_path / "other"
    build(language_run().model.to_huggingface(TOKENIZER)).save_pretrained(other)
    TOKENIZER.save(other)
    with pytest.raises(UserError, match="belongs to weights"):
        load_language_model(tmp_path / "run" / "final", base=other)


def test_base_of_the_hub(
    parquet: Path, foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run as with its folder; its adapter finds its base again, or says that it cannot."""
    name = "zai-org/tiny@v1"
    asked: list[str] = []

    def fetch(repository: str, *, revision: str, **_: object) -> str:
        asked.append(f"{repository}@{revision}")
        return str(held)

    held = foreign
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    train_language(narrow(parquet, Path(name)), tmp_path / "hub", device="cpu")
    assert asked == [name]
    train_language(narrow(parquet, foreign), tmp_path / "folder", device="cpu")
    saved, other = (load_checkpoint(tmp_path / run / "final") for run in ("hub", "folder"))
    for key, array in saved.model.items():
        np.testing.assert_array_equal(array, other.model[key])
    assert name in (saved.path / "adapter_config.json").read_text()
    load_language_model(saved.path)
    ranker = load_ranker([], name)
    assert (ranker.name, ranker.folder) == ("tiny@v1", foreign)
    assert asked == [name] * 3
    held = tmp_path / "moved"
    build(language_run().model.to_huggingface(TOKENIZER)).save_pretrained(held)
    with pytest.raises(UserError, match="belongs to weights"):
        load_language_model(saved.path)


def test_wrong_bases(parquet: Path, foreign: Path, tmp_path: Path) -> None:
    """One line each: no folder, another network, no tokenizer, one that is too large."""
    rows = read_records(parquet)

    def told(base: Path, **model: int) -> str:
        config = narrow(parquet, base)
        changed = config.model_copy(update={"model": config.model.model_copy(update=model)})
        with pytest.raises(UserError) as caught:
            Trainer(changed, rows, rows)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in told(tmp_path / "absent")
    assert "num_hidden_layers is 1, but model.layers 2" in told(foreign, layers=2)
    copy = tmp_path / "copy"
    shutil.copytree(foreign, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    assert "they do not belong together" in told(copy)
    (copy / "tokenizer.json").write_text("{}")
    assert "cannot read the tokenizer" in told(copy)
    (copy / "tokenizer.json").unlink()
    assert "no tokenizer in" in told(copy)


def test_gradient_checkpointing_changes_nothing(parquet: Path, foreign: Path) -> None:
    rows, found = read_records(parquet), []
    for setting in (False, True):
        trainer = Trainer(narrow(parquet, foreign, gradient_checkpointing=setting), rows, rows)
        assert trainer.model.is_gradient_checkpointing == setting
        found.append([trainer.train_step(b)["loss"] for b in islice(trainer.batches(), 4)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# Folders


def test_transformers_reads_the_folder(trained: Path) -> None:
    own = load_language_model(trained / "final")
    other = AutoModelForCausalLM.from_pretrained(trained / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")
    text = "\nSpace group: 225 Fm-3m"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == TOKENIZER.encode(text)
    ids = prompts()[0]
    with torch.no_grad():
        wanted = other(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
    np.testing.assert_allclose(own([ids], [None])[0][0], wanted, rtol=1e-5, atol=1e-6)


def test_run_folder_is_its_latest_step(trained: Path) -> None:
    step = latest(trained)
    assert step is not None
    assert load_language_model(trained).name == load_checkpoint(step).hash


def test_it_is_told_what_it_was_trained_with(
    parquet: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Analogues in training are analogues in use; known polymorphs where one beside is wanted."""
    settings = {"analogues": 2, "steps": 2, "validation_every": 2, "token_budget": 900}
    train_language(language_run(parquet, **settings), tmp_path, device="cpu")
    told = load_language_model(tmp_path / "final")
    plain = load_language_model(trained / "final")
    seen: list[str] = []

    def write(prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
        seen.extend(map(TOKENIZER.decode, prompts))
        return [[] for _ in prompts]

    for model in (told, plain):
        monkeypatch.setattr(model, "write", write)
    question = Question.ask({38: 1, 22: 1, 8: 3})
    write_answers(told, [question])
    write_answers(told, [question], known=True)
    write_answers(plain, [question], known=True)
    assert [text.count("\nAnalogue: ") for text in seen] == [2, 2, 0]
    assert [text.count("\nKnown: 221 Pm-3m 1, Sr 1a Ti 1b O 3c") for text in seen] == [0, 1, 0]


def test_folder_of_transformers(model: LanguageModel, tmp_path: Path) -> None:
    model.model.save_pretrained(tmp_path, max_shard_size="40KB")
    TOKENIZER.save(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = prompts()[1]
    found = load_language_model(tmp_path)([ids], [None])[0][0]
    np.testing.assert_allclose(found, full_logits(model, ids), rtol=1e-5, atol=1e-5)


def test_device(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one here unless another is wanted; what is not here is refused."""

    def place(device: str) -> str:
        return next(load_language_model(trained / "final", device).model.parameters()).device.type

    monkeypatch.setattr(devices, "devices", lambda: ["meta", "cpu"])
    assert [place("auto"), place("cpu"), place("meta")] == ["meta", "cpu", "meta"]
    with pytest.raises(UserError, match="no device 'cuda' here: give meta or cpu"):
        place("cuda")


def refused(folder: Path) -> str:
    """The one line that a user gets."""
    with pytest.raises(UserError) as caught:
        load_language_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_folders(trained: Path, model: LanguageModel, tmp_path: Path) -> None:
    assert "absent" in refused(tmp_path / "absent")
    damaged = tmp_path / "damaged"
    shutil.copytree(trained / "final", damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refused(damaged)
    other = tmp_path / "other"
    model.model.save_pretrained(other)
    TOKENIZER.save(other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "model_type" in refused(other)
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "layers.2" in refused(other)
    (other / "config.json").write_text(json.dumps(config))
    shard = other / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "other" in refused(other)
    (other / "model.safetensors").unlink()
    assert "other" in refused(other)


def test_bad_folders_of_several_files(
    foreign: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The file is named, and nothing else is written."""
    folder = tmp_path / "several"
    shutil.copytree(foreign, folder)
    load_language_model(folder)
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-100])
    assert refused(folder).startswith(f"{last} is damaged")
    last.unlink()
    assert refused(folder).startswith(f"{last} is absent")
    assert capfd.readouterr() == ("", "")


def test_logits_do_not_hang_on_the_number_of_threads() -> None:
    """The shipped model's, whose probabilities `generate` writes down."""
    model = load_language_model(shipped_language()["glm4_tiny_fm"])
    questions = [list(range(5, 65 + 7 * i)) for i in range(6)]
    found = []
    for threads in (1, 2, 3):
        with threads_per_operation(threads):
            found.append(model(questions, [None] * len(questions))[0])
            assert torch.get_num_threads() == threads
    assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()
