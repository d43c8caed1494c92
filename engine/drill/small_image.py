"""Small images for the drill: OCI archives with one layer."""

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping
from typing import Any, Final

IMAGE: Final = "small:1"
FILE: Final = "etc/motd"
CONTENT: Final = b"as it was unpacked\n"
_FILES: Final = {FILE: CONTENT}
_NO_LINKS: Final[Mapping[str, str]] = {}
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}  # in Go's terms
_MEDIA_TYPE: Final = "application/vnd.oci.image"


def make_archive(
    image: str = IMAGE, files: Mapping[str, bytes] = _FILES, links: Mapping[str, str] = _NO_LINKS
) -> bytes:
    """Return the archive, always the same bytes; its files are programs, `links` lead from a path to another."""
    layer = _pack(files, links)
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
        "annotations": {"org.opencontainers.image.ref.name": image}
    }
    documents = {
        "oci-layout": {"imageLayoutVersion": "1.0.0"},
        "index.json": {"schemaVersion": 2, "manifests": [named]},
    }
    return _pack({name: json.dumps(document).encode() for name, document in documents.items()} | blobs)


def _pack(files: Mapping[str, bytes], links: Mapping[str, str] = _NO_LINKS) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o755
            archive.addfile(info, io.BytesIO(content))
        for name, target in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()
