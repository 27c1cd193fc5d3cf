"""Mutations of what wan-data does with object stores and on Ray."""

from mutations.mutation import mutation_of

_of = mutation_of("wan-data")

MUTATIONS = (
    _of(
        "failing-store-final", "storage/failures.py",
        "400 <= status < 500 and status not in _PASSING", "400 <= status < 600",
        "one answer of 503 ends a preparation of days",
        "storage/test_store.py::test_errors_of_the_server_are_asked_again",
    ),
    _of(
        "outage-rejects-clips", "storage/failures.py",
        "isinstance(error, others) or error.errno in _LOCAL", "error.errno in _LOCAL",
        "clips are rejected for good because the store was away for a moment",
        "storage/test_stored_sources.py::test_an_outage_rejects_no_clip",
    ),
    _of(
        "cut-download-taken", "storage/store.py",
        "if partial.stat().st_size != found.bytes:", "if False:",
        "half a clip is decoded as if it were whole",
        "storage/test_store.py::test_an_object_that_was_replaced_meanwhile_is_not_taken",
    ),
    _of(
        "broken-list-begins-anew", "storage/store.py",
        "                last = found.key", "                pass",
        "clips of a list that broke off come twice",
        "storage/test_store.py::test_a_long_list_that_breaks_off_goes_on",
    ),
    _of(
        "ranges-not-checked", "storage/store.py",
        "if length is not None and len(content) > length:", "if False:",
        "a proxy that ignores ranges gives the first sample of a shard for each",
        "storage/test_answers.py::test_a_store_that_reads_no_ranges_is_refused",
    ),
    _of(
        "replaced-object-not-seen", "storage/store.py",
        "equal = tags[0] == tags[1] if all(tags) else self.mtime_ns == other.mtime_ns", "equal = True",
        "a clip that another of its size has replaced keeps the latents of the old one",
        "storage/test_store.py::test_an_object_of_the_same_size_that_replaces_one_within_a_second_has_another_time",
        "storage/test_refusals.py::test_a_large_object_of_the_same_size_that_replaces_one_is_not_taken",
    ),
    _of(
        "local-copies-without-bound", "storage/local_copies.py",
        "        return self._bytes + size <= self._most", "        return True",
        "copies of clips fill the local disk",
        "storage/test_local_copies.py::test_the_bound_holds_and_the_oldest_goes_first",
        "storage/test_local_copies.py::test_objects_come_ahead_and_stay_until_they_are_used",
    ),
    _of(
        "claim-not-respected", "prepare/writer_claim.py",
        "if now is not None and now != self._before:", "if False:",
        "two preparations of one dataset in a store end with a manifest over shards of the other",
        "storage/test_two_writers.py::test_the_first_is_told_when_another_has_written_its_shards",
    ),
    _of(
        "index-not-uploaded", "prepare/store_output.py",
        "if uploaded.get(name) != (stamp := _stamp(self.folder / name)):", "if False:",
        "the manifest in the store names an index that was never uploaded",
        "storage/test_stored_output.py::test_from_a_store_into_a_store_is_the_same_as_on_a_disk",
    ),
    _of(
        "cache-without-bound", "storage/range_cache.py",
        "if total is None or total + len(content) > self._most:", "if False:",
        "the cache of training fills the local disk",
        "reading/test_from_store.py::test_a_cache_serves_later_epochs_within_its_bound",
    ),
    _of(
        "replaced-shard-read", "shards/stored_shards.py",
        "if not found.is_same(current):", "if False:",
        "training goes on with the samples of another dataset of the same name",
        "reading/test_from_store.py::test_a_shard_that_was_replaced_is_refused",
    ),
    _of(
        "calls-of-lost-actors-forgotten", "prepare/on_ray/actor_pool.py",
        "for item, _ in calls:", "for item, _ in ():",
        "a preparation on Ray waits for ever for what a lost actor was doing",
        "prepare/on_ray/test_ray_workers.py::test_the_calls_of_lost_actors_are_made_again",
    ),
    _of(
        "latents-of-an-earlier-attempt", "prepare/on_ray/shard_pipeline.py",
        "if attempt != work.attempt:", "if False:",
        "windows of a lost node are in their shard twice",
        "prepare/on_ray/test_shard_pipeline.py::test_what_an_earlier_attempt_has_decoded_is_not_taken",
    ),
    _of(
        "keys-of-a-part-alone", "curation/duplicates.py",
        "for number in range(slices):", "for number in range(1):",
        "of many clips only a part of the near-duplicates is found",
        "curation/test_duplicates.py::test_nothing_depends_on_how_many_keys_are_sorted_at_once_or_where_the_hashes_are",
    ),
)  # fmt: skip
