"""Refusals: what callers may be told, with the public code and the HTTP status of each.

A refusal is a value of the contract, not an accident: rules and verbs raise it, and both doors (REST and Socket.IO)
render it from this one table. Anything else that is raised is a bug and answers 500.
"""

from __future__ import annotations

from typing import Any, ClassVar

from models import base


class Refused(Exception):
    """A command that is not carried out. `fields` are the extra members of the answer, as the contract names them."""

    code: ClassVar[str]
    status: ClassVar[int]
    title: ClassVar[str]
    members: ClassVar[dict[str, Any]] = {}
    """Names and types of `fields`, for the documents."""

    def __init__(self, detail: str, **fields: object) -> None:
        super().__init__(detail)
        self.detail = detail
        self.fields = fields


class Malformed(Refused):
    code, status, title = "malformed", 400, "The request cannot be read"


class BadSignature(Refused):
    code, status, title = "bad_signature", 400, "The webhook is not signed as it should be"


class Unauthenticated(Refused):
    code, status, title = "unauthenticated", 401, "The token is missing or not accepted"


class PaymentDeclined(Refused):
    """The payer's bank said no. `failure`: why, in the gateway's words."""

    code, status, title = "payment_declined", 402, "The payment was declined"


class Forbidden(Refused):
    code, status, title = "forbidden", 403, "The role does not allow this"


class ApprovalRequired(Refused):
    code, status, title = "approval_required", 403, "Somebody with more rights must do this"


class NotFound(Refused):
    """Also somebody else's thing: a stranger does not learn that it exists."""

    code, status, title = "not_found", 404, "There is no such thing for you"


class Conflict(Refused):
    code, status, title = "conflict", 409, "Something else holds this now"


class IllegalMove(Refused):
    """The order cannot go there from where it is. `allowed`: where this caller may move it now."""

    code, status, title = "illegal_move", 409, "The order cannot move there"
    members: ClassVar[dict[str, Any]] = {"allowed": list[str]}

    def __init__(self, detail: str, allowed: list[str]) -> None:
        super().__init__(detail, allowed=allowed)


class OrderClosed(Refused):
    code, status, title = "order_closed", 409, "The order is in a final status"


class PaymentRequired(Refused):
    """`due`: what is still to be paid, in minor units of the order's currency."""

    code, status, title = "payment_required", 409, "The order must be paid first"
    members: ClassVar[dict[str, Any]] = {"due": int}

    def __init__(self, detail: str, due: int) -> None:
        super().__init__(detail, due=due)


class PaymentInProgress(Refused):
    """`paymentId`: the payment whose money is moving."""

    code, status, title = "payment_in_progress", 409, "Another payment is under way"
    members: ClassVar[dict[str, Any]] = {"paymentId": str}

    def __init__(self, detail: str, payment_id: str) -> None:
        super().__init__(detail, paymentId=payment_id)


class AlreadyPaid(Refused):
    code, status, title = "already_paid", 409, "Nothing is due"


class MoneyMoved(Refused):
    """What has moved money is never undone by forgetting it."""

    code, status, title = "money_moved", 409, "Money has moved"


class NotRefundable(Refused):
    """`refundable`: what may still be refunded, in minor units of the payment's currency."""

    code, status, title = "not_refundable", 409, "There is not so much to refund"
    members: ClassVar[dict[str, Any]] = {"refundable": int}

    def __init__(self, detail: str, refundable: int) -> None:
        super().__init__(detail, refundable=refundable)


class LinkExpired(Refused):
    code, status, title = "link_expired", 410, "The link has ended"


class TooLarge(Refused):
    code, status, title = "too_large", 413, "The request is too large"


class UnsupportedMedia(Refused):
    code, status, title = "unsupported_media", 415, "The content type is not supported"


class Invalid(Refused):
    """A value breaks its rule. `pointer`: RFC 6901 pointer to it in the request body."""

    code, status, title = "invalid", 422, "A value breaks its rule"
    members: ClassVar[dict[str, Any]] = {"errors": list[base.FieldError]}

    def __init__(self, detail: str, pointer: str = "") -> None:
        super().__init__(detail, errors=[{"pointer": pointer, "code": "invalid", "message": detail}])


class IdempotencyMismatch(Refused):
    code, status, title = "idempotency_mismatch", 422, "The Idempotency-Key was used for another request"


class InvalidSignature(Refused):
    """The checkout's signature does not belong to this payment."""

    code, status, title = "invalid_signature", 422, "The signature is wrong"


class AmountMismatch(Refused):
    code, status, title = "amount_mismatch", 422, "The amount is not what is due"


class CurrencyMismatch(Refused):
    code, status, title = "currency_mismatch", 422, "The currency is not the order's"


class AmountTooSmall(Refused):
    code, status, title = "amount_too_small", 422, "The gateway does not take so small an amount"


class Stale(Refused):
    """The position is older than `LOCATION_MAX_AGE_MS`."""

    code, status, title = "stale", 422, "The position is too old"


class Future(Refused):
    """The position is further ahead than `LOCATION_FUTURE_MAX_MS`: it would hide every honest one until then."""

    code, status, title = "future", 422, "The position is from the future"


class Inaccurate(Refused):
    """The position may be further off than `LOCATION_ACCURACY_MAX_M`."""

    code, status, title = "inaccurate", 422, "The position is too inaccurate"


class Jump(Refused):
    """Nobody gets there from the last position at `LOCATION_SPEED_MAX_MPS`."""

    code, status, title = "jump", 422, "The position is an impossible jump"


class RateLimited(Refused):
    """`retryAfterMs`: when to come back."""

    code, status, title = "rate_limited", 429, "Too many requests"
    members: ClassVar[dict[str, Any]] = {"retryAfterMs": int}

    def __init__(self, detail: str, retry_after_ms: int) -> None:
        super().__init__(detail, retryAfterMs=retry_after_ms)


class GatewayError(Refused):
    """The gateway said no, or was not reached: surely nothing happened."""

    code, status, title = "gateway_error", 502, "The payment gateway could not do it"


class Unavailable(Refused):
    code, status, title = "unavailable", 503, "A part that this needs does not answer now"
