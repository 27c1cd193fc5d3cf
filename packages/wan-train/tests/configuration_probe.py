"""Part of ``engine_probe``: configurations and what is said of wrong ones."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def raises(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


# As NVIDIA's documents have it, for one machine of 8 GPUs.
TUTORIAL = """
model.tensor_model_parallel_size=1 model.pipeline_model_parallel_size=1 model.context_parallel_size=4
model.sequence_parallel=false model.crossattn_emb_size=1536 model.hidden_size=1536 model.ffn_hidden_size=8960
model.num_attention_heads=12 model.num_layers=30 model.qkv_format=thd model.bias_activation_fusion=false
dataset.path=DATA dataset.packing_buffer_size=50 dataset.num_workers=10
checkpoint.save=RUN checkpoint.load=RUN checkpoint.load_optim=false checkpoint.save_interval=200
optimizer.lr=5e-6 optimizer.min_lr=5e-6 train.eval_iters=0 scheduler.lr_decay_style=constant
scheduler.lr_warmup_iters=0 model.seq_length=40000 dataset.seq_length=40000 train.global_batch_size=2
train.micro_batch_size=1 dataset.global_batch_size=2 dataset.micro_batch_size=1 logger.log_interval=1
logger.wandb_project=wan logger.wandb_exp_name=trial logger.wandb_save_dir=RUN
"""


def _tutorial_answers() -> list[object]:
    from wan_train.config.options import RunOptions
    from wan_train.loop.run import build_config, check_layout

    config = build_config(RunOptions("wan_1_3b", "pretrain", overrides=tuple(TUTORIAL.split())))
    layout = check_layout(config, 8)
    dataset, train = config.dataset, config.train
    return [layout.data, layout.context, dataset.capacity, dataset.packing_buffer, train.global_batch_size]


def configuration_answers() -> dict[str, object]:
    from wan_train.config.options import RunOptions
    from wan_train.config.settings import derive_settings
    from wan_train.loop.run import build_config, check_layout, configure_data
    from wan_train.model.layout import Layout

    def settled(*overrides: str) -> list[object]:
        config = build("train.train_iters=7", *overrides)
        derive_settings(config, on_cpu=True)
        scheduler = config.scheduler
        return [scheduler.lr_decay_iters, scheduler.start_weight_decay, scheduler.end_weight_decay]

    def build(*overrides: str, **options: Any) -> Any:
        return build_config(RunOptions(**{"recipe": "tiny", **options}, overrides=overrides))

    folder = Path(tempfile.mkdtemp())
    (folder / "run.yaml").write_text(
        "train:\n  train_iters: 7\nmodel:\n  flow:\n    shift: 4.0\noptimizer:\n  lr: 1e-5\n"
    )
    layered = build("train.train_iters=9", config_file=str(folder / "run.yaml"))
    finetune = build(training_mode="finetune")
    wide = build("model.tensor_model_parallel_size=3")
    return {
        "unknown key": raises(lambda: build("train.train_iter=3")),
        "unknown section": raises(lambda: build("trian.train_iters=3")),
        "no weights": raises(lambda: build(init_from=str(folder / "absent"))),
        "unknown recipe": raises(lambda: build(recipe="huge")),
        "wrong kind": raises(lambda: build("train.train_iters=many")),
        "bad flow": raises(lambda: build("model.flow.density=cauchy")),
        "file then command line": [layered.train.train_iters, layered.model.flow.shift, layered.optimizer.lr],
        "finetune": [finetune.model.flow.density, finetune.model.flow.shift],
        "settled": settled("optimizer.weight_decay=0.5"),
        "settled otherwise": settled("scheduler.lr_decay_iters=3", "scheduler.end_weight_decay=0.1"),
        "warming up to the end": settled("scheduler.lr_warmup_iters=9")[0],
        "tutorial": _tutorial_answers(),
        "other format": raises(lambda: build("model.qkv_format=sbhd")),
        "layout": raises(lambda: check_layout(build("model.tensor_model_parallel_size=2"), 3)),
        "batch": raises(lambda: check_layout(build(), 2)),
        "fsdp": raises(
            lambda: check_layout(build("dist.use_megatron_fsdp=true", "model.pipeline_model_parallel_size=2"), 2)
        ),
        "heads": raises(lambda: check_layout(wide, 3)),
        "no data": raises(lambda: configure_data(build(), Layout(1))),
        "absent data": raises(lambda: configure_data(build(f"dataset.path={folder / 'absent'}"), Layout(1))),
        "two kinds of data": raises(lambda: configure_data(build(f"dataset.path={folder}", mock=True), Layout(1))),
    }
