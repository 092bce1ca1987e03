"""Sections of MindFormers' YAML: which there are, and what of them a run heeds.

A run is one of several processes that divide every batch, in graph mode, and its checkpoints are
this project's. What says otherwise, or nothing, is not passed on, and refused where it is read.
"""

from collections.abc import Iterator, Mapping
from typing import Any

#: Those that our settings fill.
FILLED = frozenset(
    {
        "seed",
        "run_mode",
        "load_checkpoint",
        "model",
        "trainer",
        "train_dataset",
        "train_dataset_task",
        "eval_dataset",
        "eval_step_interval",
        "runner_config",
        "runner_wrapper",
        "lr_schedule",
        "optimizer",
        "recompute_config",
        "callbacks",
        "uni_mdm",
    }
)
#: What others are where nobody says more: one process, or some with a part of the data each.
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
#: What may be given, or be something else than usual, and has an effect then.
HEEDED = frozenset(
    {
        "context.affinity_config",
        "context.affinity_cpu_list",
        "context.ascend_config",
        "context.jit_config",
        "context.max_call_depth",
        "context.max_device_memory",
        "context.memory_optimize_level",
        "context.mempool_block_size",
        "context.save_graphs",
        "context.save_graphs_path",
        "parallel.all_reduce_fusion_config",
        "parallel.comm_fusion",
        "init_start_profile",
        "mstx",
        "profile",
        "profile_communication",
        "profile_level",
        "profile_memory",
        "profile_pipeline",
        "profile_rank_ids",
        "profile_start_step",
        "profile_stop_step",
        "train_precision_sync",
    }
)
#: What else MindFormers 1.9 knows at the top of a file, without effect on such a run.
_IDLE = frozenset(
    {
        "adapter_id",
        "balanced_load",
        "data_skip_steps",
        "do_eval",
        "eval_callbacks",
        "eval_dataset_task",
        "eval_epoch_interval",
        "exclude_cann_cpu",
        "ignore_data_skip",
        "infer_precision_sync",
        "input_data",
        "layer_decay",
        "layer_scale",
        "load_ckpt_async",
        "load_ckpt_format",
        "lr_scale",
        "lr_scale_factor",
        "metric",
        "moe_config",
        "monitor_config",
        "output_dir",
        "postprocess_use_numpy",
        "predict_batch_size",
        "pretrained_model_dir",
        "print_separate_loss",
        "processor",
        "remote_save_url",
        "reshard_worker_num",
        "save_file",
        "src_strategy_path_or_dir",
        "swap_config",
        "transform_process_num",
        "use_legacy",
        "use_legacy_format",
        "use_parallel",
    }
)
#: What a file says of the network, and a run has from the weights that it starts from.
OF_THE_BASE = frozenset(
    {
        "padded_vocab_size",
        "kv_channels",
        "layernorm_epsilon",
        "rope_ratio",
        "pad_token_id",
        "eos_token_id",
        "attention_dropout",
    }
)
#: All that may stand at the top of a file.
KNOWN = FILLED | USUAL.keys() | {name for name in HEEDED if "." not in name} | _IDLE


def passed_on(given: Mapping[str, Any]) -> dict[str, Any]:
    """Sections that no setting of ours fills, as MindFormers gets them.

    Args:
        given: of these, in place of the usual ones or beside them; only what is heeded is taken.
    """
    found = {name: dict(u) if isinstance(u, Mapping) else u for name, u in USUAL.items()}
    for name, value in given.items():
        if name in HEEDED:
            found[name] = value
        elif isinstance(value, Mapping) and isinstance(found.get(name), dict):
            found[name] |= {key: v for key, v in value.items() if f"{name}.{key}" in HEEDED}
    return found


def unheeded(given: Mapping[str, Any]) -> list[str]:
    """A line for everything in such sections that is not passed on."""
    return list(differences("", passed_on(given), given, whole=False))


def differences(name: str, ours: Any, given: Any, whole: bool = True) -> Iterator[str]:
    """A line for every setting that is another one here than what a file says.

    Args:
        name: of the section; empty for all of them.
        ours: what MindFormers gets.
        given: what the file says.
        whole: whether it must say everything.
    """
    if isinstance(ours, Mapping) and isinstance(given, Mapping):
        for key in (*ours, *(key for key in given if key not in ours)):
            path = f"{name}.{key}".lstrip(".")
            if key not in ours:
                yield f"{path} would not be heeded: leave it out"
            elif key in given:
                yield from differences(path, ours[key], given[key], whole)
            elif whole:
                yield f"{path} is missing: write {ours[key]}"
    elif ours != given:
        yield f"{name} is {given}, but only {ours} is heeded"
