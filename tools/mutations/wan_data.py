"""Mutations of wan-data."""

from mutations.mutation import mutation_of

_of = mutation_of("wan-data")

MUTATIONS = (
    _of(
        "windows-cross-cuts", "curation/scenes.py",
        "Window(scene.start + window.start, scene.start + window.stop)", "window",
        "samples of a clip with several scenes show two of them",
        "curation/test_scenes.py::test_no_window_crosses_a_cut",
    ),
    _of(
        "mirrored-copies-missed", "curation/duplicates.py",
        "_MIRROR * mirrored.astype", "0 * mirrored.astype",
        "mirrored copies of clips stay in the training set",
        "curation/test_duplicates.py::test_hashes_that_differ_in_less_than_eight_bits_are_always_candidates",
    ),
    _of(
        "unmeasured-clips-selected", "curation/expressions.py",
        "return None if found is None else not found", "return not found",
        "clips without a measure are selected, in Python but not in SQLite",
        "curation/test_expressions.py::test_what_was_not_measured_is_not_selected",
    ),
    _of(
        "cuts-count-as-motion", "curation/movement.py",
        "        if not cut:", "        if True:",
        "clips of stills that are cut together have motion",
        "curation/test_movement.py::test_cuts_are_not_motion",
    ),
    _of(
        "scenes-not-planned", "prepare/probing/source_probe.py",
        "cuts = () if found.measures is None", "cuts = () if found is found",
        "--scenes finds cuts, and samples show two scenes all the same",
        "prepare/test_curated.py::test_no_window_crosses_a_cut",
    ),
    _of(
        "duplicate-of-another-split", "prepare/near_duplicates.py",
        "entry = entry._replace(sha256=found.content)", "pass",
        "a validation clip's mirrored copy is trained on",
        "prepare/test_curated.py::test_a_copy_of_a_validation_clip_is_for_validation_too",
    ),
    _of(
        "duplicates-of-earlier-rounds", "prepare/near_duplicates.py",
        "yield from _existing(index, replaced)", "yield from ()",
        "copies of what the dataset has are added to it",
        "prepare/test_near_duplicates.py::test_what_the_dataset_has_stays",
    ),
    _of(
        "left-out-decoded-again", "index/part.py",
        "        record.mtime_ns,", "        0,",
        "every run decodes again what --where has left out",
        "prepare/test_curated.py::test_an_expression_selects_and_a_second_run_decodes_nothing",
    ),
    _of(
        "left-out-is-rejected", "prepare/probing/source_probe.py",
        "            UNSELECTED,", '            "rejected",',
        "a command with --where fails although it did what was asked",
        "prepare/test_curated.py::test_an_expression_selects_and_a_second_run_decodes_nothing",
    ),
    _of(
        "cuts-of-another-detector", "prepare/probing/cache.py",
        "elif measured != self._measured:", "elif measured is None:",
        "a run with another --scenes uses the cuts of the one before",
        "prepare/test_curated.py::test_what_is_known_counts_only_where_the_same_was_measured",
    ),
    _of(
        "loader-state-without-waiting-samples", "energon/pipeline.py",
        '(*PackingDataset._savable_fields, "_carried")', "PackingDataset._savable_fields",
        "a resumed run packs the carried-over samples differently from the uninterrupted run",
        "reading/test_loader.py::test_resume_is_exact_from_every_pack_of_an_epoch",
    ),
    _of(
        "every-rank-reads-the-same", "reading/loader.py",
        "rank=rank, world_size=world_size, num_workers", "rank=0, world_size=world_size, num_workers",
        "all data-parallel ranks train on the same samples and most of the dataset is never seen",
        "reading/test_loader.py::test_ranks_share_out_an_epoch",
    ),
    _of(
        "bad-samples-skipped", "energon/pipeline.py",
        'return {"global_error_handler": _raise}, {}', "return {}, {}",
        "a damaged sample is silently skipped and training continues",
        "reading/test_loader.py::test_a_refused_sample_ends_the_run_and_is_named",
    ),
    _of(
        "workers-resume-in-another-order", "energon/pipeline.py",
        "(process.id + self.worker_id_offset)", "(process.id + process.num_workers - self.worker_id_offset)",
        "a run with three or more workers resumes with another order of samples",
        "reading/test_loader.py::test_resume_with_workers_is_exact_and_can_be_repeated",
    ),
    _of(
        "padding-beyond-the-capacity", "reading/packing.py",
        "usable = capacity - capacity % multiple", "usable = capacity",
        "padded packs exceed the capacity and may run out of memory",
        "reading/test_packing.py",
    ),
    _of(
        "blend-weights-ignored", "reading/loader.py",
        "weight=one.part.weight", "weight=1.0",
        "a blend draws its datasets equally often and ignores the weights",
        "reading/test_blends.py",
    ),
    _of(
        "known-split-forgotten", "prepare/shard_batches.py",
        "yield source, splits.get(content) or drawn", "yield source, drawn",
        "a copy of a validation clip that is added later is put into the train split",
        "prepare/test_shard_batches.py",
    ),
    _of(
        "earlier-record-hides-the-later", "index/sources.py",
        "for part in reversed(self._parts):", "for part in self._parts:",
        "an updated clip is compared with what it was before, and encoded again by every run",
        "index/test_sources.py::test_a_history_of_changes_leaves_what_a_dictionary_would",
    ),
    _of(
        "index-written-whole", "index/sources.py",
        "<= max(size * _MERGED_UP_TO, written.records)", "<= 10**12",
        "adding a thousand clips to ten million writes ten million records",
        "index/test_sources.py::test_adding_writes_what_is_new_and_leaves_the_files_that_are_there",
    ),
    _of(
        "old-shards-are-left", "prepare/removal.py",
        "file.unlink(missing_ok=True)", "pass",
        "removed samples stay on the disk after an update",
        "prepare/test_update.py",
    ),
    _of(
        "damaged-shard-copied", "prepare/removal.py",
        "sha256_of(path) != shard.sha256", "not shard.sha256",
        "an update copies a damaged shard and records the digest of the damage",
        "prepare/test_update_safety.py::test_a_damaged_shard_is_not_copied",
    ),
    _of(
        "changed-content-of-equal-size", "sources/changes.py",
        "known.get(source.name) != look.status.mtime_ns:", "False:",
        "a clip that was replaced by one of equal size keeps the samples of the other without a word",
        "prepare/test_update.py::test_changes_are_named_and_left",
    ),
    _of(
        "cut-video-accepted", "video/containers/truncation.py",
        "if missing > 0 else None", "if missing > 100_000 else None",
        "a WebM file whose download broke off goes into the dataset as a shorter clip",
        "video/containers/test_truncation.py",
    ),
    _of(
        "dropped-windows-exit-0", "cli.py",
        'counts.rejected or counts.dropped', 'counts.rejected',
        "the exit code is 0 although windows of accepted clips are missing",
        "test_cli.py::test_dropped_windows_of_an_accepted_clip_decide_the_exit_code",
    ),
    _of(
        "replaced-clip-of-equal-size", "prepare/probing/source_probe.py",
        '[known.bytes, known.mtime_ns] != [size, status.mtime_ns]', 'known.bytes != size',
        "a clip that was replaced by one of equal size keeps the old digest and frame count",
        "prepare/test_run_again.py::test_cached_probe_results_are_used_again",
    ),
    _of(
        "finished-shards-encoded-again", "prepare/run.py",
        "if not self.of.finished(number).is_file()]", "]",
        "after an interruption all shards are encoded again: hours of GPU time",
        "prepare/test_run.py::test_a_failing_run_leaves_whole_shards_only_and_is_taken_up",
    ),
    _of(
        "frames-on-ray-without-bound", "prepare/on_ray/shard_pipeline.py",
        "pools.encode.calls >= self._most_frames", "pools.encode.calls >= 10**9",
        "decoders on a Ray cluster run ahead of its GPUs and fill the memory",
        "prepare/on_ray/test_shard_pipeline.py::test_decoding_waits_for_the_encoding_actors",
    ),
    _of(
        "pixels-from-0-to-2", "prepare/encoding/encoder.py",
        ".float() / 127.5 - 1", ".float() / 127.5",
        "all latents are of videos twice as bright as the autoencoder knows",
        "prepare/test_run.py::test_latents_are_those_of_the_codec",
    ),
    _of(
        "frame-rate-ignored", "video/decode.py",
        "yield from resample(timed, fps, longest=self.limits.still)", "yield from (frame.image for frame in timed)",
        "clips of 30 frames a second are encoded as if they had 16: motion at half speed",
        "video/test_decode.py",
    ),
    _of(
        "rotation-ignored", "video/display/picture.py",
        "image = image.swapaxes(0, 1)", "image = image[:]",
        "rotated videos, such as those of phones, are encoded without rotation",
        "video/test_decode.py",
    ),
    _of(
        "hdr-not-mapped", "video/display/tone_mapping.py",
        "intent=perceptual:", "intent=relative_colorimetric:",
        "highlights of HDR videos are cut off at white",
        "video/display/test_tone_mapping.py",
    ),
    _of(
        "windows-overlap-by-one-frame", "video/windows.py",
        "start += length", "start += max(1, length - 1)",
        "the last frame of each window is the first of the next",
        "video/test_windows.py",
    ),
    _of(
        "verify-without-digests", "inspect/verify.py",
        "(digest := sha256_of(path)) != record.sha256", "not (digest := sha256_of(path))",
        "wan-data verify accepts a shard with a flipped bit",
        "inspect/test_verify.py", "test_reliability.py::test_every_cut_and_every_flipped_bit_is_found",
    ),
    _of(
        "folder-not-locked", "shards/lock.py",
        "stack.enter_context(locked(path))", "os.open(path, os.O_RDWR | os.O_CREAT)",
        "two preparations write into one folder and damage each other's shards",
        "prepare/test_run.py::test_one_writer_a_folder",
    ),
    _of(
        "shards-run-code", "shards/serialization.py",
        "weights_only=True", "weights_only=False",
        "reading a downloaded dataset runs code from its shards",
        "shards/test_serialization.py",
    ),
)  # fmt: skip
