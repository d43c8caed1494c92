"""Bytes that coverage guides, with atheris: `python -m tests.campaigns.hostile.guided KIND [libFuzzer's options]`.

For what is parsed byte by byte, where a change of one byte leads somewhere else; what is drawn from a seed, with its
meaning, is in the campaign. An AssertionError, any exception but InvalidInputError, or a hang ends it, and the bytes
are kept in a file; give that file in place of the options to repeat it.
"""

import io
import json
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from sqlite3 import connect
from typing import Final, NamedTuple

from limpet.engine.database.sqlite.wal import find_tail
from limpet.engine.images.layer import clean_path
from limpet.engine.images.limits import Budget
from limpet.engine.images.manifests import read_manifest
from limpet.engine.images.oci import CONFIGURATION, INDEX, Compression, decode
from limpet.engine.images.streams import Decompressor
from limpet.engine.images.tar import read_tar
from limpet.schema.cri import parse_container_config, parse_pod_sandbox_config
from limpet.schema.errors import InvalidInputError
from tests.campaigns.hostile.archives import COMPRESSORS

_BLOCK: Final = 512
_READ_BYTES: Final = 1 << 22
"""As much of one input is read: a hole may be of any size."""
_MAGIC: Final = slice(257, 262)
_CHECKSUM: Final = slice(148, 156)


def read_archive(data: bytes) -> None:
    """Read a tar file whose headers are given the checksum that they need, as it is read for a layer."""
    blocks = [_with_checksum(data[start : start + _BLOCK]) for start in range(0, len(data), _BLOCK)]
    read = 0
    for member, chunks in read_tar(io.BytesIO(b"".join(blocks)), Budget()):
        path = clean_path(member.name)
        assert not path.startswith(b"/"), path
        assert b".." not in path.split(b"/"), path
        assert b"\0" not in path, path
        for offset, chunk in chunks:
            assert 0 <= offset <= member.size - len(chunk), (offset, len(chunk), member)
            read += len(chunk)
            if read > _READ_BYTES:
                return


def _with_checksum(block: bytes) -> bytes:
    if len(block) < _BLOCK or block[_MAGIC] != b"ustar":
        return block
    total = sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" ")
    return block[: _CHECKSUM.start] + b"%06o\0 " % total + block[_CHECKSUM.stop :]


def read_compressed(data: bytes) -> None:
    """Decompress a stream; the first byte says of which kind it is to be."""
    kinds = list(Compression)
    stream = Decompressor(io.BytesIO(data[1:]), kinds[data[0] % len(kinds)], Budget())
    read = 0
    while read < _READ_BYTES and (chunk := stream.read(1 << 16)):
        read += len(chunk)


_DOCUMENTS: Final[Sequence[Callable[[bytes], object]]] = (
    read_manifest,
    lambda data: decode(data, INDEX, "index.json"),
    lambda data: decode(data, CONFIGURATION, "an image configuration").created_at,
    parse_container_config,
    parse_pod_sandbox_config,
)


def read_any_document(data: bytes) -> None:
    """Read an image's document or a CRI config; the first byte says which."""
    _DOCUMENTS[data[0] % len(_DOCUMENTS)](data[1:])


def read_wal(data: bytes) -> None:
    """Read a WAL."""
    tail = find_tail(io.BytesIO(data))
    assert 0 <= tail.commits <= len(data) // _BLOCK, tail


class Kind(NamedTuple):
    """What is done with an input, and the inputs to begin with."""

    read: Callable[[bytes], None]
    make_examples: Callable[[], Sequence[bytes]]


def _make_tars() -> list[bytes]:
    return [_make_tar(form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]


def _make_tar(form: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for kind in (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo(f"{'x' * 60}/{'y' * 60}{kind.decode()}é")
            member.type, member.linkname, member.mtime = kind, "target", 1
            if form == tarfile.PAX_FORMAT:
                member.pax_headers = {"SCHILY.xattr.user.a": "b", "mtime": "1.5"}
            content = b"content" if kind == tarfile.REGTYPE else b""
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _make_streams() -> list[bytes]:
    tar = _make_tar(tarfile.USTAR_FORMAT)
    return [bytes([number]) + compress(tar) for number, compress in enumerate(COMPRESSORS.values())]


def _make_documents() -> list[bytes]:
    digest = f"sha256:{'a' * 64}"
    oci = "application/vnd.oci.image"
    layer = {"mediaType": f"{oci}.layer.v1.tar+gzip", "digest": digest, "size": 3}
    platform = {"os": "linux", "architecture": "amd64"}
    documents: list[dict[str, object]] = [
        {"schemaVersion": 2, "config": {**layer, "mediaType": f"{oci}.config.v1+json"}, "layers": [layer]},
        {"schemaVersion": 2, "manifests": [{**layer, "platform": platform, "annotations": {"a": "b"}}]},
        {**platform, "created": "2020-01-01T00:00:00Z", "config": {"Env": ["a=b"]}, "rootfs": {"diff_ids": [digest]}},
        {
            "metadata": {"name": "a"},
            "image": {"image": "x"},
            "command": ["a"],
            "mounts": [{"container_path": "/a", "host_path": "/b"}],
            "linux": {"resources": {"cpu_quota": "5"}},
        },
        {"metadata": {"name": "a", "uid": "b", "namespace": "c"}, "port_mappings": [{"container_port": 80}]},
    ]
    return [bytes([number]) + json.dumps(document).encode() for number, document in enumerate(documents)]


def _make_wals() -> list[bytes]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "database"
        with closing(connect(path)) as connection:
            for pragma in ("page_size = 512", "journal_mode = wal"):
                connection.execute(f"PRAGMA {pragma}")
            connection.execute("CREATE TABLE numbers (number)")
            connection.execute("INSERT INTO numbers VALUES (1)")
            connection.commit()
            return [path.with_name("database-wal").read_bytes()]


KINDS: Final[Mapping[str, Kind]] = {
    "tar": Kind(read_archive, _make_tars),
    "stream": Kind(read_compressed, _make_streams),
    "document": Kind(read_any_document, _make_documents),
    "wal": Kind(read_wal, _make_wals),
}


def try_one(kind: Kind, data: bytes) -> bool:
    """Try one input, and say whether it was accepted. What must not happen is raised."""
    if not data:
        return False
    try:
        kind.read(data)
    except InvalidInputError:
        return False
    return True


def main() -> None:
    """Try inputs until something is found, or the options end it."""
    if len(sys.argv) < 2 or sys.argv[1] not in KINDS:
        sys.exit(f"{__doc__}\nKIND is one of: {', '.join(KINDS)}")
    try:
        import atheris  # has wheels for some Pythons only
    except ImportError:
        sys.exit("atheris is not installed: pip install atheris")
    kind = KINDS[sys.argv[1]]
    with tempfile.TemporaryDirectory(prefix="limpet-guided-") as directory:
        for number, example in enumerate(kind.make_examples()):
            (Path(directory) / str(number)).write_bytes(example)
        given = [word for word in sys.argv[2:] if not word.startswith("-")]
        atheris.instrument_all()
        atheris.Setup([sys.argv[0], *sys.argv[2:], *([] if given else [directory])], lambda data: try_one(kind, data))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
