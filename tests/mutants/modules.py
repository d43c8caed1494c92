"""Which modules are mutated, how many mutants of each are tried, and which tests must notice them."""

from typing import NamedTuple


class Group(NamedTuple):
    """Modules that the same tests are to watch; the quickest tests come first, for the first failure ends a trial."""

    modules: tuple[str, ...]
    one_in: int
    """A sample of the mutants is tried: one in so many."""
    tests: tuple[str, ...]


def _without(path: str, *tests: str) -> tuple[str, ...]:
    """Leave out those that take long."""
    return tuple(f"--deselect={path}::{test}" for test in tests)


_SLOW_LAWS = _without(
    "tests/store/test_laws.py",
    "test_the_store_is_a_dictionary_that_survives",
    "test_many_threads_on_few_containers_lose_no_update",
    "test_readers_never_see_half_a_transaction",
    "test_lists_never_see_half_of_who_came_and_went",
)
_KEEPER = (
    "tests/starters/test_keeper_starts.py",
    "tests/starters/test_stop_signal.py",
    "tests/starters/test_waits.py",
    "tests/starters/test_leftovers.py",
    "tests/starters/test_keeper_socket.py",
    "tests/starters/test_keeper_clean.py",
    "tests/starters/test_keeper_output.py",
    "tests/starters/test_keeper_descriptors.py",
    "tests/starters/test_keeper_killed.py",
    "tests/starters/test_keeper_stopped.py",
    *_without(
        "tests/starters/test_keeper_starts.py",
        "test_a_start_that_all_keepers_leave_is_told_by_its_process",
        "test_a_gate_that_dies_or_hangs_is_no_start",
    ),
    *_without(
        "tests/starters/test_stop_signal.py",
        "test_a_stop_is_finished_by_the_next_engine",
    ),
    *_without(
        "tests/starters/test_waits.py",
        "test_ctrl_c_cuts_no_step_in_two",
        "test_tasks_wait_without_a_thread",
    ),
    *_without(
        "tests/starters/test_keeper_clean.py",
        "test_the_keeper_is_small_and_ends_when_nothing_is_left",
    ),
    *_without(
        "tests/starters/test_keeper_output.py",
        "test_nothing_stays_of_output_that_a_lost_keeper_had_copied",
    ),
    *_without(
        "tests/starters/test_keeper_killed.py",
        "test_only_a_parent_vouches_for_a_process",
        "test_the_keeper_is_killed_again_and_again",
        "test_ends_are_witnessed_while_no_engine_lives[killed2]",
        "test_ends_are_witnessed_while_no_engine_lives[killed3]",
        "test_nothing_false_is_said_when_all_are_killed",
    ),
    *_without(
        "tests/starters/test_keeper_stopped.py",
        "test_an_anchor_that_was_stopped_takes_over",
        "test_whichever_of_the_keepers_processes_is_stopped_the_next_life_is_whole",
        "test_a_keeper_that_was_stopped_goes_on_once_it_is_needed",
    ),
)
_SLOW_COPIER = _without(
    "tests/logs/test_copier.py",
    "test_no_line_is_lost_or_doubled_by_kills",
    "test_a_full_disk_is_waited_for",
    "test_running_out_of_descriptors_delays_and_loses_nothing",
    "test_what_is_put_in_a_logs_place_is_not_written",
)

GROUPS = {
    "recovery": Group(
        tuple(
            f"recovery/{name}.py"
            for name in (
                "bundles", "evidence", "examine", "files", "host", "intents", "orphans", "ourselves",
                "pid_namespaces", "report", "rules", "sandbox_rules",
            )
        ),
        4,
        (
            "tests/recovery/test_rules.py",
            "tests/recovery/test_sandbox_rules.py",
            "tests/recovery/test_intents.py",
            "tests/recovery/test_bundles.py",
            "tests/recovery/test_files.py",
            "tests/recovery/test_report.py",
            "tests/recovery/test_ourselves.py",
            "tests/recovery/test_users.py",
            "tests/recovery/test_probe.py",
            "tests/recovery/test_world.py",
        ),
    ),
    "probe": Group(("recovery/probe.py",), 4, ("tests/recovery/test_probe.py", "tests/recovery/test_world.py")),
    "looks": Group(("recovery/looks.py",), 4, ("tests/starters/test_seam.py",)),
    "thread": Group(("recovery/thread.py",), 4, ("tests/recovery/test_thread.py", "tests/engine/test_handles.py")),
    "mounts": Group(
        ("recovery/mounts.py", "recovery/users.py"),
        4,
        (
            "tests/recovery/test_mounts.py",
            "tests/recovery/test_users.py",
            "tests/engine/test_bundle.py",
            "tests/starters/test_oci_sandboxes.py",
        ),
    ),
    "store": Group(
        tuple(
            f"engine/store/{name}.py"
            for name in (
                "draft", "listing", "record", "rows", "sandboxes", "store",
            )
        ),
        12,
        (
            "tests/store/test_laws.py",
            *_SLOW_LAWS,
            "tests/store/test_own.py",
            "tests/store/test_store.py",
            "tests/store/test_opening.py",
            "tests/engine/test_handles.py",
            "tests/store/test_closing.py",
            "tests/store/test_events.py",
        ),
    ),
    "deadlines": Group(
        ("engine/store/deadlines.py",),
        12,
        ("tests/intent/test_expiry.py", "tests/store/test_own.py"),
    ),
    "memory": Group(
        ("engine/store/doubt.py", "engine/store/memory.py"),
        12,
        (
            "tests/store/test_memory.py",
            "tests/store/test_own.py",
            "tests/store/test_labels.py",
            "tests/store/test_laws.py",
            *_SLOW_LAWS,
            "tests/store/test_opening.py",
            "tests/store/test_events.py",
        ),
    ),
    "match": Group(
        ("engine/store/match.py",),
        6,
        (
            "tests/store/test_laws.py::test_look_up_by_id_name_and_prefix",
            "tests/store/test_laws.py::test_look_up_of_a_sandbox",
            "tests/store/test_laws.py::test_every_combination_of_filters",
            "tests/store/test_own.py",
            "tests/store/test_labels.py",
        ),
    ),
    "commit": Group(
        ("engine/store/commit.py",),
        12,
        (
            "tests/store/test_store.py",
            "tests/store/test_closing.py",
            "tests/store/test_commit.py",
            *_without("tests/store/test_commit.py", "test_sigkill_while_threads_and_tasks_write"),
        ),
    ),
    "watch": Group(("engine/store/feed.py", "engine/store/watch.py"), 6, ("tests/store/test_events.py",)),
    "shipping": Group(("engine/store/fleet.py",), 6, ("tests/store/test_store.py", "tests/fleet/test_shipping.py")),
    "lifecycle": Group(
        tuple(
            f"engine/lifecycle/{name}.py"
            for name in (
                "bundle", "container", "expiry", "freezing", "life", "limits", "patience", "releasing", "removal",
                "runtime", "sandbox", "starting", "stopping", "strict", "watcher",
            )
        ),
        12,
        (
            "tests/engine/test_bundle.py",
            "tests/engine/test_handles.py",
            "tests/engine/test_containers.py",
            "tests/engine/test_sandboxes.py",
            *_without(
                "tests/engine/test_sandboxes.py",
                "test_the_next_engine_goes_on_with_a_stop",
                "test_all_are_stopped_side_by_side",
            ),
        ),
    ),
    "stops": Group(
        ("engine/lifecycle/stops.py",),
        6,
        (
            "tests/starters/test_many.py",
            "tests/engine/test_sandboxes.py",
            *_without("tests/engine/test_sandboxes.py", "test_the_next_engine_goes_on_with_a_stop"),
        ),
    ),
    "status": Group(
        ("engine/lifecycle/cri_status.py",),
        6,
        ("tests/starters/test_private.py", "tests/engine/test_containers.py", "tests/engine/test_sandboxes.py"),
    ),
    "restarts": Group(
        tuple(f"engine/lifecycle/{name}.py" for name in ("attempts", "follow_ups", "prune", "timetable")),
        8,
        (
            "tests/intent/test_timetable.py",
            "tests/intent/test_expiry.py",
            *_without(
                "tests/intent/test_expiry.py",
                "test_a_renewal_puts_it_off_and_is_durable",
                "test_a_clock_that_is_set_back_keeps_nothing_for_ever",
                "test_a_clock_that_is_set_forward_ends_nothing_early",
                "test_a_sandbox_that_expired_while_nobody_was_there_goes_at_the_next_opening",
            ),
            "tests/intent/test_restart.py",
            *_without(
                "tests/intent/test_restart.py",
                "test_a_stop_cancels_a_restart_that_waits",
                "test_nobodys_stop_is_undone",
                "test_what_was_released_or_deleted_is_not_restarted",
                "test_what_waits_is_restarted_by_the_original_and_by_no_copy",
            ),
        ),
    ),
    "output": Group(
        tuple(f"engine/starters/process/keeper/{name}.py" for name in ("copier", "lines", "log")),
        16,
        (
            "tests/logs/test_reading.py",
            "tests/logs/test_copier.py",
            *_SLOW_COPIER,
        ),
    ),
    "starters": Group(
        tuple(
            f"engine/starters/{name}.py"
            for name in (
                "abilities", "choices", "contract", "environment", "log_directory", "pidfds", "propagation", "registry",
                "signals", "users",
            )
        )
        + tuple(
            f"engine/starters/process/{name}.py"
            for name in ("accounts", "interpreter", "plan", "root_files", "spec", "unapplied")
        ),
        6,
        (
            "tests/starters/test_registry.py",
            "tests/starters/test_private.py",
            "tests/starters/test_adoption.py",
            "tests/engine/test_containers.py",
        ),
    ),
    "copies": Group(
        ("engine/starters/process/keeper/copies.py",),
        16,
        (
            "tests/logs/test_copier.py",
            *_SLOW_COPIER,
            "tests/starters/test_keeper_output.py::test_nothing_stays_of_output_that_a_lost_keeper_had_copied",
            "tests/starters/test_keeper_killed.py::test_the_keeper_is_killed_again_and_again",
            "tests/starters/test_evidence.py",
        ),
    ),
    "facts": Group(("engine/starters/process/facts.py",), 2, ("tests/starters/test_facts.py",)),
    "client": Group(
        tuple(f"engine/starters/process/{name}.py" for name in ("client", "ends", "starter", "starts")),
        16,
        (
            "tests/starters/test_keeper_anew.py",
            "tests/engine/test_containers.py",
            *_KEEPER,
            "tests/starters/test_evidence.py",
            "tests/starters/test_adoption.py",
            "tests/starters/test_private.py",
        ),
    ),
    "cgroups": Group(
        tuple(
            f"engine/starters/process/cgroups/{name}.py"
            for name in ("files", "freezer", "hierarchies", "limits", "parents", "settings")
        ),
        12,
        ("tests/engine/test_cgroups.py", "tests/engine/test_freezer.py", "tests/intent/test_pause.py"),
    ),
    "talk": Group(
        ("engine/starters/process/keeper/loop.py", "engine/starters/process/keeper/messages.py"),
        12,
        ("tests/starters/test_loop.py", "tests/starters/test_messages.py", "tests/starters/test_spare.py"),
    ),
    "roots": Group(("engine/starters/process/keeper/root.py",), 16, ("tests/starters/test_private.py",)),
    "keeper": Group(
        tuple(
            f"engine/starters/process/{name}.py"
            for name in (
                "keeper/container", "keeper/gate", "keeper/journal", "keeper/keeper",
                "keeper/adoption", "keeper/kernel", "keeper/listener", "keeper/main", "keeper/members", "keeper/spare",
                "keeper/starts",
            )
        ),
        16,
        (
            "tests/starters/test_keeper_anew.py",
            "tests/starters/test_private.py",
            "tests/starters/test_spare.py",
            *_without(
                "tests/starters/test_spare.py",
                "test_a_spare_that_was_killed_is_replaced",
                "test_the_spare_ends_with_its_keeper",
            ),
            *_KEEPER,
        ),
    ),
    "oci": Group(
        tuple(
            f"engine/starters/oci/{name}.py"
            for name in (
                "annotations", "apparmor", "capabilities", "mounts", "namespaces", "resources", "seccomp",
                "spec", "target", "unapplied", "written",
            )
        ),
        12,
        (
            "tests/starters/test_oci_apparmor.py",
            "tests/starters/test_oci_seccomp.py",
            "tests/starters/test_oci_written.py",
            "tests/starters/test_oci_capabilities.py",
            "tests/starters/test_oci_mounts.py",
            "tests/starters/test_oci_resources.py",
            "tests/starters/test_oci_spec.py",
            "tests/starters/test_oci_seen.py",
            "tests/starters/test_oci_abilities.py",
            "-k",
            "not crun",  # it is given the same as runc
        ),
    ),
    "oci limits": Group(
        ("engine/starters/host_path.py", "engine/starters/oci/ranges.py"),
        6,
        (
            "tests/starters/test_oci_mounts.py",
            "tests/starters/test_oci_resources.py",
            "tests/starters/test_oci_limits.py",
            "-k",
            "not crun",
        ),
    ),
    "oci programs": Group(
        tuple(f"engine/starters/oci/{name}.py" for name in ("command", "executable", "root", "tools")),
        12,
        (
            "tests/starters/test_oci_root.py",
            "tests/starters/test_oci_tools.py",
            "tests/starters/test_oci_command.py",
            "tests/starters/test_oci_executable.py",
            "tests/starters/test_oci_family.py",
        ),
    ),
    "oci calls": Group(("engine/starters/oci/calls.py",), 12, ("tests/starters/test_oci_calls.py",)),
    "oci runs": Group(("engine/starters/oci/run_directory.py",), 12, ("tests/starters/test_oci_run_directory.py",)),
    "oci cgroups": Group(
        ("engine/starters/oci/cgroups.py",),
        12,
        ("tests/starters/test_oci_cgroups.py", "tests/starters/test_oci_abilities.py"),
    ),
    "oci probe": Group(
        ("engine/starters/oci/probe.py",),
        16,
        (
            "tests/starters/test_oci_probe.py",
            "tests/starters/test_oci_evidence.py",
            "-k",
            "not crun",
        ),
    ),
    "oci lives": Group(
        tuple(
            f"engine/starters/oci/{name}.py"
            for name in (
                "conmon", "exits", "starter",
            )
        ),
        16,
        (
            "tests/starters/test_oci_life.py",
            "tests/starters/test_oci_evidence.py",
            "tests/starters/test_oci_abilities.py",
            "tests/starters/test_oci_root.py",
        ),
    ),
    "oci commands": Group(
        tuple(f"engine/starters/oci/{name}.py" for name in ("abilities", "commands", "family")),
        12,
        (
            "tests/starters/test_oci_commands.py",
            "tests/starters/test_oci_family.py",
            "tests/starters/test_oci_abilities.py",
            "tests/starters/test_oci_frozen.py",
            "tests/starters/test_oci_limits.py",
            "tests/starters/test_oci_sessions.py",
            "-k",
            "not crun",
        ),
    ),
    "oci sandboxes": Group(
        ("engine/starters/oci/pin.py", "engine/starters/oci/sandboxes.py", "engine/starters/oci/rootless.py"),
        12,
        ("tests/starters/test_oci_sandboxes.py", "tests/starters/test_oci_rootless.py"),
    ),
    "oci networks": Group(("engine/starters/oci/cni.py",), 12, ("tests/starters/test_oci_cni.py",)),
    "oci sessions": Group(("engine/starters/oci/sessions.py",), 12, ("tests/starters/test_oci_sessions.py",)),
}  # fmt: skip
