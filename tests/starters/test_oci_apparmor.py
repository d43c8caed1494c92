"""Which AppArmor profile a container gets: pure, of what is asked for and of what the kernel says that it has."""

from pathlib import Path

import pytest

from limpet.engine.starters.oci import apparmor
from limpet.engine.starters.oci.apparmor import choose_apparmor
from limpet.schema.cri import LinuxContainerSecurityContext, ProfileType, SecurityProfile

ASKED = [
    (LinuxContainerSecurityContext(), ""),
    (LinuxContainerSecurityContext(apparmor=SecurityProfile(profile_type=ProfileType.RUNTIME_DEFAULT)), ""),
    (
        LinuxContainerSecurityContext(
            apparmor=SecurityProfile(profile_type=ProfileType.UNCONFINED, localhost_ref="mine"),
            apparmor_profile="localhost/other",
        ),
        "",
    ),
    (
        LinuxContainerSecurityContext(
            apparmor=SecurityProfile(profile_type=ProfileType.LOCALHOST, localhost_ref="mine"),
            apparmor_profile="localhost/other",
        ),
        "mine",
    ),
    (
        LinuxContainerSecurityContext(
            apparmor=SecurityProfile(profile_type=ProfileType.LOCALHOST, localhost_ref="localhost/mine")
        ),
        "mine",
    ),
    (LinuxContainerSecurityContext(apparmor_profile="localhost/other"), "other"),
    (LinuxContainerSecurityContext(apparmor_profile="runtime/default"), ""),
    (LinuxContainerSecurityContext(apparmor_profile="unconfined"), ""),
]


@pytest.mark.parametrize("said", ["Y\n", "N\n", None])
def test_a_profile_is_named_where_the_kernel_has_apparmor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None
) -> None:
    """A loaded one, by the newer field if there is one. Elsewhere a runtime would refuse any."""
    file = tmp_path / "enabled"
    if said is not None:
        file.write_text(said)
    monkeypatch.setattr(apparmor, "_ENABLED", str(file))
    for context, profile in ASKED:
        assert choose_apparmor(context) == (profile if said == "Y\n" else "")
