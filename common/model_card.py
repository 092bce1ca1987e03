"""The card of a finished run: what it learned from, for how long, and what its loss became."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from common.checkpoint import CONFIG
from common.weights import STANDARDIZER_PREFIX

if TYPE_CHECKING:
    from common.training import TrainingRun

#: Of the losses on validation rows: the whole one, and of language models that of an answer.
_LOSSES = ("loss", "answer")


def model_card(run: "TrainingRun[Any]", validation: Mapping[str, float]) -> str:
    """Markdown for a run's ``final/README.md``.

    Args:
        run: after its last step.
        validation: losses on the validation rows then, by name.
    """
    settings = run.config.train
    *before, (data, rows) = run.account["data"]
    learned = f"{data}, {rows:,} rows, fingerprint `{run.fingerprint}`"
    if before:
        learned += "; before that from " + ", ".join(f"{name}, {n:,} rows" for name, n in before)
    processes = f" in {run.shard.count} processes" if run.shard.count > 1 else ""
    start = f"what `{settings.init_from}` has" if settings.init_from else "random weights"
    arrays = run.model_arrays().items()
    size = sum(array.size for name, array in arrays if not name.startswith(STANDARDIZER_PREFIX))
    losses = [f"{name} {validation[name]:.4f}" for name in _LOSSES if name in validation]
    return "\n".join(
        [
            f"# {run.config.name}\n",
            f"{run.description} {size:,} parameters.\n",
            f"- **Data:** learned from {learned}.",
            f"- **Budget:** {run.step:,} steps, {run.seconds:,.0f} s of training{processes}, "
            f"{settings.precision}; from {start}.",
            f"- **Loss** on the first {settings.validation_rows:,} rows of {settings.validation}, "
            f"as far as there are so many: {', '.join(losses)}.",
            f"- **Settings:** `{CONFIG}` beside this card (seed {settings.seed}).\n",
            "Nothing but the loss was measured; `uni-mdm evaluate` measures what it is worth.",
            "",
        ]
    )
