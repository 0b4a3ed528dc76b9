"""Where an embedded server may live: paths that its user can reach, and sockets short enough for the kernel."""

from __future__ import annotations

import hashlib
import os
import pwd
import stat
import tempfile
from pathlib import Path
from typing import Any


def server_account() -> pwd.struct_passwd | None:
    """The account that PostgreSQL must run as instead of root; None when we are not root."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def popen_account() -> dict[str, Any]:
    """`subprocess.Popen` arguments that start a process as `server_account`."""
    account = server_account()
    return {} if account is None else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def give(path: Path) -> Path:
    """Creates `path` as a directory that only the server's account (and root) may enter, and returns it."""
    path.mkdir(parents=True, exist_ok=True)
    if (account := server_account()) is not None:
        os.chown(path, account.pw_uid, account.pw_gid)
    path.chmod(0o700)
    return path


def ours(path: Path) -> Path:
    """`path` as a directory that we or the server's account made. Raises PermissionError for anybody else's: its place is open to all."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found, account = path.lstat(), server_account()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.geteuid(), os.geteuid() if account is None else account.pw_uid):
        raise PermissionError(f"{path} was made by somebody else; remove it, or set TMPDIR to a directory of your own")
    return path


def reachable(path: Path) -> bool:
    """Whether the server's account can pass every directory above `path`. Always so when we are not root."""
    if server_account() is None:
        return True
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in path.resolve().parents if parent.exists())


def digest(path: Path) -> str:
    """Eight characters that stand for `path`."""
    return hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]


def data_directory(wanted: Path) -> Path:
    """`wanted`, or a directory under /var/lib when root's own directories hide `wanted` from the server's account."""
    return wanted if reachable(wanted) else Path("/var/lib/moelab") / digest(wanted)


def socket_directory(data: Path) -> Path:
    """A short private directory for the sockets of the server whose data is `data` (the kernel allows 107 bytes)."""
    return Path(tempfile.gettempdir()) / f"moelab-{os.geteuid()}-{digest(data)}"
