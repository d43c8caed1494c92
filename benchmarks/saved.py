"""Reports as files, so that one run can be compared with another."""

import msgspec

from limpet.benchmarks.figures import SCHEMA_VERSION, BenchReport
from limpet.engine.state.durable import write_file
from limpet.schema.decoders import make_decoder
from limpet.schema.errors import InvalidInputError

_report = make_decoder(BenchReport)


def save_report(report: BenchReport, path: str) -> None:
    """Write the JSON document to `path`. Raises OSError."""
    write_file(path, msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n", mode=0o644)


def load_report(path: str) -> BenchReport:
    """Read what `save_report` wrote. Raises OSError, InvalidInputError if it is not a report."""
    with open(path, "rb") as file:
        data = file.read()
    try:
        report = _report.decode(data)
    except msgspec.MsgspecError as error:
        raise InvalidInputError(f"{path} is not a report of `limpet bench`: {error}") from error
    if report.schema_version != SCHEMA_VERSION:
        raise InvalidInputError(f"{path}: its version is {report.schema_version}, this limpet reads {SCHEMA_VERSION}")
    return report
