"""What must hold of the books at every moment."""

from __future__ import annotations

CHECK = {
    "every entry balances": """
        select entry from ledger_rows group by entry, currency having sum(amount) <> 0""",
    "what a gateway holds is what came, less what went back, what it kept and what banks hold": """
        with expected as (
            select provider, currency, amount as n from captures
            union all select provider, currency, -coalesce(fee, 0) from captures
            union all select provider, currency, -amount from refunds
                where status = 'succeeded' and channel = 'original'
            union all select provider, currency, -amount from disputes where status <> 'won'),
        sums as (select 'gateway:' || provider as account, currency, sum(n) as s from expected
            where provider in ('razorpay', 'stripe') group by 1, 2),
        booked as (select account, currency, sum(amount) as s from ledger_rows
            where account like 'gateway:%' group by 1, 2)
        select * from sums full join booked using (account, currency)
        where coalesce(sums.s, 0) <> coalesce(booked.s, 0)""",
    "what is due to payers is what was reserved and is not back": """
        with owed as (select currency, sum(amount) as s from refunds where status <> 'succeeded' group by 1),
        booked as (select currency, sum(amount) as s from ledger_rows where account = 'refunds_due' group by 1)
        select * from owed full join booked using (currency) where coalesce(owed.s, 0) <> -coalesce(booked.s, 0)""",
    "an order's sums are those of its captures and refunds": """
        select o.id from orders o
        left join (select p.order_id, sum(c.applied) as s from captures c join payments p on p.id = c.payment_id
            group by 1) c on c.order_id = o.id
        left join (select order_id, sum(applied) as s from refunds where status = 'succeeded' group by 1) r
            on r.order_id = o.id
        where o.paid <> coalesce(c.s, 0) or o.refunded <> coalesce(r.s, 0)""",
    "a payment's sums are those of its captures, refunds and disputes": """
        select p.id from payments p
        left join (select payment_id, currency, sum(amount) as s from captures group by 1, 2) c
            on c.payment_id = p.id and c.currency = p.currency
        left join (select payment_id, currency, sum(amount) filter (where status = 'succeeded') as back,
            sum(amount) filter (where status <> 'succeeded') as reserved from refunds group by 1, 2) r
            on r.payment_id = p.id and r.currency = p.currency
        left join (select payment_id, currency, sum(amount) as s from disputes where status <> 'won' group by 1, 2) d
            on d.payment_id = p.id and d.currency = p.currency
        where p.captured <> coalesce(c.s, 0) or p.refunded <> coalesce(r.back, 0)
            or p.reserved <> coalesce(r.reserved, 0) or p.disputed <> coalesce(d.s, 0)""",
    "no online order is confirmed without its money": """
        select id from orders
        where payment_method = 'online' and status not in ('pending', 'cancelled') and paid < total""",
    "no money is without an order or a refund": """
        select c.key from captures c join payments p on p.id = c.payment_id join orders o on o.id = p.order_id
        left join (select provider, capture_key, sum(amount) as s from refunds group by 1, 2) r
            on r.provider = c.provider and r.capture_key = c.key
        left join (select payment_id, sum(amount) as s from disputes where status <> 'won' group by 1) d
            on d.payment_id = p.id
        where c.amount - coalesce(r.s, 0)
            > case when o.status = 'cancelled' then coalesce(d.s, 0)
                when c.provider = 'cash' then c.amount else c.applied end""",
    "the rounding of cash is what it settled less what it was, as far as it is not back": """
        with expected as (
            select payment_id, applied - amount as n from captures where provider = 'cash'
            union all select payment_id, amount - applied from refunds where provider = 'cash'),
        sums as (select payment_id, sum(n) as s from expected group by 1),
        booked as (select payment_id, sum(amount) as s from ledger_rows where account = 'rounding' group by 1)
        select * from sums full join booked using (payment_id) where coalesce(sums.s, 0) <> coalesce(booked.s, 0)""",
    "an order that waits for money has not got it": """
        select id from orders where payment_method = 'online' and status = 'pending' and paid >= total and total > 0""",
    "an order is confirmed once": """
        select order_id from order_events where type = 'orderStatusUpdate' and body::json ->> 'status' = 'confirmed'
        group by order_id having count(*) > 1""",
}
"""What must hold of the books at every moment, as queries that find what breaks it."""
