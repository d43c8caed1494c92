"""Builds real OCI image layouts, good and bad ones, for the tests of the image store."""

import gzip
import hashlib
import io
import json
import os
import platform
import tarfile
from pathlib import Path
from typing import Any

import zstandard

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
"""Of this machine, in Go's words."""
LAYER = "application/vnd.oci.image.layer.v1.tar"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
NAME = "org.opencontainers.image.ref.name"

COMPRESSORS = {
    "": lambda data: data,
    "+gzip": lambda data: gzip.compress(data, 1),
    "+zstd": lambda data: zstandard.ZstdCompressor().compress(data),
}


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def member(name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tuple[Any, bytes]:
    """One tar member: a TarInfo with these fields, and its data."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(data)
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def directory(name: str, **fields: Any) -> tuple[Any, bytes]:
    return member(name, kind=tarfile.DIRTYPE, **fields)


def symlink(name: str, target: str, **fields: Any) -> tuple[Any, bytes]:
    return member(name, kind=tarfile.SYMTYPE, linkname=target, **fields)


def hard_link(name: str, target: str) -> tuple[Any, bytes]:
    return member(name, kind=tarfile.LNKTYPE, linkname=target)


def tar(*members: tuple[Any, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar file of these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class Layout:
    """An OCI image layout in a directory, written as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index: list[dict[str, Any]] = []
        (path / "blobs" / "sha256").mkdir(parents=True)
        self.write_json("oci-layout", {"imageLayoutVersion": "1.0.0"})

    def write_json(self, name: str, document: Any) -> None:
        (self.path / name).write_text(json.dumps(document))

    def blob_path(self, digest: str) -> Path:
        return self.path / "blobs" / digest.replace(":", "/")

    def add_blob(self, data: bytes, media_type: str) -> dict[str, Any]:
        """Write a blob; return its descriptor."""
        digest = sha256(data)
        self.blob_path(digest).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def add_json(self, document: Any, media_type: str) -> dict[str, Any]:
        return self.add_blob(json.dumps(document).encode(), media_type)

    def add_manifest(self, tars: list[bytes], /, *, compression: str = "+gzip", **changes: Any) -> dict[str, Any]:
        """Write an image with these uncompressed layers; return its manifest's descriptor."""
        config = {
            "os": "linux",
            "architecture": ARCHITECTURE,
            "rootfs": {"type": "layers", "diff_ids": [sha256(each) for each in tars]},
            "config": {"Cmd": ["/bin/app"], "Env": None},
        } | changes.pop("configuration", {})
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.add_json(config, "application/vnd.oci.image.config.v1+json"),
            "layers": [self.add_blob(COMPRESSORS[compression](each), LAYER + compression) for each in tars],
        } | changes
        return self.add_json(manifest, MANIFEST)

    def list_manifest(self, descriptor: dict[str, Any], name: str = "app:1", **fields: Any) -> None:
        """Put a descriptor into index.json, under a name."""
        annotations = {"annotations": {NAME: name}} if name else {}
        self.index.append(descriptor | annotations | fields)
        self.write_json("index.json", {"schemaVersion": 2, "manifests": self.index})

    def add_image(self, tars: list[bytes], name: str = "app:1", /, **changes: Any) -> dict[str, Any]:
        """Write an image and list it under a name; return its manifest's descriptor."""
        descriptor = self.add_manifest(tars, **changes)
        self.list_manifest(descriptor, name)
        return descriptor

    def pack(self, archive: Path) -> Path:
        """Write the layout as a tar file, compressed as its name says."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as file:
            file.add(self.path, ".")
        compression = {".gz": "+gzip", ".zst": "+zstd"}.get(archive.suffix, "")
        archive.write_bytes(COMPRESSORS[compression](buffer.getvalue()))
        return archive


def snapshot(path: Path) -> dict[str, Any]:
    """Everything that can be seen of a tree: kind, mode, owner, content, link target, time of change."""
    seen = {}
    for above, directories, files in os.walk(path):
        for name in [".", *directories, *files]:
            where = Path(above) / name
            status = where.lstat()
            content: Any = None
            if where.is_symlink():
                content = os.readlink(where)
            elif where.is_file():
                content = where.read_bytes()
            seen[str(where)] = (status.st_mode, status.st_uid, status.st_nlink, status.st_mtime_ns, content)
    return seen


def names(path: Path) -> set[str]:
    """The relative paths of all that is in a tree."""
    return {os.path.relpath(os.path.join(above, name), path) for above, d, f in os.walk(path) for name in d + f}
