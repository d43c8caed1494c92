"""A supervisor in twenty lines: services with restart policies, and all that happens to them. Kill and restart it.

python supervisor.py STATE_DIR NAME=POLICY=COMMAND...
"""

import sys

from limpet import Engine
from limpet.schema import ContainerState

# twenty lines: from here
with Engine.open(sys.argv[1]) as engine:
    since = engine.store.revision
    for finding in engine.recovery.findings:  # what had not ended when the last supervisor did
        print("found:", finding.id[:12], finding.state, finding.because, flush=True)
    services = engine.get_or_create_sandbox({"metadata": {"name": "services"}})  # after a reboot, a new one
    for text in sys.argv[2:]:
        name, policy, command = text.split("=", 2)
        config = {"metadata": {"name": name}, "image": {"image": "host"}, "command": ["sh", "-c", command]}
        known = engine.store.list(name=name, sandbox_id=services.id)
        firsts = [one for one in known if not one.metadata.restart_count]  # the others are its policy's
        if firsts and not firsts[0].status.created_at:
            engine.delete(firsts[0].id)  # the supervisor was killed while it made this one
            known.remove(firsts.pop())
        if not known:
            engine.create_container(config, services, restart=policy).start()
        elif firsts and firsts[0].status.state is ContainerState.CREATED:
            engine.get(firsts[0].id).start()
    for event in engine.store.watch(since=since, kinds=["added", "state", "deleted"]):
        print(event.revision, event.name, event.id[:12], event.kind, event.state, event.reason, flush=True)
# to here
