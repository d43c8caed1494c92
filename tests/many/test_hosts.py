"""What a host program may do to an engine in it: fork, reap, close it at once, run out, be in a container itself."""

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import pytest

from limpet.engine import Engine, errors
from tests import oci_layout
from tests.conftest import in_thread
from tests.recovery.test_world import in_namespace

RUN = """
import os, resource, signal, sys, threading, time
from limpet.engine import Engine, errors
from limpet.engine.starters.process import ProcessStarter

def config(name, *command):
    return {"metadata": {"name": name}, "image": {"image": "host"}, "command": list(command)}
"""


def run(script: str, *arguments: str) -> str:
    """Run a host program, and return what it prints."""
    command = [sys.executable, "-c", RUN + textwrap.dedent(script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("harm", [pytest.param("fork", marks=pytest.mark.long), "reap", "ignore"])
def test_a_host_that_forks_and_reaps_all_the_time(state_dir: str, harm: str) -> None:
    """Forks keep nothing of the engine's open that matters; whoever reaps all children takes no exit code from it."""
    script = """
        from tests.children import reap_any

        state_dir, harm = sys.argv[1:]
        over = threading.Event()

        def reap():
            reap_any(over)

        def fork():
            while not over.is_set():
                if not os.fork():
                    time.sleep(0.05)
                    os._exit(0)
                time.sleep(0.01)

        if harm == "ignore":
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        threads = [threading.Thread(target=each) for each in ((fork, reap) if harm != "ignore" else ())]
        for each in threads[:1 if harm == "fork" else 2]:
            each.start()
        with Engine.open(state_dir) as engine:
            engine.create_sandbox({"metadata": {"name": "s"}}, id="s")
            for n in range(5):
                container = engine.create_container(config(f"c{n}", "sh", "-c", f"exit {n}"), "s")
                container.start()
                print(container.wait(20).exit_code)
                container.release()
                container.delete()
            lasting = engine.create_container(config("lasting", "sleep", "1000"), "s")
            lasting.start()
            print(lasting.stop(5).exit_code)
        with Engine.open(state_dir) as engine:
            print(*{each.state.name for each in engine.list()})
        over.set()
        for each in threads[:1 if harm == "fork" else 2]:
            each.join()
    """
    assert run(script, state_dir, harm).split() == [*map(str, range(5)), "143", "EXITED"]


def test_a_write_that_nobody_reads_ends_no_host_program() -> None:
    """Where SIGPIPE is as the kernel has it, as in a program that embeds Python: it is an error, and no more."""
    script = """
        from limpet.engine.starters.oci import command
        from limpet.engine.state.pipes import write_to_pipe

        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        far, near = os.pipe()
        print(write_to_pipe(near, b"abc"), os.read(far, 9))
        os.close(far)
        for is_pending in (False, True):
            if is_pending:
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPIPE])
                signal.pthread_kill(threading.get_ident(), signal.SIGPIPE)
            try:
                write_to_pipe(near, b"abc")
            except BrokenPipeError:
                print(sorted(signal.sigpending()) == [signal.SIGPIPE] * is_pending)
        signal.sigtimedwait([signal.SIGPIPE], 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPIPE])
        print(command.run(["true"], given=b"x" * 1_000_000, timeout=20, begin=lambda pid: None).code)
        print(before == signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    """
    assert run(script).split("\n")[:-1] == ["3 b'abc'", "True", "True", "0", "True"]


def test_closed_by_several_threads_at_once(state_dir: str) -> None:
    """Each close returns once the engine is closed; who waits for a container is told; the next opening works."""
    with Engine.open(state_dir) as engine:
        sandbox = engine.create_sandbox({"metadata": {"name": "s"}}).id
        config = {"metadata": {"name": "c"}, "image": {"image": "host"}, "command": ["sleep", "1000"]}
        engine.create_container(config, sandbox, id="one").start()
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(4):
        engine = Engine.open(state_dir)
        waiting, told = in_thread(lambda engine=engine: engine.get("one").wait(30))  # type: ignore[misc] # bound at once
        barrier = threading.Barrier(3)

        def close(engine: Engine = engine, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            engine.close()

        closing = [in_thread(close) for _ in range(3)]
        for thread, outcome in closing:
            thread.join(30)
            assert outcome == [None]
        waiting.join(30)
        assert isinstance(told[0], errors.ClosedError), told
    assert set(os.listdir("/proc/self/fd")) == before
    with Engine.open(state_dir) as engine:
        assert engine.get("one").state.name == "RUNNING"
        engine.get("one").stop(0)


@pytest.mark.parametrize("mask", [0o177, 0o777])
def test_a_umask_that_takes_rights_from_the_owner(state_dir: str, tmp_path: Path, mask: int) -> None:
    """As programs set it for a moment to make a socket: what limpet makes then is of use to its user all the same.

    And what every user of a container is to read is for everybody, as with any other umask.
    """
    layout = oci_layout.Layout(tmp_path / "layout")
    layout.add_image([oci_layout.tar(oci_layout.member("a/b/file", b"x"))], "app:1")
    old_mask = os.umask(mask)
    try:
        with Engine.open(state_dir) as engine:
            engine.images.load(str(tmp_path / "layout"))
            logs = str(tmp_path / "above" / "logs")
            sandbox = engine.create_sandbox({"metadata": {"name": "s"}, "log_directory": logs})
            config = {"metadata": {"name": "c"}, "image": {"image": "app:1"}, "command": ["a"]}
            image = engine.create_container(config, sandbox)
            config |= {"image": {"image": "host"}, "command": ["sh", "-c", "exit 3"], "log_path": "d/c.log"}
            container = engine.create_container(config | {"metadata": {"name": "d"}}, sandbox)
            container.start()
            assert container.wait(timeout=20).exit_code == 3
            made = [each for top in (state_dir, str(tmp_path / "above")) for each in os.walk(top)]
            files = [os.path.join(above, name) for above, _, names in made for name in names]
            unusable = [each for each in files if os.stat(each).st_mode & 0o600 != 0o600]
    finally:
        os.umask(old_mask)
    assert len(made) > 10
    unusable += [above for above, *_ in made if os.stat(above).st_mode & 0o700 != 0o700]
    assert not unusable
    etc = Path(state_dir, "containers", image.id, "rootfs", "etc")
    assert [each.stat().st_mode & 0o777 for each in (etc, etc / "hosts")] == [0o755, 0o644]


def test_no_descriptors_for_the_modules_that_are_loaded_at_the_opening(state_dir: str) -> None:
    """The soft limit is raised first; with a hard one that is as low, the error says what is missing."""
    script = textwrap.dedent("""
        import os, resource, sys
        from limpet.engine import Engine, errors

        def attempt(hard):
            in_use = len(os.listdir("/proc/self/fd")) - 1
            resource.setrlimit(resource.RLIMIT_NOFILE, (in_use, hard or in_use))
            try:
                Engine.open(sys.argv[1]).close()
            except errors.ResourcesError as error:
                return "RLIMIT_NOFILE" in str(error)
            return "opened"

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        print(attempt(most if sys.argv[2] == "soft" else 0))
    """)
    told = [
        subprocess.run(
            [sys.executable, "-c", script, state_dir, limit], capture_output=True, text=True, timeout=60, check=False
        )
        for limit in ("soft", "hard")
    ]
    assert [each.stdout.strip() for each in told] == ["opened", "True"], told[1].stderr


def test_no_more_processes_and_threads() -> None:
    """Under RLIMIT_NPROC each call is answered, with an error or not; once there is room, everything works."""
    python = "/usr/bin/python3"
    if os.geteuid() or not shutil.which(python):
        pytest.skip(f"only root becomes another user, and {python} is needed")
    if subprocess.run([python, "-c", ""], user=54321, check=False, cwd="/").returncode:
        pytest.skip("another user cannot run a Python here")
    script = """
        place, python = sys.argv[1:]
        os.chown(place, 54321, 54321)
        os.setgroups([]); os.setgid(54321); os.setuid(54321)
        hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]

        def limit(number):
            resource.setrlimit(resource.RLIMIT_NPROC, (number, hard))

        def attempt(name):
            try:
                container = engine.create_container(config(name, "sh", "-c", "exit 3"), "s", id=name)
                container.start()
                return container.wait(20).exit_code
            except errors.LimpetError as error:
                return "refused"

        engine = Engine.open(place + "/state", starter=ProcessStarter(interpreter=python))
        engine.create_sandbox({"metadata": {"name": "s"}}, id="s")
        limit(1)
        print(attempt("no-keeper"))
        limit(hard)
        print(attempt("keeper"))
        limit(1)

        print(attempt("limited") in {3, "refused"})
        limit(hard)
        print(attempt("last"))
        engine.close()
        limit(1)
        try:
            Engine.open(place + "/state", starter=ProcessStarter(interpreter=python)).close()
        except errors.LimpetError:
            pass
        limit(hard)
        with Engine.open(place + "/state", starter=ProcessStarter(interpreter=python)) as engine:
            print(*sorted({each.state.name for each in engine.list()}))
            print(attempt("again"))
    """
    with tempfile.TemporaryDirectory() as place:  # whose parents others may enter
        told = run(script, place, python).split()
    assert told == ["refused", "3", "True", "3", "EXITED", "3"]


def test_an_engine_in_an_isolated_subinterpreter_says_why_it_cannot_be(state_dir: str) -> None:
    """Python gives those no threads; it was said that none can be started, as if there were too many."""
    script = """
        try:
            import _xxsubinterpreters as interpreters
            run = interpreters.run_string
        except ImportError:
            import _interpreters as interpreters
            run = interpreters.exec
        run(interpreters.create(), f'''if True:
            import sys
            sys.path[:0] = {sys.path!r}
            try:
                from limpet import Engine, errors
                Engine.open({sys.argv[1]!r})
            except ImportError as error:  # of a module that refuses to be loaded there
                print(error)
            except errors.ResourcesError as error:
                print(error)
        ''')
    """
    assert "interpreter" in run(script, state_dir)


def test_an_engine_in_a_new_pid_namespace_at_each_start(tmp_path: Path) -> None:
    """As `docker restart` does: what ran before never runs on; each start works, and a person can settle the rest."""
    state = str(tmp_path / "state")
    script = RUN + textwrap.dedent(f"""
        turn = int(os.environ["TURN"])
        engine = Engine.open({state!r})
        engine.get_or_create_sandbox({{"metadata": {{"name": "s"}}}})
        print(*sorted({{each.state.name for each in engine.list()}}), end=" ")
        for each in engine.list():
            if each.state.name == "UNKNOWN" and turn == 2:
                engine.declare_gone(each.id, "it was restarted")
            if each.state.name == "EXITED":
                each.release()
                each.delete()
        sandbox, = engine.list_sandboxes()
        container = engine.create_container(config("c" + str(turn), "sleep", "1000"), sandbox.id)
        print(container.start().state.name, container.status.pid < 1000, flush=True)
        os.kill(os.getpid(), signal.SIGKILL) if os.getpid() != 1 else os._exit(0)
    """)
    for turn in range(3):
        told = in_namespace(f"export TURN={turn}", script, "-pfm", "--mount-proc").split()
        assert told[-2:] == ["RUNNING", "True"]
        assert set(told[:-2]) <= ({"EXITED", "UNKNOWN"} if turn else set()), turn
