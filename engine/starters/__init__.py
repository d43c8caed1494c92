"""Starters: how a container's process comes to be.

Read `contract` (what an engine asks), `choices` (what config and image leave open), `registry` (which there are), then
`process`, the built-in one.
"""

from limpet.engine.starters.choices import choose_log_path, choose_stop_signal
from limpet.engine.starters.contract import Exit, Launch, Prepared, Starter
from limpet.engine.starters.environment import require_secrets
from limpet.engine.starters.registry import Starters, make_host_probe, make_probe
from limpet.schema.signals import number_of_signal, to_cri_signal

__all__ = [
    "Exit",
    "Launch",
    "Prepared",
    "Starter",
    "Starters",
    "choose_log_path",
    "choose_stop_signal",
    "make_host_probe",
    "make_probe",
    "number_of_signal",
    "require_secrets",
    "to_cri_signal",
]
