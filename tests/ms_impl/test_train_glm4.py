"""GLM-4's rate of learning in a graph, and what is refused; tests/parity trains with it."""

from importlib.util import find_spec

import mindspore as ms
import pytest

from common.config import TORCH_ONLY, Optimisation
from common.errors import UserError
from common.language.config import LanguageRunConfig, LanguageTrainConfig
from common.language.mindformers_sections import KNOWN
from common.training import TrainingRun
from ms_impl import glm4
from ms_impl.device import say_unheeded
from ms_impl.mindformers_parts import WarmUpCosineLR
from ms_impl.train_glm4 import Trainer
from tests.conftest import REPOSITORY
from tests.training import textbook_records


@pytest.mark.parametrize("warmup", [0, 3, 12])
def test_rate(warmup: int) -> None:
    """Of every step and beyond the last one."""
    settings = Optimisation(learning_rate=0.2, final_rate=0.1, warmup=warmup, steps=12)
    run = type("Run", (), {"config": type("Config", (), {"train": settings})})()
    rate = WarmUpCosineLR(0.2, 0.02, warmup, 12)
    for step in range(14):
        found = float(rate(ms.Tensor([step], ms.int32)).asnumpy().reshape(()))
        assert found == pytest.approx(TrainingRun.learning_rate(run, step), rel=1e-5), step


def trained(**settings: object) -> str:
    """The one line that a user gets."""
    model = {"layers": 1, "width": 32, "heads": 4, "groups": 2, "feed_forward": 48}
    data = {"name": "tiny", "kind": "language", "model": model, "train": settings}
    records = textbook_records()
    with pytest.raises(UserError) as caught:
        Trainer(LanguageRunConfig.model_validate(data), records, records)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_mindformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glm4, "find_spec", lambda name: None)
    assert "MindFormers is not installed" in trained()


def test_precision() -> None:
    assert "float16" in trained(precision="float16")


def test_unknown_weights() -> None:
    assert "does not exist" in trained(init_from="absent")


@pytest.mark.skipif(
    find_spec("mindformers") is None, reason="MindFormers is not installed: scripts/install.sh"
)
def test_sections_are_mindformers_own() -> None:
    """Those that stand in its template, which completes a file; and nothing else reaches it."""
    glm4.prepare_mindformers()
    from mindformers.tools.register.template import CONFIG_NAME_TO_CLASS, GeneralConfig

    own = {"run_mode", *GeneralConfig.keys(), *CONFIG_NAME_TO_CLASS} - {"general_config"}
    assert KNOWN - {"uni_mdm"} == own


def test_what_is_torchs_alone_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    trained(precision="float16", compile=True)
    line = "train.compile: torch's alone, without effect on MindSpore\n"
    assert capsys.readouterr().err == line
    trained(precision="float16")
    assert not capsys.readouterr().err
    train = LanguageTrainConfig(compile=True, fsdp=True)
    say_unheeded(train)
    assert capsys.readouterr().err.startswith("train.compile, train.fsdp: torch's alone")


def test_what_is_torchs_alone_is_documented() -> None:
    """And says so where it is described."""
    text = (REPOSITORY / "docs" / "ascend.md").read_text()
    assert TORCH_ONLY
    for name in TORCH_ONLY:
        assert f"`train.{name}`" in text
        assert "(torch" in str(LanguageTrainConfig.model_fields[name].description)
