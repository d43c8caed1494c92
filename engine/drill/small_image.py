"""A small image for the drill: an OCI archive with one layer that contains one file."""

import hashlib
import io
import json
import platform
import tarfile
from typing import Any, Final

IMAGE: Final = "small:1"
FILE: Final = "etc/motd"
CONTENT: Final = b"as it was unpacked\n"
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}  # in Go's terms
_MEDIA_TYPE: Final = "application/vnd.oci.image"


def make_archive() -> bytes:
    """Return the archive, always the same bytes."""
    layer = _pack({FILE: CONTENT})
    blobs: dict[str, bytes] = {}

    def add(kind: str, content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = content
        return {"mediaType": f"{_MEDIA_TYPE}.{kind}", "digest": f"sha256:{digest}", "size": len(content)}

    layers = [add("layer.v1.tar", layer)]
    config = {
        "os": "linux",
        "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
        "rootfs": {"type": "layers", "diff_ids": [layers[0]["digest"]]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_MEDIA_TYPE}.manifest.v1+json",
        "config": add("config.v1+json", json.dumps(config).encode()),
        "layers": layers,
    }
    named = add("manifest.v1+json", json.dumps(manifest).encode()) | {
        "annotations": {"org.opencontainers.image.ref.name": IMAGE}
    }
    documents = {
        "oci-layout": {"imageLayoutVersion": "1.0.0"},
        "index.json": {"schemaVersion": 2, "manifests": [named]},
    }
    return _pack({name: json.dumps(document).encode() for name, document in documents.items()} | blobs)


def _pack(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
