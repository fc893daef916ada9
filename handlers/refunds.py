"""The refunds desk: give money back, look at it, and try again what failed.

A refund is two short transactions around one gateway call. The first reserves the money under the order's lock, so that
no race gives back more than came; the gateway is asked with a key of ours that stays the same, so that asking twice is
one refund; the second books what became of it. The job `refund` carries on what a crash or a silent gateway left open.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import msgspec
import structlog
from msgspec import UNSET, Meta, UnsetType
from sqlalchemy import Text, func, literal_column, select, tuple_

from handlers import audit, orders
from handlers.context import Row, Tx
from handlers.orders import LINES_MAX, _decode_cursor, _encode_cursor, order_uuid
from handlers.jobs import NotYet, enqueue
from handlers.ports import (
    Done,
    GatewayAway,
    GatewayRefused,
    Gateways,
    GatewayUnknown,
    Known,
    NewRefund,
    Once,
    Transactions,
)
from models.base import Id, Later, Quantity, Reason, ShortText, Strict, rfc3339
from models.errors import ApprovalRequired, Conflict, CurrencyMismatch, Invalid, MoneyMoved, NotFound, NotRefundable
from models.money import EXPONENTS, MINOR_UNITS_MAX
from models.order import may_see, require_role
from models.payment import GATEWAYS, Capture, Failure, Provider, RefundNews, RefundReport, Source
from models.refund import Channel, Cause, Money, Refund, RefundedLine, RefundStatus, allot, line_share, spread
from models.user import BACK_OFFICE, STAFF, Actor, Role
