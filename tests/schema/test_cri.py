"""CRI configs: what crictl and protobuf write is read, nothing is lost in writing, the rest is refused by name."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect

from limpet.schema import cri
from limpet.schema.cri import ContainerConfig, PodSandboxConfig, parse_container_config, parse_pod_sandbox_config
from limpet.schema.errors import InvalidInputError
from limpet.schema.protobuf_json import MAX_BYTES, to_json

PARSERS: dict[Any, Any] = {ContainerConfig: parse_container_config, PodSandboxConfig: parse_pod_sandbox_config}

CRICTL_CONTAINER = """
{
  "metadata": {"name": "web", "attempt": 2},
  "image": {"image": "registry.example/web:1", "annotations": {"log_path": "kept"}},
  "command": ["/bin/sh", "-c"],
  "args": ["exec serve --port=$PORT"],
  "working_dir": "/srv",
  "envs": [{"key": "PORT", "value": "8080"}, {"key": "EMPTY"}],
  "mounts": [{"container_path": "/data", "host_path": "/var/data", "readonly": true, "propagation": 1,
              "uidMappings": [{"host_id": 100000, "container_id": 0, "length": 65536}]}],
  "devices": [{"container_path": "/dev/fuse", "host_path": "/dev/fuse", "permissions": "rw"}],
  "labels": {"cpu_quota": "a label", "logPath": "another"},
  "annotations": null,
  "log_path": "web/2.log",
  "stdin": false,
  "tty": true,
  "linux": {
    "resources": {"cpu_period": 100000, "cpu_quota": 50000, "memory_limit_in_bytes": 268435456, "oom_score_adj": -5,
                  "hugepage_limits": [{"page_size": "2MB", "limit": 18446744073709551615}],
                  "unified": {"memory.high": "200M"}},
    "security_context": {"run_as_user": {"value": 0}, "supplemental_groups": [7, 8],
                         "namespace_options": {"network": 2, "pid": 1},
                         "capabilities": {"drop_capabilities": ["ALL"]},
                         "seccomp": {"profile_type": 1}}
  },
  "CDI_devices": [{"name": "vendor.example/gpu=0"}],
  "stop_signal": 10
}
"""
CONTAINER = ContainerConfig(
    metadata=cri.ContainerMetadata(name="web", attempt=2),
    image=cri.ImageSpec(image="registry.example/web:1", annotations={"log_path": "kept"}),
    command=("/bin/sh", "-c"),
    args=("exec serve --port=$PORT",),
    working_dir="/srv",
    envs=(cri.KeyValue(key="PORT", value="8080"), cri.KeyValue(key="EMPTY")),
    mounts=(
        cri.Mount(
            container_path="/data",
            host_path="/var/data",
            readonly=True,
            propagation=cri.MountPropagation.HOST_TO_CONTAINER,
            uid_mappings=(cri.IDMapping(host_id=100000, length=65536),),
        ),
    ),
    devices=(cri.Device(container_path="/dev/fuse", host_path="/dev/fuse", permissions="rw"),),
    labels={"cpu_quota": "a label", "logPath": "another"},
    log_path="web/2.log",
    tty=True,
    linux=cri.LinuxContainerConfig(
        resources=cri.LinuxContainerResources(
            cpu_period=100000,
            cpu_quota=50000,
            memory_limit_in_bytes=268435456,
            oom_score_adj=-5,
            hugepage_limits=(cri.HugepageLimit(page_size="2MB", limit=2**64 - 1),),
            unified={"memory.high": "200M"},
        ),
        security_context=cri.LinuxContainerSecurityContext(
            run_as_user=cri.Int64Value(value=0),
            supplemental_groups=(7, 8),
            namespace_options=cri.NamespaceOption(network=cri.NamespaceMode.NODE, pid=cri.NamespaceMode.CONTAINER),
            capabilities=cri.Capability(drop_capabilities=("ALL",)),
            seccomp=cri.SecurityProfile(profile_type=cri.ProfileType.UNCONFINED),
        ),
    ),
    cdi_devices=(cri.CDIDevice(name="vendor.example/gpu=0"),),
    stop_signal=cri.Signal.SIGINT,
)
CANONICAL_CONTAINER = {
    "metadata": {"name": "web", "attempt": 2},
    "image": {"image": "registry.example/web:1", "annotations": {"log_path": "kept"}},
    "command": ["/bin/sh", "-c"],
    "args": ["exec serve --port=$PORT"],
    "workingDir": "/srv",
    "envs": [{"key": "PORT", "value": "8080"}, {"key": "EMPTY"}],
    "mounts": [
        {
            "containerPath": "/data",
            "hostPath": "/var/data",
            "readonly": True,
            "propagation": "PROPAGATION_HOST_TO_CONTAINER",
            "uidMappings": [{"hostId": 100000, "length": 65536}],
        }
    ],
    "devices": [{"containerPath": "/dev/fuse", "hostPath": "/dev/fuse", "permissions": "rw"}],
    "labels": {"cpu_quota": "a label", "logPath": "another"},
    "logPath": "web/2.log",
    "tty": True,
    "linux": {
        "resources": {
            "cpuPeriod": "100000",
            "cpuQuota": "50000",
            "memoryLimitInBytes": "268435456",
            "oomScoreAdj": "-5",
            "hugepageLimits": [{"pageSize": "2MB", "limit": "18446744073709551615"}],
            "unified": {"memory.high": "200M"},
        },
        "securityContext": {
            "capabilities": {"dropCapabilities": ["ALL"]},
            "namespaceOptions": {"network": "NODE", "pid": "CONTAINER"},
            "runAsUser": {},
            "supplementalGroups": ["7", "8"],
            "seccomp": {"profileType": "Unconfined"},
        },
    },
    "CDIDevices": [{"name": "vendor.example/gpu=0"}],
    "stopSignal": "SIGINT",
}
CRICTL_SANDBOX = {
    "metadata": {"name": "web", "uid": "u-1", "namespace": "default", "attempt": 1},
    "log_directory": "/var/log/pods/web",
    "dns_config": {"servers": ["192.0.2.1"]},
    "port_mappings": [{"protocol": 1, "container_port": 53, "host_port": 5353}],
    "linux": {"cgroup_parent": "/web", "sysctls": {"net.core.somaxconn": "1024"}, "security_context": {}},
    "windows": {"security_context": {"host_process": True}},
}
SANDBOX = PodSandboxConfig(
    metadata=cri.PodSandboxMetadata(name="web", uid="u-1", namespace="default", attempt=1),
    log_directory="/var/log/pods/web",
    dns_config=cri.DNSConfig(servers=("192.0.2.1",)),
    port_mappings=(cri.PortMapping(protocol=cri.Protocol.UDP, container_port=53, host_port=5353),),
    linux=cri.LinuxPodSandboxConfig(
        cgroup_parent="/web",
        sysctls={"net.core.somaxconn": "1024"},
        security_context=cri.LinuxSandboxSecurityContext(),
    ),
    windows=cri.WindowsPodSandboxConfig(security_context=cri.WindowsSandboxSecurityContext(host_process=True)),
)

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PYTHON = JSON | st.sampled_from([b"sh", 10**5000, object(), {1}, ("a",), {10**5000: ""}, {(): ""}, "\ud800", "a\0"])


def valid(**changes: Any) -> dict[str, Any]:
    return {"metadata": {"name": "web"}, "image": {"image": "web"}, **changes}


def values(kind: Any, *, required: bool = False) -> st.SearchStrategy[Any]:
    """Generate valid values of a field, from msgspec's description of its type."""
    match kind:
        case inspect.StructType():
            return st.builds(kind.cls, **{f.name: values(f.type, required=f.required) for f in kind.fields})
        case inspect.UnionType():
            return st.one_of(*(values(member) for member in kind.types))
        case inspect.VarTupleType():
            return st.lists(values(kind.item_type), max_size=2).map(tuple)
        case inspect.DictType():
            return st.dictionaries(TEXT, TEXT, max_size=2)
        case inspect.EnumType():
            return st.sampled_from(list(kind.cls))
        case inspect.IntType():
            return st.integers(kind.ge, 2**64 - 1 if kind.le is None else kind.le)
        case inspect.NoneType():
            return st.none()
        case inspect.BoolType():
            return st.booleans()
    return TEXT.filter(bool) if required else TEXT


CONFIGS = st.one_of(*(values(inspect.type_info(message)) for message in PARSERS))


@given(CONFIGS)
def test_what_is_written_is_read_back_in_either_spelling(config: Any) -> None:
    """No config loses or changes anything when it is written and read in either spelling, copied, or stored."""
    parse = PARSERS[type(config)]
    assert parse(to_json(config)) == config
    assert parse(to_json(config, camel_case=True)) == config
    assert parse(msgspec.to_builtins(config)) == config
    assert parse(config) == config
    assert msgspec.json.decode(to_json(config), type=type(config)) == config


def test_crictl_config_is_valid_as_it_is() -> None:
    """A config file for crictl is accepted: proto names, enums by number, null for what is not set."""
    assert parse_container_config(CRICTL_CONTAINER) == CONTAINER
    assert parse_pod_sandbox_config(CRICTL_SANDBOX) == SANDBOX


def test_camel_case_is_the_canonical_json_of_protobuf() -> None:
    """Names, 64-bit integers in strings and enum names are as protobuf writes them; keys of maps stay as they are."""
    assert json.loads(to_json(CONTAINER, camel_case=True)) == CANONICAL_CONTAINER
    assert parse_container_config(json.dumps(CANONICAL_CONTAINER)) == CONTAINER


def test_snake_case_keeps_the_names_of_the_proto_file() -> None:
    """What is stored has proto names, also where the Python name differs, and integers as numbers."""
    stored = json.loads(to_json(CONTAINER))
    assert stored["mounts"][0]["uidMappings"] == [{"host_id": 100000, "length": 65536}]
    assert stored["CDI_devices"] == [{"name": "vendor.example/gpu=0"}]
    assert stored["linux"]["resources"]["cpu_quota"] == 50000
    assert stored["stop_signal"] == "SIGINT"


def test_signal_number_is_that_of_the_cri() -> None:
    """A stop signal by number is read with the proto file's numbers: by name, then the real-time signals in order."""
    signals = [parse_container_config(valid(stop_signal=number)).stop_signal for number in range(66)]
    assert signals[0] == "RUNTIME_DEFAULT"
    assert signals[1:35] == sorted(signals[1:35])
    assert (signals[1], signals[10], signals[23], signals[34]) == ("SIGABRT", "SIGINT", "SIGTERM", "SIGXFSZ")
    assert signals[35:] == [
        "SIGRTMIN",
        *(f"SIGRTMINPLUS{n}" for n in range(1, 16)),
        *(f"SIGRTMAXMINUS{n}" for n in range(14, 0, -1)),
        "SIGRTMAX",
    ]


def test_time_that_is_not_yet_is_not_written() -> None:
    """A status without start and end has neither time in its JSON, and names its state in the CRI's words."""
    status = cri.ContainerStatus(
        id="c1",
        metadata=cri.ContainerMetadata(name="web"),
        state=cri.ContainerStateName.CREATED,
        created_at=5,
        image=cri.ImageSpec(image="web"),
    )
    assert json.loads(to_json(status, camel_case=True)) == {
        "id": "c1",
        "metadata": {"name": "web"},
        "state": "CONTAINER_CREATED",
        "createdAt": "5",
        "image": {"image": "web"},
    }


REFUSALS = {
    "unknown field": (
        valid(linux={"resources": {"cpu_qota": 1}}),
        "`linux.resources.cpu_qota` is not a field of LinuxContainerResources; did you mean cpu_quota?",
    ),
    "unknown field like no other": (
        {"metadata": {"zzz": 1}},
        "`metadata.zzz` is not a field of ContainerMetadata; it has name, attempt",
    ),
    "both spellings": (valid(log_path="a", logPath="a"), "`logPath` is also given as log_path; remove one"),
    "no metadata": ({"image": {"image": "web"}}, "`metadata` is required and must not be empty"),
    "no name": (valid(metadata={}), "`metadata.name` is required and must not be empty"),
    "empty name": (valid(metadata={"name": ""}), "`metadata.name` is required and must not be empty"),
    "null image": (valid(image={"image": None}), "`image.image` is required and must not be empty"),
    "variable without a name": (valid(envs=[{"value": "1"}]), "`envs[0].key` is required and must not be empty"),
    "string for a list": (valid(command="sh"), "`command` must be a list, not 'sh'"),
    "number for a string": (valid(args=["a", 1]), "`args[1]` must be a string, not 1"),
    "null in a list": (valid(args=[None]), "`args[0]` must be a string, not null"),
    "bare number for an Int64Value": (
        valid(linux={"security_context": {"run_as_user": 1}}),
        "`linux.security_context.run_as_user` must be an object, not 1",
    ),
    "string for a flag": (valid(tty="true"), "`tty` must be true or false, not 'true'"),
    "flag for a number": (
        valid(metadata={"name": "web", "attempt": True}),
        "`metadata.attempt` must be an integer from 0 to 4294967295, not true",
    ),
    "beyond uint32": (
        valid(metadata={"name": "web", "attempt": 2**32}),
        "`metadata.attempt` must be an integer from 0 to 4294967295, not 4294967296",
    ),
    "beyond int64, in a string": (
        valid(linux={"resources": {"cpuQuota": "9223372036854775808"}}),
        (
            "`linux.resources.cpuQuota` must be an integer from -9223372036854775808 to 9223372036854775807, "
            "not 9223372036854775808"
        ),
    ),
    "beyond uint64": (
        valid(linux={"resources": {"hugepage_limits": [{"limit": 2**64}]}}),
        (
            "`linux.resources.hugepage_limits[0].limit` must be an integer from 0 to 18446744073709551615, "
            "not 18446744073709551616"
        ),
    ),
    "fraction": (
        valid(linux={"resources": {"oom_score_adj": 0.5}}),
        "`linux.resources.oom_score_adj` must be an integer from -9223372036854775808 to 9223372036854775807, not 0.5",
    ),
    "unknown enum value": (
        valid(mounts=[{"propagation": 3}]),
        (
            "`mounts[0].propagation` must be one of PROPAGATION_PRIVATE, PROPAGATION_HOST_TO_CONTAINER, "
            "PROPAGATION_BIDIRECTIONAL or a number from 0 to 2, not 3"
        ),
    ),
    "misspelled signal": (
        valid(stop_signal="SIGTRM"),
        (
            "`stop_signal` must be a Signal such as RUNTIME_DEFAULT or a number from 0 to 65, not 'SIGTRM'; "
            "did you mean SIGTERM?"
        ),
    ),
    "a signal's other name": (
        valid(stop_signal="sigrtmin+3"),
        (
            "`stop_signal` must be a Signal such as RUNTIME_DEFAULT or a number from 0 to 65, not 'sigrtmin+3'; "
            "did you mean SIGRTMINPLUS3?"
        ),
    ),
    "NUL": (valid(command=["a\0"]), r"`command[0]` must be without NUL characters and lone surrogates, not 'a\x00'"),
    "surrogate in a key": (
        valid(labels={"\ud800": ""}),
        r"`labels['\ud800']` must be without NUL characters and lone surrogates, not '\ud800'",
    ),
    "long value": (valid(tty="a" * 99), f"`tty` must be true or false, not {'a' * 60!r}... (99 characters)"),
    "list at the top": ([], "the top level must be an object, not a list"),
}


@pytest.mark.parametrize(("data", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusal_names_the_field_and_the_value(data: Any, message: str) -> None:
    """What is wrong with a config is said with the path of the field and the value, for a mapping as for JSON."""
    for form in (data, json.dumps(data)):
        with pytest.raises(InvalidInputError) as refusal:
            parse_container_config(form, strict=True)
        assert str(refusal.value) == f"container config: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "the top level must be an object, not null"),
        (b"{", "not valid JSON: Expecting property name"),
        (b"metadata: [", "not valid YAML: while parsing"),
        (b"metadata: {name: a, name: b}", "the key 'name' appears twice in one mapping"),
        (b"metadata: &a {name: b}\nlabels: *a", "it has a YAML alias"),
        (b"labels: &a [*a]", "it has a YAML alias"),
        (b"labels: !!python/object:a.b {}", "the YAML tag 'python/object:a.b'"),
        (b"tty: !!binary aaaa", "the YAML tag 'binary'"),
        (b"? [a]\n: b", "a YAML key that is a list"),
        (b"tty: " + b"9" * 5000, "has 5000 digits, too many for any field"),
        (b"a: b\n" * 60_000, "the limit is 262144"),
        (b'{"metadata": {"name": "a"}} trailing', "not valid JSON: Extra data"),
        (b'{"metadata": NaN}', "not valid JSON: NaN is not a JSON number"),
        (b'{"metadata": {"name": "\xff"}}', "not UTF-8: 'utf-8' codec can't decode byte 0xff"),
        (b'{"metadata": {"name": "a", "name": "b"}}', "the key 'name' appears twice in one object"),
        (b'{"log_path": ' + b"9" * 5000 + b"}", "has 5000 digits, too many for any field"),
        (b"[" * 200_000, "it is nested too deeply, more than 64 levels"),
        (b"a: " + b"{b: " * 64 + b"}" * 64, "it is nested too deeply, more than 64 levels"),
        (b'{"a":' * 200_000, "it is nested too deeply"),
        (b" " * (MAX_BYTES + 1), "the limit is 4194304"),
        (valid(log_path="a" * MAX_BYTES), "the limit is 4194304"),
        (None, "the top level must be an object, not null"),
        (cri.ImageSpec(image="web"), "the top level must be an object, not a Python ImageSpec"),
    ],
)
def test_what_is_no_json_object_of_ordinary_size_is_refused(text: Any, message: str) -> None:
    """Malformed, ambiguous, endless or foreign input gets an error that says what is wrong with it."""
    with pytest.raises(InvalidInputError) as refusal:
        parse_container_config(text)
    assert message in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_message_built_by_hand_is_checked() -> None:
    """A struct made by its constructor, which checks nothing, gets the same refusals as JSON, at any depth."""
    config = msgspec.structs.replace(CONTAINER, envs=(cri.KeyValue(key="A", value="\0"),))
    with pytest.raises(InvalidInputError, match=r"`envs\[0\].value` must be without NUL"):
        parse_container_config(config)
    assert parse_container_config(valid(linux=CONTAINER.linux)).linux == CONTAINER.linux
    assert type(parse_container_config(valid(working_dir=cri.Signal.SIGINT)).working_dir) is str


YAML = """\
# as people write it for crictl
metadata:
  name: web
  attempt: 0x2
image: {image: nginx}
command: [/bin/sh, -c]
args:
  - >-
    date;
    sleep 1
  - 600
labels: {date: 2020-01-01, time: 22:22, 8080: port, flag: yes, number: 1.5}
envs:
- key: DAY
  value: 2020-01-01
tty: yes
linux: ~
---
metadata: {name: another}
"""


def test_yaml_is_read_like_json() -> None:
    """Of several documents the first; numbers in any base; what is to be text is text, without quotes as well."""
    assert parse_container_config(YAML) == cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="web", attempt=2),
        image=cri.ImageSpec(image="nginx"),
        command=("/bin/sh", "-c"),
        args=("date; sleep 1", "600"),
        labels={"date": "2020-01-01", "time": "22:22", "8080": "port", "flag": "true", "number": "1.5"},
        envs=(cri.KeyValue(key="DAY", value="2020-01-01"),),
        tty=True,
    )
    for mark in ("", "\ufeff"):
        assert parse_pod_sandbox_config(f"{mark}metadata: {{name: s}}".encode()).metadata.name == "s"
        assert parse_pod_sandbox_config(mark + '{"metadata": {"name": "s"}}').metadata.name == "s"


IGNORED = {  # fields that crictl's users have left in their files: the place that is named
    "of a neighbour": (valid(privileged=True, metadata={"name": "web", "namespace": "n"}), "`metadata.namespace`"),
    "of an older API": (valid(linux={"user": {"uid": 5}, "capabilities": {"add_capabilities": ["x"]}}), "`linux.user`"),
    "in a list": (valid(envs=[{"key": "A", "valu": "1"}]), "`envs[0].valu` is not a field of KeyValue; did you mean"),
    "of any value": (valid(zzz=[{"\0": float("nan")}, None]), "`zzz`"),
    "many": (valid(**{f"z{number}": 1 for number in range(50_000)}), "and 49995 more"),
}


@pytest.mark.parametrize(("data", "named"), IGNORED.values(), ids=IGNORED)
def test_an_unknown_field_is_ignored_and_named_or_refused(
    data: dict[str, Any], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What crictl ignores is ignored with a warning; strict=True refuses it; what is understood counts."""
    assert parse_container_config(data).metadata.name == "web"
    assert named in caplog.text
    assert len(caplog.records) == 1
    assert len(caplog.text) < 2000
    with pytest.raises(InvalidInputError, match="is not a field of"):
        parse_container_config(data, strict=True)


@given(st.binary() | st.text(st.characters()) | JSON.map(json.dumps) | PYTHON)
def test_arbitrary_input_is_refused_with_one_error(data: Any) -> None:
    """Whatever is given, a config or an InvalidInputError comes out, and no other exception."""
    with pytest.raises(InvalidInputError):
        parse_container_config(data)


@given(CONFIGS, PYTHON, st.data())
def test_damaged_config_is_read_or_refused(config: Any, damage: Any, data: st.DataObject) -> None:
    """A config with any one value replaced by anything is read to the end or refused with an InvalidInputError."""
    tree = json.loads(to_json(config))
    node, key = data.draw(st.sampled_from(list(_places(tree))))
    node[key] = damage
    try:
        read = PARSERS[type(config)](tree)
    except InvalidInputError as error:
        str(error).encode()  # the message can be printed
    else:
        assert PARSERS[type(config)](to_json(read)) == read


def _places(node: Any) -> Any:
    """Yield each container of the tree with each of its keys."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(value, (dict, list)):
            yield from _places(value)
