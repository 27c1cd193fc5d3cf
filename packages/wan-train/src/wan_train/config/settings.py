"""Validation of a configuration, and settings derived from others.

Import only after ``wan_train.engine.start``.

Megatron-Bridge's sections have some five hundred keys, made for language models. Keys that would have no effect on a
Wan run, or would break its guarantees, are errors instead of being ignored.
"""

import dataclasses
import math
import os
from typing import Any

from wan_model.system.files import require_local
from wan_train.engine.installed import is_installed
from wan_train.engine.upstream.configuration import ONLY
from wan_train.engine.upstream.loop import TransformerConfig
from wan_train.model.provider import WanModelProvider

# Key, allowed values, and advice for any other value.
_ONLY: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("train.micro_batch_size", (1,), "a micro-batch is one pack; set train.global_batch_size"),
    ("train.train_samples", (None,), "a run's length is train.train_iters"),
    ("train.rampup_batch_size", (None,), "every step has train.global_batch_size packs"),
    ("train.decrease_batch_size_if_needed", (False,), "every step has train.global_batch_size packs"),
    ("train.iterations_to_skip", ([], None), "the saves and the exit of a step that is not trained would be left out"),
    ("dist.use_torch_fsdp2", (False,), "use dist.use_megatron_fsdp for FSDP"),
    ("checkpoint.ckpt_format", ("torch_dist", "fsdp_dtensor"), "leave it out, dist.use_megatron_fsdp decides it"),
    ("checkpoint.dist_ckpt_optim_fully_reshardable", (True,), "a run is not resumed exactly from the other format"),
    ("checkpoint.pretrained_checkpoint", (None,), "use checkpoint.load with checkpoint.finetune=true, or --init-from"),
    ("checkpoint.ckpt_convert_format", (None,), "use wan-train export"),
    ("checkpoint.non_persistent_save_interval", (None,), "use checkpoint.save_interval with checkpoint.most_recent_k"),
    ("scheduler.use_checkpoint_opt_param_scheduler", (False,), "a resumed run uses its own configuration"),
    ("scheduler.override_opt_param_scheduler", (True,), "a resumed run uses its own configuration"),
    ("scheduler.lr_warmup_samples", (0,), "a schedule is counted in steps: scheduler.lr_warmup_iters"),
    ("scheduler.lr_decay_samples", (None,), "a schedule is counted in steps: scheduler.lr_decay_iters"),
    ("scheduler.lr_wsd_decay_samples", (None,), "a schedule is counted in steps: scheduler.lr_wsd_decay_iters"),
    ("scheduler.lr_warmup_fraction", (None,), "a warm-up is counted in steps: scheduler.lr_warmup_iters"),
    ("optimizer.overlap_param_gather_with_optimizer_step", (False,), "use ddp.overlap_param_gather"),
    ("optimizer.optimizer", ("adam",), "only Adam's state is saved and resumed"),
    ("mixed_precision", (None, "bf16_mixed", "bf16-mixed"), "expected null (fp32) or bf16_mixed"),
    ("model.fp16", (False,), "set mixed_precision to null (fp32) or bf16_mixed"),
    ("model.bf16", (False,), "set mixed_precision to null (fp32) or bf16_mixed"),
    ("model.virtual_pipeline_model_parallel_size", (None,), "virtual pipeline stages are not supported"),
    ("model.expert_model_parallel_size", (1,), "a Wan model has no experts"),
)
# Megatron's keys of a transformer and of its parallelism that have an effect on a Wan model. The exchange between
# pipeline stages is Megatron's own, so are its keys; the linears use the fusion, if its kernel is installed.
_SUPPORTED = frozenset(
    {
        *("recompute_granularity", "recompute_method", "recompute_num_layers"),
        *("tensor_model_parallel_size", "sequence_parallel", "context_parallel_size", "pipeline_model_parallel_size"),
        *("pipeline_model_parallel_comm_backend", "batch_p2p_comm", "batch_p2p_sync", "use_ring_exchange_p2p"),
        *("deallocate_pipeline_outputs", "gradient_accumulation_fusion", "barrier_with_L1_time", "deterministic_mode"),
    }
)
_FUSION_KERNEL = "fused_weight_gradient_mlp_cuda"
# Megatron seeds NumPy, which takes 32 bits, with this and an addition for each rank.
_LARGEST_SEED = 4_000_000_000
# What libraries need beside torch's own switch to repeat a run to the bit. Megatron-Bridge accepts these algorithms.
_NCCL_ALGORITHMS = ("Tree", "Ring", "CollnetDirect", "CollnetChain", "^NVLS")
_DETERMINISTIC = {
    "NCCL_ALGO": "Ring",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}
_OURS = {
    "num_layers": "model.transformer.num_layers",
    "num_attention_heads": "model.transformer.num_attention_heads",
    "hidden_size": "model.transformer.num_attention_heads and attention_head_dim",
    "kv_channels": "model.transformer.attention_head_dim",
    "ffn_hidden_size": "model.transformer.ffn_dim",
    "layernorm_epsilon": "model.transformer.eps",
    "attention_backend": "model.attention",
    "fp8": "mixed_precision",
    "recompute_modules": "model.recompute_granularity, whose selective recomputes all but self-attention (Megatron's "
    "recomputes only that)",
}


# Paths that Megatron and wan-train open themselves. What else a section names is read through resolve_folder.
_LOCAL = ("checkpoint.save", "checkpoint.load", "lora.init_from", "samples.prompts")


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def check_settings(config: Any) -> None:
    """Validate a configuration.

    Raises:
        ValueError: a setting is invalid; the message names the key and what to do.
    """
    for key, possible, instead in (*_ONLY, *ONLY):
        if (value := _value(config, key)) not in possible:
            raise ValueError(f"{key} is {value!r}; {instead}")
    for key in _LOCAL:
        require_local(key, _value(config, key))
    for key in ("train.train_iters", "train.global_batch_size"):
        if (value := _value(config, key)) is None or value < 1:
            raise ValueError(f"{key} is {value!r}; expected at least 1")
    if config.rng.seed is None or not 1 <= config.rng.seed <= _LARGEST_SEED:
        raise ValueError(f"rng.seed is {config.rng.seed!r}; expected 1 to {_LARGEST_SEED}")
    fresh, sizes = WanModelProvider(), config.model.wan_config
    follows = {
        "num_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "hidden_size": sizes.hidden_size,
        "kv_channels": sizes.head_dim,
        "ffn_hidden_size": sizes.ffn_dim,
        "layernorm_epsilon": sizes.eps,
    }
    for field in dataclasses.fields(TransformerConfig):
        value = getattr(config.model, field.name)
        if field.name in _SUPPORTED or value == getattr(fresh, field.name):
            continue
        if field.name in follows and value == follows[field.name]:
            continue
        instead = f"set {_OURS[field.name]}" if field.name in _OURS else "leave it out"
        raise ValueError(f"model.{field.name} is {value!r}, which has no effect on a Wan model; {instead}")
    if config.dist.use_megatron_fsdp and config.ema.decay:
        raise ValueError("ema.decay is not supported with dist.use_megatron_fsdp; set it to 0")
    if config.dist.use_megatron_fsdp and config.checkpoint.async_save:
        raise ValueError("checkpoint.async_save is not supported with dist.use_megatron_fsdp; set it to false")
    if config.model.gradient_accumulation_fusion and not is_installed(_FUSION_KERNEL):
        raise ValueError(
            f"model.gradient_accumulation_fusion needs APEX's {_FUSION_KERNEL}, which is not installed; set it to false"
        )
    ours, theirs = config.optimizer.use_distributed_optimizer, config.ddp.use_distributed_optimizer
    if ours != theirs:
        raise ValueError(
            f"optimizer.use_distributed_optimizer is {ours} and ddp.use_distributed_optimizer is {theirs}; set both"
        )
    if config.mixed_precision is not None and not ours and config.checkpoint.save is not None:
        raise ValueError(
            "optimizer.use_distributed_optimizer is false and mixed_precision is set: Megatron cannot save that "
            "optimizer's state, because some weights are fp32 beside others in bf16; set it and "
            "ddp.use_distributed_optimizer to true"
        )
    _check_schedule(config.optimizer, config.scheduler)
    if config.model.deterministic_mode:
        _check_deterministic(config)
    config.validation.check()
    config.ema.check()
    config.lora.check(sizes, recompute=config.model.recompute, fully_sharded=config.dist.use_megatron_fsdp)
    config.samples.check(ema_decay=config.ema.decay, saved=config.checkpoint.save is not None)


def _check_schedule(optimizer: Any, scheduler: Any) -> None:
    """What Megatron only asserts, or changes without a word."""
    expected = {
        "lr": (lambda value: value > 0, "a number above 0"),
        "min_lr": (lambda value: value >= 0, "0 or more"),
        "weight_decay": (lambda value: value >= 0, "0 or more"),
        "clip_grad": (lambda value: value >= 0, "0 for no clipping, or more"),
        "adam_beta1": (lambda value: 0 <= value < 1, "0 or more and below 1"),
        "adam_beta2": (lambda value: 0 <= value < 1, "0 or more and below 1"),
        "adam_eps": (lambda value: value > 0, "a number above 0"),
    }
    for name, (possible, what) in expected.items():
        value = getattr(optimizer, name)
        if value is None or not possible(value):
            raise ValueError(f"optimizer.{name} is {value!r}; expected {what}")
    if optimizer.min_lr > optimizer.lr:
        raise ValueError(
            f"optimizer.min_lr is {optimizer.min_lr}, above optimizer.lr, which is {optimizer.lr}; set both"
        )
    warmup, decay = scheduler.lr_warmup_iters, scheduler.lr_decay_iters
    if warmup < 0:
        raise ValueError(f"scheduler.lr_warmup_iters is {warmup}; expected 0 or more steps")
    if not 0 <= scheduler.lr_warmup_init <= optimizer.lr:
        raise ValueError(
            f"scheduler.lr_warmup_init is {scheduler.lr_warmup_init}; expected 0 to optimizer.lr, {optimizer.lr}"
        )
    if decay is not None and decay <= warmup:
        raise ValueError(
            f"scheduler.lr_decay_iters is {decay} and scheduler.lr_warmup_iters {warmup}; the decay must end after the "
            "warm-up"
        )
    if scheduler.lr_decay_style == "WSD" and scheduler.lr_wsd_decay_iters is None:
        raise ValueError("scheduler.lr_decay_style is WSD, which needs scheduler.lr_wsd_decay_iters")
    start, end = scheduler.start_weight_decay, scheduler.end_weight_decay
    start, end = (optimizer.weight_decay if value is None else value for value in (start, end))
    if not 0 <= start <= end or (start != end and scheduler.weight_decay_incr_style == "constant"):
        raise ValueError(
            f"the weight decay goes from {start} (scheduler.start_weight_decay, else optimizer.weight_decay) to {end} "
            f"(scheduler.end_weight_decay) with scheduler.weight_decay_incr_style={scheduler.weight_decay_incr_style}; "
            "it can only grow, and not if constant"
        )


def _check_deterministic(config: Any) -> None:
    if config.model.attention == "cudnn":
        raise ValueError(
            "model.attention is cudnn, whose backward pass is not deterministic, and model.deterministic_mode is true; "
            "set model.attention to auto, flash or varlen"
        )
    algorithm = os.environ.get("NCCL_ALGO", _NCCL_ALGORITHMS[0])
    if algorithm not in _NCCL_ALGORITHMS:
        expected = ", ".join(_NCCL_ALGORITHMS)
        raise ValueError(
            f"NCCL_ALGO is {algorithm!r} and model.deterministic_mode is true; unset it, or set one of {expected}"
        )
    if os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0") != "0":
        raise ValueError("model.deterministic_mode is true; unset NVTE_ALLOW_NONDETERMINISTIC_ALGO")


def derive_settings(config: Any, *, on_cpu: bool) -> None:
    """Set what follows from other settings.

    Raises:
        ValueError: the device cannot do what a setting says.
    """
    if config.model.deterministic_mode:
        for name, value in _DETERMINISTIC.items():
            os.environ.setdefault(name, value)
    if on_cpu and config.optimizer.optimizer_cpu_offload:
        raise ValueError("optimizer.optimizer_cpu_offload is True, and there is no GPU to offload from; leave it out")
    config.model.ema_decay = config.ema.decay
    config.model.lora = config.lora.settings()
    config.model.fp8_base, config.model.offload_base = config.lora.fp8_base, config.lora.offload_base
    optimizer, scheduler = config.optimizer, config.scheduler
    if optimizer.clip_grad == 0:
        optimizer.clip_grad = math.inf  # the NaN guard needs the norm, which is computed only for clipping
    if scheduler.lr_decay_iters is None:
        # A run that ends during warm-up has no decay.
        scheduler.lr_decay_iters = max(config.train.train_iters, scheduler.lr_warmup_iters + 1)
    # Megatron uses the scheduler's weight decay and ignores the optimizer's.
    for name in ("start_weight_decay", "end_weight_decay"):
        if getattr(scheduler, name) is None:
            setattr(scheduler, name, optimizer.weight_decay)
    if config.dist.use_megatron_fsdp:
        from wan_train.model import fsdp

        fsdp.configure(config, on_cpu=on_cpu)
