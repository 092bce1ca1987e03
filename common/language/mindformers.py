"""A language model's run as MindFormers' own YAML says it, and back: ``configs/mindformers``.

Both spellings mean the same run. Sections of MindFormers that our settings have no word for (its
context, how processes divide the work, ...) are kept as they are and reach its Trainer; what it has
no word for stands in the section ``uni_mdm``.
"""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from common.config import parse_as
from common.errors import UserError
from common.language.config import LanguageRunConfig
from common.language.mindformers_sections import FILLED, KNOWN, OF_THE_BASE, differences, passed_on
from common.language.parameters import ATTENTION
from common.training import ADAM_BETAS, ADAM_EPS

#: Where a file in MindFormers' words has our settings; callbacks are named by their types.
_PLACES = {
    "name": "trainer.model_name",
    "model.layers": "model.model_config.num_layers",
    "model.width": "model.model_config.hidden_size",
    "model.heads": "model.model_config.num_attention_heads",
    "model.groups": "model.model_config.multi_query_group_num",
    "model.feed_forward": "model.model_config.ffn_hidden_size",
    "model.positions": "model.model_config.seq_length",
    "model.norm_eps": "model.model_config.layernorm_epsilon",
    "train.data": "train_dataset.data_loader.dataset_dir",
    "train.validation": "eval_dataset.data_loader.dataset_dir",
    "train.validation_rows": "eval_dataset.rows",
    "train.validation_every": "eval_step_interval",
    "train.log_every": "callbacks.MFLossMonitor.per_print_times",
    "train.checkpoint_every": "callbacks.CheckpointMonitor.save_checkpoint_steps",
    "train.steps": "lr_schedule.total_steps",
    "train.learning_rate": "lr_schedule.learning_rate",
    "train.warmup": "lr_schedule.warmup_steps",
    "train.weight_decay": "optimizer.weight_decay",
    "train.clip_norm": "runner_wrapper.max_grad_norm",
    "train.precision": "model.model_config.compute_dtype",
    "train.dropout": "model.model_config.hidden_dropout",
    "train.gradient_checkpointing": "recompute_config.recompute",
    "train.init_from": "load_checkpoint",
    "train.seed": "seed",
}
#: Of training, for which MindFormers has no place.
_OWN = (
    "questions",
    "analogues",
    "rehearsals",
    "analogue_dropout",
    "token_budget",
    "ema",
    "compile",
    "fsdp",
)
_ADAPTER = "model.model_config.pet_config"
#: Where users find all of our settings, some of which are not read as they stand there.
SAID_AT = _PLACES | {
    "train.final_rate": "lr_schedule.lr_end",
    "lora.rank": f"{_ADAPTER}.lora_rank",
    "lora.alpha": f"{_ADAPTER}.lora_alpha",
    "lora.targets": f"{_ADAPTER}.target_modules",
    "lora.base_precision": "model.model_config.param_init_type",
    **{f"train.{name}": f"uni_mdm.{name}" for name in _OWN},
}


def sections(run: LanguageRunConfig, network: Mapping[str, Any]) -> dict[str, Any]:
    """A run as MindFormers' YAML has it.

    Args:
        run: the run.
        network: content of the network's config.json.
    """
    train = run.train
    return {
        "seed": train.seed,
        "run_mode": "finetune" if run.lora else "train",
        "load_checkpoint": train.init_from or "",
        "trainer": {"type": "CausalLanguageModelingTrainer", "model_name": run.name},
        "model": {
            "model_config": {"type": "ChatGLM2Config", **model_config(run, network)},
            "arch": {"type": "ChatGLM2ForConditionalGeneration"},
        },
        "train_dataset": {
            "data_loader": {"type": "GeneratorDataset", "dataset_dir": train.data},
            "input_columns": ["input_ids", "labels", "share"],
        },
        "train_dataset_task": {"type": "CausalLanguageModelDataset"},
        "eval_dataset": {
            "data_loader": {"type": "GeneratorDataset", "dataset_dir": train.validation},
            "rows": train.validation_rows,
        },
        "eval_step_interval": train.validation_every,
        "runner_config": {"epochs": 1, "batch_size": 1, "sink_mode": False},
        "runner_wrapper": {
            "type": "AnswerStep",
            "scale_sense": 1.0,
            "use_clip_grad": True,
            "max_grad_norm": train.clip_norm,
        },
        "lr_schedule": {
            "type": "WarmUpCosineLR",
            "learning_rate": train.learning_rate,
            "lr_end": float(f"{train.learning_rate * train.final_rate:.9g}"),
            "warmup_steps": train.warmup,
            "total_steps": train.steps,
        },
        "optimizer": {
            "type": "AdamW",
            "betas": list(ADAM_BETAS),
            "eps": ADAM_EPS,
            "weight_decay": train.weight_decay,
        },
        "recompute_config": {"recompute": train.gradient_checkpointing},
        "callbacks": [
            {"type": "MFLossMonitor", "per_print_times": train.log_every},
            {"type": "CheckpointMonitor", "save_checkpoint_steps": train.checkpoint_every},
        ],
        **passed_on(run.mindformers),
        "uni_mdm": {name: _plain(getattr(train, name)) for name in _OWN},
    }


def network_settings(network: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Arguments of MindFormers' ChatGLM2Config, in float32.

    Args:
        network: content of config.json.
        length: tokens of a sequence, at most.
    """
    return {
        "num_layers": network["num_hidden_layers"],
        "padded_vocab_size": network["vocab_size"],
        "hidden_size": network["hidden_size"],
        "ffn_hidden_size": network["intermediate_size"],
        "kv_channels": network["head_dim"],
        "num_attention_heads": network["num_attention_heads"],
        "multi_query_group_num": network["num_key_value_heads"],
        "seq_length": length,
        "layernorm_epsilon": network["rms_norm_eps"],
        "rope_ratio": network["rope_theta"] / 10000.0,
        "pad_token_id": network["pad_token_id"],
        "eos_token_id": network["eos_token_id"],
        "hidden_dropout": 0.0,
        "attention_dropout": network.get("attention_dropout", 0.0),
        "param_init_type": "float32",
        "compute_dtype": "float32",
        "layernorm_compute_type": "float32",
        "rotary_dtype": "float32",
        "use_past": False,
        "use_flash_attention": True,
        "qkv_concat": False,
        "mlp_concat": False,
    }


def model_config(run: LanguageRunConfig, network: Mapping[str, Any]) -> dict[str, Any]:
    """The section of that name.

    Args:
        run: the run.
        network: content of the network's config.json.
    """
    settings = network_settings(network, run.model.positions)
    settings["compute_dtype"] = run.train.precision
    settings["hidden_dropout"] = run.train.dropout
    if run.lora is not None:
        settings["param_init_type"] = run.lora.base_precision
        settings["pet_config"] = {
            "pet_type": "lora",
            "lora_rank": run.lora.rank,
            "lora_alpha": run.lora.alpha,
            "lora_dropout": 0.0,
            "param_init_type": "float32",
            "target_modules": "|".join(f"{ATTENTION[name]}$" for name in run.lora.targets),
        }
    return settings


def check_stated(run: LanguageRunConfig, network: Mapping[str, Any], where: str) -> None:
    """Makes sure that a network is as the run's file in MindFormers' words has it, if it has one.

    Args:
        run: the run.
        network: content of config.json, of what it starts from.
        where: names that in errors.

    Raises:
        UserError: if a setting is another one.
    """
    if not run.network:
        return
    own = network_settings(network, run.model.positions)
    wrong = [
        f"model.model_config.{name} is {given}, but {own[name]} in {where}"
        for name, given in run.network.items()
        if given != own[name]
    ]
    if wrong:
        raise UserError(f"{'; '.join(wrong)}: write that, or give another load_checkpoint")


def parse_mindformers(data: Mapping[str, Any], where: str) -> LanguageRunConfig:
    """A run from MindFormers' YAML.

    Args:
        data: content of the file.
        where: names it in errors.

    Raises:
        UserError: if something is missing, out of its range, or would not be heeded.
    """
    if unknown := list(_unknown(data)):
        raise UserError(f"{where}: {'; '.join(unknown[:5])}")
    try:
        settings = _run_settings(data)
        network = _network(data["model"]["model_config"])
    except KeyError as error:
        raise UserError(f"{where}: MindFormers' setting {error} is missing") from error
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{where}: not as in configs/mindformers: {reason}") from error
    run = parse_as(LanguageRunConfig, settings, where)
    unheeded = list(differences("", sections(run, network), data))
    if unheeded:
        raise UserError(f"{where}: {'; '.join(unheeded[:5])}")
    return run


def _unknown(data: Mapping[str, Any]) -> Iterator[str]:
    """A line for every setting at the top of a file, or in our words, that MindFormers lacks."""
    for name, value in data.items():
        inner = value if isinstance(value, Mapping) else {}
        paths = [f"{name}.{key}" for key in inner]
        if name in KNOWN:  # `model` is a section of both
            paths = [path for path in paths if path in SAID_AT]
        for path in paths or ([] if name in KNOWN else [str(name)]):
            yield f"{path}: unknown in MindFormers' words{_meant(path)}"


def _meant(path: str) -> str:
    """What MindFormers calls one of our settings; or its section of nearly the same name."""
    section, _, rest = path.partition(".")
    if section == "mindformers" and rest:
        return f"; here it is {rest}"
    if path in SAID_AT:
        *sections, kind, key = SAID_AT[path].split(".")
        if sections == ["callbacks"]:
            return f"; here it is {key} of {kind} in callbacks"
        return f"; here it is {SAID_AT[path]}"
    near = get_close_matches(section, sorted(KNOWN), n=1)
    return f"; did you mean {'.'.join(filter(None, (*near, rest)))}?" if near else ""


def _network(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of config.json ``network_settings`` reads."""
    return {
        "num_hidden_layers": settings["num_layers"],
        "vocab_size": settings["padded_vocab_size"],
        "hidden_size": settings["hidden_size"],
        "intermediate_size": settings["ffn_hidden_size"],
        "head_dim": settings["hidden_size"] // settings["num_attention_heads"],
        "num_attention_heads": settings["num_attention_heads"],
        "num_key_value_heads": settings["multi_query_group_num"],
        "rms_norm_eps": settings["layernorm_epsilon"],
        "rope_theta": 10000.0 * settings["rope_ratio"],
        "pad_token_id": settings["pad_token_id"],
        "eos_token_id": settings["eos_token_id"],
        "attention_dropout": settings["attention_dropout"],
    }


def _run_settings(data: Mapping[str, Any]) -> dict[str, Any]:
    network, schedule = data["model"]["model_config"], data["lr_schedule"]
    places = {**data, "callbacks": {item["type"]: item for item in data["callbacks"]}}
    run: dict[str, Any] = {
        "kind": "language",
        "model": {},
        "train": {
            "final_rate": round(schedule["lr_end"] / schedule["learning_rate"], 12),
            **data["uni_mdm"],
        },
        "network": {name: network[name] for name in sorted(OF_THE_BASE)},
        "mindformers": passed_on({n: value for n, value in data.items() if n not in FILLED}),
    }
    for setting, place in _PLACES.items():
        *section, name = setting.split(".")
        value: Any = places
        for key in place.split("."):
            value = value[key]
        (run[section[0]] if section else run)[name] = value
    run["train"]["init_from"] = run["train"]["init_from"] or None
    adapter = network.get("pet_config")
    if adapter is not None:
        ours = {f"{theirs}$": name for name, theirs in ATTENTION.items()}
        run["lora"] = {
            "rank": adapter["lora_rank"],
            "alpha": adapter["lora_alpha"],
            "targets": [ours[name] for name in adapter["target_modules"].split("|")],
            "base_precision": network["param_init_type"],
        }
    return run


def _plain(value: Any) -> Any:
    """As YAML has it."""
    return list(value) if isinstance(value, tuple) else value
