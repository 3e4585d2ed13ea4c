"""What the lines of our logs look like, in every process alike.

A line that concerns one request says so with `extra={"request_id": ...}`; whatever else `extra` holds
are facts of the line: fields of their own in JSON, while the message of a text line says what matters
by itself. Requests' texts and credentials are in no line.
"""

import json
import logging
import sys
import time
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from cluster.config import ConfigError, ObservabilityConfig

OUR_PACKAGES = ("cluster", "comms", "deploy", "experts", "router", "simulations")
LIBRARIES = ("grpc", "uvicorn", "uvicorn.error", "uvicorn.access", "opentelemetry")

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"asctime", "message", "color_message"}


def configure(config: ObservabilityConfig, process: str) -> None:
    """Log to stderr, and to a file if one is wanted, from now on.

    process: "controller", "rank 3", stands in each line. Takes the place of what was configured before,
    also of what uvicorn and gRPC would do by themselves. Raises ConfigError for a file that cannot be
    written.
    """
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    for handler in _handlers(config, process):
        handler.setFormatter(
            JsonFormatter(process) if config.log_format == "json" else TextFormatter(process)
        )
        root.addHandler(handler)
    level = logging.getLevelNamesMapping()[config.log_level.upper()]
    # What libraries say for their own debugging is not for us.
    root.setLevel(max(level, logging.INFO))
    for name in OUR_PACKAGES:
        logging.getLogger(name).setLevel(level)
    for name in LIBRARIES:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    # A line for each HTTP request: `log_requests` has better ones.
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)


def _handlers(config: ObservabilityConfig, process: str) -> list[logging.Handler]:
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if config.log_dir is not None:
        path = Path(config.log_dir) / f"{process.replace(' ', '-')}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # It sees when logrotate has moved the file away.
            handlers.append(WatchedFileHandler(path, encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"observability.log_dir = {config.log_dir!r}: cannot write {path}: {error.strerror}"
            ) from None
    return handlers


class TextFormatter(logging.Formatter):
    """`2026-11-22 10:00:00,000 INFO rank 3: message`, and the request's id in brackets if it has one."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process.replace('%', '%%')}: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        request_id = getattr(record, "request_id", None)
        if request_id is None or str(request_id) in record.message:
            return line
        return f"{line} [{request_id}]"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, process, message, what `extra` holds, error."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
            "message": record.getMessage(),
        }
        extra = {k: v for k, v in vars(record).items() if k not in _STANDARD and k[0] != "_"}
        line.update(extra)
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _utc(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"
