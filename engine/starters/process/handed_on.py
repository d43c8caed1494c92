"""What a process hands on to its children, and a container gets from the engine that starts it, not from its keeper."""

import os
import resource
from collections.abc import Mapping
from typing import Any

from limpet.engine.state.descriptors import original_descriptor_limit

_LIMITS = (
    resource.RLIMIT_AS,
    resource.RLIMIT_CORE,
    resource.RLIMIT_CPU,
    resource.RLIMIT_DATA,
    resource.RLIMIT_FSIZE,
    resource.RLIMIT_MEMLOCK,
    resource.RLIMIT_MSGQUEUE,
    resource.RLIMIT_NICE,
    resource.RLIMIT_NPROC,
    resource.RLIMIT_RTPRIO,
    resource.RLIMIT_RTTIME,
    resource.RLIMIT_SIGPENDING,
    resource.RLIMIT_STACK,
)
"""All of getrlimit(2) that Linux heeds, but for that of open files: of that we have more than those who started us."""


def read_handed_on() -> Mapping[str, Any]:
    """Return fields of a plan: resource limits, niceness, scheduling policy and CPUs, as this thread's child has them.

    "nofile" stands alone, for a keeper of an older version knows no other limit.
    """
    policy = os.sched_getscheduler(0)
    is_reset = bool(policy & os.SCHED_RESET_ON_FORK)
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    return {
        "nofile": original_descriptor_limit(),
        "limits": [(number, *resource.getrlimit(number)) for number in _LIMITS],
        "scheduling": {
            "policy": os.SCHED_OTHER if is_reset else policy,
            "priority": 0 if is_reset else os.sched_getparam(0).sched_priority,
            "nice": max(nice, 0) if is_reset else nice,
            "cpus": sorted(os.sched_getaffinity(0)),
        },
    }
