"""Files inside archives: zip, tar, and the rows of Parquet, read in place; nothing is unpacked under its name.

An archive is indexed once per process; then any number of threads can read its members by offset.
"""

from __future__ import annotations

import bz2
import gzip
import io
import logging
import lzma
import os
import re
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipeline.config import ARCHIVES
from pipeline.io.remote import Stat, address_of, forget_listings, list_remote, open_remote, read_remote, stat_remote

logger = logging.getLogger(__name__)

ENDINGS = (*ARCHIVES, ".parquet")
"""File name endings of archives; the format is recognised by content."""

MOST_BYTES = 1 << 30
"""Size limit of a member, in bytes: larger ones are no images, or meant to exhaust memory."""

SMALL = 4096
"""Members of a remote tar up to this size, such as labels, are kept while indexing: reading each later would be a request."""

GROUPS = 4
"""Number of cached row groups of a Parquet file: images are read in order, by several threads."""

_PATTERN = re.compile(rf"(.*?(?:{'|'.join(map(re.escape, sorted(ENDINGS, key=len, reverse=True)))}))(?:/(.*))?", re.I)

_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError)
"""Exceptions of the libraries, including pyarrow, for damaged archives or unsupported compression."""


class Refused(NamedTuple):
    """A file that is not read: the status of the failure, and the reason."""

    status: str
    reason: str


FolderEntry = Stat | Refused | None
"""An entry of a folder: a file, a refused file, or (None) a folder."""


@dataclass(frozen=True)
class Archive:
    """The members of an archive by path, each with its size and times, or the reason why it is not read."""

    stat: Stat
    """The state of the archive itself."""
    members: Mapping[str, Stat | Refused]
    read: Callable[[str, int | None], bytes]
    """Read a member, or at most a number of bytes from its start; raises OSError or one of `_DAMAGED`."""
    problem: str = ""
    """The problem of an archive that can be read only in part."""
    holds_images: bool = False
    """Whether each member is an image, whatever its name."""

    @cached_property
    def folders(self) -> Mapping[str, Mapping[str, FolderEntry]]:
        """The entries of each folder by its path; the top folder's is ''."""
        found: dict[str, dict[str, FolderEntry]] = {"": {}}
        for path, entry in self.members.items():
            folder, _, name = path.rpartition("/")
            below = folder
            while below not in found:
                found[below] = {}
                below = below.rpartition("/")[0]
            found[folder].setdefault(name, entry)
        for folder in filter(None, found):
            above, _, name = folder.rpartition("/")
            found[above][name] = None
        return found


_OPEN: dict[str, Archive] = {}
_LOCK = threading.Lock()


def inside(path: str) -> tuple[str, str] | None:
    """Split a path into an archive and the path inside it, '' for the archive itself; None if it is not in an archive."""
    address = address_of(path)
    if address is not None:
        found = _PATTERN.fullmatch(address)
        return None if found is None else (found[1], (found[2] or "").rstrip("/"))
    at = path.rstrip("/")
    while at and not os.path.lexists(at):
        at = at.rpartition("/")[0]
    if not os.path.isfile(at) or (at == path.rstrip("/") and not at.lower().endswith(ENDINGS)):
        return None
    return at, path[len(at) :].strip("/")


def open_archive(path: str) -> Archive:
    """Open an archive, which is indexed again only if the file has changed; OSError if it cannot be indexed."""
    known = _OPEN.get(path)
    if (address := address_of(path)) is not None:
        stat = known.stat if known is not None else stat_remote(address)  # remote archives are kept until `forget`
    else:
        about = os.stat(path)
        stat = about.st_size, about.st_mtime_ns, about.st_ctime_ns
    if known is None or known.stat != stat:
        with _LOCK:
            known = _OPEN.get(path)
            if known is None or known.stat != stat:
                known = _OPEN[path] = _indexed(path, stat)
    return known


def forget(root: str) -> None:
    """Drop the cached listings and archives of a remote root or pattern, so that they are read again."""
    if (address := address_of(root.partition("{")[0])) is not None:
        forget_listings(address)
        for path in [path for path in _OPEN if path.startswith(address)]:
            del _OPEN[path]


def entries(path: str) -> Mapping[str, FolderEntry]:
    """Return the entries of a folder inside an archive, or of a remote folder; NotADirectoryError if it is a file."""
    found = inside(path)
    if found is None:
        if (address := address_of(path)) is not None:
            return list_remote(address)
        raise NotADirectoryError(path)
    archive = open_archive(found[0])
    if found[1] not in archive.folders:
        raise (NotADirectoryError if found[1] in archive.members else FileNotFoundError)(path)
    return archive.folders[found[1]]


def read_elsewhere(path: str, most: int | None = None) -> bytes:
    """Read a file inside an archive, or a remote file: completely, or at most `most` bytes from its start.

    OSError also for a member that is damaged, or larger than `MOST_BYTES`.
    """
    found = inside(path)
    if found is None or not found[1]:
        if (address := address_of(path)) is None:
            raise NotADirectoryError(path)
        return read_remote(address, *((0, most) if most else ()))
    archive = open_archive(found[0])
    about = archive.members.get(found[1])
    if about is None:
        raise FileNotFoundError(path)
    if isinstance(about, Refused):
        raise OSError(None, about.reason)
    try:
        return archive.read(found[1], most)
    except _DAMAGED as error:
        raise OSError(None, f"damaged in the archive: {error}") from None


def opened(path: str) -> BinaryIO:
    """Open a local, archived or remote file for random access; errors are those of `open`."""
    if (address := address_of(path)) is not None and not (inside(path) or ("", ""))[1]:
        return open_remote(address)
    return open(path, "rb") if os.path.lexists(path) else io.BytesIO(read_elsewhere(path))


def _bytes_at(path: str, start: int, size: int) -> bytes:
    """Read some bytes of an archive; thread-safe, as no handle is shared."""
    if (address := address_of(path)) is not None:
        return read_remote(address, start, start + size) if size else b""
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, start)


def _indexed(path: str, stat: Stat) -> Archive:
    """Index an archive, whose format is recognised by its first bytes."""
    try:
        with opened(path) as file:
            start = file.read(tarfile.BLOCKSIZE)
            file.seek(0)
            opener = next((opener for magic, opener in _COMPRESSED.items() if start.startswith(magic)), None)
            if start[:4] in (b"PK\3\4", b"PK\5\6"):
                return _zip(path, file, stat)
            if start[:4] == b"PAR1":
                return _parquet(path, stat)
            if opener is not None:
                return _compressed_tar(path, file, stat, opener)
            if start[257:262] == b"ustar" or path.lower().endswith(".tar"):
                return _tar(file, stat, partial(_bytes_at, path), keep=address_of(path) is not None)
    except _DAMAGED as error:
        raise OSError(None, f"it is damaged or cut off ({error}); copy it again, or make it anew") from None
    raise OSError(None, "it is no zip, tar or Parquet file")


_COMPRESSED: Mapping[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


def _name(path: str) -> str:
    """Normalise a member's path: separated by '/', without a root and without empty or '.' parts."""
    return "/".join(part for part in path.replace("\\", "/").split("/") if part not in ("", "."))


def _zip(path: str, file: BinaryIO, stat: Stat) -> Archive:
    with zipfile.ZipFile(file) as archive:
        infos = {_name(info.filename): info for info in archive.infolist() if not info.is_dir()}

    def read(name: str, most: int | None) -> bytes:
        info = infos[name]
        header = _bytes_at(path, info.header_offset, 30)
        if header[:4] != b"PK\3\4":
            raise zipfile.BadZipFile("its header is not where the list of members says")
        start = (
            info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        )
        size = info.compress_size if most is None else min(info.compress_size, most + SMALL)
        with zipfile.ZipExtFile(io.BytesIO(_bytes_at(path, start, size)), "r", info) as member:
            data = member.read(-1 if most is None else most)
        if most is None and len(data) != info.file_size:
            raise zipfile.BadZipFile("its end is missing")
        return data

    members: dict[str, Stat | Refused] = {}
    for name, info in infos.items():
        is_link = (info.external_attr >> 16) & 0o170000 == 0o120000
        when = int("".join(f"{part:02d}" for part in info.date_time))
        members[name] = _refused(name, info.file_size, is_link) or (info.file_size, when, info.CRC)
        if info.flag_bits & 1:
            members[name] = Refused("unreadable", "it is encrypted; unpack the archive")
    return Archive(stat, members, read)


def _refused(name: str, size: int, is_link: bool) -> Refused | None:
    """Return why a member cannot be read, else None; '..' is refused, as the path would lead outside the archive."""
    if ".." in name.split("/"):
        return Refused("bad_name", "its path leaves the archive by '..'")
    if is_link:
        return Refused("unreadable", "it is a symbolic link in an archive, which is not followed")
    if size > MOST_BYTES:
        return Refused("unreadable", f"it has {size:,} bytes; more than {MOST_BYTES:,} are not read")
    return None


def _tar(
    file: BinaryIO, stat: Stat, bytes_at: Callable[[int, int], bytes], keep: bool = False, cut: str = ""
) -> Archive:
    """Index an uncompressed tar. Members get the times of the tar, as it has no checksums of their contents."""
    members: dict[str, Stat | Refused] = {}
    places: dict[str, tuple[int, int] | bytes] = {}
    problem = cut
    with tarfile.open(fileobj=file, mode="r:") as tar:
        try:
            for member in tar:
                name = _name(member.name)
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                if member.islnk() and (target := _name(member.linkname)) in places:
                    members[name], places[name] = members[target], places[target]
                elif member.isreg() or member.issym():
                    refused = _refused(name, member.size, member.issym())
                    members[name] = refused or (member.size, stat[1], stat[2])
                    places[name] = (member.offset_data, member.size)
                    if keep and member.size <= SMALL and refused is None:
                        places[name] = tar.extractfile(member).read()  # type: ignore[union-attr]
        except (tarfile.ReadError, EOFError) as error:
            problem = problem or f"it is cut off ({error})"
        file.seek(tar.offset)
        end = file.read(tarfile.BLOCKSIZE)
    if not problem and len(end) < tarfile.BLOCKSIZE:
        problem = "its end mark is missing: it may be cut off, or was not closed"
    elif not problem and end.strip(b"\0"):
        problem = f"it is damaged at byte {tar.offset:,}: what follows is not read"

    def read(name: str, most: int | None) -> bytes:
        place = places[name]
        if isinstance(place, bytes):
            return place[:most]
        wanted = place[1] if most is None else min(place[1], most)
        data = bytes_at(place[0], wanted)
        if len(data) < wanted:
            raise EOFError("the archive ends before the file")
        return data

    return Archive(stat, members, read, problem and f"{problem}; the {len(members):,} files before that are read")


def _compressed_tar(path: str, file: BinaryIO, stat: Stat, opener: Callable[[Any], Any]) -> Archive:
    """Decompress a compressed tar to a temporary file without a name, and index that."""
    laid_out = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the archive is cached
    logger.info(
        "%s is compressed as a whole and has no random access: it is decompressed once for this run, to %s; a zip or plain "
        "tar needs no such step",
        path,
        tempfile.gettempdir(),
    )
    cut = ""
    try:
        with opener(file) as stream:
            while chunk := stream.read1(1 << 24):
                laid_out.write(chunk)
    except (*_DAMAGED, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        cut = f"it is damaged or cut off ({error})"
    laid_out.seek(0)
    return _tar(laid_out, stat, lambda start, size: os.pread(laid_out.fileno(), size, start), cut=cut)


def image_columns(schema: Any) -> list[str]:
    """Return the image columns of an Arrow schema: bytes, or a struct with `bytes`, as in Hugging Face data sets."""
    import pyarrow as pa

    def holds(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return bool(kind.get_field_index("bytes") >= 0)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    return [one.name for one in schema if holds(one.type)]


def _parquet(path: str, stat: Stat) -> Archive:
    """Index a Parquet file: each row is an image, named by its number and its file name, if there is one.

    If there are several columns of images, each is a folder.
    """
    import pyarrow.parquet as pq

    table = pq.ParquetFile(opened(path))
    columns = image_columns(table.schema_arrow)
    if not columns:
        raise OSError(None, "it has no column of images, of type binary or struct<bytes, path>")
    groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
    starts = np.cumsum([0, *(group.num_rows for group in groups)])
    members: dict[str, Stat | Refused] = {}
    for column in columns:
        kind, names = table.schema_arrow.field(column).type, [None] * table.metadata.num_rows
        if kind.num_fields and kind.get_field_index("path") >= 0:
            names = table.read(columns=[f"{column}.path"])[column].combine_chunks().field("path").to_pylist()
        for row, name in enumerate(names):
            member = f"{row:08d}" + (f"-{name.rpartition('/')[2]}" if name else "")
            members[f"{column}/{member}" if len(columns) > 1 else member] = (-1, stat[1], stat[2])
    lock = threading.Lock()

    @lru_cache(maxsize=GROUPS)
    def cells_of(column: str, group: int) -> Any:
        return table.read_row_group(group, columns=[column])[column]

    def read(name: str, most: int | None) -> bytes:
        column, _, member = name.rpartition("/")
        row = int(member[:8])
        group = int(np.searchsorted(starts, row, side="right")) - 1
        with lock:
            cells = cells_of(column or columns[0], group)
        cell = cells[row - int(starts[group])].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if data is None:
            raise EOFError(
                "its row has no bytes" + (f", only the path {cell['path']}" if cell and cell.get("path") else "")
            )
        return data[:most]  # type: ignore[no-any-return]

    return Archive(stat, members, read, holds_images=True)
