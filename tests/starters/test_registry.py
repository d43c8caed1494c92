"""Several starters in one engine: each container is run, watched and judged by the one that it was made for."""

import pytest

from limpet import Engine, errors
from limpet.schema import ContainerState
from limpet.testing import FakeStarter

SANDBOX = {"metadata": {"name": "jobs"}}


def named(name: str) -> FakeStarter:
    starter = FakeStarter()
    starter.name = name
    return starter


def config(name: str) -> dict[str, object]:
    return {"metadata": {"name": name}, "image": {"image": "host"}, "command": ["true"]}


def test_the_runtime_handler_chooses_the_starter(state_dir: str) -> None:
    """Each container is started and stopped by its sandbox's starter, and its metadata names it."""
    plain, special = FakeStarter(), named("special")
    with Engine.open(state_dir, starter=plain, runtimes={"fancy": special}) as engine:
        for handler in ("", "fancy"):
            sandbox = engine.create_sandbox(
                {"metadata": {"name": f"pod{handler}"}}, id=f"pod{handler}", runtime_handler=handler
            )
            assert sandbox.metadata.runtime_handler == handler
            engine.create_container(config(f"one{handler}"), sandbox.id, id=f"one{handler}").start()
        assert [plain.is_running("one"), plain.is_running("onefancy")] == [True, False]
        assert [special.is_running("one"), special.is_running("onefancy")] == [False, True]
        assert engine.get("onefancy").metadata.starter == "special"
        assert engine.get("onefancy").stop(5).exit_code == 143
        assert special.signals("onefancy") == [15]
        assert engine.get("one").state is ContainerState.RUNNING


def test_recovery_asks_the_starter_that_a_container_names(state_dir: str) -> None:
    """What ended and what runs is told by each one's own starter, also if the handlers have changed places."""
    plain, special = FakeStarter(), named("special")
    with Engine.open(state_dir, starter=plain, runtimes={"fancy": special}) as engine:
        engine.create_sandbox(SANDBOX, id="a")
        engine.create_sandbox({"metadata": {"name": "other"}}, id="b", runtime_handler="fancy")
        for sandbox in ("a", "b"):
            for name in ("ended", "alive"):
                engine.create_container(config(name), sandbox, id=f"{name}-{sandbox}").start()
    plain.end("ended-a", 3)
    special.end("ended-b", 4)
    with Engine.open(state_dir, starter=special, runtimes={"fancy": plain}) as engine:
        assert [engine.get(f"ended-{each}").status.exit_code for each in "ab"] == [3, 4]
        assert [engine.get(f"alive-{each}").state.name for each in "ab"] == ["RUNNING", "RUNNING"]
        special.end("alive-b", 5)
        assert engine.get("alive-b").wait(10).exit_code == 5
        engine.get("alive-b").release()
        engine.get("alive-b").delete()


def test_what_is_not_there_is_refused_by_name(state_dir: str) -> None:
    """A handler or a starter that the engine lacks is named, and nothing is written; two of one name are refused."""
    with pytest.raises(errors.InvalidInputError, match="another starter has the name 'fake'"):
        Engine.open(state_dir, starter=FakeStarter(), runtimes={"x": FakeStarter()})
    special = named("special")
    with Engine.open(state_dir, starter=FakeStarter(), runtimes={"fancy": special}) as engine:
        with pytest.raises(errors.InvalidInputError, match="runtime_handler 'kata': this engine has 'fancy'"):
            engine.create_sandbox(SANDBOX, runtime_handler="kata")
        assert engine.list_sandboxes() == []
        engine.create_sandbox(SANDBOX, id="b", runtime_handler="fancy")
        engine.create_container(config("one"), "b", id="one")
    with Engine.open(state_dir, starter=FakeStarter()) as engine:
        with pytest.raises(errors.InvalidStateError, match="for the starter 'special', this engine has 'fake'"):
            engine.get("one").start()
        with pytest.raises(errors.InvalidInputError, match="this engine has none"):
            engine.create_container(config("two"), "b")
