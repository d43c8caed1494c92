"""A supervisor in twenty lines: services with restart policies, and all that happens to them. Kill and restart it.

python supervisor.py STATE_DIR NAME=POLICY=COMMAND...
"""

import sys

from limpet import Engine

# twenty lines: from here
with Engine.open(sys.argv[1]) as engine:
    services = engine.get_or_create_sandbox({"metadata": {"name": "services"}})  # after a reboot, a new one
    for text in sys.argv[2:]:
        name, policy, command = text.split("=", 2)
        config = {"metadata": {"name": name}, "image": {"image": "host"}, "command": ["sh", "-c", command]}
        for one in engine.list(name=name, sandbox_id=services.id):
            if not one.status.created_at and not one.metadata.restart_count:
                one.delete()  # the supervisor was killed while it made this one
        known = engine.list(name=name, sandbox_id=services.id)
        service = known[0] if known else engine.create_container(config, services, restart=policy)
        if service.state.name == "CREATED" and not service.metadata.restart_count:
            service.start()  # from now on its policy is kept, by whoever has the state directory open
    told = engine.store.find("supervisor", "told")
    for event in engine.store.watch(since=told.value if told else 0, kinds=["added", "state", "deleted"]):
        print(event.revision, event.name, event.kind, event.state, event.reason, event.exit_code, flush=True)
        engine.store.put("supervisor", "told", event.revision)
# to here
