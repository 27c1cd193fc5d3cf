"""Recipes: each a function that returns the whole configuration of a run.

Import only after ``wan_train.engine.start``. Values that are not ours are those of NVIDIA's Wan recipe: Adam 0.9/0.95,
eps 1e-8, clipping at 1, 2,000 warm-up steps, seed 1234.
"""

from collections.abc import Callable
from typing import Literal

from wan_model import WAN_1_3B, WAN_14B, WanConfig
from wan_model.flow import FlowMatching
from wan_model.tiny import TINY_CONFIG
from wan_train.config.options import RECIPES
from wan_train.config.schema import WanRunConfig
from wan_train.data.dataset import WanDatasetConfig
from wan_train.data.mock_data import MockConfig
from wan_train.engine.upstream.configuration import (
    CheckpointConfig,
    DistributedDataParallelConfig,
    DistributedInitConfig,
    LoggerConfig,
    OptimizerConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    checkpoint_settings,
    no_validation_by_bridge,
)
from wan_train.model.provider import WanModelProvider, transformer_section

TrainingMode = Literal["pretrain", "finetune"]


def _config(
    model: WanConfig,
    mode: TrainingMode,
    *,
    capacity: int,
    bf16: bool,
    learning_rate: float,
    iterations: int,
    warmup: int,
) -> WanRunConfig:
    flow = FlowMatching.pretrain() if mode == "pretrain" else FlowMatching.finetune()
    return WanRunConfig(
        model=WanModelProvider(transformer=transformer_section(model), flow=flow, seq_length=capacity),
        dataset=WanDatasetConfig(capacity=capacity),
        train=TrainingConfig(
            train_iters=iterations, global_batch_size=1, micro_batch_size=1, **no_validation_by_bridge(iterations)
        ),
        optimizer=OptimizerConfig(
            optimizer="adam", lr=learning_rate, min_lr=learning_rate / 10, adam_beta1=0.9, adam_beta2=0.95,
            adam_eps=1e-8, weight_decay=0.01, clip_grad=1.0, use_distributed_optimizer=True,
        ),
        scheduler=SchedulerConfig(
            lr_decay_style="cosine", lr_warmup_iters=warmup,
            # A resumed run uses its settings; Megatron would raise an error where they differ from the checkpoint's.
            override_opt_param_scheduler=True,
        ),
        # A non-finite gradient is found in the gradient's norm, on every rank at once, after the reduction.
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=True, check_for_nan_in_grad=False),
        checkpoint=CheckpointConfig(
            save_interval=1000, ckpt_format="torch_dist", dist_ckpt_optim_fully_reshardable=True,
            exit_on_missing_checkpoint=True, save_tokenizer_assets=False, **checkpoint_settings(),
        ),
        logger=LoggerConfig(log_interval=10),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=1),
        rng=RNGConfig(seed=1234),
        dist=DistributedInitConfig(),
        mixed_precision="bf16_mixed" if bf16 else None,
    )  # fmt: skip


def _released(model: WanConfig, mode: TrainingMode) -> WanRunConfig:
    """A released model in bf16. Without recomputation its activations would not fit a GPU of 80 GB."""
    config = _config(model, mode, capacity=43008, bf16=True, learning_rate=0.9e-4, iterations=10_000, warmup=2000)
    config.model.recompute_granularity = "selective"
    return config


def wan_1_3b(mode: TrainingMode) -> WanRunConfig:
    """Wan 2.1 1.3B text-to-video, bf16."""
    return _released(WAN_1_3B, mode)


def wan_14b(mode: TrainingMode) -> WanRunConfig:
    """Wan 2.1 14B text-to-video, bf16."""
    return _released(WAN_14B, mode)


def tiny(mode: TrainingMode) -> WanRunConfig:
    """The tiny model of ``wan_model.tiny``, fp32: a complete run in seconds on any device."""
    config = _config(TINY_CONFIG, mode, capacity=512, bf16=False, learning_rate=2e-3, iterations=20, warmup=2)
    config.dataset.mock_settings = MockConfig(
        shapes=[[3, 8, 8], [1, 6, 10], [2, 4, 10]], context_length=16, number_packed_samples=3
    )
    config.logger.log_interval = 1
    return config


def _images(config: WanRunConfig) -> WanRunConfig:
    """Packs of single frames: many small samples, so the packing buffer is larger."""
    config.dataset.packing_buffer = 256
    # 480 x 832: 1 x 30 x 52 tokens an image.
    config.dataset.mock_settings = MockConfig(shapes=[[1, 60, 104]], context_length=512, number_packed_samples=27)
    return config


def wan_1_3b_t2i(mode: TrainingMode) -> WanRunConfig:
    """Wan 2.1 1.3B text-to-image, bf16."""
    return _images(wan_1_3b(mode))


def wan_14b_t2i(mode: TrainingMode) -> WanRunConfig:
    """Wan 2.1 14B text-to-image, bf16."""
    return _images(wan_14b(mode))


def fine_tuning(config: WanRunConfig, *, lora: bool) -> None:
    """Defaults of ``wan-train finetune`` over a recipe's: a short run of constant learning rate, saved often.

    Args:
        config: of the recipe, before files and overrides.
        lora: whether they make it a run of adapters, which start from zero and take a larger rate.
    """
    config.train.train_iters = 2000
    config.optimizer.lr = config.optimizer.min_lr = 1e-4 if lora else 1e-5
    config.scheduler.lr_warmup_iters = 100
    config.scheduler.lr_decay_style = "constant"
    config.checkpoint.save_interval = 250


RECIPE_FUNCTIONS: dict[str, Callable[[TrainingMode], WanRunConfig]] = dict(
    zip(RECIPES, (wan_1_3b, wan_1_3b_t2i, wan_14b, wan_14b_t2i, tiny), strict=True)
)
