"""The REST functions of background jobs; server/workers/jobs.py runs them."""

from __future__ import annotations

from aiohttp import web

from handlers import jobs
from server.calls import Call, answer, written
from server.context import Rest
from server.doors import Verb

RETRY_JOB = Verb("retry_job", jobs.retry_job)
DISMISS_JOB = Verb("dismiss_job", jobs.dismiss_job)


async def list_jobs(rest: Rest, call: Call) -> web.Response:
    async with rest.doors.database.statement() as tx:
        return answer(await jobs.list_jobs(tx, call.actor, call.command))


async def retry_job(rest: Rest, call: Call) -> web.Response:
    return await _decide_job(rest, call, RETRY_JOB)


async def dismiss_job(rest: Rest, call: Call) -> web.Response:
    return await _decide_job(rest, call, DISMISS_JOB)


async def _decide_job(rest: Rest, call: Call, verb: Verb) -> web.Response:
    job_id, key = call.request.match_info["job_id"], call.request.headers.get("Idempotency-Key")
    return written(await rest.doors.perform(verb, call.actor, job_id, call.command, key=key))
