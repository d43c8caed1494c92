"""Threads that are the first to decode a record, all at once: as in a program that serves several callers."""

import subprocess
import sys

import pytest

FORKS = 60
AT_ONCE = """
import os, sys, threading, traceback
sys.setswitchinterval(1e-6)

def at_once(*calls):
    barrier, wrong = threading.Barrier(len(calls)), []

    def begin(call):
        barrier.wait()
        try:
            call()
        except BaseException:
            wrong.append(traceback.format_exc())

    threads = [threading.Thread(target=begin, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong

def main(make_calls):
    for _ in range(int(sys.argv[1])):
        pid = os.fork()  # a process in which nothing was decoded yet
        if not pid:
            wrong = at_once(*make_calls())
            print(*wrong, flush=True, sep="", end="")
            os._exit(len(wrong))
        if os.waitpid(pid, 0)[1]:
            sys.exit("a process failed or crashed")
"""
ROWS = """
from limpet.schema import codec
from limpet.schema.cri import ContainerConfig, ContainerMetadata, ImageSpec, Mount, PodSandboxConfig, PodSandboxMetadata
from limpet.schema.image import ImageManifest, ImageName
from limpet.schema.metadata import Metadata, SandboxMetadata

config = ContainerConfig(
    metadata=ContainerMetadata(name="a"), image=ImageSpec(image="host"), mounts=(Mount(container_path="/a"),)
)
manifest = ImageManifest(name=ImageName("host"), layers=("a",))
pod = PodSandboxConfig(metadata=PodSandboxMetadata(name="pod"), labels={"a": "b"})
container = Metadata(id="c", sandbox_id="s", name="a", config=config, image_manifest=manifest)
sandbox = SandboxMetadata(id="s", name="pod", config=pod, created_at=1)
row, sandbox_row = codec.metadata_to_row("n", container), codec.sandbox_to_row("n", sandbox)

def look():
    assert codec.row_to_metadata("n", row) == container
    assert codec.row_to_sandbox("n", sandbox_row) == sandbox

main(lambda: [look] * 8)
"""
MADE = """
from limpet.schema.cri import ContainerConfig
from limpet.schema.decoders import make_converter, make_decoder

def make():
    made = make_decoder(ContainerConfig).decode(b'{"metadata":{"name":"a"},"image":{"image":"host"}}')
    assert made.metadata.name == "a"

def convert():
    config = {"metadata": {"name": "a"}, "image": {"image": "host"}}
    assert make_converter(ContainerConfig)(config).metadata.name == "a"

main(lambda: [make, convert] * 4)
"""


@pytest.mark.parametrize("script", [ROWS, MADE], ids=["rows", "made"])
def test_threads_that_are_first_to_decode_all_see_the_whole(script: str) -> None:
    """None misses fields, none is refused, and none ends the process: also where each makes a decoder of its own."""
    command = [sys.executable, "-c", AT_ONCE + script, str(FORKS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
