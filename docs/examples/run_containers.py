"""Run a container; then kill an engine while one runs, and read what the next engine finds.

python run_containers.py STATE_DIR
"""

import os
import signal
import sys

# The library in fifteen lines: from here
from limpet.engine import Engine

with Engine.open(sys.argv[1]) as engine:
    jobs = engine.get_or_create_sandbox({"metadata": {"name": "jobs"}})
    config = {
        "metadata": {"name": "hello"},
        "image": {"image": "host"},  # built in: the host's own programs
        "command": ["sh", "-c", "echo hello; exit 3"],
        "log_path": "hello.log",
    }
    hello = engine.create_container(config, jobs.id)
    hello.start()  # on disk before its program runs
    ended = hello.wait(timeout=10)
    print(hello.state.name, ended.exit_code, ended.reason)
# to here

with Engine.open(sys.argv[1]) as engine:
    # How it ended was written down: nothing is left to find out.
    print("settled:", engine.recovery.settled, "examined:", len(engine.recovery.findings))
    hello = engine.get(hello.id[:12])
    hello.release()  # its bundle is removed, and all that it wrote is in its log
    print("log:", *(entry.text.decode().strip() for entry in hello.read_log()))
    hello.delete()  # and its record
    print("left:", engine.list())

if os.fork() == 0:
    engine = Engine.open(sys.argv[1])
    sleeper = engine.create_container(
        {"metadata": {"name": "sleeper"}, "image": {"image": "host"}, "command": ["sleep", "1000"]}, jobs.id
    )
    sleeper.start()
    os.kill(os.getpid(), signal.SIGKILL)
os.wait()

with Engine.open(sys.argv[1]) as engine:
    for finding in engine.recovery.findings:
        print("recovered:", finding.state, f"[{finding.rule}]", finding.because)
    (sleeper,) = engine.list(name="sleeper")
    print("stopped:", sleeper.stop(timeout=5).exit_code)  # 128 + SIGTERM, though it was not our child
    sleeper.release()
    sleeper.delete()
    engine.get_sandbox(jobs.id).delete()
