"""Which modules are mutated, how many mutants of each are tried, and which tests must notice them."""

from typing import NamedTuple


class Group(NamedTuple):
    """Modules that the same tests are to watch; the quickest tests come first, for the first failure ends a trial."""

    modules: tuple[str, ...]
    one_in: int
    """A sample of the mutants is tried: one in so many."""
    tests: tuple[str, ...]


GROUPS = {
    "recovery": Group(
        tuple(
            f"recovery/{name}.py"
            for name in (
                "bundles", "evidence", "examine", "files", "host", "intents", "looks", "mounts", "orphans", "ourselves",
                "pid_namespaces", "probe", "report", "rules", "sandbox_rules", "users",
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
    "store": Group(
        tuple(
            f"engine/store/{name}.py"
            for name in (
                "commit", "deadlines", "doubt", "draft", "feed", "fleet", "listing", "match", "memory", "record",
                "rows", "sandboxes", "store", "watch",
            )
        ),
        12,
        (
            "tests/store/test_store.py",
            "tests/store/test_events.py",
            "tests/store/test_own.py",
            "tests/store/test_opening.py",
            "tests/store/test_laws.py",
            "tests/store/test_closing.py",
            "tests/store/test_statements.py",
            "tests/store/test_commit.py",
            "--deselect=tests/store/test_commit.py::test_sigkill_while_threads_and_tasks_write",
        ),
    ),
    "lifecycle": Group(
        tuple(
            f"engine/lifecycle/{name}.py"
            for name in (
                "bundle", "container", "cri_status", "patience", "prune", "runtime", "sandbox", "steps",
                "strict", "watcher",
            )
        ),
        12,
        (
            "tests/engine/test_bundle.py",
            "tests/engine/test_handles.py",
            "tests/engine/test_containers.py",
            "tests/engine/test_sandboxes.py",
            "tests/engine/test_interrupts.py",
        ),
    ),
    "restarts": Group(
        tuple(f"engine/lifecycle/{name}.py" for name in ("attempts", "follow_ups", "timetable")),
        12,
        ("tests/intent/test_timetable.py", "tests/intent/test_restart.py", "tests/intent/test_expiry.py"),
    ),
    "output": Group(
        tuple(f"engine/starters/process/keeper/{name}.py" for name in ("copier", "copies", "lines", "log")),
        16,
        ("tests/logs/test_copier.py", "tests/logs/test_reading.py", "tests/starters/test_keeper.py"),
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
            for name in (
                "accounts", "client", "facts", "interpreter", "plan", "root_files", "spec", "starter", "unapplied",
                "keeper/container", "keeper/gate", "keeper/journal", "keeper/keeper", "keeper/kernel", "keeper/main",
                "keeper/messages", "keeper/root", "keeper/spare",
            )
        ),
        16,
        (
            "tests/starters/test_registry.py",
            "tests/starters/test_private.py",
            "tests/starters/test_keeper_anew.py",
            "tests/starters/test_spare.py",
            "--deselect=tests/starters/test_spare.py::test_a_spare_that_was_killed_is_replaced",
            "tests/starters/test_seam.py",
            "tests/starters/test_keeper.py",
            "--deselect=tests/starters/test_keeper.py::test_a_gate_that_dies_or_hangs_is_no_start",
        ),
    ),
}  # fmt: skip
