"""A folder of photos packed in every way that is read, and a file server on loopback."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq


def images_of(photos: Path) -> list[Path]:
    return sorted(photos.rglob("*.png"))


def zipped(photos: Path, target: Path, below: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(target, "w", method) as file:
        for path in images_of(photos):
            file.write(path, below + str(path.relative_to(photos)))
    return target


def tarred(photos: Path, target: Path, mode: str = "w") -> Path:
    with tarfile.open(target, mode) as file:  # type: ignore[call-overload]
        file.add(photos, ".")
    return target


def add(file: tarfile.TarFile, name: str, data: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(data)
    file.addfile(about, io.BytesIO(data))


LABELS: Mapping[str, Callable[[str], str]] = {
    "cls": str,
    "txt": lambda label: f"{label}\n",
    "json": lambda label: json.dumps({"width": 3, "label": label}),
}


def shard(target: Path, images: Iterable[Path], ending: str = "cls") -> Path:
    """A WebDataset: each image with a file of the same key that has its label."""
    with tarfile.open(target, "w") as file:
        for path in images:
            key = f"{len(path.parent.name)}{path.stem}"
            add(file, f"{key}.png", path.read_bytes())
            add(file, f"{key}.{ending}", LABELS[ending](path.parent.name).encode())
    return target


def shards(photos: Path, folder: Path, ending: str = "cls", names: tuple[str, ...] = ("s-0", "s-1", "s-2")) -> Path:
    folder.mkdir()
    for number, name in enumerate(names):
        shard(folder / f"{name}.tar", images_of(photos)[number :: len(names)], ending)
    return folder


def parquet(photos: Path, target: Path, as_struct: bool = True, part: slice = slice(None)) -> Path:
    """A table as Hugging Face writes it: labels are numbers, whose names stand in the schema."""
    images = images_of(photos)[part]
    classes = sorted({path.parent.name for path in images_of(photos)})
    cells = [{"bytes": path.read_bytes(), "path": path.name} if as_struct else path.read_bytes() for path in images]
    table = pa.table({"image": cells, "label": [classes.index(path.parent.name) for path in images]})
    features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    described = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(described, target, row_group_size=5)
    return target


@contextmanager
def serving(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder on loopback as WebHDFS does, which fsspec reads by plain HTTP; yield the address and what was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            path = root / unquote(url.path).removeprefix("/webhdfs/v1").strip("/")
            query = {key.lower(): values[0] for key, values in parse_qs(url.query).items()}
            asked.append(f"{query['op']} {path.name}")
            if not path.exists():
                self.answer(404, b'{"RemoteException": {"message": "there is no such file"}}')
            elif query["op"] == "OPEN":
                start = int(query.get("offset", 0))
                length = query.get("length")
                self.answer(200, path.read_bytes()[start : start + int(length) if length else None])
            elif query["op"] == "LISTSTATUS":
                found = (
                    [status(each, each.name) for each in sorted(path.iterdir())]
                    if path.is_dir()
                    else [status(path, "")]
                )
                self.answer(200, json.dumps({"FileStatuses": {"FileStatus": found}}).encode())
            else:
                self.answer(200, json.dumps({"FileStatus": status(path, "")}).encode())

        def answer(self, code: int, data: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"webhdfs://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def status(path: Path, name: str) -> dict[str, Any]:
    about = path.stat()
    kind = "DIRECTORY" if path.is_dir() else "FILE"
    return {
        "pathSuffix": name,
        "type": kind,
        "length": about.st_size,
        "modificationTime": about.st_mtime_ns // 1_000_000,
    }
