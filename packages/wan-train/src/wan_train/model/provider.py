"""``WanDiT`` in the form that Megatron's loop requires: a provider in the configuration, a module with pipeline stages.

Import only after ``wan_train.engine.start``.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from einops import rearrange
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from wan_model import WAN_1_3B, LatentSpec, PackLayout, Stage, WanConfig, WanDiT, init_weights
from wan_model.config import TEXT_LENGTH_KEY
from wan_model.dit.adapters import add_adapters
from wan_model.dit.attention import AttentionKind
from wan_model.dit.frozen import QuantizationError, StreamedWeights, materialize, to_fp8
from wan_model.dit.lora import LoraSettings
from wan_model.dit.recompute import Recompute
from wan_model.flow import FlowMatching
from wan_model.weights.base_digest import joint_digest, tensor_digests
from wan_model.weights.lora_adapters import FoundAdapters
from wan_model.weights.model_folder import resolve_folder
from wan_model.weights.transformer import init_adapters, load_adapters, load_weights, read_config
from wan_train import engine
from wan_train.engine.upstream.loop import ModelProviderMixin, TransformerConfig
from wan_train.model.ema import PREFIX as EMA_PREFIX
from wan_train.model.ema import WeightEMA
from wan_train.model.layout import layers_of_stages
from wan_train.model.megatron_ops import MegatronOps
from wan_train.model.recompute_granularity import RECOMPUTE

# Every pipeline stage has its own copy of the timestep and text embedders; the copies must stay equal.
REPLICATED_ON_STAGES = "condition_embedder."


def transformer_section(config: WanConfig) -> dict[str, Any]:
    """The ``model.transformer`` section for a model's sizes; the data decide about the length of texts."""
    return {**config.to_diffusers(), TEXT_LENGTH_KEY: None}


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """The transformer that a training starts from; its weights have not been read.

    Attributes:
        name: of the model, as it was given.
        folder: its ``transformer`` folder.
        config: its sizes.
    """

    name: str
    folder: Path
    config: WanConfig

    @classmethod
    def find(cls, model: str) -> "InitialWeights":
        """Of a model given by path or hub id.

        Raises:
            ValueError: the model has no such folder, or its configuration is not of Wan 2.1.
        """
        folder = resolve_folder(model, ["transformer"]) / "transformer"
        return cls(model, folder, read_config(folder))


def stage_of(config: WanConfig, rank: int, ranks: int) -> Stage:
    """The layers of one pipeline stage.

    Raises:
        ValueError: more stages than layers.
    """
    sizes = layers_of_stages(config.num_layers, ranks)
    first = sum(sizes[:rank])
    return Stage(first, first + sizes[rank], rank == 0, rank == ranks - 1)


def base_digest(folder: Path) -> str:
    """The digest of a transformer's weights, computed by all ranks together."""
    mine = tensor_digests(folder, torch.distributed.get_rank(), torch.distributed.get_world_size())
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, mine)
    return joint_digest({key: digest for part in gathered for key, digest in part.items()})


def _ops(provider: "WanModelProvider") -> MegatronOps:
    if provider.attention == "transformer_engine":
        if not engine.start().transformer_engine:
            raise ValueError(
                "model.attention is transformer_engine, which is not installed here (it needs CUDA); install it as the "
                "README of wan-train says, or leave the setting at auto"
            )
        from wan_train.model.transformer_engine_ops import TransformerEngineOps

        return TransformerEngineOps(provider)
    return MegatronOps(provider, provider.attention)


def _dit(provider: "WanModelProvider", stage: Stage) -> WanDiT:
    device = torch.device("cuda", torch.cuda.current_device())
    if provider.lora is None:
        with device:
            return WanDiT(provider.wan_config, _ops(provider), stage)
    # Not in fp32 at first, and not on the device if its weights will not stay there as they are read.
    with torch.device("meta"):
        dit = WanDiT(provider.wan_config, _ops(provider), stage)
    add_adapters(dit, provider.lora)
    dit.to_precision(provider.params_dtype)
    elsewhere = provider.fp8_base or provider.offload_base
    frozen = torch.device("cpu") if elsewhere else device
    materialize(dit, lambda key, weight: device if weight.requires_grad or not key.startswith("blocks.") else frozen)
    return dit


class MegatronWanDiT(MegatronModule):
    """The layers of one pipeline stage.

    Args:
        provider: the run's model configuration.
        stage: which layers.
    """

    share_embeddings_and_output_weights = False

    def __init__(self, provider: "WanModelProvider", stage: Stage) -> None:
        super().__init__(config=provider)
        self.pre_process, self.post_process = stage.is_first, stage.is_last
        self.dit = _dit(provider, stage)
        self.dit.recompute = provider.recompute
        self.lora = provider.lora
        self._received: Tensor | None = None
        # The EMA of the weights, if enabled, and whether the checkpoint that is saved or loaded has it.
        self.ema: WeightEMA | None = None
        self.ema_in_checkpoint = True
        parameter: Any
        for name, parameter in self.dit.named_parameters():
            if name.startswith(REPLICATED_ON_STAGES):
                parameter.pipeline_parallel = True  # its gradient is summed over the stages
                parameter.shared = not stage.is_first  # and counted once in the gradient norm
                # The sum is over what a rank keeps of the gradient after the data-parallel ranks have shared it out:
                # in a bucket of its own, that is the same part on every stage.
                parameter.shared_embedding = not (stage.is_first and stage.is_last)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters of this part that are trained and saved, by diffusers' keys: all, or those of adapters."""
        return {key: parameter for key, parameter in self.dit.named_parameters() if parameter.requires_grad}

    def enable_ema(self, decay: float) -> None:
        """Keep an EMA of the weights from now on, see ``wan_train.model.ema``."""
        self.ema = WeightEMA(
            self.trained.items(),
            decay,
            rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
            ranks=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        )

    def bfloat16(self) -> "MegatronWanDiT":
        """Called by Megatron's precision wrapper: to bf16, except the weights that diffusers keeps in fp32."""
        self.dit.to_precision(torch.bfloat16)
        return self

    def set_input_tensor(self, tensor: Tensor | list[Tensor] | None) -> None:
        """Called by the schedule with the output of the previous stage."""
        self._received = tensor[0] if isinstance(tensor, list) else tensor

    def forward(
        self,
        *,
        tokens_SC: Tensor,
        timesteps_B: Tensor,
        text_BTD: Tensor,
        layout: PackLayout,
        dropout_seed: int | None = None,
    ) -> Tensor:
        """Velocity tokens [S, C] on the last stage, else hidden rows [S, 1, D] for the next stage.

        The arguments are keyword-only because Megatron's precision wrapper casts positional ones: timesteps stay fp32.
        """
        if self.pre_process:
            x = tokens_SC
        else:
            assert self._received is not None, "the schedule passed this stage no input"
            x = rearrange(self._received, "s 1 d -> s d")
        out: Tensor = self.dit(x, timesteps_B, text_BTD, layout, dropout_seed)
        return out if self.post_process else rearrange(out, "s d -> s 1 d")

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Every trained tensor by its diffusers key with its global shape, in any layout."""
        del metadata
        assert not sharded_offsets, "layers are numbered over the whole model, without offsets"
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        dp_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        pp_rank = parallel_state.get_pipeline_model_parallel_rank()
        sharded = {}
        for key, parameter in self.trained.items():
            part = self.dit.ops.partition(parameter)
            stage_replica = pp_rank if key.startswith(REPLICATED_ON_STAGES) else 0
            sharded[f"{prefix}dit.{key}"] = ShardedTensor.from_rank_offsets(
                key,
                parameter,
                *([part] if part else []),
                replica_id=(stage_replica, 0 if part else tp_rank, dp_rank),
            )
            if self.ema is not None and self.ema_in_checkpoint and key in self.ema.tensors:
                # No other rank of the data-parallel group holds it.
                sharded[f"{prefix}{EMA_PREFIX}{key}"] = ShardedTensor.from_rank_offsets(
                    f"{EMA_PREFIX}{key}",
                    self.ema.tensors[key],
                    *([part] if part else []),
                    replica_id=(stage_replica, 0 if part else tp_rank, 0),
                )
        return sharded

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The weights and their EMA, which starts from the weights if the checkpoint has none."""
        saved, weights = {}, {}
        for key, value in state_dict.items():
            if key.startswith(EMA_PREFIX):
                saved[key.removeprefix(EMA_PREFIX)] = value
            else:
                weights[key] = value
        if differing := sorted({key.removeprefix("dit.") for key in weights} ^ self.trained.keys()):
            raise ValueError(f"the checkpoint has other tensors than this run, for example {differing[0]}")
        # What is not trained is not in a checkpoint.
        loaded = super().load_state_dict(weights, strict=strict and self.lora is None, assign=assign)
        if self.ema is not None:
            if self.ema_in_checkpoint:
                self.ema.load(saved)
            else:
                self.ema.reset()
        return loaded


@dataclasses.dataclass
class WanModelProvider(TransformerConfig, ModelProviderMixin[MegatronWanDiT]):
    """The ``model`` section of the configuration: the transformer and its parallel layout.

    Attributes:
        transformer: the content of diffusers' ``transformer/config.json``, with ``text_len``, the tokens that texts are
            padded to; None for those of the initial weights or the data, until the run has read them.
        latent_spec: ``LatentSpec.to_dict()`` of the training data, recorded in checkpoints; None for mock data.
        flow: the flow-matching objective.
        attention: ``sdpa``, ``cudnn``, ``flash`` and ``varlen`` are torch's (see ``wan_model.dit.attention``);
            ``transformer_engine`` is its fused packed attention, which torch does not see as an operator, so that every
            recomputation computes it again; ``auto`` is the fastest of torch's.
        init_from: a model in diffusers' layout (folder or hub id) whose transformer the training starts from; None
            for the official random initialisation.
        init_seed: seed of the random initialisation.
        base_digest: of the weights that adapters are trained on, see ``wan_model.weights.base_digest``; set when they
            are read, and recorded in checkpoints.
        ema_decay: set from ``ema.decay``.
        recompute_granularity: see ``RECOMPUTE``.
    """

    num_layers: int = 0
    hidden_size: int = 0
    num_attention_heads: int = 0
    transformer: dict[str, Any] = dataclasses.field(default_factory=lambda: transformer_section(WAN_1_3B))
    latent_spec: dict[str, Any] | None = None
    flow: FlowMatching = dataclasses.field(default_factory=FlowMatching)
    attention: AttentionKind | Literal["transformer_engine"] = "auto"
    init_from: str | None = None
    init_seed: int = 1234
    base_digest: str | None = None
    ema_decay: float = 0.0
    recompute_granularity: Literal["elementwise", "selective", "full"] | None = None
    # Megatron-Bridge reads these from every model.
    seq_length: int = 0
    vocab_size: int | None = 1
    should_pad_vocab: bool = False
    has_cond_embedder: bool = True

    # No fields, because they are no settings of the run. A checkpoint is loaded, which has every weight.
    resumes = False
    # What ``init_from`` names, found once by ``build_config``.
    initial_weights = cast(InitialWeights | None, None)
    # Set from the ``lora`` section.
    lora = cast(LoraSettings | None, None)
    fp8_base = offload_base = False
    # That rounding the base to fp8 has made, of this rank's part.
    fp8_error = cast(QuantizationError | None, None)
    # That a training starts from, instead of A at random and B at zero.
    initial_adapters = cast(FoundAdapters | None, None)
    # That of the checkpoint, at a resume.
    recorded_digest = cast(str | None, None)

    @property
    def wan_config(self) -> WanConfig:
        """The sizes of the transformer."""
        return WanConfig.from_diffusers(self.transformer)

    @property
    def spec(self) -> LatentSpec | None:
        """The latent space of the data."""
        return LatentSpec.from_dict(self.latent_spec) if self.latent_spec else None

    @property
    def recompute(self) -> Recompute:
        """Activation recomputation, by wan-model's names.

        Raises:
            ValueError: recomputation of only some layers.
        """
        if self.recompute_method not in (None, "uniform") or self.recompute_num_layers not in (None, 1):
            raise ValueError(
                f"model.recompute_method is {self.recompute_method!r} and recompute_num_layers "
                f"{self.recompute_num_layers!r}; recomputation applies to every layer, so leave both out"
            )
        return RECOMPUTE[self.recompute_granularity]

    def finalize(self) -> None:
        """Derive Megatron's names of the sizes, and the settings that packs of mixed shapes need."""
        config = self.wan_config
        self.num_layers, self.hidden_size = config.num_layers, config.hidden_size
        self.num_attention_heads, self.ffn_hidden_size = config.num_heads, config.ffn_dim
        self.add_bias_linear = True
        self.variable_seq_lengths = True
        self.moe_token_dispatcher_type = "alltoall"  # there are no experts, but Megatron checks the pair
        self.calculate_per_token_loss = True
        self.perform_initialization = False
        self.hidden_dropout = self.attention_dropout = 0.0
        # Megatron requires these two with "full" and refuses them otherwise; they have no other effect here.
        full = self.recompute == "block"
        self.recompute_method = "uniform" if full else None
        self.recompute_num_layers = 1 if full else None
        # Megatron does not know our name.
        chosen = self.recompute_granularity
        if self.recompute == "elementwise":
            self.recompute_granularity = "selective"
        super().finalize()
        self.recompute_granularity = chosen

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> MegatronWanDiT:
        """Build this rank's part with the initial weights, which do not depend on the layout.

        At a resume trained weights are undefined: drawing or reading those of 14 billion parameters takes minutes.

        Raises:
            ValueError: the weights are not those that the checkpoint's adapters were trained on.
        """
        assert vp_stage is None, "refused in finalize"
        rank = parallel_state.get_pipeline_model_parallel_rank()
        ranks = parallel_state.get_pipeline_model_parallel_world_size()
        stage = stage_of(self.wan_config, rank, ranks)
        assert (pre_process, post_process) == (stage.is_first, stage.is_last), (
            "the stage is the one that Megatron expects"
        )
        model = MegatronWanDiT(self, stage)
        if self.lora is not None:
            self._fill_base_and_adapters(model.dit)
        elif self.resumes:
            pass
        elif self.initial_weights is None:
            assert self.init_from is None, "found by build_config"
            init_weights(model.dit, seed=self.init_seed)
        else:
            load_weights(model.dit, self.initial_weights.folder)
        if self.ema_decay:
            model.enable_ema(self.ema_decay)
        return model

    def _fill_base_and_adapters(self, dit: WanDiT) -> None:
        assert self.initial_weights is not None, "the settings were checked"
        folder = self.initial_weights.folder
        load_weights(dit, folder)
        self.base_digest = base_digest(folder)
        if self.recorded_digest not in (None, self.base_digest):
            raise ValueError(
                f"the weights of {self.init_from} are not those that the checkpoint's LoRA was trained on (digest "
                f"{self.base_digest[:12]} where it has {self.recorded_digest[:12]}); give the model that it was begun "
                "with as --init-from"
            )
        if self.initial_adapters is not None:
            load_adapters(dit, self.initial_adapters.tensors)
        elif not self.resumes:
            init_adapters(dit, seed=self.init_seed)
        device = dit.condition_embedder.time_proj.weight.device
        if self.fp8_base:
            self.fp8_error = to_fp8(dit, device)
        if self.offload_base:
            dit.streamed = StreamedWeights(dict(dit.blocks.items()), device)

    def _get_num_floating_point_operations(self, batch_size: int) -> int:
        # Without this hook Bridge would apply its formula for language models. A pack's FLOPs depend on its samples.
        return 0
