"""Webhooks as Razorpay sends them, for the load generator: one line each, signed beforehand."""

from __future__ import annotations

import hashlib
import hmac
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.harness import ROOT

CAPTURED = (ROOT / "tests" / "fixtures" / "razorpay" / "live-netbanking-payment.captured.json").read_text()
"""What Razorpay sent when somebody had paid. Each of ours is of another payment, order and amount."""

PAYMENT, ORDER, AMOUNT = "pay_TUouivTMBk4OY6", "order_TUorOYH8gErbbD", '"amount":100,'
NOBODYS = -1
"""In place of the number of an order: nobody watches for what becomes of it."""


class Webhook(NamedTuple):
    """`order`: the number of the order in the load generator's plan, or NOBODYS."""

    order: int
    event_id: str
    body: bytes


def captured(order: int, gateway_order: str, amount: int) -> Webhook:
    """The payment of a gateway's order was captured. `amount`: minor units."""
    name = uuid.uuid4().hex[:14]
    body = CAPTURED.replace(PAYMENT, f"pay_{name}").replace(ORDER, gateway_order)
    return Webhook(order, name, body.replace(AMOUNT, f'"amount":{amount},', 1).encode())


def of_nobody(count: int) -> Iterator[Webhook]:
    """So many of payments that the server does not know."""
    return (captured(NOBODYS, f"order_{uuid.uuid4().hex[:14]}", 100) for _ in range(count))


def write(file: Path, webhooks: Iterator[Webhook] | Sequence[Webhook], secret: str) -> None:
    """Sign them, and write them down as the load generator reads them."""
    with file.open("wb") as lines:
        for order, event_id, body in webhooks:
            signature = hmac.digest(secret.encode(), body, hashlib.sha256).hex()
            lines.write(f"{order} {signature} {event_id} ".encode() + body + b"\n")
