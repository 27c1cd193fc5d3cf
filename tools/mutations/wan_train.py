"""Mutations of wan-train."""

from mutations.mutation import mutation_of

_EQUAL = "loop/test_parallel_equality.py::test_equals_one_process"
_LORA_EQUAL = "loop/test_lora_equality.py::test_equals_one_process"


_of = mutation_of("wan-train")

MUTATIONS = (
    _of(
        "same-noise-on-every-rank", "data/pack_iterator.py",
        "number = self.drawn * self.ranks + self.rank", "number = self.drawn",
        "data-parallel ranks draw the same noise and timesteps: a step sees far fewer of them than it should",
        f"{_EQUAL}[data, communication overlapped]",
    ),
    _of(
        "adapter-gradient-of-one-tensor-rank", "model/megatron_ops.py",
        "return matrix if is_up else _summed_over_ranks(matrix)", "return matrix",
        "under tensor parallelism A of queries, keys and values is trained from some of the heads",
        f"{_LORA_EQUAL}[tensor, recomputing]",
    ),
    _of(
        "same-adapter-dropout-for-every-pack", "loop/step.py",
        'seed_for("lora", state.cfg.rng.seed, numbered.number)', 'seed_for("lora", state.cfg.rng.seed)',
        "the same values of an adapter's input are dropped in every step",
        "loop/test_lora_equality.py::test_one_process_of_the_engine_is_plain_torch",
    ),
    _of(
        "base-of-an-adapter-not-compared", "model/provider.py",
        "if self.recorded_digest not in (None, self.base_digest):", "if False:",
        "a run of adapters goes on with other weights below them",
        "checkpoint/test_adapters.py::test_other_weights_than_those_of_the_checkpoint_are_refused",
    ),
    _of(
        "same-noise-for-every-pack", "loop/step.py",
        'generator_for("noise", state.cfg.rng.seed, numbered.number, ', 'generator_for("noise", state.cfg.rng.seed, ',
        "every pack of a run is trained with one noise and one timestep",
        "loop/test_plain_training.py",
    ),
    _of(
        "pack-numbers-restart-at-a-resume", "data/pack_iterator.py",
        "self.drawn = drawn", "pass",
        "a resumed run repeats the noise of its first steps and differs from the uninterrupted run",
        "checkpoint/test_resume.py::test_resumed_equals_uninterrupted_to_the_bit",
    ),
    _of(
        "context-parallel-pack-counted-twice", "loop/step.py",
        "counted = tokens if parallel_state.get_context_parallel_rank() == 0 else 0", "counted = tokens",
        "under context parallelism gradients are divided by the number of ranks",
        f"{_EQUAL}[data x context, communication overlapped]",
    ),
    _of(
        "sequence-parallel-gradients-not-summed", "model/megatron_ops.py",
        "parameter.sequence_parallel = self.sequence_parallel", "parameter.sequence_parallel = False",
        "under sequence parallelism norms and modulation tables get gradients from only a part of the tokens",
        f"{_EQUAL}[tensor and sequence, recomputing]",
    ),
    _of(
        "gradient-of-rows-without-keys-and-values", "model/column_products.py",
        "whole_SI.addmm_(gradient, weight)", "whole_SI.addmm(gradient, weight)",
        "under tensor parallelism what comes before a layer is trained by its queries alone",
        f"{_EQUAL}[tensor, recomputing]",
    ),
    _of(
        "killed-writer-not-noticed", "checkpoint/writer_supervision.py",
        "for process in list(started)) if code]", "for process in list(started)) if code and code > 0]",
        "a run whose writer is killed for its memory stands still forever",
        "launch/test_stopped_children.py",
    ),
    _of(
        "weights-read-before-they-are-gathered", "model/megatron_ops.py",
        "zip(*(linear(x_SD, parameters_only=True) for linear in trained), strict=True)",
        "zip(*((linear.weight, linear.bias) for linear in trained), strict=True)",
        "with ddp.overlap_param_gather tensor parallelism computes with weights of the step before",
        "loop/test_overlapped_communication.py::test_overlapped_communication_changes_nothing[data x tensor]",
    ),
    _of(
        "optimizer-state-behind-the-padding", "engine/upstream/bucket_padding.py",
        "padding.append(bucket.offset - end)", "padding.append(0)",
        "a run with several buckets resumes with the moments of other parameters",
        f"{_EQUAL}[data, communication overlapped]",
    ),
    _of(
        "weights-of-another-optimizer-state-accepted", "engine/upstream/master_weights.py",
        "not torch.equal(copy.to(model), model)", "copy.shape != model.shape",
        "a checkpoint that an earlier version saved wrong is trained on",
        "checkpoint/test_resume.py::test_optimizer_states_of_other_parameters_are_refused[bf16]",
    ),
    _of(
        "overwritten-weights-accepted", "engine/upstream/master_weights.py",
        "return overwritten + sum(", "return sum(",
        "adapters of a checkpoint that an earlier version saved wrong are trained on",
        "checkpoint/test_resume.py::test_optimizer_states_of_other_parameters_are_refused[LoRA]",
    ),
    _of(
        "gradients-of-stages-in-other-parts", "model/provider.py",
        "parameter.shared_embedding = not (stage.is_first and stage.is_last)", "pass",
        "pipeline stages add up gradients of different elements of the weights that they share",
        f"{_EQUAL}[data x pipeline, communication overlapped]",
    ),
    _of(
        "exchange-not-overlapped", "model/column_products.py",
        "work = torch.distributed.reduce_scatter_tensor(into_x, whole_SI, group=ctx.group, async_op=True)",
        "torch.distributed.reduce_scatter_tensor(into_x, whole_SI, group=ctx.group)",
        "under sequence parallelism the gradients of weights wait for an exchange that they do not need",
        "loop/test_overlapped_communication.py",
    ),
    _of(
        "tensor-parallel-norm-gradient", "model/megatron_ops.py",
        "copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))",
        "reduce_from_tensor_model_parallel_region(squares)",
        "under tensor parallelism the gradient of queries and keys lacks the contribution of the other ranks' heads",
        f"{_EQUAL}[tensor, recomputing]",
    ),
    _of(
        "embedders-of-stages-drift-apart", "model/provider.py",
        "parameter.pipeline_parallel = True", "parameter.pipeline_parallel = False",
        "the copies of the timestep embedder on the pipeline stages diverge",
        f"{_EQUAL}[data x pipeline, communication overlapped]",
    ),
    _of(
        "average-decays-the-wrong-way", "model/ema.py",
        "1 - self.decay)", "self.decay)",
        "the EMA nearly equals the weights of the last step",
        "loop/test_plain_training.py",
    ),
    _of(
        "average-not-restored", "model/provider.py",
        "self.ema.load(saved)", "self.ema.reset()",
        "each resume restarts the EMA",
        "loop/test_bf16.py::test_resumes_to_the_bit",
    ),
    _of(
        "validation-noise-not-seeded", "loop/validation.py",
        "torch.randn(stop - start, clean.shape[1], generator=generator)", "torch.randn(stop - start, clean.shape[1])",
        "validation losses of different steps and runs use different noise and cannot be compared",
        "loop/test_metrics.py::test_a_validation_does_not_depend_on_how_samples_are_packed",
    ),
    _of(
        "infinite-gradient-steps", "loop/nan_guard.py",
        "norm is not None and not math.isfinite(norm)", "norm is not None and math.isnan(norm)",
        "a step with an infinite gradient destroys the weights and the next checkpoint",
        "loop/test_nan_guard.py",
    ),
    _of(
        "record-not-flushed", "checkpoint/record.py",
        "os.fsync(file.fileno())", "file.fileno()",
        "after a power failure a checkpoint is declared complete and its files are empty",
        "checkpoint/test_durability.py",
    ),
    _of(
        "only-sizes-compared", "checkpoint/record.py",
        "if record_file(folder / name) != files[name]]",
        "if record_file(folder / name).bytes != files[name].bytes]",
        "a run resumes from a checkpoint with flipped bits",
        "checkpoint/test_folder.py",
    ),
    _of(
        "cut-file-accepted", "checkpoint/record.py",
        "if size != record.bytes:", "if size > record.bytes:",
        "a checkpoint with a file cut short counts as complete",
        "checkpoint/test_folder.py",
    ),
    _of(
        "retention-deletes-the-newest", "checkpoint/folder.py",
        "complete_steps(folder)[-max(1, keep) :]", "complete_steps(folder)[: max(1, keep)]",
        "the newest checkpoints are deleted and the oldest kept",
        "checkpoint/test_folder.py",
    ),
    _of(
        "loader-state-runs-code", "checkpoint/file_checks.py",
        "weights_only=True", "weights_only=False",
        "resuming from a downloaded checkpoint runs code from its loader state",
        "checkpoint/test_file_checks.py",
    ),
    _of(
        "refused-dry-run-exits-0", "cli.py",
        "    exit_code = 2", "    exit_code = 0",
        "the exit status is 0 for an invalid configuration",
        "config/test_configurations.py::test_a_dry_run_refuses_what_cannot_be",
    ),
    _of(
        "plan-forgets-fp32-weights", "planning/memory.py",
        "optimizer=parameters * (12 if bf16 else 8) / replicas", "optimizer=parameters * 8 / replicas",
        "wan-train plan recommends layouts that run out of memory at the first step",
        "planning/test_plan.py",
    ),
    _of(
        "checkpoint-written-past-the-hook", "checkpoint/hooks.py",
        "if not saving():", "if False:",
        "a version of Megatron-Bridge that moved its function writes checkpoints that a crash can damage",
        "checkpoint/test_changed_engine.py::test_a_save_that_passes_by_the_hook_writes_nothing",
    ),
    _of(
        "missing-save-unnoticed", "loop/callback.py",
        "self.hooks.require_saved(config, done)", "pass",
        "a run goes on although a step was not saved",
        "checkpoint/test_changed_engine.py::test_a_step_that_should_have_been_saved_is_missed_before_the_next",
    ),
    _of(
        "missing-load-unnoticed", "checkpoint/hooks.py",
        "if self._point is not None and not self._loaded:", "if False:",
        "a run that should resume starts from the initial weights",
        "checkpoint/test_changed_engine.py::test_a_resume_that_loads_nothing_takes_no_step",
    ),
    _of(
        "code-in-the-common-state", "checkpoint/hooks.py",
        '**{**kwargs, "weights_only": True}', "**kwargs",
        "with some versions of Megatron-Core a checkpoint can execute code",
        "checkpoint/test_changed_engine.py::test_no_version_of_core_reads_more_than_weights",
    ),
    _of(
        "replacement-not-verified", "engine/upstream/replace.py",
        "or function.__globals__.get(name) is not new:", "or False:",
        "a hook is placed where nothing calls it",
        "engine/test_replace.py::test_a_caller_that_imported_it_from_elsewhere_is_an_error",
    ),
    _of(
        "fully-sharded-run-resumes-with-initial-weights", "checkpoint/hooks.py",
        "use_read_weights(model)", "pass",
        "a resumed run with FSDP computes with the initial weights and goes on training them",
        "checkpoint/test_resume.py::test_fully_sharded_resumes_to_the_bit",
    ),
    _of(
        "caption-gap-of-own-captions", "loop/validation.py",
        "texts=self._others[one.pack]", "texts=pack.texts",
        "the caption gap is 1 whatever the model has learned",
        "loop/test_caption_gap.py::test_the_gap_of_a_model_that_errs_twice_as_much_with_other_captions_is_four",
    ),
    _of(
        "samples-of-the-weights-called-ema", "model/ema.py",
        "parameter.copy_(average)", "pass",
        "samples.ema shows the weights, which look worse than what is saved",
        "sampling/test_samples.py::test_captions_of_the_validation_split_become_files_records_and_curves",
    ),
    _of(
        "training-goes-on-from-the-ema", "model/ema.py",
        "parameter.copy_(kept[key])", "pass",
        "each time of sampling replaces the weights by their EMA",
        "sampling/test_samples.py::test_training_is_the_same_to_the_bit",
    ),
    _of(
        "lora-file-not-started-from", "model/provider.py",
        "load_adapters(dit, self.initial_adapters.tensors)", "init_adapters(dit, seed=self.init_seed)",
        "a training that should go on from a LoRA file starts anew, and says that it starts from it",
        "checkpoint/test_lora_start.py::test_the_first_step_is_that_of_the_base_with_the_file",
    ),
    _of(
        "alpha-of-the-lora-file-ignored", "config/lora.py",
        "alpha if self.alpha is None else self.alpha", "self.rank if self.alpha is None else self.alpha",
        "a LoRA file whose alpha is not its rank is refused, or starts with another change",
        "checkpoint/test_lora_start.py::test_the_first_step_is_that_of_the_base_with_the_file",
    ),
)  # fmt: skip
