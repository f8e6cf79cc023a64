"""The format of log records: text, or one JSON object a line for a log collector.

Records contain no question, answer, image, key or file name of a client; tests/serving/test_api_errors.py holds this.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from clincot.config.server_settings import LogFormat
from clincot.serving.tracing import read_trace_id


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time, level, logger, message, trace, and the fields in `extra={"fields": {…}}`."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if trace := read_trace_id():
            entry["trace"] = trace
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def configure_logging(form: LogFormat) -> None:
    """Log to standard error; auto: text on a terminal, JSON elsewhere."""
    handler = logging.StreamHandler()
    if form == "json" or (form == "auto" and not sys.stderr.isatty()):
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
