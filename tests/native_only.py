"""What `pytest --files portable` leaves out, and why: whole modules of tests, or single tests."""

from __future__ import annotations

KEYDIR = "it is about the file `keydir`, which the portable layer does not have"
PROCESSES = "several processes, or a parent and its fork, write at the same time"
STAGED = "it stages system calls, maps or locks of the native layer"
WHOLE = "the portable layer reads a segment as a whole"
PLACE = "the portable layer finds files by path (test_portable.py says what it does instead)"

REASONS = {
    KEYDIR: """
        test_check::test_deleted_key_has_no_slot
        test_check::test_hint_that_does_not_list_all_keys_is_found
        test_check::test_key_without_a_slot_is_found
        test_check::test_page_that_is_wrong_about_itself_is_found
        test_check::test_slot_that_points_at_an_older_record_is_found
        test_check::test_slot_that_points_between_records_is_found
        test_check::test_two_slots_of_one_record_are_found
        test_check::test_wrong_counters_are_found
        test_bit_flips::test_flipped_bit_of_the_log_gives_the_right_value_or_an_error_that_names_the_place
        test_bit_flips::test_slot_that_leads_to_the_record_of_another_key_never_gives_its_value
        test_damaged_stores::test_key_whose_record_was_lost_has_no_older_value_after_a_repair_if_the_keydir_knew_it
        test_errors::test_check_reports_damage_and_raises_nothing_but_error
        test_errors::test_damaged_keydir_never_changes_what_is_read
        test_expiry::test_counts_of_bytes_that_expire_may_be_anything
        test_interrupted::test_close_that_is_interrupted_at_any_line_can_be_called_again_and_loses_nothing
        test_open::test_mode_under_the_umask_is_that_of_every_file
        test_pitfalls::test_pitfall_10_length_in_a_record_that_does_not_verify_is_not_followed
        test_readonly
        test_recovery::test_changing_before_the_manifest_was_replaced_goes_back
        test_recovery::test_changing_keydir_that_fits_neither_manifest_is_made_anew
        test_recovery::test_clean_keydir_is_trusted_after_a_restart
        test_recovery::test_clean_keydir_says_dirty_durably_before_its_first_change
        test_recovery::test_damage_in_a_sealed_segment_is_reported_and_everything_else_can_be_read
        test_recovery::test_dirtying_keydir_is_made_durable_by_whoever_comes_next
        test_recovery::test_every_prefix_of_the_last_record_is_cut_and_reopens
        test_recovery::test_everything_of_a_closed_database_is_vouched_for
        test_recovery::test_flipped_bit_before_a_sync_is_reported_and_nothing_is_cut
        test_recovery::test_flipped_bit_of_a_sealed_header_makes_the_keydir_anew
        test_recovery::test_keydir_is_trusted_within_a_boot
        test_recovery::test_keydir_of_an_older_state_is_made_anew
        test_recovery::test_keydir_that_cannot_be_trusted_is_made_anew
        test_recovery::test_keydir_that_is_not_clean_is_made_anew_after_a_restart
        test_recovery::test_linked_keydir_is_left_alone
        test_recovery::test_seal_at_the_tail_is_a_rotation_to_be_finished
        test_recovery::test_torn_tail_is_cut_in_place_if_the_machine_did_not_restart
        test_recovery::test_unfinished_state_is_trusted_within_a_boot_only
        test_recovery::test_unknown_state_is_made_anew
        test_recovery::test_without_a_boot_id_nothing_but_a_clean_keydir_is_trusted
        test_redteam::test_copy_of_a_live_database_whose_keydir_is_torn_apart_finds_every_key
        test_redteam::test_copy_that_says_clean_over_pages_of_later_is_not_trusted
        test_redteam::test_damaged_record_can_be_overwritten_and_deleted
        test_redteam::test_dirty_mark_is_durable_before_the_first_change_whoever_made_it
        test_redteam::test_handle_whose_keydir_lost_its_name_sees_what_is_written_by_another_one
        test_redteam::test_index_is_written_in_place_by_file_systems_that_copy_on_write
        test_redteam::test_keydir_has_no_holes_and_never_shrinks
        test_redteam::test_keydir_of_another_byte_order_is_not_believed
        test_redteam::test_keydir_on_another_device_is_trusted_after_a_clean_close_only
        test_redteam::test_keydir_whose_sync_failed_is_not_trusted_any_more
        test_redteam::test_maps_stay_valid_for_whoever_still_reads_them
        test_redteam::test_reader_waits_for_nobody_who_died_within_a_split
        test_regressions_crash::test_check_reports_a_flipped_bit_in_what_is_only_derived
        test_regressions_crash::test_damaged_page_in_the_way_of_an_unfinished_write_does_not_keep_the_database_from_opening
        test_regressions_crash::test_directory_of_the_keydir_that_leads_nowhere_is_made_anew_by_a_set
        test_regressions_crash::test_page_without_an_empty_slot_does_not_hang_a_set
        test_repair::test_damaged_index_is_made_anew
        test_repair::test_database_that_is_whole_is_left_alone
    """,
    PROCESSES: """
        test_batch::test_child_of_a_fork_is_in_no_batch_and_writes_nothing_of_it
        test_batch::test_child_of_a_fork_that_leaves_the_block_writes_nothing
        test_dead_processes
        test_kill::test_writer_goes_on_beside_one_that_is_killed
        test_pitfalls::test_pitfall_20_nothing_is_cut_that_somebody_may_have_mapped
        test_pitfalls::test_pitfall_23_lock_is_not_lost_with_another_descriptor_of_the_same_file
        test_pitfalls::test_pitfall_24_child_takes_no_lock_away_and_is_not_stuck_in_one
        test_processes
        test_readme::test_examples_run_one_after_the_other
        test_redteam::test_reader_beside_a_writer_shares_its_keydir
        test_redteam::test_what_a_dead_process_left_is_synced_by_any_that_lives
        test_regressions::test_child_of_a_fork_within_a_refresh_of_another_thread_reads
        test_regressions::test_child_that_can_open_no_lock_of_its_own_refuses_to_write_until_it_can
    """,
    STAGED: """
        test_descriptors
        test_iteration::test_iteration_over_more_segments_than_descriptors_beside_a_merge_sees_each_key_once
        test_large_values::test_full_disk_in_the_middle_of_a_large_value_leaves_the_old_one
        test_large_values::test_short_write_goes_on_where_it_ended
        test_mutants
        test_pitfalls::test_pitfall_15_directory_is_synced_behind_each_commit_and_before_anything_is_deleted
        test_pitfalls::test_pitfall_16_segment_is_durable_before_the_next_one_is_used
        test_pitfalls::test_pitfall_17_failed_sync_is_not_tried_again
        test_recovery::test_close_that_is_killed_at_any_step_loses_nothing
        test_recovery::test_healing_after_a_failed_sync_that_is_killed_at_any_step_is_done_again
        test_recovery::test_operation_that_is_interrupted_at_any_step_is_done_or_not_and_the_handle_goes_on
        test_recovery::test_operation_that_is_killed_at_any_step_is_done_or_not_and_another_handle_goes_on
        test_recovery::test_operation_that_is_killed_at_any_step_is_done_or_not_and_the_next_one_goes_on
        test_recovery::test_operation_that_is_killed_at_any_step_is_seen_as_done_or_not_by_those_who_only_read
        test_redteam::test_after_a_failed_sync_nobody_writes_until_the_database_is_opened_again
        test_redteam::test_file_system_that_two_machines_may_share_is_refused
        test_redteam::test_full_disk_is_found_before_anything_is_appended
        test_redteam::test_signal_that_arrives_as_the_lock_is_taken_does_not_leak_it
        test_redteam::test_there_is_no_lock_file_that_somebody_could_delete
        test_redteam::test_what_a_failed_sync_leaves_in_doubt_is_written_anew
        test_regressions::test_reader_that_looks_between_the_mark_and_the_new_name_of_a_keydir_goes_on_to_the_new_one
        test_regressions::test_sync_that_fails_while_another_handle_changes_the_keydir_stops_all_writing
        test_regressions::test_what_a_failed_sync_left_in_doubt_is_written_anew_and_its_file_not_synced_again
        test_schedules
        test_security::test_files_are_opened_without_following_links_and_made_new
    """,
    WHOLE: """
        test_check::test_memory_does_not_grow_with_the_keys
        test_fuzz::test_record_of_a_store_that_promises_four_gigabytes_takes_no_memory
        test_large_values::test_large_value_is_copied_once_by_a_get_and_never_else
        test_security::test_file_that_somebody_made_huge_takes_no_memory
    """,
    PLACE: """
        test_open::test_handle_stays_with_its_database_when_another_takes_its_path
        test_redteam::test_old_handle_does_nothing_to_a_database_that_took_the_place_of_its_own
    """,
}

NATIVE_ONLY = {name: reason for reason, names in REASONS.items() for name in names.split()}


def reason_of(module: str, test: str) -> str | None:
    """Why a test is not for the portable layer, or None if it is."""
    return NATIVE_ONLY.get(module) or NATIVE_ONLY.get(f"{module}::{test}")
