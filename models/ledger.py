"""The ledger: where every minor unit is. Rows are only ever added; the rows of one entry sum to zero in each currency.

A positive amount on an account means that more of it is there. Money of a customer comes from `order_receivable`, which
goes below zero by what was paid, so the sum over all accounts is always zero. The database holds both rules: a deferred
constraint refuses an entry that does not balance, a trigger refuses changing or deleting a row.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import DDL, BigInteger, CheckConstraint, Column, Identity, Index, Table, Text, Uuid, event

from models.base import UtcTime, add_only, metadata
from models.payment import Provider

ledger_rows = Table(
    "ledger_rows",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("entry", Uuid, nullable=False),
    Column("at", UtcTime, nullable=False),
    Column("kind", Text, nullable=False),
    Column("account", Text, nullable=False),
    Column("currency", Text, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("order_id", Uuid),
    Column("payment_id", Uuid),
    Column("refund_id", Uuid),
    Column("note", Text),
    CheckConstraint("amount <> 0", name="amount"),
    Index("ix_ledger_rows_entry", "entry"),
    Index("ix_ledger_rows_account", "account", "currency", "id"),
    Index("ix_ledger_rows_order", "order_id"),
)

add_only(ledger_rows)

BALANCE = """
create function refuse_unbalanced() returns trigger language plpgsql as $$
begin
    if exists (select from ledger_rows where entry = new.entry group by currency having sum(amount) <> 0) then
        raise exception 'the ledger entry % does not balance', new.entry;
    end if;
    return null;
end $$"""
"""The rows of an entry come in one transaction; when it commits, they must sum to zero in each currency."""

BALANCE_TRIGGER = """
create constraint trigger ledger_rows_balance after insert on ledger_rows deferrable initially deferred
    for each row execute function refuse_unbalanced()"""

for _ddl in (BALANCE, BALANCE_TRIGGER):
    event.listen(ledger_rows, "after_create", DDL(_ddl.replace("%", "%%")))  # type: ignore[no-untyped-call]

ORDER_RECEIVABLE = "order_receivable"
"""What orders owe us, less what was paid for them."""
REFUNDS_DUE = "refunds_due"
"""What we owe to payers: negative while something is due."""
TILL = "till"
DISPUTES = "disputes"
"""What payers' banks hold back, or have taken for good."""
FEES = "fees"
ROUNDING = "rounding"
"""What rounding cash to coins that exist has gained (negative) or lost."""
AGENT_PREFIX = "cash:"


def agent_cash(agent_id: str) -> str:
    """The account of the cash that an agent carries."""
    return AGENT_PREFIX + agent_id


def money_of(provider: Provider) -> str:
    """The account where a provider's money lies."""
    return TILL if provider in (Provider.CASH, Provider.MANUAL) else f"gateway:{provider}"


class Post(NamedTuple):
    """One row of an entry. `amount`: minor units of the entry's currency."""

    account: str
    amount: int


def balanced(*posts: Post) -> list[Post]:
    """The rows of an entry without those of nothing.

    Raises:
        ValueError: they do not sum to zero.
    """
    if sum(post.amount for post in posts) != 0:
        raise ValueError(f"an entry that does not balance: {posts}")
    return [post for post in posts if post.amount]
