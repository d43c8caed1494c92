"""Worlds with an image store: hostile tar files as layers, and hostile documents in layouts and docker archives."""

import gzip
import hashlib
import io
import json
import os
import platform
import shutil
import stat
import tarfile
from pathlib import Path
from random import Random
from typing import Any

import zstandard

from limpet.engine.images import DirectoryImageStore
from limpet.engine.state.durable import remove_tree
from limpet.schema.image import ImageName, MountType
from tests.campaigns.hostile import values
from tests.campaigns.hostile.canary import differences, make_canary, photograph
from tests.campaigns.hostile.engines import TRICKS
from tests.campaigns.hostile.oracle import Attempt

_ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_NAME = "org.opencontainers.image.ref.name"
_APP = ImageName("app", "1")
COMPRESSORS: dict[str, Any] = {
    "": lambda data: data,
    "+gzip": lambda data: gzip.compress(data, 1),
    "+zstd": lambda data: zstandard.ZstdCompressor().compress(data),
}

NAMES = (
    b"a",
    b"a/b",
    b"a/b/c",
    b"dir",
    b"dir/x",
    b"link",
    b"link/x",
    b"link/../x",
    b"up",
    b"up/file",
    b"up/directory/deep/file",
    b"abs/around/file",
    b"../around/file",
    b"a/../../around/file",
    b"/etc/limpet-was-here",
    b"//x",
    b"./x",
    b".",
    b"./",
    b"",
    b"a//b",
    b".wh.a",
    b".wh.dir",
    b".wh.link",
    b".wh.up",
    b"up/.wh.file",
    b"up/.wh..wh..opq",
    b"dir/.wh..wh..opq",
    b".wh..wh..opq",
    b".wh..",
    b".wh...",
    b".wh.",
    b".wh..wh.plnk/x",
    b".wh.a/x",
    b"\xff\xfe",
    b"new\nline",
    b"x" * 99,
    b"x" * 255,
    b"x" * 256,
    b"d/" * 400,
    b"d/" * 2100,
    b"proc/self/root/x",
    b"dev/null",
)
LINKS = (
    b"..",
    b"../..",
    b"/",
    b"/etc",
    b"../around",
    b"a",
    b".",
    b"",
    b"link",
    b"../around/file",
    b"dir",
    b"a\0b",
    b"x" * 5000,
)
_TYPES = b"0000\0" + b"1112223455667SxgLKDVMNAZ\xff"
_FIELDS = {"mode": (100, 8), "uid": (108, 8), "gid": (116, 8), "size": (124, 12), "mtime": (136, 12), "major": (329, 8)}
_PAX = (
    b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime", b"SCHILY.xattr.user.x",
    b"SCHILY.xattr.trusted.overlay.opaque",
    b"SCHILY.xattr.security.capability", b"SCHILY.xattr.user.\0", b"GNU.sparse.major", b"GNU.sparse.minor",
    b"GNU.sparse.name",
    b"GNU.sparse.realsize", b"GNU.sparse.size", b"GNU.sparse.map", b"GNU.sparse.offset", b"GNU.sparse.numbytes",
    b"GNU.sparse.numblocks", b"hdrcharset", b"comment",
)  # fmt: skip


def header(name: bytes, kind: bytes, length: int, link: bytes = b"", **fields: bytes) -> bytes:
    """Return a tar header with a right checksum, whatever stands in it."""
    block = bytearray(512)
    block[: min(len(name), 100)] = name[:100]
    block[100:108], block[108:116], block[116:124] = b"0000755\0", b"0000000\0", b"0000000\0"
    block[124:136], block[136:148] = b"%011o\0" % length, b"00000000000\0"
    block[156:157], block[257:265] = kind, b"ustar\00000"
    block[157 : 157 + min(len(link), 100)] = link[:100]
    for field, value in fields.items():
        start, width = _FIELDS[field]
        block[start : start + width] = value[:width].ljust(width, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def _pax_record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(b"%d" % length) + len(body) != length:
        length += 1
    return b"%d" % length + body


def draw_member(random: Random) -> bytes:
    """Draw one member: its headers and its data, in whatever order of good and bad."""
    kind = bytes([random.choice(_TYPES)])
    tame = random.random() < 0.6
    kind = bytes([random.choice(b"0000555212")]) if tame else kind
    name = random.choice(NAMES[:10]) if tame else random.choice((random.choice(NAMES), values.file_name(random)))
    link = random.choice(LINKS[:10])
    if not tame:
        link = random.choice(LINKS)
    data = random.choice((b"", b"x", b"y" * 600, b"1\n0\n3\n", b"0\n", random.randbytes(70)))
    if kind in b"xg":
        value = random.choice(
            (b"", b"1", b"-1", b"0,1", b"0,1,2", b"1,0,5,9", b"9" * 30, b"../around/file", random.choice(NAMES), b"1.5")
        )
        records = [_pax_record(random.choice(_PAX), value) for _ in range(random.randrange(1, 5))]
        data = b"".join(records)
        if random.random() < 0.15:
            data = values.spoil_bytes(random, data)
    elif kind in b"LK":
        data = random.choice((*NAMES, *LINKS)) + b"\0"
    elif kind not in b"0\x007S" and random.random() < 0.95:
        data = b""
    size = len(data)
    if random.random() < 0.02:
        size = random.choice((0, 1, 511, 513, 10**6, 8**11 - 1))
    fields: dict[str, bytes] = {}
    if random.random() < 0.04:
        odd = (
            b"\xff" * 12,
            b"\x80" + b"\xff" * 11,
            b"77777777777",
            b"-1",
            b"8",
            b"\x80" + bytes(10) + b"\1",
            b" ",
            b"\0" * 12,
        )
        fields[random.choice(sorted(_FIELDS))] = random.choice(odd)
    block = header(name, kind, size, link, **fields)
    if kind == b"S" and random.random() < 0.8:
        block = _sparse(random, block)
    return block + _padded(data)


def _sparse(random: Random, block: bytes) -> bytes:
    changed = bytearray(block)
    for start in (386, 398, 410, 422, 483):
        if random.random() < 0.6:
            changed[start : start + 12] = b"%011o\0" % random.choice((0, 1, 512, 600, 8**11 - 1))
    if random.random() < 0.3:
        changed[483:495] = b"\x80" + random.randbytes(11)
    changed[482] = random.random() < 0.1
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def draw_tar(random: Random) -> bytes:
    """Draw a tar file: some good beginning, hostile members, an end or none, spoilt in one of ten."""
    good = header(b"dir", b"5", 0) + header(b"up", b"2", 0, b"../around") + header(b"abs", b"2", 0, b"/")
    good += header(b"link", b"2", 0, b"dir") + header(b"a", b"0", 1) + _padded(b"x")
    data = good if random.random() < 0.6 else b""
    data += b"".join(draw_member(random) for _ in range(random.randrange(1, 8)))
    data += bytes(random.choice((1024, 1024, 1024, 0, 512, 100)))
    return values.spoil_bytes(random, data) if random.random() < 0.1 else data


class _ImageWorld:
    """An image store, a layout that is written anew for each input, and the tree around."""

    def __init__(self, place: Path) -> None:
        self.place = place
        make_canary(place)
        self.store = DirectoryImageStore(str(place / "store"))
        self._tar = draw_good_tar()
        self._around = self._photograph()

    def _photograph(self) -> dict[str, Any]:
        return photograph(self.place, apart_from=frozenset({"store", "layout", "layout.tar", "rootfs"}))

    def inspect(self) -> str:
        """Nothing around has changed, no device was made, and a good image still loads and unpacks."""
        devices = [path for path in (self.place / "rootfs").rglob("*") if _is_device(path)]
        remove_tree(str(self.place / "rootfs"))
        if devices:
            return f"a device was made: {devices[0]}"
        for summary in self.store.list():
            self.store.remove(summary.name)
        write_layout(self.place / "layout", [self._tar])
        self._mount(str(self.place / "layout"))
        if (self.place / "rootfs" / "good").read_bytes() != b"x":
            return "a good image is not unpacked as it should be"
        self.store.remove(_APP)
        remove_tree(str(self.place / "rootfs"))
        return differences(self._around, self._photograph())

    def _mount(self, path: str) -> None:
        for name in self.store.load(path):
            self.store.manifest(name)
            self.store.check(name)
            self.store.list()
            remove_tree(str(self.place / "rootfs"))
            (self.place / "rootfs").mkdir()
            self.store.mount(name, MountType.PLAIN, str(self.place / "rootfs"))

    def close(self) -> None:
        """Nothing is open."""


class LayerWorld(_ImageWorld):
    """Layers: tar files with everything that a stranger may put into one."""

    def draw(self, random: Random) -> Attempt:
        seed = random.randrange(1 << 48)
        return Attempt(f"layers drawn from seed {seed}", lambda: self._run(Random(seed)))

    def _run(self, random: Random) -> None:
        tars = [draw_tar(random) for _ in range(random.choice((1, 1, 2, 3)))]
        compression = random.choice(("", "", "+gzip", "+zstd"))
        write_layout(self.place / "layout", tars, compression=compression)
        self._mount(str(self.place / "layout"))


class LayoutWorld(_ImageWorld):
    """Layouts and docker archives: their documents, digests, sizes, files, compression, truncation."""

    def draw(self, random: Random) -> Attempt:
        seed = random.randrange(1 << 48)
        shape = random.choice(("directory", "directory", "tar", "tar", "gzip", "zstd", "docker", "docker"))
        return Attempt(f"{shape} drawn from seed {seed}", lambda: self._run(Random(seed), shape))

    def _run(self, random: Random, shape: str) -> None:
        layout, archive = self.place / "layout", self.place / "layout.tar"
        if shape == "docker":
            archive.write_bytes(self._draw_docker(random))
        else:
            write_layout(layout, [self._tar], spoil=random)
            files = [path for path in layout.rglob("*") if not path.is_dir()]
            if random.random() < 0.3:
                TRICKS[random.choice(sorted(TRICKS.keys() - {"huge"}))](random.choice(files), self.place / "around")
            archive.write_bytes(_pack(layout) if shape != "directory" else b"")
        if shape in {"gzip", "zstd"}:
            archive.write_bytes(COMPRESSORS["+" + shape](archive.read_bytes()))
        if random.random() < 0.3:
            archive.write_bytes(values.spoil_bytes(random, archive.read_bytes()))
        self._mount(str(layout if shape == "directory" else archive))

    def _draw_docker(self, random: Random) -> bytes:
        config = json.dumps(_configuration([self._tar])).encode()
        layer = random.choice((self._tar, COMPRESSORS["+gzip"](self._tar)))
        entries: Any = [{"Config": "c.json", "RepoTags": ["app:1"], "Layers": ["l/layer.tar"]}]
        if random.random() < 0.7:
            entries = values.spoil_json(random, entries)[0]
        document = values.to_json(random, entries) if random.random() < 0.5 else json.dumps(entries).encode()
        if random.random() < 0.3:
            config = values.to_json(random, values.spoil_json(random, json.loads(config))[0])
        members = [(b"manifest.json", document), (b"c.json", config), (b"l/layer.tar", layer)]
        data = b"".join(header(name, b"0", len(content)) + _padded(content) for name, content in members)
        if random.random() < 0.3:
            data += b"".join(draw_member(random) for _ in range(3))
        return data + bytes(1024)


def draw_good_tar() -> bytes:
    """Return a layer that is as it should be."""
    return header(b"good", b"0", 1) + _padded(b"x") + bytes(1024)


def _is_device(path: Path) -> bool:
    mode = path.lstat().st_mode
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def _sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _configuration(tars: list[bytes]) -> dict[str, Any]:
    return {
        "os": "linux",
        "architecture": _ARCHITECTURE,
        "created": "2020-01-01T00:00:00Z",
        "rootfs": {"type": "layers", "diff_ids": [_sha256(each) for each in tars]},
        "config": {"Cmd": ["/bin/app"], "Env": ["A=b"], "User": "0:0", "StopSignal": "SIGINT", "WorkingDir": "/"},
    }


def write_layout(path: Path, tars: list[bytes], *, compression: str = "", spoil: Random | None = None) -> None:
    """Write an OCI layout, with documents spoilt on the way if there is somebody to spoil them."""
    shutil.rmtree(path, ignore_errors=True)
    blobs = path / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def write(document: Any, chance: float) -> bytes:
        if spoil is None or spoil.random() > chance:
            return json.dumps(document).encode()
        spoilt = values.spoil_json(spoil, document)[0]
        return values.to_json(spoil, spoilt) if spoil.random() < 0.3 else json.dumps(spoilt).encode()

    def put(data: bytes, media_type: str) -> dict[str, Any]:
        digest = _sha256(data)
        (blobs / digest[7:]).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    layers = [put(COMPRESSORS[compression](each), _LAYER + compression) for each in tars]
    config = put(write(_configuration(tars), 0.3), _CONFIG)
    manifest = put(
        write({"schemaVersion": 2, "mediaType": _MANIFEST, "config": config, "layers": layers}, 0.3), _MANIFEST
    )
    index = {"schemaVersion": 2, "manifests": [manifest | {"annotations": {_NAME: "app:1"}}]}
    (path / "index.json").write_bytes(write(index, 0.3))
    (path / "oci-layout").write_bytes(write({"imageLayoutVersion": "1.0.0"}, 0.1))


def _pack(layout: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for path in sorted(layout.rglob("*")):
            if not path.is_socket():
                file.add(path, os.path.relpath(path, layout), recursive=False)
    return buffer.getvalue()
