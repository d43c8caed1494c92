"""Unpacking: what a root file system looks like in the end, and that nothing outside of it is ever touched."""

import gzip
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from limpet.engine.images import DirectoryImageStore, limits
from limpet.engine.state.durable import remove_unflushed
from limpet.schema.errors import InvalidInputError, NotFoundError
from limpet.schema.image import ImageName, MountType
from tests.oci_layout import (
    COMPRESSORS,
    LAYER,
    Layout,
    directory,
    hard_link,
    member,
    names,
    sha256,
    snapshot,
    symlink,
    tar,
)

APP = ImageName("app", "1")
Members = list[tuple[Any, bytes]]


def unpack(path: Path, *layers: Members | bytes, compression: str = "", config: Any = None) -> Path:
    """Load an image of these layers and mount it; return the root file system."""
    layout = Layout(path / "layout")
    tars = [layer if isinstance(layer, bytes) else tar(*layer) for layer in layers]
    layout.add_image(tars, compression=compression, configuration={"config": config})
    store = DirectoryImageStore(str(path / "store"))
    store.load(str(layout.path))
    target = path / "rootfs"
    target.mkdir()
    store.mount(APP, MountType.PLAIN, str(target))
    return target


LOWER = [
    directory("d"),
    member("d/a"),
    member("d/b"),
    directory("d/sub"),
    member("d/sub/deep"),
    symlink("link", "d"),
    member("file"),
]
ALL = {"d", "d/a", "d/b", "d/sub", "d/sub/deep", "link", "file"}

WHITEOUTS = {  # the upper layer: what is left of the lower one, and what is new
    "a file": ([member("d/.wh.a")], ALL - {"d/a"}),
    "a directory": ([member(".wh.d")], {"link", "file"}),
    "a link, not what it leads to": ([member(".wh.link")], ALL - {"link"}),
    "nothing there": ([member("d/.wh.no"), member("no/.wh.a")], ALL),
    "opaque": ([member("d/.wh..wh..opq")], {"d", "link", "file"}),
    "opaque, then new": ([member("d/.wh..wh..opq"), member("d/new")], {"d", "d/new", "link", "file"}),
    "new, then opaque": ([member("d/new"), member("d/.wh..wh..opq")], {"d", "d/new", "link", "file"}),
    "opaque keeps what is replaced": ([member("d/a"), member("d/.wh..wh..opq")], {"d", "d/a", "link", "file"}),
    "opaque in an upper directory only": (
        [member("d/sub/new"), member("d/.wh..wh..opq")],
        {"d", "d/sub", "d/sub/new", "link", "file"},
    ),
    "the whole root": ([member(".wh..wh..opq"), member("new")], {"new"}),
    "hidden, then made again": ([member(".wh.d"), directory("d"), member("d/new")], {"d", "d/new", "link", "file"}),
    "made again, then hidden": ([directory("d"), member("d/new"), member(".wh.d")], {"d", "d/new", "link", "file"}),
    "a file that its layer brings": ([member("d/a"), member("d/.wh.a")], ALL),
    "with a leading ./": ([member("./d/.wh.a")], ALL - {"d/a"}),
    "notes of aufs": ([directory(".wh..wh.plnk"), member(".wh..wh.plnk/1.2"), member(".wh..wh.aufs")], ALL),
}


@pytest.mark.parametrize(("upper", "expected"), WHITEOUTS.values(), ids=WHITEOUTS)
def test_whiteouts(tmp_path: Path, upper: Members, expected: set[str]) -> None:
    """A whiteout removes what lower layers left, and never what its own layer brings."""
    assert names(unpack(tmp_path, LOWER, upper)) == expected


REPLACED = {  # the upper layer: a path, and what it is then
    "a file by a directory": ([directory("file")], "file", Path.is_dir),
    "a directory by a file": ([member("d")], "d", Path.is_file),
    "a directory by a link": ([symlink("d", "/etc")], "d", Path.is_symlink),
    "a link by a directory": ([directory("link"), member("link/x")], "link", lambda path: not path.is_symlink()),
    "a link by a file": ([member("link")], "link", lambda path: not path.is_symlink() and path.is_file()),
    "a file by a pipe": ([member("file", kind=tarfile.FIFOTYPE)], "file", Path.is_fifo),
    "a directory by itself": ([directory("d", mode=0o711)], "d/sub/deep", Path.is_file),
    "twice in one layer": ([member("file", b"1"), member("file", b"2")], "file", lambda p: p.read_bytes() == b"2"),
    "by a link to another": ([hard_link("file", "d/a")], "file", lambda p: p.stat().st_nlink == 2),
    "a link to a link": ([hard_link("file", "link")], "file", Path.is_symlink),
}


@pytest.mark.parametrize(("upper", "path", "holds"), REPLACED.values(), ids=REPLACED)
def test_an_upper_member_replaces_a_lower_one(
    tmp_path: Path, upper: Members, path: str, holds: Callable[[Path], bool]
) -> None:
    """Whatever kind the lower one has, what the upper layer says is there; directories keep their content."""
    assert holds(unpack(tmp_path, LOWER, upper) / path)


def test_a_file_that_is_replaced_keeps_its_content_under_other_names(tmp_path: Path) -> None:
    """An upper layer's file is a new one, not new content in an old one that has other names as well."""
    root = unpack(tmp_path, [member("a", b"old"), hard_link("b", "a")], [member("a", b"new")])
    assert ((root / "a").read_bytes(), (root / "b").read_bytes()) == (b"new", b"old")


LONG = "/".join(["n" * 200] * 5)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_attributes_are_kept(tmp_path: Path, form: int) -> None:
    """Modes with setuid and sticky bits, times, owners (as root), long names and link targets arrive as written."""
    mtime_ns = 1_500_000_000_250_000_000 if form == tarfile.PAX_FORMAT else 1_500_000_000_000_000_000
    fields = {"uid": 3_000_000, "gid": 70_000, "mtime": mtime_ns / 10**9}
    layer = tar(
        directory(".", mode=0o750, **fields),
        directory("closed", mode=0o000, **fields),
        member("closed/tool", b"x" * 3_000_000, mode=0o4755, **fields),  # type: ignore[arg-type]
        directory("tmp", mode=0o1777, **fields),
        member(LONG, b"long", **fields),  # type: ignore[arg-type]
        symlink("link", "/" + LONG, **fields),
        format=form,
    )
    root = unpack(tmp_path, layer)
    paths = {"": 0o750, "closed": 0o000, "closed/tool": 0o4755, "tmp": 0o1777, LONG: 0o644, "link": 0o777}
    for path, mode in paths.items():
        status = (root / path).lstat()
        assert (path, status.st_mode & 0o7777) == (path, mode)
        assert status.st_mtime_ns == mtime_ns
        if os.geteuid() == 0:
            assert (status.st_uid, status.st_gid) == (3_000_000, 70_000)
        if path == "closed":
            (root / path).chmod(0o700)  # for who is not root
    assert (root / LONG).read_bytes() == b"long"
    assert os.readlink(root / "link") == "/" + LONG
    assert (root / "closed/tool").stat().st_size == 3_000_000


def test_directories_that_no_member_describes_can_be_passed_by_all(tmp_path: Path) -> None:
    """The root and implied directories are 0755, whatever the mode of the target was."""
    root = unpack(tmp_path, [member("implied/x")])
    assert [path.stat().st_mode & 0o7777 for path in (root, root / "implied")] == [0o755, 0o755]


def test_a_name_of_gnu_tar_has_no_prefix(tmp_path: Path) -> None:
    """Where POSIX has the beginning of a long name, GNU tar may keep a time."""
    block = bytearray(tar(member("name"), format=tarfile.GNU_FORMAT)[:512])
    block[345:357] = b"12345670123\0"
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    assert names(unpack(tmp_path, bytes(block) + bytes(1024))) == {"name"}


@pytest.mark.parametrize("compression", ["+gzip", "+zstd"])
def test_a_layer_may_be_compressed_in_parts(tmp_path: Path, compression: str) -> None:
    """Concatenated gzip members and zstd frames, as parallel compressors write them, are one layer."""
    layout = Layout(tmp_path / "layout")
    layer = tar(member("a", b"x" * 5000))
    parts = b"".join(COMPRESSORS[compression](layer[start : start + 999]) for start in range(0, len(layer), 999))
    layout.add_image([layer], layers=[layout.add_blob(parts, LAYER + compression)])
    store = DirectoryImageStore(str(tmp_path / "store"))
    store.load(str(layout.path))
    (tmp_path / "rootfs").mkdir()
    store.mount(APP, MountType.PLAIN, str(tmp_path / "rootfs"))
    assert (tmp_path / "rootfs/a").read_bytes() == b"x" * 5000


def test_extended_attributes_of_a_file_are_kept_but_not_those_of_the_host(tmp_path: Path) -> None:
    """user.* is kept; trusted.overlay.*, which would redirect an overlay mount, is not."""
    records = {"SCHILY.xattr.user.a": "b", "SCHILY.xattr.trusted.overlay.redirect": "/etc"}
    root = unpack(tmp_path, [member("f", pax_headers=records)])
    assert {name: os.getxattr(root / "f", name) for name in os.listxattr(root / "f")} == {"user.a": b"b"}


@pytest.mark.parametrize("form", [["gnu"], *(["pax", f"--sparse-version={v}"] for v in ("0.0", "0.1", "1.0"))])
def test_sparse_files_keep_their_content_and_their_holes(tmp_path: Path, form: list[str]) -> None:
    """Each of the four formats of GNU tar gives the same file, and takes no more disk than its data."""
    source = tmp_path / "source"
    source.mkdir()
    with open(source / "sparse", "wb") as file:
        for piece in range(60):  # more than fit into one header
            file.seek(piece << 20)
            file.write(b"%d" % piece * 2000)
        file.truncate(70 << 20)
    command = ["tar", "-C", str(source), f"--format={form[0]}", *form[1:], "--sparse", "-c", "sparse"]
    layer = subprocess.run(command, check=True, capture_output=True).stdout
    assert len(layer) < 4 << 20
    made = unpack(tmp_path, layer) / "sparse"
    assert made.read_bytes() == (source / "sparse").read_bytes()
    assert made.stat().st_blocks * 512 < 4 << 20


def raw_name(name: bytes) -> Members:
    """A member of this name, in a PAX record, which can hold any bytes."""
    info = tarfile.TarInfo("placeholder")
    info.pax_headers = {"path": name.decode("utf-8", "surrogateescape")}
    return [(info, b"")]


OUT = "../outside"

HOSTILE = {  # layers, from the lowest: what is said of the member
    "climbing": ([[member(f"{OUT}/x")]], "leads out of the root"),
    "climbing inside": ([[member("a/b/../../../outside/x")]], "leads out of the root"),
    "climbing from the root": ([[member("/../outside/x")]], "leads out of the root"),
    "climbing directory": ([[directory("..", mode=0o777)]], "leads out of the root"),
    "through a loop of links": ([[symlink("l", "m"), symlink("m", "l"), member("l/x")]], "too many symbolic links"),
    "through links that double": (
        [[*(symlink(f"l{n}", f"l{n + 1}/../l{n + 1}") for n in range(30)), member("l0/x")]],
        "too many symbolic links",
    ),
    "a path that links make too long": (
        [[symlink("l", "x/" * 2_000), member("l/" + "y/" * 100 + "z")]],
        "once its links are followed",
    ),
    "whiteout of ..": ([[member(".wh...")]], "without a file name"),
    "whiteout of .": ([[member("d/.wh..")]], "without a file name"),
    "whiteout of nothing": ([[member(".wh.")]], "without a file name"),
    "inside a whiteout": ([[member(".wh.d/x")]], "has the name of a whiteout"),
    "hard link out": ([[hard_link("h", f"{OUT}/secret")]], "leads out of the root"),
    "hard link to an absolute path": ([[hard_link("h", "{outside}/secret")]], "which is not there"),
    "hard link through a link": (
        [[symlink("l", OUT), hard_link("h", "l/secret")]],
        "'outside/secret', which is not there",
    ),
    "hard link to a directory": ([[directory("d"), hard_link("h", "d")]], "Operation not permitted"),
    "hard link to nothing": ([[hard_link("h", "none")]], "it is a hard link to 'none', which is not there"),
    "hard link to itself": ([[member("h"), hard_link("h", "h")]], "which it would replace"),
    "hard link to what it replaces": ([[member("d/x"), hard_link("d", "d/x")]], "which it would replace"),
    "unknown type": ([[member("x", kind=b"Z")]], "unknown member type"),
    "NUL in a name": ([raw_name(b"a\0b")], "a NUL"),
    "NUL in a link": ([[symlink("l", "x", pax_headers={"linkpath": "a\0b"})]], "contains a NUL"),
    "empty link": ([[symlink("l", "")]], "target is empty"),
    "name of 10 kB": ([[member("x" * 10_000)]], "longer than 4095 bytes"),
    "path of 10 kB": ([[member("x/" * 5_000 + "y")]], "longer than 4095 bytes"),
    "part of 300 bytes": ([[member("x" * 300)]], "name too long"),
    "link of 10 kB": ([[symlink("l", "x" * 10_000)]], "name too long"),
    "file as a directory": ([[member("f"), member("f/x")]], "leads through 'f'"),
    "root as a file": ([[member(".")]], "the root directory"),
    "root as a link": ([[symlink("./", OUT)]], "the root directory"),
    "negative owner": ([[member("x", pax_headers={"uid": "-1"})]], "owner"),
    "owner too large": ([[member("x", pax_headers={"gid": "4294967295"})]], "owner"),
    "endless number": ([[member("x", pax_headers={"size": "9" * 5000})]], "invalid size"),
    "invalid time": ([[member("x", pax_headers={"mtime": "1e999999999"})]], "invalid time"),
    "negative size": ([[member("x", pax_headers={"size": "-512"})]], "invalid size -512"),
    "sparse overlap": (
        [[member("x", b"ab", pax_headers={"GNU.sparse.map": "0,1,0,1", "GNU.sparse.size": "2"})]],
        "overlap",
    ),
    "sparse too short": (
        [[member("x", b"ab", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"})]],
        "does not match its 2 bytes",
    ),
    "sparse bomb": (
        [[member("x", pax_headers={"GNU.sparse.map": "", "GNU.sparse.size": str(1 << 60)})]],
        "unpacks to more than",
    ),
}


def place_outside(layers: list[Members], outside: Path) -> list[Members]:
    """Put the real path of the sentinel into the members' links."""
    for layer in layers:
        for info, _ in layer:
            info.linkname = info.linkname.replace("{outside}", str(outside))
    return layers


@pytest.mark.parametrize(("layers", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_member_is_refused_and_reaches_nothing(tmp_path: Path, layers: list[Members], message: str) -> None:
    """The error names image, layer, member and reason; the tree beside the root file system is as it was."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    before = snapshot(outside)
    tars = [tar(*layer) for layer in place_outside(layers, outside)]
    with pytest.raises(InvalidInputError) as caught:
        unpack(tmp_path, *tars)
    assert snapshot(outside) == before
    assert f"image app:1, layer {sha256(tars[-1])}: " in str(caught.value)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 800


def device(name: str, major: int, minor: int, kind: bytes = tarfile.CHRTYPE) -> tuple[Any, bytes]:
    return member(name, kind=kind, devmajor=major, devminor=minor)


USR_MERGED = [directory("usr/lib"), member("usr/lib/old"), symlink("lib", "usr/lib"), member("outside/old")]
MERGED = {"usr", "usr/lib", "usr/lib/old", "lib", "outside", "outside/old"}

TAKEN = {  # the upper layer, over a base whose lib is usr/lib: what the root has then
    "an entry for the root": ([directory("/"), member("new")], MERGED | {"new"}),
    "absolute names": ([directory("/usr/"), member("//usr/./new")], MERGED | {"usr/new"}),
    "a name with '..'": ([member("usr/lib/../new")], MERGED | {"usr/new"}),
    "a name with '..' after a link": ([member("lib/../new")], MERGED | {"new"}),
    "an absolute hard link": ([hard_link("new", "/usr/lib/old")], MERGED | {"new"}),
    "a hard link through a link": ([hard_link("lib/new", "lib/old")], MERGED | {"usr/lib/new"}),
    "a file below a link": ([member("lib/new")], MERGED | {"usr/lib/new"}),
    "a directory below a link": ([directory("lib/d"), member("lib/d/new")], MERGED | {"usr/lib/d", "usr/lib/d/new"}),
    "a link below a link": ([symlink("lib/l", "old"), member("lib/new")], MERGED | {"usr/lib/l", "usr/lib/new"}),
    "below an absolute link": ([symlink("l", "/usr/lib"), member("l/new")], MERGED | {"l", "usr/lib/new"}),
    "below a link of a link": ([symlink("l", "lib"), member("l/new")], MERGED | {"l", "usr/lib/new"}),
    "below a link with '..' after a link": (
        [symlink("usr/l", "../lib/../new"), member("usr/l/x")],
        MERGED | {"usr/l", "usr/new", "usr/new/x"},
    ),
    "below a link to what is missing": (
        [symlink("l", "run/a"), member("l/x")],
        MERGED | {"l", "run", "run/a", "run/a/x"},
    ),
    "below a link out of the root": ([symlink("l", "../../outside"), member("l/new")], MERGED | {"l", "outside/new"}),
    "below an absolute link out of it": ([symlink("l", "/../outside"), member("l/new")], MERGED | {"l", "outside/new"}),
    "a whiteout below a link": ([member("lib/.wh.old")], MERGED - {"usr/lib/old"}),
    "a whiteout below a link out of the root": (
        [symlink("l", "../outside"), member("l/.wh.old")],
        (MERGED - {"outside/old"}) | {"l"},
    ),
    "opaque below a link": (
        [member("lib/new"), member("lib/.wh..wh..opq")],
        (MERGED | {"usr/lib/new"}) - {"usr/lib/old"},
    ),
    "a link by a directory": ([directory("lib"), member("lib/new")], MERGED | {"lib/new"}),
    "overlay's whiteout": ([device("usr/lib", 0, 0)], MERGED - {"usr/lib", "usr/lib/old"}),
    "overlay's whiteout below a link": ([device("lib/old", 0, 0)], MERGED - {"usr/lib/old"}),
    "overlay's whiteout of nothing": ([device("no", 0, 0)], MERGED),
    "a disk": ([device("sda", 8, 0, tarfile.BLKTYPE)], MERGED),
    "the memory": ([device("mem", 1, 1)], MERGED),
    "a block device with null's numbers": ([device("x", 1, 3, tarfile.BLKTYPE)], MERGED),
    "a whiteout below a file": ([member("usr/lib"), member("usr/lib/.wh.old")], MERGED - {"usr/lib/old"}),
    "a whiteout below a lower file": ([member("outside/old/.wh.x")], MERGED),
    "opaque below a file": ([member("usr/lib"), member("usr/lib/.wh..wh..opq")], MERGED - {"usr/lib/old"}),
    "a hard link to a disk": (
        [device("sda", 8, 0, tarfile.BLKTYPE), hard_link("lib/old", "sda")],
        MERGED - {"usr/lib/old"},
    ),
    "a hard link to what replaced a disk": (
        [device("sda", 8, 0, tarfile.BLKTYPE), member("sda"), hard_link("new", "sda")],
        MERGED | {"sda", "new"},
    ),
    "aufs's file of several names": (
        [directory(".wh..wh.plnk"), member(".wh..wh.plnk/1.2"), hard_link("a", ".wh..wh.plnk/1.2")],
        MERGED | {"a"},
    ),
    "what else aufs keeps": ([directory(".wh..wh.orph"), member(".wh..wh.orph/x"), member(".wh..wh.aufs")], MERGED),
    "a disk in a file's place": ([device("lib/old", 8, 0, tarfile.BLKTYPE)], MERGED - {"usr/lib/old"}),
}


@pytest.mark.parametrize(("upper", "expected"), TAKEN.values(), ids=TAKEN)
def test_what_common_tools_write_is_taken_and_stays_in_the_root(
    tmp_path: Path, upper: Members, expected: set[str]
) -> None:
    """Names and links are meant from the root file system; what lies beside it is never reached."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "old").write_text("old")
    before = snapshot(outside)
    assert names(unpack(tmp_path, USR_MERGED, upper)) == expected
    assert snapshot(outside) == before


def test_harmless_devices_are_made_and_the_others_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """null is made, with owner and mode, by who may; a disk that all may read never is; the log names what is not."""
    null, _ = device("dev/null", 1, 3)
    null.mode = 0o666
    lower = [(null, b""), device("dev/sda", 8, 0, tarfile.BLKTYPE), device("dev/console", 5, 1)]
    root = unpack(tmp_path, lower, [hard_link("dev/disk", "dev/sda")])
    assert "'dev/sda', 'dev/console'" in caplog.text
    assert "'dev/disk'" in caplog.text
    assert not os.path.lexists(root / "dev/disk")
    made = root / "dev/null"
    if made.exists():
        assert made.is_char_device()
        assert (made.stat().st_rdev, made.stat().st_mode & 0o7777) == (os.makedev(1, 3), 0o666)
    else:
        assert "dev/null" in caplog.text


VOLUMED = [
    directory("brought", mode=0o700, mtime=5),
    member("file"),
    directory("closed", mode=0o555),
    directory("to"),
    symlink("link", "/to/there"),
    symlink("out", "../../outside"),
]
VOLUMES = {  # of an image's configuration: what is there in the end that no layer has brought
    "/new": {"new"},
    "new/": {"new"},
    "/new/../new/deep": {"new", "new/deep"},
    "/brought": set(),
    "/closed/new": {"closed/new"},
    "/link": {"to/there"},
    "/out/new": {"outside", "outside/new"},
    "/file": set(),
    "/file/below": set(),
    "/": set(),
}


@pytest.mark.parametrize(("volume", "expected"), VOLUMES.items(), ids=VOLUMES)
def test_an_images_volumes_are_there(tmp_path: Path, volume: str, expected: set[str]) -> None:
    """Programs count on them, and other runtimes have them; what is there stays as it is, and nothing leads out."""
    root = unpack(tmp_path, VOLUMED, config={"Volumes": {volume: {}}})
    assert names(root) == {"brought", "file", "closed", "to", "link", "out"} | expected
    for name in expected:
        assert (root / name).is_dir()
        assert (root / name).stat().st_mode & 0o7777 == 0o755
    assert ((root / "brought").stat().st_mode & 0o7777, (root / "brought").stat().st_mtime) == (0o700, 5)
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize(
    ("volume", "message"),
    [("/../x", "leads out"), ("/a\0b", "NUL"), ("/" + 300 * "n", "name too long"), ("/l/x", "too many")],
)
def test_a_volume_that_cannot_be_is_refused_at_load(tmp_path: Path, volume: str, message: str) -> None:
    """With its name, and not when a container is created."""
    with pytest.raises(InvalidInputError, match=f"(?i)volume '/.*{message}"):
        unpack(tmp_path, [symlink("l", "l")], config={"Volumes": {volume: {}}})
    assert not (tmp_path / "rootfs").exists()


def test_names_of_volumes_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document of 4 MiB could name directories whose paths together fill the memory."""
    monkeypatch.setattr(limits, "MAX_NAME_BYTES", 10_000_000)
    with pytest.raises(InvalidInputError, match="10000000 bytes of names"):
        unpack(tmp_path, [member("f")], config={"Volumes": {f"/{number}" + 1000 * "/d": {} for number in range(20)}})


def test_an_image_that_cannot_be_unpacked_is_refused_at_load(tmp_path: Path, store: DirectoryImageStore) -> None:
    """Nothing of it stays, and what an image of that name was before goes on."""
    good, bad = Layout(tmp_path / "good"), Layout(tmp_path / "bad")
    digest = good.add_image([tar(member("x" * 200, b"data"))])["digest"]
    bad.add_image([tar(member("x" * 300))])
    store.load(str(good.path))
    before = names(tmp_path / "store")
    with pytest.raises(InvalidInputError, match="name too long"):
        store.load(str(bad.path))
    assert names(tmp_path / "store") == before
    assert store.manifest(APP).digest == digest


def header(kind: bytes, size: int) -> bytes:
    """One tar header with these fields and a right checksum."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


MALFORMED = {  # an uncompressed layer: what is said of it
    "noise": (b"noise" * 500, "invalid checksum"),
    "wrong checksum": (tar(member("a")).replace(b"a", b"b", 1), "wrong checksum"),
    "noise after a member": (header(b"0", 0) + b"noise" * 500, "invalid checksum"),
    "cut in a header": (tar(member("a", b"x"))[:300], "in the middle of a header"),
    "cut in the data": (tar(member("a", b"x" * 2000))[:1000], "in the middle of a member"),
    "huge name": (header(b"L", 1 << 40) + bytes(512), "an extended header of 1099511627776"),
    "huge PAX header": (header(b"x", 1 << 40) + bytes(512), "an extended header of 1099511627776"),
    "endless PAX headers": (900 * (header(b"x", 0)) + header(b"0", 0), "two extended headers"),
    "PAX header for nobody": (header(b"x", 0) + bytes(1024), "without a member"),
    "PAX header of noise": (header(b"x", 512) + b"?" * 512 + header(b"0", 0), "malformed record"),
    "PAX record of no length": (header(b"x", 512) + b"0 a=b\n".ljust(512) + header(b"0", 0), "malformed record"),
    "PAX record of no length, after one": (
        header(b"x", 512) + b"6 a=b\n0 a=b\n".ljust(512) + header(b"0", 0),
        "malformed record",
    ),
    "PAX record too long": (header(b"x", 512) + b"999 a=b\n".ljust(512) + header(b"0", 0), "malformed record"),
    "file of 8 EiB": (header(b"0", (1 << 63) - 1), "in the middle of a member"),
}


WRONG_TYPES = {  # how a layer is compressed, and what its media type says
    "gzip, as none": (gzip.compress, ""),
    "none, as gzip": (bytes, "+gzip"),
    "zstd, as gzip": (zstandard.compress, "+gzip"),
    "zstd that begins with a frame to skip": (lambda data: b"\x5a\x2a\x4d\x18\1\0\0\0x" + zstandard.compress(data), ""),
}


@pytest.mark.parametrize(("compress", "compression"), WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_how_a_layer_is_compressed_is_told_by_its_content(
    tmp_path: Path, compress: Callable[[bytes], bytes], compression: str
) -> None:
    """As other tools do: some give media types that are not right. The digests say whether it is the layer."""
    layout = Layout(tmp_path / "layout")
    data = tar(member("a", b"1", pax_headers={"mtime": "1099511627776123"}))  # later than any file system's times
    layer = layout.add_blob(compress(data), f"application/vnd.oci.image.layer.v1.tar{compression}")
    layout.list_manifest(layout.add_manifest([data], compression="", layers=[layer]))
    store = DirectoryImageStore(str(tmp_path / "store"))
    store.load(str(layout.path))
    (tmp_path / "rootfs").mkdir()
    store.mount(APP, MountType.PLAIN, str(tmp_path / "rootfs"))
    assert (tmp_path / "rootfs" / "a").read_bytes() == b"1"


@pytest.mark.parametrize("compression", ["", "+gzip", "+zstd"])
@pytest.mark.parametrize(("layer", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_layer_that_is_no_tar_file_is_refused(tmp_path: Path, layer: bytes, message: str, compression: str) -> None:
    """Noise, cut archives and headers that promise too much end in a clear error, not in memory or time used up."""
    with pytest.raises(InvalidInputError, match=message):
        unpack(tmp_path, layer, compression=compression)


LIES = {  # what is done to the layer's blob before it gets its digest: what is said
    "not the diff_id": (lambda data: tar(member("other")), "but the image's configuration says"),
    "something after the end": (lambda data: data + bytes(512), "but the image's configuration says"),
    "cut after the last member": (lambda data: data[:1024], "but the image's configuration says"),
}


@pytest.mark.parametrize("compression", ["", "+gzip", "+zstd"])
@pytest.mark.parametrize(("change", "message"), LIES.values(), ids=LIES)
def test_a_layer_that_is_not_what_the_configuration_says_is_refused(
    tmp_path: Path, change: Callable[[bytes], bytes], message: str, compression: str
) -> None:
    """The diff_id is checked over the whole uncompressed layer, its end marker included."""
    layout = Layout(tmp_path / "layout")
    good = tar(member("a", b"x"))
    configuration = {"rootfs": {"diff_ids": [sha256(good)]}}
    layout.add_image([change(good)], compression=compression, configuration=configuration)
    with pytest.raises(InvalidInputError, match=message):
        DirectoryImageStore(str(tmp_path / "store")).load(str(layout.path))


BOUNDS = {"MAX_UNPACKED_BYTES": 900_000, "MAX_MEMBERS": 9, "MAX_NAME_BYTES": 10}


@pytest.mark.parametrize("compression", ["", "+gzip", "+zstd"])
@pytest.mark.parametrize(("bound", "value"), BOUNDS.items())
def test_a_bomb_is_refused_at_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, value: int, compression: str
) -> None:
    """Bytes, members and names are counted over all layers together, and before they fill disk or memory."""
    layer = tar(*(member(f"name{number}", bytes(50_000)) for number in range(10)))
    monkeypatch.setattr(limits, bound, value)
    with pytest.raises(InvalidInputError, match=f"more than {value}"):
        unpack(tmp_path, layer, layer, compression=compression)


def test_what_paths_cost_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that goes to and fro costs thousands of steps for each member behind it, in a layer of 1 kB."""
    monkeypatch.setattr(limits, "MAX_STEPS", 20_000)
    to_and_fro = symlink("l", "d" + 600 * "/../d")
    unpack(tmp_path / "few", [directory("d"), to_and_fro, *(member(f"l/{number}") for number in range(3))])
    with pytest.raises(InvalidInputError, match="more than 20000 steps"):
        unpack(tmp_path / "many", [directory("d"), to_and_fro, *(member(f"l/{number}") for number in range(99))])


def test_deep_and_wide_directories_take_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each member is near the one before: not as many steps as it is deep are taken for each."""
    monkeypatch.setattr(limits, "MAX_STEPS", 10_000)
    deep = [directory("/".join(["d"] * depth)) for depth in range(1, 400)]
    wide = [member(f"w/{number}/sub/file") for number in range(300)]
    root = unpack(tmp_path, [*deep, *wide])
    assert (root / "/".join(["d"] * 399)).stat().st_mode & 0o777 == 0o755


def test_lower_files_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a layer says that it hides what lower ones have: nothing of theirs comes after that."""
    monkeypatch.setattr(limits, "MAX_STEPS", 3_000)
    files = [member(f"d/{number}") for number in range(300)]
    whiteouts = 100 * [member("d/.wh..wh..opq"), member(".wh.d")]
    assert len(names(unpack(tmp_path, [member("d/old")], [*files, *whiteouts]))) == 301


def test_headers_are_read_as_by_others(tmp_path: Path) -> None:
    """A file whose name ends with "/" is one, but before ustar; digits may follow NULs (Go's archive/tar, umoci)."""
    old = bytearray(tar(member("old/", b"")))
    old[156:157] = b"\0"
    mode = bytearray(tar(member("mode", b"", mode=0o755)))
    mode[100:108] = bytes(2) + b"0755 " + bytes(1)
    data = b"".join(_with_checksum(each)[:512] for each in (old, mode, bytearray(tar(member("new/", b"")))))
    root = unpack(tmp_path, data + bytes(1024))
    assert {name: (root / name).is_dir() for name in names(root)} == {"old": True, "mode": False, "new": False}
    assert (root / "mode").stat().st_mode & 0o777 == 0o755


def test_a_layer_that_goes_on_after_zeros_is_refused(tmp_path: Path) -> None:
    """One block of them is no end: what follows would be missing, and nobody would know."""
    with pytest.raises(InvalidInputError, match="goes on after one block of zeros"):
        unpack(tmp_path, tar(member("a"))[:512] + bytes(512) + tar(member("b")))


def _with_checksum(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


UNRUNNABLE = {  # a configuration: what is said
    "a variable without a name": ({"Env": ["=x"]}, "Env has a variable without a name: '=x'"),
    "a variable with a NUL": ({"Env": ["A=\0"]}, "Env has a NUL"),
    "a command with a NUL": ({"Cmd": ["/a\0"]}, "Cmd has a NUL"),
    "an entrypoint with a NUL": ({"Entrypoint": ["/a\0"]}, "Entrypoint has a NUL"),
    "a user with a NUL": ({"User": "a\0"}, "User has a NUL"),
    "a relative directory": ({"WorkingDir": "rel"}, "WorkingDir is no absolute path: 'rel'"),
    "no signal": ({"StopSignal": "SIGFOO"}, "stop signal 'SIGFOO'"),
}


@pytest.mark.parametrize(("config", "message"), UNRUNNABLE.values(), ids=UNRUNNABLE)
def test_what_no_container_can_be_made_of_is_refused_at_load(tmp_path: Path, config: Any, message: str) -> None:
    """Not when one is created, or started."""
    with pytest.raises(InvalidInputError, match=message):
        unpack(tmp_path, [member("f")], config=config)
    assert not (tmp_path / "rootfs").exists()


def test_only_an_empty_directory_is_mounted_on(tmp_path: Path, store: DirectoryImageStore) -> None:
    """A target that is missing, a file, a link, or not empty is refused before anything is written."""
    root = unpack(tmp_path, [member("a")])
    (tmp_path / "link").symlink_to(tmp_path / "rootfs")
    (tmp_path / "file").write_text("")
    for target in [root, tmp_path / "link", tmp_path / "file", tmp_path / "none", "nul\0"]:
        with pytest.raises(InvalidInputError, match="mount target"):
            store.mount(APP, MountType.PLAIN, str(target))
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="none:latest"):
        store.mount(ImageName("none"), MountType.PLAIN, str(tmp_path / "empty"))
    assert names(root) == {"a"}


def test_unmount_says_when_something_is_still_mounted(tmp_path: Path, store: DirectoryImageStore) -> None:
    """A mount at or below the target is named, spaces and all, so that nobody removes what is mounted there."""
    store.unmount(str(tmp_path))
    store.unmount(str(tmp_path / "gone"))
    script = """
import os, sys
from limpet.engine.images import DirectoryImageStore
from limpet.schema.errors import InvalidStateError
try:
    DirectoryImageStore(sys.argv[1]).unmount(sys.argv[2])
except InvalidStateError as error:
    print(error)
"""
    point = tmp_path / "root fs" / "inner"
    point.mkdir(parents=True)
    inside = 'mount --bind /usr "$1" && exec "$2" -c "$3" "$4" "$5"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", inside, "sh", point, sys.executable, script]
    done = subprocess.run([*command, tmp_path / "store", point.parent], capture_output=True, text=True, check=False)  # type: ignore[list-item]
    if done.returncode:
        pytest.skip(f"no mount namespace here: {done.stderr}")
    assert f"{point} is still a mount point" in done.stdout


ORDINARY = """
import os, sys
from limpet.engine.state.durable import remove_tree
from limpet.engine.images import DirectoryImageStore
from limpet.schema.image import ImageName, MountType
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
store = DirectoryImageStore(sys.argv[1] + "/store")
name, = store.load(sys.argv[1] + "/layout")
target = sys.argv[1] + "/rootfs"
os.mkdir(target)
store.mount(name, MountType.PLAIN, target)
found = {}
for path in ["", "shut", "ro", "ro/tool", "ro/new"]:
    status = os.stat(os.path.join(target, path))
    assert status.st_uid == os.geteuid() != 0
    found[path] = oct(status.st_mode & 0o7777)
print(found)
remove_tree(target)
store.remove(name)
assert not os.path.exists(target) and not store.check(name)
"""


def test_an_ordinary_user_unpacks_and_removes_the_same_tree() -> None:
    """Without root, owners are skipped, modes are kept, and a directory that is shut is no obstacle."""
    closed = [directory("ro", mode=0o555, uid=0), member("ro/tool", mode=0o4755, uid=0), directory("shut", mode=0)]
    closed += [directory("ro/in", mode=0o555), directory("shut/in", mode=0)]
    upper = [member("ro/new", mode=0o600), member("shut/.wh.x")]
    with tempfile.TemporaryDirectory() as path:
        Layout(Path(path) / "layout").add_image([tar(*closed, member("shut/x")), tar(*upper)])
        if os.geteuid() == 0:
            os.chown(path, 65534, 65534)
        done = subprocess.run([sys.executable, "-c", ORDINARY, path], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    modes = {"": "0o755", "shut": "0o0", "ro": "0o555", "ro/tool": "0o4755", "ro/new": "0o600"}
    assert done.stdout == f"{modes}\n"


PARTS = st.sampled_from(["a", "b", "c", "..", ".", "", ".wh.a", ".wh..wh..opq", ".wh...", "outside", "secret"])
PATHS = st.one_of(
    st.lists(PARTS, min_size=1, max_size=4).map("/".join),
    st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3).map("/".join),
)
KINDS = st.sampled_from(
    [
        tarfile.REGTYPE,
        tarfile.REGTYPE,
        tarfile.DIRTYPE,
        tarfile.SYMTYPE,
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.FIFOTYPE,
        tarfile.CHRTYPE,
    ]
)
TARGETS = st.one_of(PATHS, st.sampled_from(["../outside", "../outside/secret", "../../outside", "/", "/tmp", "."]))


@st.composite
def members(draw: st.DrawFn) -> tuple[Any, bytes]:
    kind = draw(KINDS)
    data = draw(st.binary(max_size=3)) if kind == tarfile.REGTYPE else b""
    mode = draw(st.sampled_from([0, 0o644, 0o755, 0o7777]))
    return member(draw(PATHS), data, kind=kind, linkname=draw(TARGETS), mode=mode)


@settings(max_examples=120)
@given(layers=st.lists(st.lists(members(), max_size=7), min_size=1, max_size=3))
def test_no_sequence_of_members_reaches_out_of_the_root(layers: list[Members]) -> None:
    """Any members in any order either unpack or raise InvalidInputError, and never touch what lies beside."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        outside = path / "outside"
        (outside / "a").mkdir(parents=True)
        (outside / "a/b").write_text("b")
        (outside / "secret").write_text("secret")
        os.link(outside / "secret", outside / "c")
        before = snapshot(outside)
        with suppress(InvalidInputError):
            unpack(path, *layers)
        assert snapshot(outside) == before
        assert {entry.name for entry in path.iterdir()} <= {"outside", "layout", "store", "rootfs"}
        for entry in path.iterdir():
            remove_unflushed(str(entry))  # also what nobody but root may enter


@settings(max_examples=120)
@given(data=st.data())
def test_no_damage_to_a_layer_is_worse_than_a_refusal(data: st.DataObject) -> None:
    """Whatever bytes a layer is made of, it unpacks or raises InvalidInputError."""
    form = data.draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    layer = bytearray(
        tar(
            member("x" * 120, b"data", pax_headers={"mtime": "1.5", "SCHILY.xattr.user.a": "b"}),
            member("s", b"ab", pax_headers={"GNU.sparse.map": "0,1,5,1", "GNU.sparse.size": "9"}),
            symlink("l", "y" * 120),
            format=form,
        )
    )
    for position, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(layer) - 1), st.integers(0, 255)), min_size=1, max_size=4)
    ):
        layer[position] = value
    if data.draw(st.booleans()):  # as somebody would who wants to get past the checksum
        for start in range(0, len(layer), 512):
            block = layer[start : start + 512]
            if block[257:262] == b"ustar":
                block[148:156] = b"        "
                layer[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    with tempfile.TemporaryDirectory() as name, suppress(InvalidInputError):
        unpack(Path(name), bytes(layer))
