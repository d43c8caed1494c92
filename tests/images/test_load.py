"""Loading: what real layouts look like, which of their images are taken, and what is refused."""

import bz2
import errno
import fcntl
import gzip
import io
import json
import lzma
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from limpet.engine import Engine
from limpet.engine.images import DirectoryImageStore, ImageSummary, limits
from limpet.engine.images.documents import Documents
from limpet.schema.errors import (
    AlreadyExistsError,
    InvalidInputError,
    NotFoundError,
    ResourcesError,
    StateDirectoryError,
    StoreDamagedError,
)
from limpet.schema.image import ImageConfig, ImageManifest, ImageName, MountType
from tests.conftest import wait_until
from tests.oci_layout import ARCHITECTURE, INDEX, LAYER, MANIFEST, NAME, Layout, directory, member, names, sha256, tar

HELLO = tar(directory("bin"), member("bin/app", b"hello", mode=0o755))
OTHER = {"os": "linux", "architecture": "m68k"}
HERE = {"os": "linux", "architecture": ARCHITECTURE}
APP = ImageName("app", "1")


def make_target(path: Path) -> Path:
    target = path / "rootfs"
    target.mkdir()
    return target


@pytest.mark.parametrize("archive", ["", "app.tar", "app.tar.gz", "app.tar.zst"])
@pytest.mark.parametrize("compression", ["", "+gzip", "+zstd"])
def test_an_image_comes_out_as_it_went_in(
    tmp_path: Path, store: DirectoryImageStore, archive: str, compression: str
) -> None:
    """A directory and each kind of archive, with each kind of layer, give the same root file system."""
    layout = Layout(tmp_path / "app")
    configuration = {
        "created": "2024-05-06T07:08:09.123456789Z",
        "config": {
            "User": "1000",
            "Env": ["A=b"],
            "Entrypoint": ["/bin/app"],
            "Cmd": None,
            "WorkingDir": "/w",
            "StopSignal": "SIGINT",
            "Labels": {"a": "b"},
        },
    }
    made = layout.add_image([HELLO], compression=compression, configuration=configuration)
    source = layout.pack(tmp_path / archive) if archive else layout.path
    assert not store.check(APP)
    assert store.load(str(source)) == [APP]
    assert store.check(APP)
    config = ImageConfig(
        user="1000", env=("A=b",), entrypoint=("/bin/app",), working_dir="/w", stop_signal="SIGINT", labels={"a": "b"}
    )
    manifest = json.loads(layout.blob_path(made["digest"]).read_bytes())
    layers = tuple(layer["digest"] for layer in manifest["layers"])
    assert store.manifest(APP) == ImageManifest(name=APP, digest=made["digest"], config=config, layers=layers)
    size = manifest["config"]["size"] + manifest["layers"][0]["size"]
    created_at = 1714979289_123456_000
    assert store.list() == [ImageSummary(name=APP, digest=made["digest"], size=size, created_at=created_at)]
    target = make_target(tmp_path)
    store.mount(APP, MountType.PLAIN, str(target))
    assert names(target) == {"bin", "bin/app"}
    assert (target / "bin/app").read_bytes() == b"hello"
    store.unmount(str(target))


NAMES = {  # annotations of the manifest: the name it is loaded by
    "tag": ({NAME: "1.2"}, ImageName("layout", "1.2")),
    "full name": ({NAME: "docker.io/library/app:1"}, ImageName("docker.io/library/app", "1")),
    "without a tag": ({NAME: "host:5000/app"}, ImageName("host:5000/app")),
    "containerd": ({NAME: "1", "io.containerd.image.name": "a.b/c:2"}, ImageName("a.b/c", "2")),
    "with a digest": ({NAME: "app:1@sha256:" + 64 * "a"}, APP),
    "none": ({}, ImageName("layout")),
}


@pytest.mark.parametrize(("annotations", "expected"), NAMES.values(), ids=NAMES)
def test_the_name_is_what_the_annotations_say(
    tmp_path: Path, store: DirectoryImageStore, annotations: dict[str, str], expected: ImageName
) -> None:
    """containerd's full name, else the OCI reference (a lone word is a tag), else the layout's own name."""
    layout = Layout(tmp_path / "layout")
    layout.list_manifest(layout.add_manifest([HELLO]), "", annotations=annotations)
    assert store.load(str(layout.path)) == [expected]
    assert store.check(expected)


def test_a_name_with_a_digest_means_that_image_only(tmp_path: Path, store: DirectoryImageStore) -> None:
    """app:1@digest is found while app:1 has that digest, and is not any other image."""
    layout = Layout(tmp_path / "layout")
    digest = layout.add_image([HELLO])["digest"]
    store.load(str(layout.path))
    assert store.check(ImageName("app", "1", digest))
    wrong = ImageName("app", "1", sha256(b"other"))
    assert not store.check(wrong)
    with pytest.raises(NotFoundError, match=digest):
        store.manifest(wrong)


def test_the_image_for_this_machine_is_taken_from_nested_indexes(tmp_path: Path, store: DirectoryImageStore) -> None:
    """Of many platforms, attestations and variants, in an index within an index, the plain one for us is taken."""
    layout = Layout(tmp_path / "layout")
    here = layout.add_manifest([HELLO])
    fast, base = layout.add_manifest([tar(member("fast"))]), layout.add_manifest([tar(member("base"))])
    baseline = {"amd64": "v1", "arm64": "v8"}.get(ARCHITECTURE, "v9")
    inner = {
        "schemaVersion": 2,
        "manifests": [
            here | {"platform": OTHER, "digest": sha256(b"not in this layout")},
            fast | {"platform": HERE | {"variant": "v9"}},
            layout.add_manifest([tar(member("x"))]) | {"platform": {"os": "unknown", "architecture": "unknown"}},
            base | {"platform": HERE | {"variant": baseline}},
            here | {"platform": HERE},
        ],
    }
    outer = {"schemaVersion": 2, "manifests": [layout.add_json(inner, INDEX)]}
    layout.list_manifest(layout.add_json(outer, INDEX))
    assert store.load(str(layout.path)) == [APP]
    assert store.manifest(APP).digest == here["digest"]


def test_indexes_that_share_indexes_are_read_once(tmp_path: Path, store: DirectoryImageStore) -> None:
    """Ten thousand million ways through a few small indexes lead to one image at once."""
    layout = Layout(tmp_path / "layout")
    descriptor = layout.add_manifest([HELLO])
    for _ in range(10):
        descriptor = layout.add_json({"schemaVersion": 2, "manifests": 10 * [descriptor]}, INDEX)
    layout.list_manifest(descriptor)
    assert store.load(str(layout.path)) == [APP]


ARTIFACTS = {  # how a manifest beside an image differs from one
    "a notation signature": {"config": "application/vnd.cncf.notary.signature"},
    "an SBOM": {"config": "application/vnd.oci.empty.v1+json", "artifactType": "application/spdx+json"},
    "a cosign signature": {"layers": "application/vnd.dev.cosign.simplesigning.v1+json"},
    "an attestation": {"layers": "application/vnd.in-toto+json"},
}


@pytest.mark.parametrize("name", ["", "app:1", "app:sha256-1.sig"], ids=["no name", "the same name", "its own name"])
@pytest.mark.parametrize("kinds", ARTIFACTS.values(), ids=ARTIFACTS)
def test_artifacts_beside_an_image_are_passed_over(
    tmp_path: Path, store: DirectoryImageStore, kinds: dict[str, str], name: str
) -> None:
    """Signatures, SBOMs and attestations, also with the platform of the image, and blobs of other types."""
    layout = Layout(tmp_path / "app")
    blob: dict[str, Any] = {
        part: layout.add_blob(b"{}", kind) for part, kind in kinds.items() if part != "artifactType"
    }
    changes: dict[str, Any] = {part: [each] if part == "layers" else each for part, each in (kinds | blob).items()}
    artifact = layout.add_manifest([HELLO], **changes)
    layout.list_manifest(artifact, name)
    layout.list_manifest(layout.add_blob(b"x", "text/spdx"), name)
    image = layout.add_manifest([HELLO])
    both = [artifact | {"platform": HERE}, image | {"platform": HERE}, layout.add_blob(b"y", "text/plain")]
    layout.list_manifest(layout.add_json({"schemaVersion": 2, "manifests": both}, INDEX), "app:1" if name else "")
    (loaded,) = store.load(str(layout.path))
    assert store.manifest(loaded).digest == image["digest"]


@pytest.mark.parametrize(
    "kind",
    [
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
        "application/vnd.docker.image.rootfs.diff.tar",
    ],
)
def test_layers_that_are_not_compressed(tmp_path: Path, store: DirectoryImageStore, kind: str) -> None:
    """Whatever their type says of who may hand them on, and whose it is."""
    layout = Layout(tmp_path / "app")
    layout.add_image([HELLO], compression="", layers=[layout.add_blob(HELLO, kind)])
    assert store.load(str(layout.path)) == [APP]


def test_an_image_without_layers_beside_another_is_passed_over(tmp_path: Path, store: DirectoryImageStore) -> None:
    """What one begins with in a layout, and what is made of it."""
    layout = Layout(tmp_path / "app")
    layout.add_image([], "empty")
    layout.add_image([HELLO], "full")
    assert store.load(str(layout.path)) == [ImageName("app", "full")]


def test_each_document_of_a_layout_is_read_once_and_all_have_a_limit(
    tmp_path: Path, store: DirectoryImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand names of one large index cost what one costs; a thousand indexes that share it are too much."""
    layout = Layout(tmp_path / "layout")
    foreign = {"mediaType": MANIFEST, "size": 1, "platform": OTHER}
    leaves = [foreign | {"digest": sha256(b"%d" % number)} for number in range(2000)]
    image = layout.add_manifest([HELLO])
    inner = layout.add_json({"schemaVersion": 2, "manifests": [*leaves, image | {"platform": HERE}]}, INDEX)
    reads = []
    read = Documents.read

    def noted_read(self: Documents, name: str) -> bytes:
        reads.append(name)
        return read(self, name)

    monkeypatch.setattr(Documents, "read", noted_read)
    layout.index = [inner | {"annotations": {NAME: f"app:{number}"}} for number in range(20)]
    layout.list_manifest(inner)
    assert len(store.load(str(layout.path))) == 20
    assert len(reads) == len(set(reads)) == 5
    shared = Layout(tmp_path / "shared")
    shutil.copytree(layout.path / "blobs", shared.path / "blobs", dirs_exist_ok=True)
    for number in range(50):
        outer = shared.add_json({"schemaVersion": 2, "manifests": [inner], "n": number}, INDEX)
        shared.list_manifest(outer, f"app:{number}")
    with pytest.raises(InvalidInputError, match="more than 100000 manifests"):
        store.load(str(shared.path))


def test_documents_together_have_a_limit(
    tmp_path: Path, store: DirectoryImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many images, each with a large configuration, are refused before they are all in memory."""
    monkeypatch.setattr("limpet.engine.images.documents.MAX_DOCUMENTS_BYTES", 1 << 20)
    layout = Layout(tmp_path / "layout")
    for number in range(12):
        layout.add_image([HELLO], f"app:{number}", configuration={"history": "x" * 100_000, "n": number})
    with pytest.raises(InvalidInputError, match="more than 1048576 bytes together"):
        store.load(str(layout.path))


def test_images_that_are_loaded_together_have_one_budget(
    tmp_path: Path, store: DirectoryImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many manifests of one large layer do not multiply what is unpacked to check them."""
    layout = Layout(tmp_path / "layout")
    for number in range(5):
        layout.add_image([tar(member("x", bytes(100_000)))], f"app:{number}", configuration={"n": number})
    monkeypatch.setattr(limits, "MAX_UNPACKED_BYTES", 400_000)
    with pytest.raises(InvalidInputError, match="more than 400000"):
        store.load(str(layout.path))


def docker_archive(path: Path, layer_compression: str = "") -> Path:
    """What `docker save` wrote before version 25; some builders compress the layers in it."""
    config = json.dumps({"os": "linux", "architecture": ARCHITECTURE, "rootfs": {"diff_ids": 2 * [sha256(HELLO)]}})
    layer = gzip.compress(HELLO) if layer_compression else HELLO
    manifest = json.dumps([{"Config": "c.json", "RepoTags": ["a:1", "b:2"], "Layers": ["1/layer.tar", "2/layer.tar"]}])
    link = member("2/layer.tar", kind=tarfile.SYMTYPE, linkname="../1/layer.tar")
    files = [member("c.json", config.encode()), member("1/layer.tar", layer), link]
    path.write_bytes(tar(*files, member("manifest.json", manifest.encode())))
    return path


def test_a_hard_link_in_an_archive_is_the_file(tmp_path: Path, store: DirectoryImageStore) -> None:
    """tar writes a file that it has already as a link to its first name, whichever of them the layout needs."""
    layout = Layout(tmp_path / "layout")
    layout.add_image([HELLO])
    os.link(layout.path / "index.json", layout.path / "a")
    order = ["--sort=name", "-C", str(layout.path), "."]
    subprocess.run(["tar", "-cf", str(tmp_path / "l.tar"), *order], check=True)
    assert store.load(os.fsencode(tmp_path / "l.tar")) == [APP]  # type: ignore[arg-type]


OLD_ARCHIVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # changes of its configuration, of its manifest
    "without the field of names": ({}, {"RepoTags": ...}),
    "with a path that begins with a dot": ({}, {"Config": "./c.json"}),
    "of no machine": ({"os": ..., "architecture": ...}, {}),
    "of a machine by its other name": ({"architecture": platform.machine()}, {}),
}


@pytest.mark.parametrize(("configuration", "entry"), OLD_ARCHIVES.values(), ids=OLD_ARCHIVES)
def test_archives_that_other_tools_take_are_read(
    tmp_path: Path, store: DirectoryImageStore, configuration: dict[str, Any], entry: dict[str, Any]
) -> None:
    """What old builders left out, or wrote in another way."""

    def change(document: dict[str, Any], changes: dict[str, Any]) -> bytes:
        return json.dumps({key: each for key, each in (document | changes).items() if each is not ...}).encode()

    config = {"os": "linux", "architecture": ARCHITECTURE, "rootfs": {"diff_ids": [sha256(HELLO)]}}
    manifest = {"Config": "c.json", "RepoTags": None, "Layers": ["l.tar"]}
    files = [member("c.json", change(config, configuration)), member("l.tar", HELLO)]
    entries = b"[" + change(manifest, entry) + b"]"
    (tmp_path / "app.tar").write_bytes(tar(*files, member("manifest.json", entries)))
    assert store.load(str(tmp_path / "app.tar")) == [ImageName("app")]


def test_an_unnamed_index_is_one_image(tmp_path: Path, store: DirectoryImageStore) -> None:
    """It may have several for this machine, such as one for each compression: the first of the best is taken."""
    layout = Layout(tmp_path / "app")
    images = [layout.add_manifest([HELLO], compression=each) for each in ("+gzip", "+zstd")]
    platformed = [each | {"platform": HERE} for each in images]
    layout.list_manifest(layout.add_json({"schemaVersion": 2, "manifests": platformed}, INDEX), "")
    assert store.load(str(layout.path)) == [ImageName("app")]
    assert store.manifest(ImageName("app")).digest == images[0]["digest"]


def test_what_a_stranger_wrote_tells_no_terminal_anything(tmp_path: Path, store: DirectoryImageStore) -> None:
    """The types, platforms and places that an error quotes have their control characters escaped."""
    layout = Layout(tmp_path / "layout")
    layout.list_manifest(layout.add_blob(b"{}", "\x1b[31mred\x1b]0;t\x07"))
    with pytest.raises(InvalidInputError, match=r"only: \\x1b\[31mred\\x1b\]0;t\\x07"):
        store.load(str(layout.path))


def test_a_digest_of_another_algorithm_beside_an_image_is_passed_over(
    tmp_path: Path, store: DirectoryImageStore
) -> None:
    """Nothing of it is read (descriptor.md); it is refused where the image's own blobs have one."""
    layout = Layout(tmp_path / "layout")
    layout.add_image([HELLO])
    other = {"mediaType": "application/vnd.example.sbom", "digest": f"blake3:{'a' * 64}", "size": 2}
    layout.list_manifest(other, "")
    assert store.load(str(layout.path)) == [APP]
    own = Layout(tmp_path / "own")
    own.list_manifest(own.add_manifest([HELLO], layers=[other | {"mediaType": LAYER}]))
    with pytest.raises(InvalidInputError, match="digest 'blake3:aaaa"):
        store.load(str(own.path))


@pytest.mark.parametrize("compression", ["", "gzip"])
def test_docker_save_archives_are_read(tmp_path: Path, store: DirectoryImageStore, compression: str) -> None:
    """An archive without an index, whose second layer is a link to the first, gives both of its names."""
    assert store.load(str(docker_archive(tmp_path / "d.tar", compression))) == [
        ImageName("a", "1"),
        ImageName("b", "2"),
    ]
    assert store.manifest(ImageName("a", "1")).digest == store.manifest(ImageName("b", "2")).digest
    target = make_target(tmp_path)
    store.mount(ImageName("b", "2"), MountType.PLAIN, str(target))
    assert (target / "bin/app").read_bytes() == b"hello"


def test_an_image_without_a_name_in_a_docker_archive_gets_the_archives(
    tmp_path: Path, store: DirectoryImageStore
) -> None:
    """`docker save ID` writes no name; a layer under many names in it is read once."""
    config = json.dumps({"os": "linux", "architecture": ARCHITECTURE, "rootfs": {"diff_ids": 9 * [sha256(HELLO)]}})
    layers = [f"{number}/layer.tar" for number in range(9)]
    links = [member(name, kind=tarfile.SYMTYPE, linkname="../0/layer.tar") for name in layers[1:]]
    manifest = json.dumps([{"Config": "c.json", "RepoTags": None, "Layers": layers}])
    files = [member("c.json", config.encode()), member(layers[0], HELLO), *links]
    (tmp_path / "app.tar").write_bytes(tar(*files, member("manifest.json", manifest.encode())))
    assert store.load(str(tmp_path / "app.tar")) == [ImageName("app")]


def test_a_directory_of_skopeos_is_refused_with_what_to_do(tmp_path: Path, store: DirectoryImageStore) -> None:
    """`skopeo copy ... dir:x` writes no layout: blobs by their digests, beside a manifest and a version."""
    layout = Layout(tmp_path / "layout")
    layout.add_image([HELLO], "app:1")
    (tmp_path / "x").mkdir()
    (tmp_path / "x/version").write_text("Directory Transport Version: 1.1\n")
    (tmp_path / "x/manifest.json").write_bytes(layout.blob_path(layout.index[0]["digest"]).read_bytes())
    for blob in (tmp_path / "layout/blobs/sha256").iterdir():
        blob.rename(tmp_path / "x" / blob.name)
    with pytest.raises(InvalidInputError, match=r'as "dir:" of skopeo .*: skopeo copy dir:'):
        store.load(str(tmp_path / "x"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def first_layer(layout: Layout) -> Path:
    manifest = json.loads(layout.blob_path(layout.index[0]["digest"]).read_bytes())
    return layout.blob_path(manifest["layers"][0]["digest"])


BROKEN = {  # what was done to a good layout: what is said of it
    "layer damaged": (lambda it: flip(first_layer(it)), "is damaged: its content has the digest"),
    "layer cut off": (lambda it: os.truncate(first_layer(it), 20), "has 20 bytes"),
    "layer too long": (lambda it: os.truncate(first_layer(it), 1 << 42), "but its image says"),
    "layer missing": (lambda it: first_layer(it).unlink(), "cannot be opened: No such file"),
    "manifest damaged": (lambda it: flip(it.blob_path(it.index[0]["digest"])), "is damaged"),
    "manifest missing": (lambda it: it.blob_path(it.index[0]["digest"]).unlink(), "No such file"),
    "manifest a pipe": (lambda it: to_pipe(it.blob_path(it.index[0]["digest"])), "is not a file"),
    "no oci-layout": (lambda it: (it.path / "oci-layout").unlink(), "no file oci-layout"),
    "other version": (lambda it: it.write_json("oci-layout", {"imageLayoutVersion": "2.0"}), "version '2.0'"),
    "no index": (lambda it: (it.path / "index.json").unlink(), "index.json cannot be opened"),
    "index not JSON": (lambda it: (it.path / "index.json").write_text("{"), "index.json: Input data was truncated"),
    "index too deep": (lambda it: (it.path / "index.json").write_text('{"manifests":' + 9999 * "["), "index.json"),
    "index too large": (lambda it: (it.path / "index.json").write_bytes(bytes(5 << 20)), "index.json is larger than"),
    "empty index": (lambda it: it.write_json("index.json", {}), "only: nothing"),
    "climbing digest": (lambda it: relist(it, digest="sha256:../../../etc/passwd"), "expected sha256:<64"),
    "short digest": (lambda it: relist(it, digest="sha256:abc"), "expected sha256:<64"),
    "unknown algorithm": (lambda it: relist(it, digest="md5:" + 32 * "a"), "expected sha256:<64"),
    "wrong size": (lambda it: relist(it, size=7), "but its image says 7"),
    "negative size": (lambda it: relist(it, size=-1), "invalid size -1"),
    "no image": (lambda it: relist(it, mediaType="text/plain"), "only: text/plain"),
    "other machine": (lambda it: relist(it, platform=OTHER), "only: linux/m68k"),
    "machine not named": (
        lambda it: relist(it, **it.add_manifest([HELLO], configuration={"architecture": "", "os": ""})),
        "only: an image whose configuration names no platform",
    ),
    "bad name": (lambda it: relist(it, annotations={NAME: "a b:1"}), "no spaces"),
    "bad tag": (lambda it: relist(it, annotations={NAME: "a b"}), "named after its directory or archive"),
    "layer elsewhere": (lambda it: relist(it, **elsewhere(it)), "the image says where it is: https://layers/1"),
    "layer of xz": (lambda it: relist(it, **packed(it, lzma.compress)), "is compressed with xz"),
    "two without names": (lambda it: it.add_image([tar(member("b"))], "") and relist(it, annotations={}), "2 images"),
    "no layers": (lambda it: relist(it, **it.add_manifest([])), "has no layers"),
    "artifact": (
        lambda it: relist(it, **it.add_manifest([HELLO], config=it.add_blob(b"{}", "application/vnd.helm"))),
        "only: an artifact of type 'application/vnd.helm'",
    ),
    "too many layers": (
        lambda it: relist(it, **it.add_manifest([HELLO], layers=1001 * [it.add_blob(b"", LAYER)])),
        "1001 layers; limpet unpacks at most 1000",
    ),
    "two sizes": (
        lambda it: relist(
            it,
            **it.add_manifest(2 * [HELLO], layers=[it.add_blob(b"", LAYER), it.add_blob(b"", LAYER) | {"size": 1}]),
        ),
        "0 bytes in one place and 1 in another",
    ),
    "layer of another kind": (
        lambda it: relist(it, **it.add_manifest([HELLO], layers=[it.add_blob(b"", LAYER + "+lzma")])),
        "not supported",
    ),
    "diff_ids missing": (
        lambda it: relist(it, **it.add_manifest([HELLO], configuration={"rootfs": {"diff_ids": []}})),
        "1 layers, but 0 diff_ids",
    ),
}


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def elsewhere(layout: Layout) -> dict[str, Any]:
    """A manifest whose layer is not in the layout: it says where to get it."""
    layer = layout.add_blob(b"x", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")
    layout.blob_path(layer["digest"]).unlink()
    return layout.add_manifest([HELLO], layers=[layer | {"urls": ["https://layers/1"]}])


def packed(layout: Layout, pack: Callable[[bytes], bytes]) -> dict[str, Any]:
    return layout.add_manifest([HELLO], layers=[layout.add_blob(pack(HELLO), LAYER)])


def relist(layout: Layout, **fields: object) -> None:
    layout.index[0] |= fields
    layout.write_json("index.json", {"schemaVersion": 2, "manifests": layout.index})


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_bad_layout_is_refused_and_leaves_nothing(
    tmp_path: Path, store: DirectoryImageStore, damage: object, message: str
) -> None:
    """Whatever is wrong with a layout is said, with its path, and the store is as it was."""
    layout = Layout(tmp_path / "layout")
    layout.add_image([HELLO])
    damage(layout)  # type: ignore[operator]
    before = names(tmp_path / "store")
    with pytest.raises(InvalidInputError) as caught:
        store.load(str(layout.path))
    assert str(layout.path) in str(caught.value)
    assert message in str(caught.value)
    assert names(tmp_path / "store") == before
    assert store.list() == []


SOURCES = {  # what is at the path: what is said
    "nothing": (lambda path: None, "No such file"),
    "a pipe": (os.mkfifo, "neither a directory nor a file"),
    "an empty file": (lambda path: path.write_bytes(b""), "no file oci-layout"),
    "noise": (
        lambda path: path.write_bytes(b"noise" * 999),
        "; give an OCI image layout, a directory or a tar archive",
    ),
    "an xz archive": (lambda path: path.write_bytes(lzma.compress(HELLO)), "is compressed with xz"),
    "a bzip2 archive": (lambda path: path.write_bytes(bz2.compress(HELLO)), "is compressed with bzip2"),
    "a tar file without a layout": (lambda path: path.write_bytes(HELLO), "no file oci-layout"),
    "a cut tar file": (lambda path: path.write_bytes(HELLO[:700]), "in the middle of a header"),
    "a cut gzip file": (lambda path: path.write_bytes(gzip.compress(HELLO)[:-20]), "damaged or truncated (tar+gzip)"),
    "a climbing member": (lambda path: path.write_bytes(tar(member("../oci-layout"))), "leads out of the root"),
}


@pytest.mark.parametrize(("make", "message"), SOURCES.values(), ids=SOURCES)
def test_what_is_no_layout_is_refused(tmp_path: Path, store: DirectoryImageStore, make: object, message: str) -> None:
    """A path that is no layout and no archive of one is named in a clear error, at once."""
    make(tmp_path / "source")  # type: ignore[operator]
    with pytest.raises(InvalidInputError) as caught:
        store.load(str(tmp_path / "source"))
    assert str(tmp_path / "source") in str(caught.value)
    assert message in str(caught.value)


def test_a_truncated_archive_never_loads(tmp_path: Path, store: DirectoryImageStore) -> None:
    """Wherever an archive is cut off before its end marker, no image of it is taken in."""
    layout = Layout(tmp_path / "layout")
    layout.add_image([HELLO])
    data = layout.pack(tmp_path / "whole.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        end = max(each.offset_data + each.size + -each.size % 512 for each in archive)
    for length in [*range(0, end, 256), end - 1]:
        (tmp_path / "cut.tar").write_bytes(data[:length])
        with pytest.raises(InvalidInputError, match=r"cut\.tar"):
            store.load(str(tmp_path / "cut.tar"))
    assert not store.check(APP)
    (tmp_path / "cut.tar").write_bytes(data[:end])
    assert store.load(str(tmp_path / "cut.tar")) == [APP]


def test_files_are_private(tmp_path: Path) -> None:
    """Whatever the umask, directories of the store are 0700 and its files 0600."""
    before = os.umask(0)
    try:
        store = DirectoryImageStore(str(tmp_path / "store"))
        layout = Layout(tmp_path / "layout")
        layout.add_image([HELLO])
        store.load(str(layout.path))
    finally:
        os.umask(before)
    paths = [tmp_path / "store", *(tmp_path / "store").rglob("*")]
    assert {oct(path.stat().st_mode & 0o7777) for path in paths if path.is_dir()} == {"0o700"}
    assert {oct(path.stat().st_mode & 0o7777) for path in paths if path.is_file()} == {"0o600"}


def test_remove_frees_what_no_other_image_needs(tmp_path: Path, store: DirectoryImageStore) -> None:
    """Of two images that share a layer, the other stays whole; with the last one all blobs go."""
    layout = Layout(tmp_path / "layout")
    layout.add_image([HELLO, tar(member("a"))], "app:1")
    layout.add_image([HELLO, tar(member("b"))], "app:2")
    empty = names(tmp_path / "store")
    store.load(str(layout.path))
    store.remove(APP)
    assert not store.check(APP)
    assert [image.name for image in store.list()] == [ImageName("app", "2")]
    assert store.check(ImageName("app", "2"))
    with pytest.raises(NotFoundError, match="app:1"):
        store.remove(APP)
    store.remove(ImageName("app", "2"))
    assert names(tmp_path / "store") == empty


def test_a_name_moves_to_the_newest_image(tmp_path: Path, store: DirectoryImageStore) -> None:
    """Loading another image under the same name replaces it; the next opening frees the blobs of the old one."""
    first, second = Layout(tmp_path / "one"), Layout(tmp_path / "two")
    first.add_image([HELLO])
    new = second.add_image([tar(member("new"))])
    store.load(str(first.path))
    store.load(str(second.path))
    assert store.manifest(APP).digest == new["digest"]
    DirectoryImageStore(str(tmp_path / "store"))
    assert sum("sha256/" in name for name in names(tmp_path / "store")) == 3


def stored(store_path: Path, digest: str) -> Path:
    return store_path / "blobs" / digest.replace(":", "/")


def test_a_record_that_cannot_be_read_now_is_not_damaged(
    tmp_path: Path, store: DirectoryImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without descriptors, say: nobody is told to remove it, no blob of the image goes, and a store can be opened."""
    layout = Layout(tmp_path / "layout")
    layout.add_image([HELLO])
    store.load(str(layout.path))

    def refuse(path: str, _limit: int) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

    with monkeypatch.context() as patched:
        patched.setattr("limpet.engine.images.records.read_small_file", refuse)
        with pytest.raises(ResourcesError, match="no file descriptor is free") as caught:
            store.manifest(APP)
        assert "remove" not in str(caught.value)
        DirectoryImageStore(str(tmp_path / "store")).register_builtin(ImageName("built-in"))
    assert store.check(APP)


def test_damage_in_the_store_is_said_and_repaired_by_another_load(tmp_path: Path, store: DirectoryImageStore) -> None:
    """A blob that rotted is never unpacked as if it were whole; loading the image again mends it."""
    layout = Layout(tmp_path / "layout")
    layout.add_image([HELLO])
    store.load(str(layout.path))
    (layer,) = store.manifest(APP).layers
    target = make_target(tmp_path)
    flip(stored(tmp_path / "store", layer))
    with pytest.raises(StoreDamagedError, match=layer.removeprefix("sha256:")):
        store.mount(APP, MountType.PLAIN, str(target))
    os.truncate(stored(tmp_path / "store", layer), 9)
    assert not store.check(APP)
    stored(tmp_path / "store", layer).unlink()
    assert not store.check(APP)
    flip(stored(tmp_path / "store", store.manifest(APP).digest))
    assert not store.check(APP)
    with pytest.raises(StoreDamagedError, match="is damaged"):
        store.manifest(APP)
    store.load(str(layout.path))
    assert store.check(APP)
    (record,) = (tmp_path / "store/images").iterdir()
    record.write_text("{")
    with pytest.raises(StoreDamagedError, match=record.name):
        DirectoryImageStore(str(tmp_path / "store")).list()
    store.load(str(layout.path))
    assert store.check(APP)


def test_builtin_images_outlive_the_store_object(tmp_path: Path, store: DirectoryImageStore) -> None:
    """A built-in image is listed, mounts as an empty directory, is kept on disk, and can be removed."""
    name, config = ImageName("host"), ImageConfig(env=("A=b",), cmd=("/bin/sh",))
    store.register_builtin(name)
    store.register_builtin(name, config)
    again = DirectoryImageStore(str(tmp_path / "store"))
    assert again.check(name)
    assert again.manifest(name) == ImageManifest(name=name, config=config)
    assert again.manifest(name).is_builtin
    assert again.list() == [ImageSummary(name=name)]
    target = make_target(tmp_path)
    again.mount(name, MountType.PLAIN, str(target))
    assert names(target) == set()
    again.remove(name)
    assert not store.check(name)


def test_a_builtin_and_a_loaded_image_never_take_each_others_name(tmp_path: Path, store: DirectoryImageStore) -> None:
    """A name does not silently change from the image's files to the host's, nor back."""
    layout = Layout(tmp_path / "layout")
    layout.add_image([HELLO])
    store.register_builtin(APP)
    with pytest.raises(AlreadyExistsError, match="app:1"):
        store.load(str(layout.path))
    store.remove(APP)
    store.load(str(layout.path))
    with pytest.raises(AlreadyExistsError, match="app:1"):
        store.register_builtin(APP)
    for name in [ImageName("a b"), ImageName(""), ImageName("a", "1", sha256(b""))]:
        with pytest.raises(InvalidInputError, match="image name"):
            store.register_builtin(name)


def test_threads_may_load_and_remove_at_once(tmp_path: Path, store: DirectoryImageStore) -> None:
    """Eight threads that load, mount and remove images of shared layers end with all of them whole."""
    errors = []

    def work(number: int) -> None:
        try:
            layout = Layout(tmp_path / f"layout{number}")
            layout.add_image([HELLO, tar(member(f"file{number % 4}"))], f"app:{number}")
            for turn in range(5):
                store.load(str(layout.path))
                target = tmp_path / f"target{number}.{turn}"
                target.mkdir()
                store.mount(ImageName("app", str(number)), MountType.PLAIN, str(target))
                assert names(target) == {"bin", "bin/app", f"file{number % 4}"}
                if turn < 4:
                    store.remove(ImageName("app", str(number)))
        except Exception as error:  # noqa: BLE001 - handed to the test's own thread
            errors.append(error)

    threads = [Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(store.check(ImageName("app", str(number))) for number in range(8))


def test_opening_does_not_disturb_a_load_in_progress(tmp_path: Path, store: DirectoryImageStore) -> None:
    """A second opening while blobs are being taken in leaves them, and the temporary files, alone."""
    with store._locked(fcntl.LOCK_SH):  # as load holds it
        leftover = tmp_path / "store/blobs/sha256/.tmp-0"
        leftover.write_bytes(b"")
        DirectoryImageStore(str(tmp_path / "store"))
        assert leftover.exists()
    DirectoryImageStore(str(tmp_path / "store"))
    assert not leftover.exists()


HOLDS = """
import fcntl, os, signal, sys
from limpet.engine import Engine
from limpet.engine.images import DirectoryImageStore
with DirectoryImageStore(sys.argv[1])._locked(getattr(fcntl, sys.argv[2])):
    os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.parametrize("how", ["LOCK_SH", "LOCK_EX"])
def test_who_is_stopped_holds_up_nobody_for_ever(state_dir: str, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """By Ctrl-Z amid a load, say: an engine opens all the same, and what needs the lock says who has it."""
    monkeypatch.setattr("limpet.engine.images.directory._PATIENCE_SECONDS", 0.1)
    Engine.open(state_dir).close()
    root = os.path.join(state_dir, "images")
    store = DirectoryImageStore(root)
    with subprocess.Popen([sys.executable, "-c", HOLDS, root, how]) as other:
        try:
            stat = Path(f"/proc/{other.pid}/stat")
            wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "it to stop")
            waits: Callable[[], object] = store.list if how == "LOCK_EX" else lambda: store.remove("no:1")
            with pytest.raises(StateDirectoryError, match=f"process {other.pid}, which is stopped by a signal"):
                waits()
            if how == "LOCK_SH":
                Engine.open(state_dir).close()
        finally:
            other.send_signal(signal.SIGCONT)
    assert [str(image.name) for image in store.list()] == ["host:latest"]
