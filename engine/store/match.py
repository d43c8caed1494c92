"""Which records are meant: one by its id, its name or the beginning of its id, and the filters of lists."""

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, Self

from limpet.schema.any_text import plain
from limpet.schema.codec import read_labels
from limpet.schema.errors import AmbiguousError, InvalidInputError, NotFoundError, quote
from limpet.schema.metadata import SandboxMetadata, require_text
from limpet.schema.rows import NameRow

_NAMED = 4
"""How many candidates an error names."""


class Named(NamedTuple):
    """A record that bears the name that was asked for."""

    id: str
    place: Hashable
    """Where attempts of the same name follow one another: a container's sandbox, a sandbox's namespace and uid."""
    attempt: int

    @classmethod
    def container(cls, row: NameRow) -> Self:
        """Return a container as one that bears its name."""
        attempt = row.attempt if type(row.attempt) is int else 0  # a damaged row may hold anything
        return cls(row.id, row.sandbox_id, attempt)

    @classmethod
    def sandbox(cls, metadata: SandboxMetadata) -> Self:
        """Return a sandbox as one that bears its name."""
        names = metadata.config.metadata
        return cls(metadata.id, (names.namespace, names.uid), names.attempt)

    @staticmethod
    def resolve(
        text: str,
        ids: Collection[str],
        find_named: Callable[[], Iterable["Named"]],
        kind: str,
        find_ids: Callable[[str], Iterable[str]] | None = None,
    ) -> str:
        """Return the id that `text` means: an exact id, else an exact name, else what one id alone begins with.

        `find_named` returns those whose name is `text`; of several attempts in one place the newest is meant.
        `find_ids` returns the ids that begin with it, where that takes less than to look at all. Raises NotFoundError
        if it means none, AmbiguousError if it means several, InvalidInputError if it is no text.
        """
        text = require_text(kind, text)
        if text in ids:
            return text
        named = list(find_named())
        if named:
            return _choose_newest(text, named, kind)
        candidates = find_ids(text) if find_ids and text else ids
        found = sorted(key for key in candidates if key.startswith(text)) if text else []
        if not found:
            raise NotFoundError(f"no {kind} has the id or the name {quote(text)}, or an id that begins with it")
        if len(found) > 1:
            raise _ambiguous(f"{len(found)} {kind}s have ids that begin with {quote(text)}", "more of it", found)
        return found[0]


def _choose_newest(text: str, named: Sequence[Named], kind: str) -> str:
    newest = max(one.attempt for one in named)
    found = sorted(one.id for one in named if one.attempt == newest)
    if len({one.place for one in named}) > 1:
        found = sorted(one.id for one in named)
    if len(found) > 1:
        raise _ambiguous(f"{len(found)} {kind}s are called {quote(text)}", "an id", found)
    return found[0]


def _ambiguous(what: str, instead: str, ids: Sequence[str]) -> AmbiguousError:
    more = ", ..." if len(ids) > _NAMED else ""
    return AmbiguousError(f"{what}: {', '.join(ids[:_NAMED])}{more}; give {instead}", tuple(ids[:_NAMED]))


class Filter(NamedTuple):
    """What a list is to hold. What is empty is not asked for."""

    id: str = ""
    """An id, or the beginning of ids."""
    name: str = ""
    sandbox_id: str = ""
    """A sandbox's id, else the name of sandboxes, else the beginning of ids."""
    labels: Mapping[str, str] = {}
    """All of them must be there, with these values."""
    extra: Mapping[str, Any] = {}
    """The same of the top-level keys of its `extra`."""

    @classmethod
    def of(
        cls,
        id: str,
        name: str,
        sandbox_id: str,
        labels: Mapping[str, str] | None,
        extra: Mapping[str, Any] | None = None,
    ) -> Self:
        """Return what a caller asks for; None asks for nothing.

        Raises InvalidInputError for what can match nothing because it is no text: a list would be empty, and not say
        why.
        """
        for what, value in (("id", id), ("name", name), ("sandbox_id", sandbox_id)):
            if not isinstance(value, str | None):
                raise InvalidInputError(f"{what} {quote(value)}: give text")
        for what, given in (("labels", labels), ("extra", extra)):
            if not isinstance(given, Mapping | None):
                raise InvalidInputError(f"{what} {quote(given)}: give a mapping from keys to values")
        texts: Iterable[object] = chain.from_iterable((labels or {}).items())
        if not all(isinstance(text, str) for text in texts):
            raise InvalidInputError(f"labels {quote(labels)}: give text for keys and values")
        plain_labels = {plain(key): plain(value) for key, value in (labels or {}).items()}
        return cls(plain(id or ""), plain(name or ""), plain(sandbox_id or ""), plain_labels, extra or {})

    @property
    def asks_for_names(self) -> bool:
        """True if ids alone do not tell what matches."""
        return bool(self.name or self.sandbox_id or self.labels)

    def find_sandboxes(self, sandboxes: Mapping[str, str]) -> Collection[str]:
        """Return the ids of the sandboxes that are meant, given the name of each by its id."""
        text = self.sandbox_id
        if text in sandboxes:
            return {text}
        named = {key for key, name in sandboxes.items() if name == text}
        return named or {key for key in sandboxes if key.startswith(text)}

    def accepts(self, row: NameRow, sandbox_ids: Collection[str]) -> bool:
        """Say whether a container is wanted; `sandbox_ids` is what `find_sandboxes` returned."""
        return (
            row.id.startswith(self.id)
            and (not self.name or row.name == self.name)
            and (not self.sandbox_id or row.sandbox_id in sandbox_ids)
            and (not self.labels or self.labels.items() <= read_labels(row.labels).items())
        )

    def accepts_extra(self, extra: Mapping[str, Any]) -> bool:
        """Say whether a container with this `extra` is wanted."""
        return all(key in extra and extra[key] == value for key, value in self.extra.items())
