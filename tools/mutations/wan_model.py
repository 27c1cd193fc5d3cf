"""Mutations of wan-model."""

from mutations.mutation import mutation_of

_of = mutation_of("wan-model")

MUTATIONS = (
    _of(
        "rope-axes-swapped", "dit/rope.py",
        "return head_dim - 2 * side, side, side", "return side, side, head_dim - 2 * side",
        "released weights get wrong rotary angles for rows and columns; videos are destroyed",
        "dit/test_block_reference.py", "dit/test_transformer_parity.py",
    ),
    _of(
        "norm-weight-gradient-of-last-piece", "dit/elementwise.py",
        "grad_weight_D += out.sum(dim=0)", "grad_weight_D = out.sum(dim=0)",
        "the norms of queries and keys get gradients only from the last tokens of a long pack",
        "dit/test_elementwise.py",
    ),
    _of(
        "base-beside-adapters-trained", "dit/adapters.py",
        "model.requires_grad_(False)", "pass",
        "the weights below a LoRA are trained with it, and the file that is written does not have what was learnt",
        "dit/test_lora.py",
    ),
    _of(
        "adapter-factor-left-out", "dit/lora.py",
        "torch.addmm(product_SO, low_SR, up_OR.t(), alpha=factor)", "torch.addmm(product_SO, low_SR, up_OR.t())",
        "a LoRA is trained and sampled with a factor of 1, whatever its alpha",
        "dit/test_lora.py",
    ),
    _of(
        "lora-not-divided-by-its-rank", "weights/lora_reading.py",
        "name: alpha / ranks[name] for", "name: alpha for",
        "the change of an adapter with an alpha is too large by a factor of its rank",
        "weights/test_lora_dialects.py",
    ),
    _of(
        "rank-stabilisation-ignored", "weights/lora_config.py",
        "math.sqrt(rank) if self.rank_stabilised else rank", "rank",
        "the change of an adapter with rsLoRA is too small by a factor of the root of its rank",
        "weights/test_lora_dialects.py",
    ),
    _of(
        "alpha-pattern-ignored", "weights/lora_config.py",
        "own_alpha.get(name, self.alpha)", "self.alpha",
        "linears with an alpha of their own get that of the others",
        "weights/test_lora_dialects.py",
    ),
    _of(
        "modulation-tables-in-bfloat16", "dit/model.py",
        '(".time_embedder.", ".scale_shift_table", ".norm2.", ', '(".time_embedder.", ".norm2.", ',
        "bfloat16 models round the modulation tables, which diffusers keeps in fp32; other videos than diffusers'",
        "weights/test_weights.py", "dit/test_transformer_parity.py",
    ),
    _of(
        "frame-count-off-by-one", "video_shape.py",
        "frames - (frames - 1) % stride", "frames - frames % stride",
        "the 81 frames of the released models are refused and 80 accepted",
        "test_latent_spec.py",
    ),
    _of(
        "other-text-encoder-unnoticed", "weights/model_folder.py",
        'text_encoder=_text_encoder_digest(text_encoder, text_config["num_layers"])', "text_encoder=None",
        "a model is sampled with other embeddings of prompts than it was trained on",
        "test_latent_spec.py",
    ),
    _of(
        "lora-alpha-without-rank-stabilisation", "weights/lora_file.py",
        "(math.sqrt(settings.rank) if settings.use_rslora else 1)", "1",
        "ComfyUI applies an adapter with rsLoRA too weakly, by a factor of the root of its rank",
        "weights/test_lora_file.py",
    ),
    _of(
        "lora-dropout-at-sampling", "weights/lora_file.py",
        '"lora_dropout": 0.0', '"lora_dropout": settings.dropout',
        "diffusers drops values of the adapters when it samples",
        "weights/test_lora_file.py",
    ),
    _of(
        "padding-before-the-samples", "pack.py",
        "rows.append(rows[0].new_zeros(layout.padding, rows[0].shape[1]))",
        "rows.insert(0, rows[0].new_zeros(layout.padding, rows[0].shape[1]))",
        "in a padded pack the rows are shifted against the offsets: tokens of one sample count as another's",
        "dit/test_packs.py",
    ),
    _of(
        "context-parallel-text-of-another-sample", "dit/context_parallel.py",
        "theirs = tuple(offset - keys.start for", "theirs = tuple(offset for",
        "under context parallelism tokens attend to the text of another sample",
        "dit/test_context_parallel.py",
    ),
    _of(
        "context-parallel-gradient-times-ranks", "dit/context_parallel.py",
        "_GatherRows.apply(x, self, False)", "_GatherRows.apply(x, self, True)",
        "under context parallelism every gradient is multiplied by the number of ranks",
        "dit/test_context_parallel.py",
    ),
    _of(
        "solver-of-first-order", "sampling/solvers.py",
        "second = len(self._predictions) == 2 and not last", "second = False",
        "the second-order solvers take first-order steps: other and worse videos at the same number of steps",
        "sampling/test_solvers.py",
    ),
    _of(
        "fps-ignored", "codec/video_encoding.py",
        "rate=fps, options", "rate=FPS, options",
        "--fps has no effect",
        "codec/test_video_encoding.py",
    ),
    _of(
        "pixels-cut-not-rounded", "codec/video_encoding.py",
        "((video_3THW.float() + 1) * 127.5).round()", "((video_3THW.float() + 1) * 127.5)",
        "all frames are half a level too dark",
        "codec/test_video_encoding.py",
    ),
    _of(
        "velocity-sign", "flow.py",
        "target_SC=noise - clean", "target_SC=clean - noise",
        "training learns the opposite of what released weights predict; finetuning destroys the model",
        "test_flow.py",
    ),
    _of(
        "timesteps-not-scaled", "flow.py",
        "timesteps_B=TIMESTEPS * sigma_B", "timesteps_B=sigma_B",
        "the model trains on timesteps of 0 to 1 and is sampled at 0 to 1000",
        "test_flow.py",
    ),
    _of(
        "caption-dropout-ignored", "flow.py",
        "if self.caption_dropout == 0:", "if self.caption_dropout < 1:",
        "no caption is dropped, so guidance has no unconditional branch to work with",
        "test_flow.py",
    ),
    _of(
        "one-draw-for-all-tensors", "weights/transformer.py",
        'f"{seed}/{key}".encode()', 'f"{seed}".encode()',
        "all layers begin with the same weights",
        "weights/test_init_weights.py",
    ),
    _of(
        "latent-mean-before-deviation", "codec/latent_codec.py",
        "(latents_CFhw[None] * std + mean)", "(latents_CFhw[None] + mean) * std",
        "every decoded video has wrong colours",
        "codec/test_codec_parity.py",
    ),
    _of(
        "decoder-memory-is-a-view", "codec/vae_decoder.py",
        "frame_cache[self] = x_BCtHW[:, :, -2:].clone()", "frame_cache[self] = x_BCtHW[:, :, -2:]",
        "each causal convolution holds all of its frames instead of two: gigabytes at 480p",
        "codec/test_tiled_decode.py",
    ),
    _of(
        "content-not-flushed", "system/files.py",
        "os.fsync(file.fileno())", "file.fileno()",
        "after a power failure a file has its name and no content",
        "system/test_files.py",
    ),
    _of(
        "lock-is-shared", "system/files.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "two processes write one file, or one dataset, and damage each other's content",
        "system/test_files.py::test_two_writers_of_one_file_do_not_mix",
    ),
    _of(
        "written-in-place", "system/files.py",
        "partial = path.with_name(", "partial = path; path.with_name(",
        "a failed save destroys the file that it should replace",
        "system/test_files.py",
    ),
    _of(
        "index-runs-code", "weights/training_checkpoint.py",
        'raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")',
        "return super().find_class(module, name)",
        "opening a downloaded checkpoint runs code from its index",
        "weights/test_training_checkpoint.py",
    ),
    _of(
        "partial-checkpoint-accepted", "weights/training_checkpoint.py",
        "    _check_files(path, index)", "    pass",
        "a truncated checkpoint is sampled or exported as the newest",
        "weights/test_training_checkpoint.py",
    ),
    _of(
        "consequence-printed-for-the-cause", "system/launcher.py",
        "key=lambda item: (item[1].lost_peer, item[1].at)", "key=lambda item: item[1].at",
        "a lost connection is printed, and not the error of the rank that broke it",
        "system/test_launcher.py::test_the_cause_is_shown_although_what_follows_from_it_came_first",
    ),
    _of(
        "stopped-rank-undetected", "system/launcher.py",
        "now - self._stopped_at >= STOPPED_SECONDS:", "now - self._stopped_at < 0:",
        "a run with one stopped rank waits for ever",
        "system/test_launcher.py::test_a_short_stop_is_forgiven",
    ),
    _of(
        "ranks-import-from-the-working-folder", "system/launcher.py",
        '[sys.executable, "-P", "-m", module, *arguments]',
        '[sys.executable, "-m", module, *arguments]',
        "a file torch.py in the folder of a command is run by its ranks",
        "system/test_launcher.py::test_modules_in_the_working_folder_are_not_imported",
    ),
    _of(
        "ranks-outlive-the-launcher", "system/child_process.py",
        "            follow_parent(self._parent)", "            pass",
        "after a kill of the launcher its ranks keep the GPUs",
        "system/test_launcher.py::test_nothing_outlives_a_killed_launcher",
    ),
)  # fmt: skip
