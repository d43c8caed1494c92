"""What a signal handler raises comes to the caller at every place of what the main thread does itself."""

import subprocess
import sys

import pytest

LIFE = """
import faulthandler, os, signal, sys
from limpet import Engine, Snapshot, Store
from limpet.schema.image import ImageConfig, ImageName
import limpet.engine

faulthandler.dump_traceback_later(90, exit=True)
signal.signal(signal.SIGALRM, lambda *_: None)  # the host program's own: what is raised below is its
OURS = os.path.dirname(limpet.engine.__path__[0])
NO_CALLERS = {"__del__", "<genexpr>"}  # what these raise when they are collected is lost with any exception

class Own(TimeoutError):
    pass

def config(name, *command):
    metadata = {"name": name}
    return {"metadata": metadata, "image": {"image": "host"}, "command": command, "log_path": f"{name}.log"}

def write_together(store):
    with store.transaction() as draft:
        draft.update(runs.id, lambda old: old)

def is_collected(frame):
    while frame is not None:
        if frame.f_code.co_name in NO_CALLERS:
            return True
        frame = frame.f_back
    return False

def raise_at(number, call):
    # As a handler does: where Python calls a function of ours, or one of C has returned.
    places = 0

    def strike(frame, event, argument):
        nonlocal places
        if event in {"call", "c_return"} and frame.f_code.co_filename.startswith(OURS) and not is_collected(frame):
            places += 1
            if places == number:
                sys.setprofile(None)
                raise Own("the caller's own")

    sys.setprofile(strike)
    try:
        call()
        return places, "nothing"
    except BaseException as error:
        return places, repr(error)
    finally:
        sys.setprofile(None)
        while opened:
            opened.pop().close()

opened = []
state_dir = sys.argv[1]
with Engine.open(state_dir) as engine:
    pod = engine.create_sandbox({"metadata": {"name": "pod"}})
    runs, ended = (engine.create_container(config(name, *command), pod) for name, command in (
        ("runs", ("sh", "-c", "echo x; sleep 1000")), ("ended", ("echo", "x"))))
    runs.start(), ended.start(), ended.wait(20)
    for _ in ended.read_log():
        pass
    with Snapshot.open(state_dir) as snapshot:
        call = eval("lambda: " + sys.argv[2])
        call()
        number = 1
        while True:
            places, came = raise_at(number, call)
            if places < number:
                break
            if came != repr(Own("the caller's own")):
                print(number, came)
            number += 1
        print("tried", number > 10)
    pod.remove(force=True, timeout=0)
"""


@pytest.mark.parametrize(
    "call",
    [
        "engine.images.list()",
        "engine.images.manifest('host')",
        "engine.images.register_builtin(ImageName.parse('other'), ImageConfig())",
        "Snapshot.open(state_dir).close()",
        "snapshot.list()",
        "snapshot.history(runs.id)",
        "snapshot.watch(0).next(0.01)",
        "list(ended.read_log())",
        "runs.cri_status()",
        "engine.store.put('kind', 'key', 1)",
        "write_together(engine.store)",
        "opened.append(Store.open(state_dir + '-other'))",
        "runs.reopen_log()",
    ],
)
def test_a_timeout_of_the_callers_own_is_no_error_of_the_disk(state_dir: str, call: str) -> None:
    """A deadline by SIGALRM raises TimeoutError, an OSError: it is neither kept nor told as an error of the system."""
    command = [sys.executable, "-c", LIFE, state_dir, call]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, "tried True\n"), done.stderr
