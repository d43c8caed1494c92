"""A JupyterHub spawner whose servers outlive the hub: what runs is asked of limpet, and nothing is kept in the hub.

In jupyterhub_config.py: c.JupyterHub.spawner_class = "jupyterhub_spawner.LimpetSpawner", and
c.JupyterHub.cleanup_servers = False. Servers run on the hub's host, as the hub's user.
"""

import asyncio
from urllib.parse import quote

from jupyterhub.spawner import Spawner
from jupyterhub.utils import random_port
from traitlets import Unicode

from limpet import AsyncEngine
from limpet.engine import AsyncContainer
from limpet.schema import ContainerState

ADDRESS = "127.0.0.1"
_openings: dict[str, "asyncio.Task[AsyncEngine]"] = {}


async def open_engine(state_dir: str) -> AsyncEngine:
    """Return the hub's engine, which is opened once; it has found by then what still runs."""

    async def begin() -> AsyncEngine:
        engine = await AsyncEngine.open(state_dir, wait=10)  # a hub that is just ending may have it open
        await engine.prune(sandboxes=True)
        return engine

    opening = _openings.get(state_dir)
    if opening is None or (opening.done() and (opening.cancelled() or opening.exception())):
        opening = _openings[state_dir] = asyncio.create_task(begin())
    return await asyncio.shield(opening)


class LimpetSpawner(Spawner):
    """Runs each server as a container. It is found by its labels, whatever the hub had time to write down."""

    state_dir = Unicode("limpet", help="The directory of the engine's state.").tag(config=True)

    async def start(self) -> tuple[str, int]:
        """Start a server; what is left of an earlier one is removed before."""
        engine = await open_engine(self.state_dir)
        for old in await self._find_all(engine):
            await old.remove(force=True)
        self.ip, self.port = ADDRESS, random_port()
        name = f"{quote(self.user.name, safe='')}:{quote(self.name, safe='')}"
        config = {
            "metadata": {"name": name},
            "image": {"image": "host"},
            "command": [*self.cmd, *self.get_args()],
            "labels": self._labels,
            "annotations": {"port": str(self.port)},
            "log_path": f"{name}.log",
        }
        sandbox = await engine.get_or_create_sandbox({"metadata": {"name": "jupyterhub"}})
        container = await engine.create_container(config, sandbox)
        await container.start(secret_env=self.get_env())  # with the server's token, which is written nowhere
        return self.ip, self.port

    async def poll(self) -> int | None:
        """Return None while the server runs, or may run; else its exit code."""
        server = await self._find()
        if server is None:
            return 0
        may_run = server.state in {ContainerState.RUNNING, ContainerState.UNKNOWN} and server.status.started_at
        return None if may_run else server.status.exit_code

    async def stop(self, now: bool = False) -> None:
        """Stop the server and all of its kernels; with `now` they get no time for it."""
        server = await self._find()
        if server is not None:
            await server.remove(force=True, timeout=0 if now else 10)

    async def get_url(self) -> str:
        """Return the server's URL: a hub that was killed amid a spawn has not written it down."""
        server = await self._find()
        port = self.port if server is None else server.metadata.config.annotations["port"]
        return f"http://{ADDRESS}:{port}"

    @property
    def _labels(self) -> dict[str, str]:
        return {"jupyterhub/user": self.user.name, "jupyterhub/server": self.name}

    async def _find(self) -> AsyncContainer | None:
        """Return its server, None if there is none."""
        found = await self._find_all(await open_engine(self.state_dir))
        return found[0] if found else None

    async def _find_all(self, engine: AsyncEngine) -> list[AsyncContainer]:
        return await engine.list(labels=self._labels)
