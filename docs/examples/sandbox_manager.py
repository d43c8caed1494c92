"""A sandbox manager for asyncio: each sandbox has an owner, and is gone once nobody has used it for a while.

It may be killed at any time and started again. Time goes on meanwhile: what was not used is removed at the next start.

python sandbox_manager.py STATE_DIR, then lines: new NAME OWNER SECONDS | run NAME COMMAND | list
"""

import asyncio
import secrets
import sys
import time

from limpet import AsyncEngine, errors
from limpet.engine import AsyncSandbox
from limpet.schema.events import EventKind


async def make(engine: AsyncEngine, name: str, owner: str, seconds: str) -> str:
    """Make a sandbox that is kept for so many seconds, and as long again after each use."""
    extra = {"owner": owner, "seconds": float(seconds)}
    await engine.create_sandbox({"metadata": {"name": name}}, extra=extra, expires_at=later(float(seconds)))
    return f"made: {name}"


async def run(engine: AsyncEngine, name: str, command: str) -> str:
    """Run a command in a sandbox, which is kept for longer then. One that takes longer than that goes with it."""
    sandbox = await engine.get_sandbox(name)
    await renew(sandbox)
    metadata = {"name": f"run-{secrets.token_hex(4)}"}
    config = {"metadata": metadata, "image": {"image": "host"}, "command": ["sh", "-c", command]}
    container = await engine.create_container(config, sandbox)
    await container.start()
    status = await container.wait()
    await container.remove()
    await renew(sandbox)
    return f"ran in {name}: {status.reason} ({status.exit_code})"


async def show(engine: AsyncEngine) -> str:
    """Name the sandboxes that are there, each with its owner."""
    found = [f"{one.name} of {one.extra['owner']}" for one in await engine.list_sandboxes()]
    return f"sandboxes: {', '.join(found)}"


async def renew(sandbox: AsyncSandbox) -> None:
    """Have it expire later."""
    await sandbox.renew(later(sandbox.extra["seconds"]))


def later(seconds: float) -> int:
    """Return the time in so many seconds, in nanoseconds since the epoch."""
    return time.time_ns() + int(seconds * 1e9)


async def tell_gone(engine: AsyncEngine) -> None:
    """Say which sandboxes are gone, from where the last manager was in the log of changes: each at least once."""
    told = engine.store.find("manager", "told")
    since = told.value if told else 0
    while True:
        try:
            async for event in engine.store.watch(since=since, kinds=[EventKind.SANDBOX_DELETED]):
                owner = event.sandbox_status.extra["owner"] if event.sandbox_status else "?"
                print(f"gone: {event.name} of {owner}", flush=True)
                since = event.revision
                await engine.store.put("manager", "told", since)
        except errors.CursorTooOldError as error:
            print("others may be gone: the log does not go back that far", flush=True)
            since = error.oldest - 1


async def answer(engine: AsyncEngine, line: str) -> None:
    """Do what a line asks for, and print what came of it."""
    try:
        match line.split(maxsplit=2):
            case ["new", name, text] if len(text.split()) == 2:
                print(await make(engine, name, *text.split()), flush=True)
            case ["run", name, command]:
                print(await run(engine, name, command), flush=True)
            case ["list"]:
                print(await show(engine), flush=True)
            case _:
                print(f"what is {line!r}?", flush=True)
    except errors.LimpetError as error:
        print(f"refused: {error}", flush=True)


async def main() -> None:
    """Answer lines, each in a task of its own, until there are no more."""
    async with AsyncEngine.open(sys.argv[1]) as engine, asyncio.TaskGroup() as tasks:
        teller = tasks.create_task(tell_gone(engine))
        answers = []
        while line := await asyncio.to_thread(sys.stdin.readline):
            answers.append(tasks.create_task(answer(engine, line.strip())))
        await asyncio.gather(*answers)
        teller.cancel()


if __name__ == "__main__":
    asyncio.run(main())
