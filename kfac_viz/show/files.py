"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

PART = ".part"  # how a temporary name ends


def folder(out_dir: str | Path | None) -> Path | None:
    """The folder that is meant; None where nothing is to be written.

    Raises:
        TypeError: a number or a truth value, which papermill makes of a name like 2024.
    """
    if out_dir is not None and not isinstance(out_dir, (str, os.PathLike)):
        raise TypeError(
            f"out_dir must be the name of a folder; got {out_dir!r} of type {type(out_dir).__name__}. "
            f"Write -r out_dir {out_dir} for papermill, with -r in place of -p."
        )
    return Path(out_dir) if out_dir else None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(contents: Mapping[str, bytes], out: Path) -> tuple[Path, ...]:
    """Write files into ``out``, which is made if it is missing: the one way in which anything is published.

    All are written under temporary names first, so that a full disk changes nothing. Records, the JSON files, are then
    taken away, and come last: whatever stops this in between, a record stands only beside the files that it is of.

    Raises:
        ValueError: a folder stands where a file is to be written.
        OSError: ``out`` cannot be written, or the disk is full.
    """
    refuse_folders(out / name for name in contents)
    out.mkdir(parents=True, exist_ok=True)
    temporary = {name: out / f".{name}.{os.getpid()}{PART}" for name in contents}
    records = {name for name in contents if name.endswith(".json")}
    try:
        for name, data in contents.items():
            temporary[name].write_bytes(data)
        for name in records:
            (out / name).unlink(missing_ok=True)
        for name in sorted(contents, key=lambda name: name in records):
            os.replace(temporary[name], out / name)
    finally:
        for part in temporary.values():
            part.unlink(missing_ok=True)
    return tuple(out / name for name in contents)


def refuse_folders(files: Iterable[Path]) -> None:
    """ValueError if a folder stands where a file is to be written."""
    for file in files:
        if file.is_dir():
            raise ValueError(f"{file} is a folder, and a file of that name is to be written. Move it away.")
