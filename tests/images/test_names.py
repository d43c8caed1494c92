"""Names: under which an image is found, how it gets another, and what older versions wrote."""

import hashlib
import json
from pathlib import Path

import pytest

from limpet.engine.images import DirectoryImageStore
from limpet.schema.errors import AlreadyExistsError, InvalidInputError, NotFoundError, StoreDamagedError
from limpet.schema.image import ImageName, MountType
from tests.oci_layout import INDEX, Layout, member, names, sha256, tar

HELLO = tar(member("app", b"hello"))


def load(store: DirectoryImageStore, path: Path, name: str, data: bytes = HELLO) -> str:
    """Load an image by this name; return its manifest's digest."""
    layout = Layout(path / f"layout{len(list(path.iterdir()))}")
    digest: str = layout.add_image([data], name)["digest"]
    store.load(str(layout.path))
    return digest


def config_digest(store_path: Path, digest: str) -> str:
    manifest = json.loads((store_path / "blobs" / digest.replace(":", "/")).read_bytes())
    config: str = manifest["config"]["digest"]
    return config


def find(store: DirectoryImageStore, text: str) -> str:
    """Return the digest of what is found by this name."""
    name = ImageName.parse(text)
    digest = store.manifest(name).digest
    assert store.check(name)
    return digest


def test_a_name_may_be_given_as_text(tmp_path: Path) -> None:
    """What is neither is refused."""
    store = DirectoryImageStore(str(tmp_path / "store"))
    load(store, tmp_path, "busybox:1")
    store.tag("busybox:1", "mine")
    assert store.check("mine")
    assert store.manifest("mine") == store.manifest(ImageName.parse("docker.io/library/mine"))
    store.remove("mine")
    for wrong in (None, 5, b"busybox:1"):
        with pytest.raises(InvalidInputError, match="give an ImageName or text"):
            store.remove(wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidInputError):
            store.load(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="expected repository"):
        store.manifest("")


NORMALIZED = {
    "busybox": "docker.io/library/busybox:latest",
    "docker.io/busybox": "docker.io/library/busybox:latest",
    "index.docker.io/library/busybox:1": "docker.io/library/busybox:1",
    "a/b": "docker.io/a/b:latest",
    "localhost/b": "localhost/b:latest",
    "localhost:5000/b": "localhost:5000/b:latest",
    "quay.example/b/c:2": "quay.example/b/c:2",
    "registry:5000/a": "registry:5000/a:latest",
}


@pytest.mark.parametrize(("written", "full"), NORMALIZED.items())
def test_a_name_means_what_other_tools_take_it_for(written: str, full: str) -> None:
    """The default registry and its folder for official images are implied, and a full name stays as it is."""
    assert str(ImageName.parse(written).normalized) == full
    assert str(ImageName.parse(full).normalized) == full


SPELLINGS = ["busybox", "busybox:latest", "docker.io/busybox", "docker.io/library/busybox:latest", "library/busybox"]


@pytest.mark.parametrize("loaded", SPELLINGS)
def test_an_image_is_found_in_every_spelling_of_its_name(
    tmp_path: Path, store: DirectoryImageStore, loaded: str
) -> None:
    """However it was named when it was loaded, it is found, moved and removed as one name, and listed as it was."""
    load(store, tmp_path, "busybox:latest", tar(member("old")))
    digest = load(store, tmp_path, loaded if ":" in loaded or "/" in loaded else f"{loaded}:latest")
    for spelling in SPELLINGS:
        assert find(store, spelling) == digest
    assert len(store.list()) == 1
    store.remove(ImageName.parse("index.docker.io/library/busybox"))
    for spelling in SPELLINGS:
        assert not store.check(ImageName.parse(spelling))
    assert store.list() == []


def test_an_image_is_found_by_digest_and_id(tmp_path: Path, store: DirectoryImageStore) -> None:
    """By repository and digest of manifest or index whatever the tag, by its configuration's digest or part of it."""
    layout = Layout(tmp_path / "layout")
    digest = layout.add_manifest([HELLO])["digest"]
    index = layout.add_json({"schemaVersion": 2, "manifests": [layout.add_manifest([HELLO])]}, INDEX)
    layout.list_manifest(index, "a.example/app:1")
    store.load(str(layout.path))
    other = load(store, tmp_path, "other:1", tar(member("other")))
    image_id = config_digest(tmp_path / "store", digest)
    for text in (
        f"a.example/app@{digest}",
        f"a.example/app:1@{digest}",
        f"a.example/app@{index['digest']}",
        digest,
        index["digest"],
        image_id,
        image_id[7:],
        image_id[7:19],
        image_id[:20],
    ):
        assert find(store, text) == digest, text
    for text in (f"b.example/app@{digest}", f"a.example/app@{other}", image_id[7:12], sha256(b"none"), "abcdefabcdef"):
        with pytest.raises(NotFoundError):
            store.manifest(ImageName.parse(text))
    (tmp_path / "rootfs").mkdir()
    store.mount(ImageName.parse(image_id), MountType.PLAIN, str(tmp_path / "rootfs"))
    assert names(tmp_path / "rootfs") == {"app"}


def test_a_name_comes_before_an_id(tmp_path: Path, store: DirectoryImageStore) -> None:
    """An image whose name looks like an id is found by that name, not what the id begins."""
    digest = load(store, tmp_path, "app:1")
    image_id = config_digest(tmp_path / "store", digest)[7:19]
    assert find(store, image_id) == digest
    named = load(store, tmp_path, f"{image_id}:latest", tar(member("other")))
    assert find(store, image_id) == named


def test_a_whole_digest_is_no_name(tmp_path: Path, store: DirectoryImageStore) -> None:
    """Nobody's image answers to the digest of another: not by a tag, nor by what an archive says that its name is."""
    digest = load(store, tmp_path, "app:1")
    other = load(store, tmp_path, "other:1", tar(member("other")))
    image_id = config_digest(tmp_path / "store", digest)
    for name in (image_id, digest, image_id[7:], f"{image_id[7:]}:latest", "sha512:" + 128 * "a"):
        with pytest.raises(InvalidInputError, match="it is a digest"):
            store.tag("other:1", name)
    stranger = Layout(tmp_path / "stranger")
    stranger.add_image([tar(member("stranger"))], image_id)
    assert store.load(str(stranger.path)) == [ImageName("stranger")]
    assert (find(store, image_id), find(store, digest), find(store, other)) == (digest, digest, other)
    stranger.index.clear()
    stranger.add_image([tar(member("stranger"))], f"{image_id[7:]}:latest")
    with pytest.raises(InvalidInputError, match="it is a digest"):
        store.load(str(stranger.path))


def test_a_digest_beside_a_name_adds_none(tmp_path: Path, store: DirectoryImageStore) -> None:
    """As containerd has each image of Kubernetes: nobody said that it is `latest`. Elsewhere, it has no other name."""
    layout = Layout(tmp_path / "layout")
    image = layout.add_manifest([HELLO])
    digest: str = image["digest"]
    for name in (f"a.b/app@{digest}", sha256(b"its configuration"), "a.b/app:1", f"c.d/app@{digest}"):
        layout.list_manifest(image, name)
    assert store.load(str(layout.path)) == [ImageName("a.b/app", "1"), ImageName("c.d/app")]
    assert find(store, f"a.b/app@{digest}") == find(store, f"c.d/app@{digest}") == digest
    assert not store.check("a.b/app")


def test_two_images_of_one_name_are_refused(tmp_path: Path, store: DirectoryImageStore) -> None:
    """One of them took the other's name, unsaid: a name may have several spellings, and a digest is of `latest`."""
    layout = Layout(tmp_path / "layout")
    first, second = (layout.add_manifest([tar(member(name))]) for name in "ab")
    for name in ("docker.io/library/app", "library/app:latest", "docker.io/library/app@" + second["digest"]):
        layout.index.clear()
        layout.list_manifest(first, "docker.io/library/app:latest")
        layout.list_manifest(second, name)
        with pytest.raises(InvalidInputError, match="two of its images have the name"):
            store.load(str(layout.path))
    assert store.list() == []


def test_an_image_can_be_given_more_names(tmp_path: Path, store: DirectoryImageStore) -> None:
    """tag by name or id; each name can go alone, with the last one the blobs, and by its id all go at once."""
    empty = names(tmp_path / "store")
    digest = load(store, tmp_path, "app:1")
    image_id = ImageName.parse(config_digest(tmp_path / "store", digest))
    store.tag(ImageName("app", "1"), ImageName("app", "2"))
    store.tag(image_id, ImageName("docker.io/library/app"))
    assert [str(image.name) for image in store.list()] == ["app:1", "app:2", "docker.io/library/app:latest"]
    store.remove(ImageName("app", "1"))
    assert find(DirectoryImageStore(str(tmp_path / "store")), "app") == digest
    load(store, tmp_path, "old:1", tar(member("old")))
    store.tag(ImageName("app"), ImageName("old", "1"))
    assert find(store, "old:1") == digest
    store.remove(image_id)
    assert names(tmp_path / "store") == empty
    with pytest.raises(NotFoundError):
        store.tag(ImageName("app"), ImageName("b"))


def test_a_builtin_image_has_no_other_spelling_and_its_name_is_taken(
    tmp_path: Path, store: DirectoryImageStore
) -> None:
    """Nobody gets the host's files for docker.io/library/host, and no image takes the place of host."""
    store.register_builtin(ImageName("host"))
    assert not store.check(ImageName("docker.io/library/host"))
    load(store, tmp_path, "app:1")
    layout = Layout(tmp_path / "layout")
    layout.add_image([HELLO], "docker.io/library/host:latest")
    for take in (
        lambda: store.load(str(layout.path)),
        lambda: store.tag(ImageName("app", "1"), ImageName("docker.io/host")),
        lambda: store.tag(ImageName("host"), ImageName("app", "1")),
        lambda: store.register_builtin(ImageName("docker.io/library/app", "1")),
    ):
        with pytest.raises(AlreadyExistsError):
            take()
    with pytest.raises(InvalidInputError, match="no digest"):
        store.tag(ImageName("app", "1"), ImageName("b", "1", sha256(b"")))
    assert store.manifest(ImageName("host")).is_builtin


def older_record(store: Path, name: ImageName, digest: str) -> Path:
    """Write a record as versions did that named it after the name as written."""
    path = store / "images" / (hashlib.sha256(f"{name.repository}:{name.tag}".encode()).hexdigest() + ".json")
    record = {"name": {"repository": name.repository, "tag": name.tag}} | ({"digest": digest} if digest else {})
    path.write_text(json.dumps(record))
    return path


def test_images_of_older_versions_go_on(tmp_path: Path, store: DirectoryImageStore) -> None:
    """They are found in every spelling, move with their name, and a record that rotted does not last."""
    first = load(store, tmp_path, "app:1", tar(member("first")))
    store.tag(ImageName("app", "1"), ImageName("keep"))
    store.remove(ImageName("app", "1"))
    old = older_record(tmp_path / "store", ImageName("app", "1"), first)
    builtin = older_record(tmp_path / "store", ImageName("host"), "")
    shadow = older_record(tmp_path / "store", ImageName("docker.io/library/host"), first)
    store = DirectoryImageStore(str(tmp_path / "store"))
    assert find(store, "app:1") == find(store, "docker.io/library/app:1") == first
    assert store.manifest(ImageName("host")).is_builtin
    assert find(store, "docker.io/library/host") == first
    store.remove(ImageName("host"))
    assert (builtin.exists(), shadow.exists()) == (False, True)
    second = load(store, tmp_path, "docker.io/library/app:1", tar(member("second")))
    assert find(store, "app:1") == find(store, "docker.io/app:1") == second
    assert [str(image.name) for image in store.list()].count("app:1") == 0
    DirectoryImageStore(str(tmp_path / "store"))
    assert not old.exists()
    assert find(store, "app:1") == second
    old.write_text("{")
    with pytest.raises(StoreDamagedError, match=old.name):
        store.list()
    for leftover in ("images/.tmp-file", ".tmp-file"):
        (tmp_path / "store" / leftover).write_text("")
    (tmp_path / "store/.tmp-tree/d").mkdir(parents=True)
    store = DirectoryImageStore(str(tmp_path / "store"))
    assert not (tmp_path / "store/.tmp-tree").exists()
    load(store, tmp_path, "app:1", tar(member("third")))
    assert len(store.list()) == 3
