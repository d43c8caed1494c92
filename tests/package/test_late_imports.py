"""A program may give up privileges, or its root, once its state is open: nothing has to be imported after that."""

import subprocess
import sys
import textwrap

SCRIPT = """
    import sys
    from limpet import Engine, Store
    from limpet.schema.cri import parse_pod_sandbox_config
    from limpet.schema import SandboxMetadata

    class Gone:
        def find_spec(self, name, path=None, target=None):
            print("imported late:", name)

    config = {"metadata": {"name": "n"}}
    with Store.open(sys.argv[1] + "/store") as store:
        sys.meta_path.insert(0, Gone())
        store.add_sandbox(SandboxMetadata(id="s", name="n", config=parse_pod_sandbox_config(config), created_at=1))
    sys.meta_path.pop(0)
    engine = Engine.open(sys.argv[1] + "/engine")
    sys.meta_path.insert(0, Gone())
    sandbox = engine.create_sandbox(config)
    for n, command in enumerate((["sh", "-c", "echo x"], ["sleep", "1000"])):
        asked = {"metadata": {"name": str(n)}, "image": {"image": "host"}, "command": command, "log_path": "log"}
        container = engine.create_container(asked, sandbox.id)
        container.start()
        if n:
            container.stop(1)
        print(container.wait(20).exit_code, container.cri_status().reason)
        container.release()
        container.delete()
    engine.recover()
    sandbox.stop()
    sandbox.delete()
    engine.close()
"""


def test_nothing_is_imported_once_a_state_is_open(state_dir: str) -> None:
    """A sandbox, two containers, their ends, a recovery and the close need no module that was not there at the open."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), state_dir]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (told.stdout.splitlines(), told.returncode) == (["0 Completed", "143 Error"], 0), told.stderr
