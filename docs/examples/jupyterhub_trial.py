"""Try jupyterhub_spawner.py with a real JupyterHub, which is killed: `make jupyterhub`."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from jupyterhub.utils import random_port

from limpet import Snapshot

TOKEN = secrets.token_hex(16)
PORT, API_PORT, HUB_PORT = random_port(), random_port(), random_port()
SECONDS = 40
BOBS = {"bob": 0.0, "bobby": 0.05, "rob": 0.1, "robin": 0.2, "robert": 0.5, "bert": 1.0, "bertie": 2.0}
"""Who has a server spawned while the hub is killed, and after how many seconds."""
CONFIG = """
import sys
sys.path.insert(0, {examples!r})
c.JupyterHub.spawner_class = "jupyterhub_spawner.LimpetSpawner"
c.JupyterHub.cleanup_servers = False
c.JupyterHub.bind_url = "http://127.0.0.1:{port}"
c.JupyterHub.hub_bind_url = "http://127.0.0.1:{hub_port}"
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{api_port}"
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.JupyterHub.services = [{{"name": "trial", "api_token": {token!r}}}]
c.JupyterHub.load_roles = [{{"name": "trial", "scopes": ["admin:users", "admin:servers"], "services": ["trial"]}}]
c.Spawner.args = ["--allow-root"]
c.Spawner.notebook_dir = "/"
"""


class Hub:
    """A JupyterHub in a directory: it may be killed and started again there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        config = CONFIG.format(
            examples=str(Path(__file__).parent), port=PORT, hub_port=HUB_PORT, api_port=API_PORT, token=TOKEN
        )
        (directory / "jupyterhub_config.py").write_text(config)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with (self.directory / "hub.log").open("ab") as log:
            command = [sys.executable, "-m", "jupyterhub"]
            self.process = subprocess.Popen(command, cwd=self.directory, stdout=log, stderr=log)
        wait_for("the hub answers", lambda: self.ask("GET", "/users") is not None)

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        """Kill it, and it alone."""
        assert self.process is not None
        self.process.send_signal(signal_number)
        self.process.wait()

    def ask(self, method: str, path: str) -> object:
        """Return what its API answers; None if it does not."""
        headers = {"Authorization": f"token {TOKEN}"}
        request = urllib.request.Request(f"http://127.0.0.1:{PORT}/hub/api{path}", method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return json.loads(answer.read() or b"true")
        except (OSError, ValueError):
            return None

    def is_ready(self, user: str) -> bool:
        """Say whether the hub takes the user's server for ready, and the server answers through the proxy."""
        model = self.ask("GET", f"/users/{user}")
        if not isinstance(model, dict) or not model.get("servers", {}).get("", {}).get("ready"):
            return False
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/user/{user}/api", timeout=SECONDS) as answer:
                return "version" in json.loads(answer.read())
        except (OSError, ValueError):
            return False

    def has_server(self, user: str) -> bool:
        """Say whether the hub takes the user's server for there, ready or not."""
        model = self.ask("GET", f"/users/{user}")
        return not isinstance(model, dict) or bool(model.get("servers"))

    def servers(self, user: str) -> list[tuple[str, int]]:
        """Return state and pid of each container of a user, as limpet tells another process."""
        if not (self.directory / "limpet" / "store.db").exists():
            return []
        with Snapshot.open(self.directory / "limpet") as snapshot:
            found = snapshot.list(labels={"jupyterhub/user": user})
            return [(record.status.state.name, record.status.pid) for record in found]


def wait_for(what: str, is_so: Callable[[], object]) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {SECONDS} s: {what}")
        time.sleep(0.1)


def say(text: str) -> None:
    """Print it at once."""
    print(text, flush=True)


def take_pid(pid: int) -> "subprocess.Popen[bytes] | None":
    """Start a process that has this very pid; None where that is not allowed."""
    for _ in range(1000):
        try:
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        except OSError:
            return None
        stranger = subprocess.Popen(["sleep", "1000"])
        if stranger.pid == pid:
            return stranger
        stranger.kill()
        stranger.wait()
    return None


def try_kill(hub: Hub) -> None:
    """Kill the hub while a server runs."""
    hub.ask("POST", "/users/ann")
    hub.ask("POST", "/users/ann/server")
    wait_for("ann's server is ready", lambda: hub.is_ready("ann"))
    before = hub.servers("ann")
    hub.kill()
    hub.start()
    wait_for("ann's server is found again", lambda: hub.is_ready("ann"))
    assert hub.servers("ann") == before, (before, hub.servers("ann"))
    say("killed while ann's server runs: the next hub has it, the same process, and it answers")


def try_kill_amid_spawn(hub: Hub, user: str, seconds: float) -> None:
    """Kill the hub while a server is being spawned: at once for 0, else so long after there is a container."""
    hub.ask("POST", f"/users/{user}")
    url = f"http://127.0.0.1:{PORT}/hub/api/users/{user}/server"
    asked = subprocess.Popen([sys.executable, "-c", ASK, url, TOKEN])
    if seconds:
        wait_for("a container is there", lambda: hub.servers(user))
    time.sleep(seconds)
    hub.kill()
    asked.wait()
    left = hub.servers(user)
    hub.start()
    wait_for("the hub has looked", lambda: hub.is_ready(user) or not hub.has_server(user))
    is_found = hub.is_ready(user)
    if not is_found:
        hub.ask("POST", f"/users/{user}/server")
        wait_for(f"{user}'s server is ready", lambda: hub.is_ready(user))
    now = hub.servers(user)
    assert [state for state, _ in now] == ["RUNNING"], now
    assert not is_found or now == left, (left, now)
    fate = "the next hub has it" if is_found else "the next hub makes another"
    states = ", ".join(state for state, _ in left)
    say(f"killed amid a spawn, {states or 'nothing'} left: {fate}, and one server runs")


ASK = """
import sys, urllib.request
headers = {"Authorization": f"token {sys.argv[2]}"}
try:
    urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="POST", headers=headers), timeout=60)
except OSError:
    pass
"""


def try_stranger(hub: Hub) -> None:
    """End the server while no hub runs, and give its pid to another process."""
    ((_, pid),) = hub.servers("ann")
    hub.kill()
    os.killpg(pid, signal.SIGKILL)
    wait_for("the server is gone", lambda: not os.path.exists(f"/proc/{pid}"))
    stranger = take_pid(pid)
    hub.start()
    if stranger is None:
        say("not tried: only root may choose the next pid")
        return
    assert not hub.is_ready("ann")
    hub.ask("POST", "/users/ann/server")
    wait_for("ann has a new server", lambda: hub.is_ready("ann"))
    hub.ask("DELETE", "/users/ann/server")
    wait_for("ann's new server is gone", lambda: not hub.servers("ann"))
    assert stranger.poll() is None, "the stranger was killed"
    say("ann's server ended, a stranger has its pid: the hub says that it ended, and leaves the stranger alone")
    stranger.kill()
    stranger.wait()


def main() -> None:
    """Try it all, and stop what was started."""
    with TemporaryDirectory(prefix="limpet-hub-") as directory:
        hub = Hub(Path(directory))
        try:
            hub.start()
            try_kill(hub)
            for user, seconds in BOBS.items():
                try_kill_amid_spawn(hub, user, seconds)
            try_stranger(hub)
        except BaseException:
            lines = (hub.directory / "hub.log").read_text().splitlines()
            print(*(line for line in lines if " 200 GET " not in line), sep="\n", file=sys.stderr)
            for log in (hub.directory / "limpet").rglob("*.log"):
                print(log, log.read_text(), sep="\n", file=sys.stderr)
            raise
        finally:
            for user in ("ann", *BOBS):
                hub.ask("DELETE", f"/users/{user}/server")
            wait_for("nothing runs", lambda: not any(map(hub.servers, BOBS)))
            hub.kill(signal.SIGTERM)


if __name__ == "__main__":
    main()
