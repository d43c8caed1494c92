"""A probe looks at one container and says what it sees. A runtime with processes of its own brings its own."""

import os
from collections.abc import Callable
from functools import cached_property
from typing import Protocol

from limpet.recovery.bundles import observe_bundle
from limpet.recovery.evidence import Boot, Bundle, Observation, Process
from limpet.recovery.host import Compare, compare, find_bundle_processes, observe_boot, observe_process
from limpet.schema.identity import ProcessIdentity
from limpet.schema.metadata import Metadata
from limpet.schema.status import Status


class Subject(Protocol):
    """A container as a probe is shown it: its status is the checkpoint, unverified."""

    @property
    def id(self) -> str:
        """The container's id."""

    @property
    def status(self) -> Status:
        """What was last checkpointed, flagged Unknown if it is not verified."""

    @property
    def metadata(self) -> Metadata:
        """The immutable part; read from disk when asked for."""


class Probe(Protocol):
    """Looks at a container without touching anything.

    An exception that comes out of `observe` makes that one container Unknown, with the exception's message.
    """

    def observe(self, container: Subject) -> Observation:
        """Return what became of the container's process and bundle."""


class HostProbe:
    """Looks at processes of this host and, if they are kept here, at bundles in `containers_dir`."""

    def __init__(
        self,
        containers_dir: str = "",
        *,
        compare: Compare = compare,
        observe_boot: Callable[[ProcessIdentity | None], Boot] = observe_boot,
    ) -> None:
        self._containers_dir = containers_dir
        self._compare = compare
        self._observe_boot = observe_boot

    @cached_property
    def _processes(self) -> dict[str, list[int]]:
        return find_bundle_processes()

    def observe(self, container: Subject) -> Observation:
        """Return what the kernel and the file system say of the container."""
        bundle_path = os.path.join(self._containers_dir, container.id) if self._containers_dir else ""
        bundle, bundle_detail = Bundle.NOT_KEPT, ""
        if bundle_path:
            bundle, bundle_detail = observe_bundle(bundle_path, container.id)
        if container.status.identity is None and not container.status.finished_at and bundle_path in self._processes:
            # It should have no process. After a database was restored from a backup it may.
            boot, process, exit_code = Boot.SAME, Process.UNPROVEN, None
            detail = f"process {self._processes[bundle_path][0]} bears its bundle's path"
        else:
            boot, process, exit_code, detail = self._observe_process(container.status.identity, bundle_path)
        return Observation(
            boot=boot,
            process=process,
            bundle=bundle,
            exit_code=exit_code,
            detail="; ".join(filter(None, (detail, bundle_detail))),
        )

    def _observe_process(
        self, identity: ProcessIdentity | None, bundle_path: str
    ) -> tuple[Boot, Process, int | None, str]:
        if identity is None:
            return Boot.SAME, Process.NONE, None, ""
        boot = self._observe_boot(identity)
        if boot is Boot.SAME:
            return boot, *observe_process(identity, bundle_path, self._compare)
        # A pid of another boot names another process; without a boot id it may.
        return boot, (Process.GONE if boot is Boot.CHANGED else Process.HIDDEN), None, ""
