"""Structured logs: for people in a terminal, one JSON object a line everywhere else. No record carries a secret."""

from __future__ import annotations

import logging
import sys

import structlog

_tracebacks = structlog.processors.ExceptionRenderer(
    # local variables hold passwords and tokens
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)

HIDDEN = frozenset({"token", "authorization", "secret", "password", "cookie", "database_url", "redis_url"})


def configure(level: str) -> None:
    """Set up logging for this process; `level` is one of debug, info, warning, error."""
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _hide,
    ]
    human = sys.stderr.isatty()
    finish: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if human
        else [_tracebacks, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, *finish],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *finish]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING), force=True)


def _hide(_logger: object, _method: str, record: structlog.typing.EventDict) -> structlog.typing.EventDict:
    for name in HIDDEN & record.keys():
        record[name] = "(hidden)"
    return record
