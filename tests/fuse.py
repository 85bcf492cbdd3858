"""A volume that fails on request: a real file system (FUSE), served by a process of its own, without any library.

    with faulty_volume(tmp_path / "volume") as volume:
        volume.fail("write", errno.EIO, on="*.part")
        (volume.folder / "x.part").write_bytes(b"…")     # raises OSError: EIO

The kernel's own calls arrive at the server (`python -m tests.fuse`), which carries them out in another folder, the
backing. So every part of a worker meets the faults, in whatever process it runs, and in the order in which a network
volume has them: a write may succeed and its fsync or close fail. The kernel caches no names and no attributes.

Mounting needs root and /dev/fuse. Without them the tests that need this are skipped.
"""

# A file system is made of these calls:
# ruff: noqa: PTH101, PTH102, PTH104, PTH106, PTH108, PTH115, PTH116, PTH118, PTH123, PTH211

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import json
import os
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

CALLS = {
    *("stat", "listdir", "statvfs", "open", "create", "mkdir", "read", "write", "truncate", "utime"),
    *("fsync", "close", "rename", "link", "unlink"),
}
"""What may fail. `create` makes a file, `open` opens one that is there. `close` is what close(2) returns."""


@dataclass
class Fault:
    """Calls that fail: `number` is the errno. `on` is a pattern of the path below the volume, of either path of two.

    The first `skip` calls succeed; `times` calls fail (None: all). With `is_lost` the bytes that were written since the
    file was opened are lost, as on a volume that had only cached them.
    """

    call: str
    number: int
    on: str = "*"
    times: int | None = None
    skip: int = 0
    is_lost: bool = False


@dataclass
class Behaviour:
    """How the volume behaves. `quota` is the most bytes that all files may take; statvfs does not show it.

    `takes_no_files_when_full`: then files and folders can be made only below the quota.

    `free`: what statvfs shows as free, in bytes (None: the truth). `has_apparent_blocks`: a file counts its length in
    st_blocks, as on MooseFS, however much of it was written.
    """

    quota: int | None = None
    takes_no_files_when_full: bool = False
    free: int | None = None
    has_apparent_blocks: bool = False


class FaultyVolume:
    """A mounted volume. Changes of its behaviour take effect before a method returns."""

    def __init__(self, folder: Path, server: subprocess.Popen[str]) -> None:
        self.folder = folder
        self.backing = backing_of(folder)
        self._server = server
        self._faults: dict[int, Fault] = {}
        self._last_fault = 0

    def fail(self, call: str, number: int, *, on: str = "*", times: int | None = None, **how: Any) -> int:
        """Let a call fail from now on. Earlier faults stay. Returns the number of this one."""
        assert call in CALLS, call
        self._last_fault += 1
        self._faults[self._last_fault] = fault = Fault(call, number, on, times, **how)
        self._ask({"add": [self._last_fault, asdict(fault)]})
        return self._last_fault

    def heal(self, *faults: int) -> None:
        """End these faults, or all if none is named."""
        for fault in faults or tuple(self._faults):
            del self._faults[fault]
            self._ask({"remove": fault})

    def behave(self, **changes: Any) -> None:
        """Change the fields of its Behaviour."""
        self._ask({"behave": asdict(Behaviour(**changes)), "changes": list(changes)})

    def calls(self, call: str, on: str = "*") -> int:
        """How many calls there were so far, failed ones included."""
        return int(self._ask({"count": [call, on]}))

    def die(self) -> None:
        """End the server: every call fails with ENOTCONN from now on."""
        self._server.kill()
        self._server.wait()

    def _ask(self, request: object) -> str:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return self._server.stdout.readline().strip()


def backing_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.backing")


@contextlib.contextmanager
def faulty_volume(folder: Path) -> Iterator[FaultyVolume]:
    """Mount a volume at a folder. What lies in the backing beside it is there."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    for path in (folder, backing_of(folder)):
        path.mkdir(parents=True, exist_ok=True)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.fuse", str(folder), str(backing_of(folder))],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None
    try:
        assert server.stdout.readline() == "mounted\n"
        yield FaultyVolume(folder, server)
    finally:
        # Lazily: a thread of the code under test may still have a file open.
        subprocess.run(["umount", "--lazy", str(folder)], check=False)
        with contextlib.suppress(OSError):
            server.stdin.close()
        server.kill()
        server.wait()
        server.stdout.close()


def why_not() -> str | None:
    """Why no such volume can be mounted here, or None if one can."""
    if not Path("/dev/fuse").exists():
        return "there is no /dev/fuse here"
    return None if os.geteuid() == 0 else "to mount a FUSE file system takes root"


# -- the server: linux/fuse.h, protocol 7.31 ---------------------------------------------------------------------------

_IN_HEADER = struct.Struct("<IIQQIIII")
_OUT_HEADER = struct.Struct("<IiQ")
_ATTRIBUTES = struct.Struct("<QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("<QQQQII")
_MAX_WRITE = 128 << 10
_WRITING = os.O_WRONLY | os.O_RDWR


def main() -> None:
    folder, backing = sys.argv[1:]
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"faulty", folder.encode(), b"fuse", 0, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), "mount")
    sys.stdout.write("mounted\n")
    sys.stdout.flush()
    FuseServer(device, backing).serve()


class FuseServer:
    """Serves one mount from one thread: requests of the kernel, and lines of the tests on stdin."""

    def __init__(self, device: int, backing: str) -> None:
        self._device = device
        self._backing = backing
        self._paths: dict[int, str | None] = {1: ""}  # by node; None: unlinked
        self._nodes: dict[str, int] = {"": 1}
        self._last_node = 1
        self._handles: dict[int, tuple[int, int]] = {}  # file descriptor: (node, flags)
        self._listings: dict[int, list[bytes]] = {}
        self._written: dict[int, list[tuple[int, int]]] = {}  # node: what was written since it was opened
        self._behaviour = Behaviour()
        self._faults: dict[int, Fault] = {}
        self._counts: dict[tuple[str, str], int] = {}

    def serve(self) -> None:
        import select

        buffer = ""
        while True:
            ready, _, _ = select.select([self._device, 0], [], [])
            if 0 in ready:
                chunk = os.read(0, 1 << 16).decode()
                if not chunk:
                    return
                buffer += chunk
                while "\n" in buffer:
                    line, _, buffer = buffer.partition("\n")
                    os.write(1, f"{self._obey(json.loads(line))}\n".encode())
            if self._device in ready:
                try:
                    request = os.read(self._device, _MAX_WRITE + 8192)
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                        continue  # the request was interrupted
                    return  # unmounted
                self._answer(request)

    def _obey(self, line: dict[str, Any]) -> object:
        if "count" in line:
            call, on = line["count"]
            return sum(n for (name, path), n in self._counts.items() if name == call and fnmatch.fnmatch(path, on))
        if "add" in line:
            number, fault = line["add"]
            self._faults[number] = Fault(**fault)
        elif "remove" in line:
            del self._faults[line["remove"]]
        else:
            self._behaviour = replace(self._behaviour, **{name: line["behave"][name] for name in line["changes"]})
        return "ok"

    def _answer(self, request: bytes) -> None:
        _, opcode, unique, node, *_ = _IN_HEADER.unpack_from(request)
        body = memoryview(request)[_IN_HEADER.size :]
        if opcode in (2, 36, 42):  # forget, interrupt, batch_forget: have no answer
            return
        handler = _HANDLERS.get(opcode)
        try:
            if handler is None:
                raise OSError(errno.ENOSYS, "")
            answer, number = handler(self, node, body), 0
        except OSError as error:
            answer, number = b"", error.errno or errno.EIO
        try:
            os.write(self._device, _OUT_HEADER.pack(16 + len(answer), -number, unique) + answer)
        except OSError as error:
            if error.errno != errno.ENOENT:  # the one that asked is gone
                raise

    # -- faults

    def _may(self, call: str, *paths: str) -> None:
        """Raise what a fault of this call says. `paths` are those that it is about."""
        for path in paths:
            self._counts[call, path] = self._counts.get((call, path), 0) + 1
        for fault in self._faults.values():
            if fault.call != call or not any(fnmatch.fnmatch(path, fault.on) for path in paths):
                continue
            if fault.skip:
                fault.skip -= 1
                continue
            if fault.times is not None:
                if not fault.times:
                    continue
                fault.times -= 1
            if fault.is_lost:
                self._lose(paths[0])
            raise OSError(fault.number, "")
        if call in ("create", "mkdir") and self._behaviour.takes_no_files_when_full:
            self._check_quota(1)

    def _lose(self, path: str) -> None:
        """Forget the bytes that were written to a file since it was opened."""
        with open(self._real(path), "r+b") as file:
            for start, end in self._written.get(self._nodes.get(path, 0), ()):
                file.seek(start)
                file.write(bytes(end - start))

    def _check_quota(self, more: int) -> None:
        if self._behaviour.quota is not None:
            used = sum(
                os.lstat(os.path.join(folder, name)).st_blocks * 512
                for folder, _, names in os.walk(self._backing)
                for name in names
            )
            if used + more > self._behaviour.quota:
                raise OSError(errno.EDQUOT, "")

    # -- nodes

    def _real(self, path: str) -> str:
        return os.path.join(self._backing, path) if path else self._backing

    def _path(self, node: int) -> str:
        path = self._paths.get(node)
        if path is None:
            raise OSError(errno.ENOENT, "")
        return path

    def _child(self, node: int, name: bytes | memoryview) -> str:
        return os.path.join(self._path(node), os.fsdecode(bytes(name).rstrip(b"\0")))

    def _node(self, path: str) -> int:
        if path not in self._nodes:
            self._last_node += 1
            self._nodes[path] = self._last_node
            self._paths[self._last_node] = path
        return self._nodes[path]

    def _forget_path(self, path: str) -> None:
        node = self._nodes.pop(path, None)
        if node is not None:
            self._paths[node] = None

    def _attributes(self, found: os.stat_result) -> bytes:
        blocks = -(-found.st_size // 512) if self._behaviour.has_apparent_blocks else found.st_blocks
        times = (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)
        return _ATTRIBUTES.pack(
            *(found.st_ino, found.st_size, blocks),
            *(at // 10**9 for at in times),
            *(at % 10**9 for at in times),
            *(found.st_mode, found.st_nlink, found.st_uid, found.st_gid, found.st_rdev, 4096, 0),
        )

    def _entry(self, path: str) -> bytes:
        found = os.lstat(self._real(path))
        return _ENTRY.pack(self._node(path), 0, 0, 0, 0, 0) + self._attributes(found)

    def _open(self, node: int, path: str, flags: int, mode: int = 0) -> bytes:
        handle = os.open(self._real(path), flags & ~os.O_NOFOLLOW, mode)
        self._handles[handle] = (node, flags)
        if not any(at == node for fd, (at, _) in self._handles.items() if fd != handle):
            self._written[node] = []
        return struct.pack("<QII", handle, 0, 0)

    # -- the calls

    def init(self, node: int, body: memoryview) -> bytes:
        _, minor, readahead, _ = struct.unpack_from("<IIII", body)
        big_writes, max_pages = 1 << 5, 1 << 22
        return struct.pack(
            "<IIIIHHIIHHI7I",
            *(7, min(minor, 31), readahead, big_writes | max_pages, 12, 9, _MAX_WRITE, 1, _MAX_WRITE // 4096, 0, 0),
            *(0,) * 7,
        )

    def lookup(self, node: int, body: memoryview) -> bytes:
        path = self._child(node, body)
        self._may("stat", path)
        return self._entry(path)

    def getattr(self, node: int, body: memoryview) -> bytes:
        path = self._paths.get(node)
        if path is not None:
            self._may("stat", path)
            found = os.lstat(self._real(path))
        else:
            handles = [handle for handle, (at, _) in self._handles.items() if at == node]
            if not handles:
                raise OSError(errno.ENOENT, "")
            found = os.fstat(handles[0])
        return struct.pack("<QII", 0, 0, 0) + self._attributes(found)

    def setattr(self, node: int, body: memoryview) -> bytes:
        valid, _, handle, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode = struct.unpack_from(
            "<IIQQQQQQIIII", body
        )
        path = self._paths.get(node)
        target: str | int = handle if valid & (1 << 6) else self._real(self._path(node))
        if valid & (1 << 3):
            self._may("truncate", path or "")
            os.truncate(target, size)
        if valid & (1 << 0):
            os.chmod(target, mode)
        if valid & (1 << 4 | 1 << 5):
            self._may("utime", path or "")
            now, found = time.time_ns(), os.stat(target)
            times = [found.st_atime_ns, found.st_mtime_ns]
            if valid & (1 << 4):
                times[0] = now if valid & (1 << 7) else atime * 10**9 + atime_ns
            if valid & (1 << 5):
                times[1] = now if valid & (1 << 8) else mtime * 10**9 + mtime_ns
            os.utime(target, ns=(times[0], times[1]))
        return struct.pack("<QII", 0, 0, 0) + self._attributes(os.stat(target))

    def readlink(self, node: int, body: memoryview) -> bytes:
        return os.fsencode(os.readlink(self._real(self._path(node))))

    def symlink(self, node: int, body: memoryview) -> bytes:
        name, target = bytes(body).rstrip(b"\0").split(b"\0")
        path = self._child(node, name)
        self._may("create", path)
        os.symlink(target, self._real(path))
        return self._entry(path)

    def mknod(self, node: int, body: memoryview) -> bytes:
        mode, device = struct.unpack_from("<II", body)
        path = self._child(node, body[16:])
        self._may("create", path)
        os.mknod(self._real(path), mode, device)
        return self._entry(path)

    def mkdir(self, node: int, body: memoryview) -> bytes:
        (mode,) = struct.unpack_from("<I", body)
        path = self._child(node, body[8:])
        self._may("mkdir", path)
        os.mkdir(self._real(path), mode)
        return self._entry(path)

    def unlink(self, node: int, body: memoryview) -> bytes:
        path = self._child(node, body)
        self._may("unlink", path)
        os.unlink(self._real(path))
        self._forget_path(path)
        return b""

    def rmdir(self, node: int, body: memoryview) -> bytes:
        path = self._child(node, body)
        self._may("unlink", path)
        os.rmdir(self._real(path))
        self._forget_path(path)
        return b""

    def rename(self, node: int, body: memoryview, header: int = 8) -> bytes:
        (new_folder,) = struct.unpack_from("<Q", body)
        old_name, new_name = bytes(body[header:]).rstrip(b"\0").split(b"\0")
        old, new = self._child(node, old_name), self._child(new_folder, new_name)
        self._may("rename", old, new)
        os.rename(self._real(old), self._real(new))
        self._forget_path(new)
        for path in [path for path in self._nodes if path == old or path.startswith(f"{old}/")]:
            moved = self._nodes.pop(path)
            self._nodes[new + path[len(old) :]] = moved
            self._paths[moved] = new + path[len(old) :]
        return b""

    def rename2(self, node: int, body: memoryview) -> bytes:
        return self.rename(node, body, 16)

    def link(self, node: int, body: memoryview) -> bytes:
        (old,) = struct.unpack_from("<Q", body)
        path = self._child(node, body[8:])
        self._may("link", path, self._path(old))
        os.link(self._real(self._path(old)), self._real(path))
        return self._entry(path)

    def open(self, node: int, body: memoryview) -> bytes:
        (flags,) = struct.unpack_from("<I", body)
        self._may("open", self._path(node))
        return self._open(node, self._path(node), flags)

    def create(self, node: int, body: memoryview) -> bytes:
        flags, mode = struct.unpack_from("<II", body)
        path = self._child(node, body[16:])
        self._may("create", path)
        opened = self._open(self._node(path), path, flags | os.O_CREAT, mode)
        return self._entry(path) + opened

    def read(self, node: int, body: memoryview) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        self._may("read", self._paths.get(node) or "")
        return os.pread(handle, size, offset)

    def write(self, node: int, body: memoryview) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        self._may("write", self._paths.get(node) or "")
        self._check_quota(size)
        written = os.pwrite(handle, body[40 : 40 + size], offset)
        self._written.setdefault(node, []).append((offset, offset + written))
        return struct.pack("<II", written, 0)

    def statfs(self, node: int, body: memoryview) -> bytes:
        self._may("statvfs", self._paths.get(node) or "")
        found = os.statvfs(self._backing)
        free = found.f_bavail if self._behaviour.free is None else self._behaviour.free // found.f_frsize
        return struct.pack(
            "<QQQQQIIII6I",
            *(found.f_blocks, free, free, found.f_files, found.f_ffree, found.f_bsize, 255, found.f_frsize, 0),
            *(0,) * 6,
        )

    def flush(self, node: int, body: memoryview) -> bytes:
        (handle,) = struct.unpack_from("<Q", body)
        if self._handles.get(handle, (0, 0))[1] & _WRITING:
            self._may("close", self._paths.get(node) or "")
        return b""

    def fsync(self, node: int, body: memoryview) -> bytes:
        self._may("fsync", self._paths.get(node) or "")
        return b""

    def release(self, node: int, body: memoryview) -> bytes:
        (handle,) = struct.unpack_from("<Q", body)
        if self._handles.pop(handle, None) is not None:
            os.close(handle)
        return b""

    def opendir(self, node: int, body: memoryview) -> bytes:
        path = self._path(node)
        self._may("listdir", path)
        entries = []
        with os.scandir(self._real(path)) as found:
            for number, entry in enumerate(found, 1):
                name = os.fsencode(entry.name)
                kind = stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode) >> 12
                record = struct.pack("<QQII", entry.inode(), number, len(name), kind) + name
                entries.append(record + bytes(-len(record) % 8))
        self._last_node += 1
        self._listings[self._last_node] = entries
        return struct.pack("<QII", self._last_node, 0, 0)

    def readdir(self, node: int, body: memoryview) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        answer = b""
        for record in self._listings[handle][offset:]:
            if len(answer) + len(record) > size:
                break
            answer += record
        return answer

    def releasedir(self, node: int, body: memoryview) -> bytes:
        (handle,) = struct.unpack_from("<Q", body)
        self._listings.pop(handle, None)
        return b""

    def nothing(self, node: int, body: memoryview) -> bytes:
        return b""


_HANDLERS: dict[int, Callable[[FuseServer, int, memoryview], bytes]] = {
    **{
        1: FuseServer.lookup,
        3: FuseServer.getattr,
        4: FuseServer.setattr,
        5: FuseServer.readlink,
        6: FuseServer.symlink,
    },
    **{
        8: FuseServer.mknod,
        9: FuseServer.mkdir,
        10: FuseServer.unlink,
        11: FuseServer.rmdir,
        12: FuseServer.rename,
        13: FuseServer.link,
    },
    **{
        14: FuseServer.open,
        15: FuseServer.read,
        16: FuseServer.write,
        17: FuseServer.statfs,
        18: FuseServer.release,
        20: FuseServer.fsync,
    },
    **{
        25: FuseServer.flush,
        26: FuseServer.init,
        27: FuseServer.opendir,
        28: FuseServer.readdir,
        29: FuseServer.releasedir,
    },
    **{
        30: FuseServer.fsync,
        35: FuseServer.create,
        38: FuseServer.nothing,
        45: FuseServer.rename2,
    },
}


if __name__ == "__main__":
    main()
