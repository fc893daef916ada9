"""The job `refund`: carries on refunds that are not settled, and begins those that nobody asked for."""

from __future__ import annotations

import random

from handlers.refund_calls import Desk, carry_on
from server.workers.jobs import Job


def refund_job(desk: Desk) -> Job:
    async def run(refund_id: str) -> None:
        await carry_on(desk, refund_id, random.uniform)

    return Job("refund", run)
