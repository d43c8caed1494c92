"""The AppArmor profile of a container, where the kernel has AppArmor: one that is loaded, by its name."""

from limpet.schema.cri import LinuxContainerSecurityContext, ProfileType

_ENABLED = "/sys/module/apparmor/parameters/enabled"
_OLD_PREFIX = "localhost/"
"""Of the deprecated field `apparmor_profile`."""


def choose_apparmor(context: LinuxContainerSecurityContext) -> str:
    """Return the profile's name, "" for none. There is no profile of the runtime's own."""
    if not _is_enabled():
        return ""
    if context.apparmor is not None:
        is_named = context.apparmor.profile_type is ProfileType.LOCALHOST
        return context.apparmor.localhost_ref.removeprefix(_OLD_PREFIX) if is_named else ""
    profile = context.apparmor_profile
    return profile.removeprefix(_OLD_PREFIX) if profile.startswith(_OLD_PREFIX) else ""


def _is_enabled() -> bool:
    try:
        with open(_ENABLED, encoding="ascii") as file:
            return file.read().strip() == "Y"
    except OSError:
        return False
