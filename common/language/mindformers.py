"""A language model's run as MindFormers' own YAML says it, and back: ``configs/mindformers``.

Both spellings mean the same run. Sections of MindFormers that our settings have no word for (its
context, how processes divide the work, ...) are kept as they are and reach its Trainer; what it has
no word for stands in the section ``uni_mdm``.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from common.config import parse_as
from common.errors import UserError
from common.language.config import FILLED, LanguageRunConfig
from common.language.parameters import ATTENTION
from common.training import ADAM_BETAS, ADAM_EPS

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
#: What the others are where nobody says more: one process, or some with a part of the data each.
USUAL: dict[str, Any] = {
    "auto_trans_ckpt": False,
    "only_save_strategy": False,
    "resume_training": False,
    "context": {"mode": 0, "max_call_depth": 10000, "save_graphs": False},
    "parallel": {"parallel_mode": 0, "gradients_mean": True, "full_batch": False},
    "parallel_config": {
        "data_parallel": 1,
        "model_parallel": 1,
        "pipeline_stage": 1,
        "micro_batch_num": 1,
        "gradient_aggregation_group": 4,
    },
    "micro_batch_interleave_num": 1,
}


def sections(run: LanguageRunConfig, network: Mapping[str, Any]) -> dict[str, Any]:
    """A run as MindFormers' YAML has it.

    Args:
        run: the run.
        network: content of the network's config.json.
    """
    train = run.train
    others = {**USUAL, **run.mindformers}
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
        **others,
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


def parse_mindformers(data: Mapping[str, Any], where: str) -> LanguageRunConfig:
    """A run from MindFormers' YAML.

    Args:
        data: content of the file.
        where: names it in errors.

    Raises:
        UserError: if something is missing, out of its range, or would not be heeded.
    """
    try:
        settings = _run_settings(data)
        network = _network(data["model"]["model_config"])
    except KeyError as error:
        raise UserError(f"{where}: MindFormers' setting {error} is missing") from error
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{where}: not as in configs/mindformers: {reason}") from error
    run = parse_as(LanguageRunConfig, settings, where)
    unheeded = list(_differences("", sections(run, network), data))
    if unheeded:
        raise UserError(f"{where}: {'; '.join(unheeded[:5])}")
    return run


def _differences(name: str, ours: Any, given: Any) -> Iterator[str]:
    """Settings that are other ones here than what a file says."""
    if isinstance(ours, Mapping) and isinstance(given, Mapping):
        for key in (*ours, *(given.keys() - ours.keys())):
            path = f"{name}.{key}".lstrip(".")
            if key not in given:
                yield f"{path} is missing: write {ours[key]}"
            elif key not in ours:
                yield f"{path} would not be heeded: leave it out"
            else:
                yield from _differences(path, ours[key], given[key])
    elif ours != given:
        yield f"{name} is {given}, but only {ours} is heeded"


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
    }


def _run_settings(data: Mapping[str, Any]) -> dict[str, Any]:
    network, schedule = data["model"]["model_config"], data["lr_schedule"]
    intervals = {item["type"]: item for item in data["callbacks"]}
    train = {
        "data": data["train_dataset"]["data_loader"]["dataset_dir"],
        "validation": data["eval_dataset"]["data_loader"]["dataset_dir"],
        "validation_rows": data["eval_dataset"]["rows"],
        "validation_every": data["eval_step_interval"],
        "log_every": intervals["MFLossMonitor"]["per_print_times"],
        "checkpoint_every": intervals["CheckpointMonitor"]["save_checkpoint_steps"],
        "steps": schedule["total_steps"],
        "learning_rate": schedule["learning_rate"],
        "warmup": schedule["warmup_steps"],
        "final_rate": round(schedule["lr_end"] / schedule["learning_rate"], 12),
        "weight_decay": data["optimizer"]["weight_decay"],
        "clip_norm": data["runner_wrapper"]["max_grad_norm"],
        "precision": network["compute_dtype"],
        "dropout": network["hidden_dropout"],
        "gradient_checkpointing": data["recompute_config"]["recompute"],
        "init_from": data["load_checkpoint"] or None,
        "seed": data["seed"],
        **data["uni_mdm"],
    }
    run = {
        "name": data["trainer"]["model_name"],
        "kind": "language",
        "model": {
            "layers": network["num_layers"],
            "width": network["hidden_size"],
            "heads": network["num_attention_heads"],
            "groups": network["multi_query_group_num"],
            "feed_forward": network["ffn_hidden_size"],
            "positions": network["seq_length"],
            "norm_eps": network["layernorm_epsilon"],
        },
        "train": train,
        "mindformers": {name: value for name, value in data.items() if name not in FILLED},
    }
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
