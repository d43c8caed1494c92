"""One module's mutants: made, sampled and tried with cosmic-ray, in whose environment this program runs."""

import ast
import hashlib
import json
import random
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cosmic_ray.plugins
from cosmic_ray.commands.execute import execute
from cosmic_ray.commands.init import init
from cosmic_ray.config import ConfigDict
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.operators.operator import Operator
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, WorkerOutcome, WorkItem, WorkResult
from parso.python.tree import Keyword, PythonNode

TIMEOUT_SECONDS = 900.0
"""For a trial that waits for its turn; its tests have a limit of their own, see apart.py."""
TIMED_OUT = "timed out after "
LEAST = 8
"""Of a small module so many are tried, however thin the sample."""
LOGS = ("log.", "logger.", "_log.")


class RemoveStatement(Operator):  # type: ignore[misc]
    """Leave out a call, a raise, a del, or an assignment to an attribute or an item."""

    def mutation_positions(self, node: PythonNode) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Yield the place of a statement that may go."""
        if node.type == "simple_stmt" and _is_effect(node.children[0]):
            yield node.children[0].start_pos, node.children[0].end_pos

    def mutate(self, node: PythonNode, index: int) -> PythonNode:
        """Put `pass` in its place."""
        old = node.children[0]
        first = old.get_first_leaf()
        node.children[0] = Keyword("pass", old.start_pos, prefix=first.prefix)
        node.children[0].parent = node
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        """Have none: the real code is the example."""
        return ()


def _is_effect(statement: PythonNode) -> bool:
    if statement.type in {"atom_expr", "power", "await_expr", "yield_expr"}:
        return not statement.get_code(include_prefix=False).startswith(LOGS)
    if statement.type == "expr_stmt":
        return statement.children[0].type in {"atom_expr", "power"}
    return statement.type in {"raise_stmt", "del_stmt"}


class Provider:
    """Cosmic-ray asks it for the operators above."""

    def __iter__(self) -> Iterator[str]:
        return iter(["RemoveStatement"])

    def __getitem__(self, name: str) -> type[Operator]:
        return RemoveStatement


def choose(database: WorkDB, path: Path, one_in: int, most: int, seed: int) -> tuple[int, int]:
    """Skip what is text, annotation or no change, all but one of a place and kind, and what a sample leaves out.

    The sample is one in `one_in`, but at least `LEAST`, and about `most` at most.

    Return how many mutants there are, and how many of them are to be tried.
    """
    source = path.read_text()
    annotations, tree = _annotations(source), ast.dump(ast.parse(source))
    places: dict[tuple[tuple[int, int], str], list[WorkItem]] = defaultdict(list)
    for item in database.work_items:
        (mutation,) = item.mutations
        where = mutation.start_pos
        if not any(begin <= where < end for begin, end in annotations):
            places[where, mutation.operator_name.split("_")[0]].append(item)
    chance = random.Random(f"{seed} {path}")
    one_each = []
    for _, items in sorted(places.items()):
        items.sort(key=lambda item: (item.mutations[0].operator_name, item.mutations[0].occurrence))
        chance.shuffle(items)
        one_each.extend(next(([item.job_id] for item in items if _changes(source, tree, item.mutations[0])), []))
    wanted = min(max(len(one_each) // one_in, LEAST), most)
    one_in = max(len(one_each) // wanted, 1)
    chosen = set(one_each[chance.randrange(one_in) :: one_in])
    for item in list(database.work_items):
        if item.job_id not in chosen:
            database.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))
    return len(one_each), len(chosen)


def _annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    found = []
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            inner = getattr(node, name, None)
            if isinstance(inner, ast.expr):
                found.append(((inner.lineno, inner.col_offset), (inner.end_lineno or 0, inner.end_col_offset or 0)))
    return found


def _changes(source: str, tree: str, mutation: MutationSpec) -> bool:
    """Tell whether it is another program, and one at all."""
    operator = cosmic_ray.plugins.get_operator(mutation.operator_name)(**mutation.operator_args)
    try:
        mutated = MutationVisitor.mutate_code(source, operator, mutation.occurrence)
        return mutated is not None and ast.dump(ast.parse(mutated)) != tree
    except (SyntaxError, AttributeError, IndexError):
        return False


def choose_survivors(database: WorkDB, before: dict[str, Any]) -> None:
    """Skip all but those that survived, or took too long, the last time."""
    survived = {
        (mutant["operator"], mutant["occurrence"]) for mutant in before["results"] if mutant["outcome"] != "killed"
    }
    for item in list(database.work_items):
        (mutation,) = item.mutations
        if (mutation.operator_name, mutation.occurrence) not in survived:
            database.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))


def results_of(database: WorkDB) -> Iterator[dict[str, Any]]:
    """Yield what came of each mutant that was tried."""
    results = dict(database.results)
    for item in database.work_items:
        result, (mutation,) = results.get(item.job_id), item.mutations
        if result is not None and result.worker_outcome != WorkerOutcome.SKIPPED:
            yield {
                "function": mutation.definition_name,
                "line": mutation.start_pos[0],
                "operator": mutation.operator_name,
                "occurrence": mutation.occurrence,
                "outcome": _outcome(result),
                "diff": result.diff,
                "output": (result.output or "")[-1500:],
            }


def _outcome(result: WorkResult) -> str:
    if TIMED_OUT in (result.output or ""):
        return "timed out"
    return result.test_outcome.value if result.test_outcome else "none"


def main(session: str, path: str, command: str, one_in: str, most: str, seed: str) -> None:
    """Try one in so many of a module's mutants, or those that survived in `session`.json; write that file.

    Of a module at least `LEAST` are tried, if it has as many, and little more than `most`.
    A session that was ended early goes on; one of another source is forgotten.
    """
    cosmic_ray.plugins.OPERATOR_PROVIDERS["limpet"] = Provider()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended early"))
    told = Path(f"{session}.json")
    before = json.loads(told.read_text()) if told.exists() else None
    source = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if before is not None and before["source"] != source:
        before = None
    goes_on = before is not None and not before["is_done"]
    with use_db(f"{session}.sqlite", WorkDB.Mode.open if goes_on else WorkDB.Mode.create) as database:
        if not goes_on:
            init([Path(path)], database, {})
        if before is None:
            total, tried = choose(database, Path(path), int(one_in), int(most), int(seed))
            before = {"module": path, "source": source, "mutants": total, "tried": tried, "results": []}
        elif not goes_on:
            choose_survivors(database, before)
        print(f"{path}: {len(database.pending_work_items)} of {before['mutants']} mutants", flush=True)
        settings = {"test-command": command, "timeout": TIMEOUT_SECONDS, "distributor": {"name": "local"}}
        try:
            execute(database, ConfigDict(settings))
        finally:
            results = {(mutant["operator"], mutant["occurrence"]): mutant for mutant in before["results"]}
            results |= {(mutant["operator"], mutant["occurrence"]): mutant for mutant in results_of(database)}
            is_done = not database.pending_work_items
            told.write_text(json.dumps(before | {"results": list(results.values()), "is_done": is_done}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
