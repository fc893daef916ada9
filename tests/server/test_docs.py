"""The documents say what the code does: tables are compared, names and links are looked up, the README is carried out.

`python -m tests.server.test_docs` writes the tables of docs/operations.md anew from the code.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from prometheus_client.metrics import MetricWrapperBase

from models import errors
from models.errors import Refused
from server import metrics, settings
from server.docs import show_docs
from tests.harness import READY_S, ROOT, SECRET, Fleet, until

OPERATIONS = ROOT / "docs" / "operations.md"
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
NPM_CLIENT = ROOT / "tests" / "clients" / "node_modules"

SETTINGS_HEAD = "| variable | default | meaning |"
METRICS_HEAD = "| metric | kind | labels | counts |"
WRITE_ANEW = "write the table anew: .venv/bin/python -m tests.server.test_docs"

PATH = re.compile(r"(?<![\w./~-])(?:\./)?((?:models|handlers|server|scripts|tests|docs|requirements|\.ci)/[\w./-]*)")
NAMED = re.compile(r"`([\w/]+\.py): (\w+)`")
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")


def settings_table() -> str:
    rows = [f"| `{name}` | {default} | {meaning} |" for name, default, meaning in settings.table()]
    return "\n".join([SETTINGS_HEAD, "|---|---|---|", *rows])


def metrics_table() -> str:
    rows = []
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            told = next(iter(metric.describe()))
            name = told.name + ("_total" if told.type == "counter" else "")
            rows.append(f"| `{name}` | {told.type} | {', '.join(metric._labelnames)} | {told.documentation} |")
    return "\n".join([METRICS_HEAD, "|---|---|---|---|", *rows])


def table_under(head: str, text: str) -> str:
    """The table of `text` that begins with this line."""
    return text[text.index(head) :].split("\n\n")[0].rstrip()


def write_tables() -> None:
    text = OPERATIONS.read_text()
    for head, table in ((SETTINGS_HEAD, settings_table()), (METRICS_HEAD, metrics_table())):
        text = text.replace(table_under(head, text), table)
    OPERATIONS.write_text(text)


def anchors(page: Path) -> set[str]:
    """What `#…` may follow a link to this page: its headings as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_settings_table_is_that_of_the_code() -> None:
    assert table_under(SETTINGS_HEAD, OPERATIONS.read_text()) == settings_table(), WRITE_ANEW


def test_the_metrics_table_is_that_of_the_code() -> None:
    assert table_under(METRICS_HEAD, OPERATIONS.read_text()) == metrics_table(), WRITE_ANEW


def test_the_fixed_limits_have_these_values() -> None:
    rows = re.findall(r"^\| `(\w+(?:/\w+)+)\.py: (\w+)` \| (\S+) \|", OPERATIONS.read_text(), re.MULTILINE)
    assert rows
    for path, name, value in rows:
        module: ModuleType = importlib.import_module(path.replace("/", "."))
        assert str(getattr(module, name)) == value, f"{path}.py: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    missing = [path for path in PATH.findall(text) if not (ROOT / path.rstrip(".")).exists()]
    assert not missing
    for path, name in NAMED.findall(text):
        source = (ROOT / path).read_text()
        assert re.search(rf"^\s*(?:class |(?:async )?def |(?:\w+, )+)?{name}\b", source, re.MULTILINE), (
            f"no {name} in {path}"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_code_names_documents_that_exist() -> None:
    for folder in ("models", "handlers", "server", "tests", "scripts"):
        for source in (ROOT / folder).rglob("*.py"):
            if "node_modules" in source.parts:
                continue
            # a name may be broken at the end of a line, behind a hyphen
            text = re.sub(r"(?<=-)\n\s*", "", source.read_text())
            for path in re.findall(r"docs/[\w./-]+\.md", text):
                assert (ROOT / path).exists(), f"{source.relative_to(ROOT)} names {path}"


async def test_every_refusal_is_on_the_docs_page() -> None:
    page = await show_docs(make_mocked_request("GET", "/docs"))
    assert isinstance(page, web.Response)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Refused)]
    codes = [kind.code for kind in kinds if kind is not Refused]
    assert codes
    for code in codes:
        assert f'id="error-{code}"' in (page.text or ""), code


class Terminal:
    """A shell that steps are pasted into; `seen` is everything that it printed."""

    def __init__(self, shell: asyncio.subprocess.Process) -> None:
        assert shell.stdin
        assert shell.stdout
        self._input, self._output = shell.stdin, shell.stdout
        self.seen = ""

    async def paste(self, step: str) -> None:
        """Paste a step and wait until the shell has worked it off."""
        done = f"the step after {len(self.seen)} characters is done"
        self._input.write(f"{step}\necho {done}\n".encode())
        try:
            async with asyncio.timeout(READY_S):
                while done not in self.seen:
                    line = await self._output.readline()
                    assert line, f"the shell ended:\n{self.seen}"
                    self.seen += line.decode()
        except TimeoutError:
            pytest.fail(f"{step}\ndoes not end:\n{self.seen}")


@asynccontextmanager
async def terminal(**env: str) -> AsyncIterator[Terminal]:
    shell = await asyncio.create_subprocess_exec(
        "bash",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, **env},
        start_new_session=True,
    )
    try:
        yield Terminal(shell)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        await shell.wait()


async def test_the_first_quarter_of_an_hour_goes_as_the_readme_says(fleet: Fleet, tmp_path: Path) -> None:
    """Paste every step of the README into a shell, beside a server, and look at what a new user would look at."""
    server = await fleet.start()
    readme = (ROOT / "README.md").read_text()
    steps = re.findall(r"^```sh\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    with_node = shutil.which("node") is not None and (NPM_CLIENT / "socket.io-client").exists()
    here = {
        "http://localhost:8080": server.url,
        "npm install --prefix /tmp/watch socket.io-client": f"ln -s {NPM_CLIENT} /tmp/watch/",
        "/tmp/watch": str(tmp_path / "watch"),
        ".venv/bin/python": sys.executable,
    }
    watchers: list[Path] = []
    async with terminal(JWT_SECRET=SECRET) as shell:
        for step in steps:
            if "npm install" in step and not with_node:
                continue
            for written, meant in here.items():
                step = step.replace(written, meant)
            if step.startswith("kill"):  # by then a person has read what the watchers say
                for watcher in watchers:
                    await until(
                        lambda seen=watcher: "orderDelivered {" in seen.read_text(), "the watcher heard the end"
                    )
            if not step.endswith("&\n"):
                await shell.paste(step)
                continue
            watcher = tmp_path / f"watcher-{len(watchers)}"  # each has a screen of its own, so that words stay whole
            watcher.touch()
            watchers.append(watcher)
            await shell.paste(f"{step.removesuffix('&' + chr(10))} >{watcher} 2>&1 &")
            await until(lambda seen=watcher: "watching: pending" in seen.read_text(), "the watcher has begun")
        assert len(watchers) == 1 + with_node
        for watcher in watchers:
            seen = watcher.read_text()
            for heard in ("deliveryAgentAssigned {", "orderLocationUpdate {", "orderOutForDelivery {"):
                assert heard in seen
            assert "refused" not in seen
            assert "Traceback" not in seen
    assert '{"accepted":1,"refused":[],"nextIntervalMs":5000}' in shell.seen
    assert '"code":"illegal_move"' in shell.seen
    assert '"allowed":["delivered","delivery_failed"]' in shell.seen
    assert "Traceback" not in shell.seen


if __name__ == "__main__":
    write_tables()
