"""What engine and keeper say to each other, over a real socket: nothing is lost, and no descriptor stays."""

import os
import socket
from collections.abc import Iterator

import pytest

from limpet.engine.starters.process.client import Connection
from limpet.engine.starters.process.keeper.messages import (
    MOST_DESCRIPTORS,
    divide,
    encode,
    lent,
    read_peer,
    receive,
    send,
)

LONGEST = 65_536
"""Bytes of a message: so many keepers of other versions send and take."""
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_a_message_and_its_descriptors_arrive(pair: Pair) -> None:
    """The longest message, whatever its text, and as many descriptors as there may be; no program inherits them."""
    ours, theirs = pair
    for number in (0, 1, MOST_DESCRIPTORS):
        sent = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(number)]
        message = {"id": "\udcff\u20ac", "text": ""}
        message["text"] = "x" * (LONGEST - len(encode(message)))
        send(ours, message, sent)
        told, descriptors = receive(theirs)
        assert told == message
        assert len(descriptors) == number
        assert not any(map(os.get_inheritable, descriptors))
        assert all(os.path.samestat(os.fstat(each), os.stat(os.devnull)) for each in descriptors)
        for each in (*sent, *descriptors):
            os.close(each)


def test_an_end_is_an_end_also_of_who_was_killed_before_it_read(pair: Pair) -> None:
    """A peer that closes with a message unread resets the connection: that is an end like any other."""
    ours, theirs = pair
    send(ours, {"op": "list"})
    theirs.close()
    assert receive(ours) == (None, [])
    assert receive(ours) == (None, [])
    with pytest.raises(BrokenPipeError):  # and no SIGPIPE
        send(ours, {"op": "list"})


def test_who_does_not_read_blocks_nobody(pair: Pair) -> None:
    """A socket that does not wait refuses what does not fit; what was sent before it arrives whole."""
    ours, theirs = pair
    ours.setblocking(False)
    sent = 0
    with pytest.raises(BlockingIOError):
        while sent < 10_000:
            send(ours, {"number": sent})
            sent += 1
    assert [receive(theirs)[0] for _ in range(sent)] == [{"number": number} for number in range(sent)]


def test_a_lent_descriptor_stays_its_owners(pair: Pair) -> None:
    """It is a socket of its kind while it is lent, and open afterwards, also after an error."""
    ours, theirs = pair
    with pytest.raises(ZeroDivisionError), lent(ours.fileno()) as link:
        assert (link.family, link.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET)
        assert read_peer(link) == (os.getpid(), os.geteuid())
        send(link, {"op": "list"})
        1 / 0  # noqa: B018
    assert receive(theirs) == ({"op": "list"}, [])
    send(ours, {"op": "end"})
    assert receive(theirs) == ({"op": "end"}, [])


def test_many_are_asked_for_each() -> None:
    """What differs is each one's own, the rest is common; one alone is as it is, and none is none."""
    assert divide({"op": "end", "id": "one"}) == [{"op": "end", "id": "one"}]
    asked = divide({"op": "signal", "number": 9, "many": [{"id": "a", "pid": 1}, {"id": "b", "number": 15}]})
    assert [(each["op"], each["id"], each["number"], each.get("pid")) for each in asked] == [
        ("signal", "a", 9, 1),
        ("signal", "b", 15, None),
    ]
    assert divide({"op": "end", "many": []}) == []


@pytest.mark.parametrize(
    ("written", "is_closed", "is_answered", "expected"),
    [
        (b"", True, False, True),
        (b"", True, True, True),
        (b"why", True, False, False),
        (b"why", False, False, False),
        (b"", False, True, False),
    ],
)
def test_an_end_with_something_to_read_is_none_yet(
    pair: Pair, written: bytes, is_closed: bool, is_answered: bool, expected: bool
) -> None:
    """The end of a report says that a program was executed; one that has a reason in it says that none was."""
    ours, theirs = pair
    read, write = os.pipe()
    os.write(write, written)
    if is_closed:
        os.close(write)
    if is_answered:
        send(theirs, {"executed": True})
    assert Connection(ours, "/no/such/directory").wait_for_either(read) is expected
    os.close(read)
    if not is_closed:
        os.close(write)


def test_an_answer_that_is_forgone_is_not_taken_for_the_next(pair: Pair) -> None:
    """However many come late: each answer is that of its own request."""
    ours, theirs = pair
    connection = Connection(ours, "/no/such/directory")
    for number in range(2):
        connection.tell({"op": "go", "id": str(number)})
        connection.forgo_answer()
    for number in range(3):
        send(theirs, {"number": number})
    assert connection.ask({"op": "end"}) == ({"number": 2}, [])
    send(theirs, {"number": 3})
    assert connection.ask({"op": "end"}) == ({"number": 3}, [])
