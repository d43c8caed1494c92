"""Steps of the main thread are run by a thread that waits for the next one, and goes when none comes."""

import os
import threading
import time

import pytest

from limpet.engine.state.steps import run_whole
from tests.conftest import wait_until


def test_one_thread_runs_step_after_step_and_goes_when_there_are_no_more() -> None:
    """A thread for each step would cost more than many a step does; one that is not needed is not kept."""
    ids = {run_whole(threading.get_native_id) for _ in range(20)}
    assert threading.get_native_id() not in ids
    assert len(ids) < 5  # the next step may come before the thread says that it is done with the last
    wait_until(lambda: not any(os.path.exists(f"/proc/self/task/{one}") for one in ids), "its end")
    assert run_whole(threading.get_native_id) != threading.get_native_id()


def test_a_step_has_the_standing_of_the_main_thread() -> None:
    """What it starts, a container, gets the CPUs, the policy and the niceness that its thread has."""
    cpus, before = os.sched_getaffinity(0), os.sched_getscheduler(0)
    try:
        for policy, allowed in ((os.SCHED_BATCH, {min(cpus)}), (os.SCHED_OTHER, {max(cpus)})):
            os.sched_setscheduler(0, policy, os.sched_param(0))
            os.sched_setaffinity(0, allowed)
            for _ in range(2):
                found = run_whole(lambda: (os.sched_getscheduler(0), os.sched_getaffinity(0)))
                assert found == (policy, allowed)
    finally:
        os.sched_setscheduler(0, before, os.sched_param(0))
        os.sched_setaffinity(0, cpus)


def test_a_step_that_fails_leaves_the_thread_to_the_next() -> None:
    """The error is the caller's."""
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            run_whole(lambda: 1 // 0)
    assert run_whole(lambda: 1) == 1


def test_a_fork_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child does not wait for a thread that is its parent's."""
    monkeypatch.setattr("limpet.engine.state.steps._BEGIN_SECONDS", 20)
    run_whole(os.getpid)
    child = os.fork()
    if not child:
        began = time.monotonic()
        is_quick = run_whole(os.getpid) == os.getpid() and time.monotonic() - began < 10
        os._exit(0 if is_quick else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
