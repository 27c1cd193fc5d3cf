"""The sections of Megatron-Bridge's configuration, and the keys that have moved or are new in some version.

Import only after ``wan_train.engine.start``.

Bridge 0.4 moved the keys of its own validation from ``train`` to a section ``validation``, whose name this package has
for its own section; that section then extends Bridge's.
"""

import dataclasses
from typing import Any

import megatron.bridge.training.config as bridge
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    DistributedInitConfig,
    LoggerConfig,
    OptimizerConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
)

__all__ = [
    "ONLY",
    "BridgeValidation",
    "CheckpointConfig",
    "ConfigContainer",
    "DistributedDataParallelConfig",
    "DistributedInitConfig",
    "LoggerConfig",
    "OptimizerConfig",
    "RNGConfig",
    "SchedulerConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "checkpoint_settings",
    "no_validation_by_bridge",
]


def has_key(section: type, name: str) -> bool:
    """Whether a section has a key in this version."""
    return name in {field.name for field in dataclasses.fields(section)}


@dataclasses.dataclass(kw_only=True)
class _NoValidation:
    """Bridge has no such section."""


_Theirs: Any = getattr(bridge, "ValidationConfig", None)
if _Theirs is not None:

    @dataclasses.dataclass(kw_only=True)
    class _OffByDefault(_Theirs):
        """Bridge's section, with which it validates nothing."""

        eval_iters: int | None = 0


# What this package's section ``validation`` extends.
BridgeValidation: Any = _NoValidation if _Theirs is None else _OffByDefault
_INSTEAD = "validate with validation.interval and validation.samples"

# Keys that not every version has: the key, its allowed values, and advice for any other value.
_OF_SOME_VERSIONS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("train.step_batch_size_schedule", (None,), "every step has train.global_batch_size packs"),
    ("train.num_epochs", (None,), "a run's length is train.train_iters"),
    ("train.skip_train", (False, None), "a run trains"),
    ("checkpoint.custom_manager_class", (None,), "only this package's saves can be resumed after a crash"),
    ("checkpoint.async_strategy", ("mcore",), "only Megatron-Core's writer is supervised"),
    ("checkpoint.also_save_hf_checkpoint", (False,), "use wan-train export"),
    ("checkpoint.load_main_params_from_ckpt", (False,), "the optimizer's weights follow from the others"),
    ("checkpoint.use_checkpoint_args", (False,), "a resumed run uses its own configuration"),
    ("dist.eval_context_parallel_size", (None,), _INSTEAD),
    ("ddp.average_in_collective", (False,), "gradients are summed over tokens and divided once"),
    ("ddp.num_distributed_optimizer_instances", (1,), "the optimizer's state has one part for each data-parallel rank"),
    ("ddp.use_megatron_fsdp", (False,), "use dist.use_megatron_fsdp for FSDP"),
    ("ddp.use_custom_fsdp", (False,), "use dist.use_megatron_fsdp for FSDP"),
    ("ddp.data_parallel_sharding_strategy", ("no_shard",), "leave it out, dist.use_megatron_fsdp decides it"),
    ("ddp.fp8_param_gather", (False,), "weights are fp32 or bf16: mixed_precision"),
    ("dataset.dataloader_load", (None,), "the data continue at the checkpoint's position"),
)
# Keys of Megatron-LM's loop that Bridge has from 0.4 on and does not read in any version, and those that it reads only
# for an export to Hugging Face's layout or for an asynchronous save with FSDP, which are refused.
_UNREAD = {
    "train": ("exit_signal_handler_for_training", "gpu_sniff_test_interval"),
    "logger": (
        *("log_device_memory_used", "log_memory_interval", "moe_routing_trace_path"),
        *("moe_routing_trace_max_training_iters", "moe_routing_trace_capture_logits"),
        *("moe_routing_trace_capture_hidden_states", "moe_routing_trace_dump_weights"),
    ),
    "checkpoint": (
        *("async_ckpt_use_cpu_shm", "auto_detect_ckpt_format", "ckpt_convert_update_legacy_dist_opt_format"),
        *("ckpt_fully_parallel_load_exchange_algo", "ckpt_fully_parallel_load_process_group"),
        *("ckpt_fully_parallel_save_process_group", "ckpt_load_validate_sharding_integrity"),
        *("dist_ckpt_save_pre_mcore_014", "dist_ckpt_workers", "hf_distributed_save", "hf_save_every_n_ranks"),
        *("hf_source_path", "hf_trust_remote_code", "save_activations_interval", "save_dgrads_interval"),
        *("save_params_interval", "save_retain_interval", "save_tokens_per_expert_interval", "save_wgrads_interval"),
        *("use_mp_args_from_checkpoint_args", "use_tokenizer_model_from_checkpoint_args", "verify_integrity"),
    ),
}


# Keys of language models, of other optimizers and of fp16, without effect on a Wan model that is trained with Adam.
_WITHOUT_EFFECT = {
    "optimizer": (
        *("decoupled_lr", "decoupled_min_lr", "apply_wd_to_qk_layernorm", "log_num_zeros_in_grad", "sgd_momentum"),
        *("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
        *("muon_momentum", "muon_split_qkv", "muon_use_nesterov", "muon_scale_mode", "muon_fp32_matmul_prec"),
        *("muon_num_ns_steps", "muon_tp_mode", "muon_extra_scale_factor", "reuse_grad_buf_for_mxfp8_param_ag"),
    ),
    "scheduler": ("no_weight_decay_cond_type",),
    "checkpoint": (
        *("non_persistent_ckpt_type", "non_persistent_global_ckpt_dir"),
        *("non_persistent_local_ckpt_dir", "non_persistent_local_ckpt_algo"),
    ),
}
_UNUSED = "it has no effect on a Wan model, so leave it out"
# Sections that Bridge has only on demand, for parts of its loop that are not used here.
_INSTEAD_OF_SECTION = {
    "peft": "adapters are the section lora",
    "comm_overlap": "set ddp.overlap_grad_reduce and ddp.overlap_param_gather",
}


def _only() -> tuple[tuple[str, tuple[Any, ...], str], ...]:
    sections = {
        "train": TrainingConfig,
        "logger": LoggerConfig,
        "checkpoint": CheckpointConfig,
        "dist": DistributedInitConfig,
        "ddp": DistributedDataParallelConfig,
        "optimizer": OptimizerConfig,
        "scheduler": SchedulerConfig,
        "dataset": bridge.DatasetProvider,
    }
    rows = [row for row in _OF_SOME_VERSIONS if has_key(sections[(path := row[0].split("."))[0]], path[1])]
    fields = dataclasses.fields(BridgeValidation)
    evaluates = ("train.eval_iters", (0, None) if fields else (0,), _INSTEAD)
    theirs = [(f"validation.{field.name}", (field.default,), _INSTEAD) for field in fields]
    unused = [
        (f"{section}.{field.name}", (field.default,), advice)
        for table, advice in (
            (_UNREAD, "Megatron-Bridge does not read it, so leave it out"),
            (_WITHOUT_EFFECT, _UNUSED),
        )
        for section, names in table.items()
        for field in dataclasses.fields(sections[section])
        if field.name in names
    ]
    on_demand = [
        (field.name, (None,), _INSTEAD_OF_SECTION.get(field.name, _UNUSED))
        for field in dataclasses.fields(ConfigContainer)
        if field.default is None and field.name != "mixed_precision"
    ]
    return (evaluates, *rows, *theirs, *unused, *on_demand)


# Of the keys above those that this version has, and those of Bridge's own validation.
ONLY = _only()


def no_validation_by_bridge(train_iters: int) -> dict[str, Any]:
    """Arguments of ``TrainingConfig``, where it has the keys of Bridge's validation."""
    return {} if dataclasses.fields(BridgeValidation) else {"eval_iters": 0, "eval_interval": train_iters}


def checkpoint_settings() -> dict[str, Any]:
    """Further arguments of ``CheckpointConfig``: the writer of asynchronous saves, where there is more than one."""
    return {"async_strategy": "mcore"} if has_key(CheckpointConfig, "async_strategy") else {}
