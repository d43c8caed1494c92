"""What `limpet` shows of sandboxes: their state, as recorded and as it is, and what a recovery makes of them."""

import json
import sqlite3
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet.engine import Engine
from limpet.testing import FakeStarter
from tests.cli.conftest import Limpet


@pytest.fixture
def made(state_dir: str) -> str:
    """A state directory with the sandboxes "web" and "old", of which "old" is stopped."""
    with Engine.open(state_dir, runtimes={"fast": FakeStarter()}) as engine:
        engine.create_sandbox(
            {"metadata": {"name": "web", "namespace": "default", "attempt": 1}},
            id="web",
            runtime_handler="fast",
            namespaces={"network": "/run/netns/web"},
            addresses=["10.0.0.7"],
            extra={"bridge": "br0"},
        )
        engine.create_sandbox({"metadata": {"name": "old"}}, id="old").stop()
    return state_dir


def test_inspect_shows_a_sandboxs_state(limpet: Limpet, made: str) -> None:
    """Whole for programs, with the CRI's status; in lines for people."""
    web, old = limpet.json("inspect", "web", "old")["inspected"]
    assert (web["status"]["state"], web["status"]["stopped_at"], web["rule"]) == ("READY", None, "sandbox-ready")
    assert web["status"] == web["checkpoint"]
    assert web["cri_status"]["network"] == {"ip": "10.0.0.7"}
    assert (old["status"]["state"], old["status"]["reason"]) == ("NOTREADY", "Stopped")
    assert old["cri_status"]["state"] == "SANDBOX_NOTREADY"
    text = limpet.ok("inspect", "web", "old")
    for line in (
        "namespace   default",
        "attempt     1",
        "state       READY",
        "namespaces  network=/run/netns/web",
        "addresses   10.0.0.7",
        'extra       {"bridge":"br0"}',
        "handler     fast",
        "state       NOTREADY",
        "reason      Stopped",
    ):
        assert f"  {line}\n" in text


def test_a_sandbox_of_another_boot_is_not_shown_as_ready(limpet: Limpet, made: str) -> None:
    """Before a recovery the record says READY, and what is shown does not; recover says why, and records it."""
    with Engine.open(made) as engine:
        engine.get_sandbox("web").update(lambda old: replace(old, boot_id="another"))
    (web,) = limpet.json("inspect", "web")["inspected"]
    assert (web["status"]["state"], web["checkpoint"]["state"], web["rule"]) == (
        "NOTREADY",
        "READY",
        "sandbox-rebooted",
    )
    assert "on disk     READY" in limpet.ok("inspect", "web")
    (planned,) = limpet.json("recover", "--dry-run")["report"]["sandboxes"]
    assert (planned["id"], planned["state"], planned["status"]["reason"]) == ("web", "NOTREADY", "Rebooted")
    assert planned["checkpoint"]["stopped_at"] is None
    assert "sandbox web: NOTREADY; sandbox-rebooted: it was made ready in another boot" in " ".join(
        limpet.ok("recover").split()
    )
    assert limpet.json("recover")["report"]["sandboxes"] == []
    assert limpet.json("inspect", "web")["inspected"][0]["checkpoint"]["reason"] == "Rebooted"


def test_a_damaged_status_is_found_and_shown(limpet: Limpet, made: str) -> None:
    """`check` names it, `inspect` shows the rest, a recovery reports it; another sandbox is shown as before."""
    connection = sqlite3.connect(Path(made, "store.db"))
    connection.execute("UPDATE sandbox_status SET stopped_at = 0 WHERE id = 'old'")
    connection.commit()
    connection.close()
    report = json.loads(limpet.ok("check", "-o", "json", status=6))
    assert any(
        "old" in problem["message"] and problem["aspect"] == "records" for problem in report["check"]["problems"]
    )
    web, old = limpet.json("inspect", "web", "old")["inspected"]
    assert (old["status"], old["cri_status"]) == (None, None)
    assert "checksum" in old["damage"]
    assert web["status"]["state"] == "READY"
    assert "damage" in limpet.ok("inspect", "old")
    for recover in (("recover", "--dry-run"), ("recover",)):
        document = json.loads(limpet.ok(*recover, "-o", "json", status=7))
        (told,) = document["report"]["sandboxes"]
        assert (told["id"], told["rule"], told["state"]) == ("old", "sandbox-damaged", "UNKNOWN")
        assert "checksum" in told["because"]
