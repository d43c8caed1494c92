"""Run the steps of a pipeline as containers. It may be killed at any time and started again.

What runs is waited for, and what has ended is not repeated. A step that ended while nobody saw its exit code, or that
never ran since the executor was killed while it started, is run as a new attempt: no code is guessed.

python ci_executor.py STATE_DIR PIPELINE_FILE

The file holds a JSON list of stages; a stage maps the names of steps, which run side by side, to shell commands.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from limpet.engine import Container, Engine, Sandbox
from limpet.schema import ContainerState


def say(text: str) -> None:
    """Print a line in one piece, although other threads print, too."""
    print(f"{text}\n", end="", flush=True)


def find_attempts(engine: Engine, name: str) -> list[Container]:
    """Return the attempts at a step so far, oldest first."""
    return sorted(engine.list(name=name), key=lambda container: container.metadata.config.metadata.attempt)


def must_repeat(step: Container, sandbox: Sandbox) -> bool:
    """Say whether a step is to be run as a new attempt: nothing starts in a sandbox from before a reboot."""
    if step.state is ContainerState.CREATED:
        return step.sandbox_id != sandbox.id
    return step.state is ContainerState.EXITED and step.exit_code is None  # it never ran, or nobody saw how it ended


def run_step(engine: Engine, sandbox: Sandbox, name: str, command: str) -> int:
    """Bring a step to its end from wherever it is, and return its exit code."""
    attempts = find_attempts(engine, name)
    if attempts and not attempts[-1].status.created_at:
        attempts.pop().delete()  # the executor was killed while it made this one
    if not attempts or must_repeat(attempts[-1], sandbox):
        config = {
            "metadata": {"name": name, "attempt": len(attempts)},
            "image": {"image": "host"},
            "command": ["sh", "-c", command],
            "log_path": f"{name}.{len(attempts)}.log",
        }
        attempts.append(engine.create_container(config, sandbox.id))
    step = attempts[-1]
    if step.state is ContainerState.UNKNOWN:
        raise SystemExit(f"{name}: {step.status.message}; look for yourself, then start again")
    if step.state is ContainerState.CREATED:
        say(f"{name}: starts, attempt {len(attempts)}")
        step.start()
    status = step.wait()
    say(f"{name}: {status.reason} ({status.exit_code})")
    return status.exit_code


def main() -> int:
    """Run the pipeline; 0 if every step did well."""
    state_dir, pipeline_file = sys.argv[1:]
    stages: list[dict[str, str]] = json.loads(Path(pipeline_file).read_text(encoding="utf-8"))
    with Engine.open(state_dir) as engine, ThreadPoolExecutor() as threads:
        for finding in engine.recovery.findings:
            say(f"recovered: {finding.state} [{finding.rule}]")
        sandbox = engine.get_or_create_sandbox({"metadata": {"name": "pipeline"}})
        for stage in stages:
            runs = [threads.submit(run_step, engine, sandbox, name, command) for name, command in stage.items()]
            if any(run.result() for run in runs):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
