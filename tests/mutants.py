"""Engines with a seeded bug each, as others have had it: the tests that are there to find it must fail. `pytest --mutant NAME` runs one.

A mutant changes one thing, by a patch of the engine as it is; each names the tests that have to notice.
"""

from __future__ import annotations

import inspect
import os
import secrets
import textwrap
from typing import TYPE_CHECKING, NamedTuple

from dbm_bitcask.engine import (
    backup,
    batch,
    contents,
    files,
    keydir,
    lock,
    log,
    lookup,
    merge,
    page,
    record,
    recovery,
    rotation,
    segment,
    store,
    walk,
    write,
)
from dbm_bitcask.engine import header as at

if TYPE_CHECKING:
    from collections.abc import Callable

CRASHES = "test_crash_states.py::test_every_crash_leaves_what_was_promised"


class Mutant(NamedTuple):
    """What is changed, and the tests of which at least one must fail."""

    apply: Callable[[], None]
    caught_by: tuple[str, ...]


MUTANTS: dict[str, Mutant] = {}


def mutant(*caught_by: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(apply: Callable[[], None]) -> Callable[[], None]:
        MUTANTS[apply.__name__] = Mutant(apply, caught_by)
        return apply

    return register


def rewrite(place: object, name: str, *words: str) -> None:
    """Replace some words by others, in turn, in the source of a function or of a class's method."""
    function = getattr(place, name)
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in zip(words[::2], words[1::2], strict=True):
        assert source.count(old) == 1, f"{name} has changed: {old!r} stands in it {source.count(old)} times"
        source = source.replace(old, new)
    changed: dict[str, object] = {}
    exec(compile(source, f"<mutant of {name}>", "exec"), function.__globals__, changed)
    setattr(place, name, changed[name])
    for module in (batch, contents, log, merge, recovery, rotation, store, write, keydir):
        if getattr(module, name, None) is function:
            setattr(module, name, changed[name])


# What is durable, and when.


@mutant(CRASHES)
def no_directory_is_synced() -> None:
    files.Directory.sync = lambda _: None


@mutant(CRASHES)
def manifest_may_be_durable_before_the_name_of_the_segment_that_it_lists() -> None:
    rewrite(segment, "create", "    directory.sync()\n", "")


@mutant(CRASHES)
def manifest_is_replaced_before_it_is_durable() -> None:
    rewrite(rotation, "write_manifest", "        file.sync()\n", "")


@mutant(CRASHES)
def sealed_segment_is_listed_before_it_is_durable() -> None:
    rewrite(rotation, "rotate", "    log.durable(log.active.sync_contents)\n", "")


@mutant(CRASHES)
def merged_segment_goes_before_what_was_copied_is_durable() -> None:
    rewrite(merge, "merge", "            log.durable(log.active.sync_contents)  # not under the lock, if it can be had so\n", "")
    rewrite(rotation, "drop", "log.durable(log.active.sync_contents)", "pass")


@mutant(CRASHES)
def merged_segment_goes_before_the_manifest() -> None:
    rewrite(
        rotation,
        "drop",
        "    _commit_list(log,",
        "    _unlink(log, gone, reclaimed)\n    _commit_list(log,",
    )


@mutant(CRASHES)
def close_syncs_nothing() -> None:
    rewrite(store.Store, "_settle", "    self.sync()\n", "")


@mutant("test_redteam.py::test_after_a_failed_sync_nobody_writes_until_the_database_is_opened_again")
def failed_sync_is_tried_again() -> None:
    rewrite(
        log.Log,
        "durable",
        "        self.keydir.words[at.POISON] = 1\n        self.keydir.words[at.STATE] = at.POISONED\n        raise\n",
        "        sync()\n",
    )


@mutant("test_redteam.py::test_dirty_mark_is_durable_before_the_first_change_whoever_made_it", CRASHES)
def clean_mark_is_taken_off_without_a_sync() -> None:
    rewrite(recovery, "_begin", "        log.durable(log.keydir.file.sync)  #", "        pass  #")


@mutant("test_redteam.py::test_keydir_is_not_marked_clean_over_the_write_of_another_handle")
def clean_mark_is_made_over_a_tail_that_has_moved() -> None:
    rewrite(store, "_mark_clean", "words[words[at.CURRENT] + at.TAIL] == tail and ", "")


# Which keydir is trusted.


@mutant(CRASHES)
def keydir_is_trusted_after_a_restart() -> None:
    rewrite(at, "is_sound", "boot == words[BOOT_LOW] | words[BOOT_HIGH] << 64", "True")


@mutant("test_redteam.py::test_copy_of_a_live_database_whose_keydir_is_torn_apart_finds_every_key")
def copied_keydir_is_trusted() -> None:
    rewrite(at, "is_sound", "words[INODE] != identity.inode or ", "")


@mutant(
    "test_redteam.py::test_keydir_of_a_later_state_is_not_trusted_over_a_restored_log",
    "test_redteam.py::test_copy_that_says_clean_over_pages_of_later_is_not_trusted",
)
def keydir_is_trusted_over_any_log() -> None:
    recovery._fits_log = lambda *_: True


@mutant("test_redteam.py::test_handle_whose_keydir_lost_its_name_sees_what_is_written_by_another_one")
def nobody_is_told_that_a_keydir_lost_its_name() -> None:
    segment.move_generation = lambda _: None


# The log.


@mutant("test_record.py", "test_format.py", CRASHES)
def checksum_does_not_cover_the_header() -> None:
    rewrite(record, "encode", "xxh3_64_intdigest(body, seed)", "xxh3_64_intdigest(body[BODY.size :], seed)")
    rewrite(record, "decode", "xxh3_64_intdigest(body, seed)", "xxh3_64_intdigest(body[BODY.size :], seed)")


@mutant("test_redteam.py::test_records_of_a_deleted_segment_never_verify_in_another", "test_redteam.py::test_swapped_segments_are_damage")
def every_segment_has_the_same_salt() -> None:
    secrets.randbits = lambda _: 1


@mutant("test_redteam.py::test_value_that_holds_records_is_never_taken_for_records")
def checksum_does_not_know_where_the_record_stands() -> None:
    rewrite(segment, "scan", "salt ^ offset", "salt")
    rewrite(segment, "next_valid", "salt ^ offset", "salt")


@mutant("test_redteam.py::test_bytes_behind_the_length_of_a_sealed_segment_are_not_there", CRASHES)
def length_of_a_sealed_segment_is_that_of_its_file() -> None:
    rewrite(
        recovery, "_keys", "end = entry.length or end", "end = segment.open_segment(log.directory, entry).size() if entry.length else end"
    )


@mutant("test_redteam.py::test_second_crash_that_undoes_a_cut_brings_nothing_back", CRASHES)
def after_a_restart_records_are_appended_behind_a_cut() -> None:
    rewrite(recovery, "rebuild", "end = _leave_torn_segment(log, keydir, end)", "log.active.truncate(end)")


@mutant("test_failing_calls.py", "test_recovery.py")
def torn_record_is_counted_instead_of_cut() -> None:
    rewrite(
        recovery,
        "_repair",
        "        log.active.truncate(tail & MASK32)\n",
        "        words[words[at.CURRENT] + at.TAIL] = tail - (tail & MASK32) + size\n",
    )


@mutant("test_redteam.py::test_bit_rot_in_the_synced_part_of_the_active_segment_is_not_cut_as_a_torn_tail")
def bad_bytes_in_the_active_segment_are_a_torn_tail_whatever_stands_behind_them() -> None:
    rewrite(contents, "torn_tail_at", "vouched = len(reading.damage)\n", "pass\n")


@mutant("test_redteam.py::test_expired_record_never_brings_the_older_value_back")
def expired_record_is_passed_over_in_a_replay() -> None:
    rewrite(
        recovery._Builder,
        "apply",
        "    keydir, live = self.keydir, self.live\n",
        "    if key.expiry:\n        return\n    keydir, live = self.keydir, self.live\n",
    )


@mutant("test_redteam.py::test_older_value_under_a_key_that_expires_never_comes_back")
def expired_record_is_dropped_by_a_merge_without_a_tombstone() -> None:
    rewrite(
        write,
        "keep",
        "        bury(log, place, found.key)\n",
        "        publish(log, place, *append(log, record.MARK, b'', b''), flags=TOMBSTONE)\n",
    )


@mutant("test_redteam.py::test_ids_are_never_used_twice_by_a_new_database_over_an_unusable_index_either")
def new_database_begins_with_the_first_id_again() -> None:
    rewrite(store.Store, "_replace", "max(old.next_id, *above) + 1", "1")


# The index, and how an operation changes it.


@mutant("test_schedules.py")
def miss_is_believed_without_another_look_at_its_entry() -> None:
    rewrite(lookup, "reader", "if directory[index] == entry and words[EPOCH] == epoch:", "if True:")
    rewrite(page, "probe", "if directory[index] == entry:", "if True:")


@mutant("test_keydir.py::test_entry_has_a_new_version_whenever_it_is_swung")
def entry_of_the_directory_has_no_version() -> None:
    rewrite(keydir.Keydir, "_swing", "(entry + VERSION & MASK64 & -VERSION) | kid * PAGE_WORDS", "kid * PAGE_WORDS")


@mutant("test_recovery.py", "test_keydir.py")
def slot_is_stored_before_the_record() -> None:
    put = write.put

    def put_slot_first(log: log.Log, key: bytes, value: record.Value, flags: int = 0, expiry: int = 0) -> None:
        words = log.keydir.words
        place = write.locate(log, key, room=True)
        log.keydir.store(place.slot, place.hashed, words[words[at.CURRENT] + at.TAIL])
        put(log, key, value, flags, expiry)

    write.put = put_slot_first


@mutant("test_redteam.py::test_interrupted_overwrite_never_loses_the_acknowledged_value")
def interrupted_write_is_cut_off() -> None:
    run = store.Store._run

    def cut_off(self: store.Store, log: log.Log, action: Callable[..., object], *args: object) -> object:
        try:
            return run(self, log, action, *args)
        except BaseException:
            log.active.truncate(log.keydir.counter(at.TAIL) & at.MASK32)
            raise

    store.Store._run = cut_off


@mutant("test_redteam.py::test_full_disk_is_found_before_anything_is_appended")
def page_is_split_after_the_append() -> None:
    rewrite(
        write,
        "put",
        "    place = locate(log, key, room=True)\n    start, length, checksum = append(log, flags, key, value, expiry=expiry)\n",
        "    start, length, checksum = append(log, flags, key, value, expiry=expiry)\n    place = locate(log, key, room=True)\n",
    )


@mutant("test_merge.py::test_tombstone_stays_while_the_value_that_it_deletes_is_still_there", CRASHES)
def tombstone_is_dropped_whatever_is_older() -> None:
    rewrite(rotation, "is_behind_cleaned", "if not cleaning_of(log, entry):", "if False:")


@mutant("test_redteam.py::test_few_tombstones_over_a_cold_segment_stay_where_they_are")
def tombstones_count_as_dead() -> None:
    rewrite(merge, "_victims", "if number == len(victims):", "if True:", "_are_tombstones_many(log) and ", "")


ONLINE = "test_online_merge.py"


@mutant(f"{ONLINE}::test_overwrites_do_not_grow_the_log_without_bound")
def slice_passes_over_records_that_count() -> None:
    rewrite(merge, "_clean_slice", "            if word:\n", "            if word and hashed % 8:\n")


@mutant(f"{ONLINE}::test_overwrites_do_not_grow_the_log_without_bound", CRASHES)
def slice_passes_over_records_that_count_and_nobody_counts_what_is_left() -> None:
    slice_passes_over_records_that_count()
    rewrite(rotation, "cleaning_of", " and not lives", "")


@mutant(f"{ONLINE}::test_segment_whose_tombstones_went_stays_if_an_older_one_does_not_count_as_cleaned_any_more")
def segment_whose_tombstones_went_is_dropped_before_older_ones() -> None:
    rewrite(merge, "_clean_slice", "rotation.CLEANED_BEHIND if behind else rotation.CLEANED", "rotation.CLEANED")


# Expiry.


@mutant("test_expiry.py::test_expiry_outlives", CRASHES)
def record_that_is_moved_lives_longer() -> None:
    rewrite(write, "keep", "found.value, found.time, found.expiry)", "found.value, found.time, found.expiry and found.expiry + 1000)")


@mutant("test_expiry.py::test_key_of_a_sealed_segment_is_gone_with_or_without_its_hint", CRASHES)
def walk_does_not_ask_the_clock() -> None:
    walk.has_passed = lambda _: False


# Batches.

BATCH = "test_batch.py"


@mutant(f"{BATCH}::test_reader_that_comes_when_the_writer_died_in_a_batch_sees_all_of_it")
def nobody_is_told_that_a_batch_is_being_published() -> None:
    rewrite(batch, "write_all", "    words[at.BATCH] = run.origin\n", "")


@mutant(f"{BATCH}::test_sync_within_a_batch_that_is_being_published_vouches_for_what_is_before_it")
def sync_vouches_for_a_part_of_a_batch() -> None:
    rewrite(log.Log, "whole_tail", "return begun or tail", "return tail")


@mutant("test_recovery.py::test_operation_that_is_killed_at_any_step_is_done_or_not_and_the_next_one_goes_on")
def key_that_was_stored_in_a_run_counts_as_overwritten() -> None:
    rewrite(recovery, "_publish_one", "place.location == tail", "False")


@mutant("test_recovery.py::test_operation_that_is_killed_at_any_step_is_done_or_not_and_the_next_one_goes_on")
def pages_of_a_run_are_not_counted_anew() -> None:
    rewrite(batch, "resume", "        _recount(log, hashes)\n", "")


@mutant(f"{BATCH}::test_full_disk_is_found_before_anything_is_appended")
def pages_are_split_behind_the_frame() -> None:
    rewrite(
        batch,
        "write_all",
        "    _make_room(log, hashes)\n    run = _append(log, wanted, hashes)\n",
        "    run = _append(log, wanted, hashes)\n    _make_room(log, hashes)\n",
    )


@mutant(f"{BATCH}::test_record_of_a_batch_that_goes_bad_while_a_half_is_published_takes_all_of_it")
def half_a_batch_is_cut_where_it_does_not_verify() -> None:
    rewrite(recovery, "_repair", "found is None and log.batch_around(tail)[0]", "False")


@mutant(f"{BATCH}::test_only_the_frame_says_that_all_before_it_was_synced", f"{BATCH}::test_every_torn_frame_is_cut_as_a_whole")
def records_within_a_batch_say_that_all_before_them_was_synced() -> None:
    rewrite(batch, "_encode", "pack(size, key_end, padding, 0, now)", "pack(size, key_end, padding, SYNCED, now)")


@mutant(f"{BATCH}::test_backup_of_a_database_in_a_batch_takes_all_of_it_or_nothing")
def backup_ends_within_a_batch() -> None:
    rewrite(backup, "_snapshot", "log.batch_around(tail)[0] or tail", "tail")


# Locks, processes and files.


@mutant("test_redteam.py::test_signal_that_arrives_as_the_lock_is_taken_does_not_leak_it")
def lock_is_taken_before_the_try() -> None:
    rewrite(
        lock.WriterLock,
        "run",
        "        try:\n            self.busy = True\n            self.acquire()",
        "        self.busy = True\n        self.acquire()\n        try:\n            pass",
    )


@mutant("test_redteam.py::test_child_does_not_keep_the_lock_of_a_parent_that_was_killed_within_a_write")
def child_keeps_the_lock_of_its_parent() -> None:
    rewrite(lock.WriterLock, "renew_after_fork", "        self.directory.renew()\n", "        pass\n")


@mutant("test_redteam.py::test_old_handle_does_nothing_to_a_database_that_took_the_place_of_its_own")
def files_are_found_by_path() -> None:
    rewrite(files.Directory, "open", "os.open(name, flags, dir_fd=self.fd)", "os.open(self.where(name), flags)")
    rewrite(
        files.Directory,
        "replace",
        "os.replace(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)",
        "os.replace(self.where(old), self.where(new))",
    )
    rewrite(files.Directory, "remove", "os.unlink(name, dir_fd=self.fd)", "os.unlink(self.where(name))")


def apply(name: str) -> None:
    """Make this process run a mutant."""
    assert os.environ.get("PYTEST_VERSION"), "mutants are for tests"
    MUTANTS[name].apply()
