"""A container's annotations in config.json: all but those by which a config would give the runtime orders.

crun and runc do what some annotations say, such as running hooks or leaving cgroups alone. Whoever writes a config may
ask for what the CRI has fields for, and for nothing beside that.
"""

from collections.abc import Mapping

from limpet.schema.cri import ContainerConfig

_ORDERS = ("run.oci.", "krun.", "module.wasm.", "org.criu.", "org.systemd.property.", "org.opencontainers.runc.")
"""What their names begin with: crun(1), "EXTENSIONS", and runc's docs."""


def choose_annotations(config: ContainerConfig) -> Mapping[str, str]:
    """Return those that config.json gets."""
    return {name: value for name, value in config.annotations.items() if not name.startswith(_ORDERS)}


def find_orders(config: ContainerConfig) -> str:
    """Return why some are left out, "" if none is."""
    left = sorted(set(config.annotations) - set(choose_annotations(config)))
    return f"a runtime would take {', '.join(left)} for an order" if left else ""
