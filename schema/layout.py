"""How a bundle lies on disk: the names in it, and the marker that says who made it and for whom.

<bundle>/.limpet.json   the marker, written first: this directory is ours to remove
                        (not flushed by itself; config.json carries the same, for when a power cut took it)
<bundle>/rootfs/        the root file system, of an image with layers
<bundle>/working/       of a built-in image instead: the program's working directory where nobody names another
<bundle>/config.json    what is to be run, written last: the bundle is whole
<bundle>/limits.json    limits that are being put into force while it runs; gone once they are written down
"""

import msgspec

MARKER_FILE = ".limpet.json"
MARKER_ANNOTATION = "limpet.marker"
"""The annotation of config.json whose value is the marker's JSON."""
CONFIG_FILE = "config.json"
CONFIG_BYTES = 64 << 20
"""Far above what a config of limpet's size limit, an image's and an environment come to."""
LIMITS_FILE = "limits.json"
ROOTFS = "rootfs"
WORKING = "working"

TEMPORARY_PREFIX = ".tmp-"
"""The names of unfinished files begin with this; a crash can leave one behind."""


class BundleMarker(msgspec.Struct, frozen=True, kw_only=True):
    """The content of MARKER_FILE."""

    limpet: str
    """What the directory is: "container" or "sandbox"."""
    id: str
    node: str
