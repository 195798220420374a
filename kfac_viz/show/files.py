"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path


def folder(out_dir: str | Path | None) -> Path | None:
    """The folder that is meant; None where nothing is to be written.

    Raises:
        TypeError: a number or a truth value, which papermill makes of a name like 2024.
    """
    if out_dir is not None and not isinstance(out_dir, (str, os.PathLike)):
        raise TypeError(f"out_dir must be the name of a folder; got {out_dir!r} of type {type(out_dir).__name__}. "
                        f"Write -r out_dir {out_dir} for papermill, with -r in place of -p.")
    return Path(out_dir) if out_dir else None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(contents: dict[str, bytes], out: Path) -> tuple[Path, ...]:
    """Write files into ``out``, which is made if it is missing: each of them whole, a record last."""
    out.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=out, prefix=".making-"))
    try:
        for name, data in contents.items():
            (made / name).write_bytes(data)
        move(made, out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return tuple(out / name for name in contents)


def move(ready: Path, out: Path) -> None:
    """Replace the files in ``out`` by those of a complete tree.

    Records, the JSON files, are taken away first and come last, stamps after all others: whatever stops this in
    between, a record stands only beside the files that it was made with.
    """
    files = [file.relative_to(ready) for file in ready.rglob("*") if file.is_file()]
    refuse_folders(out / file for file in files)
    for file in files:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
    records = {file for file in files if file.suffix == ".json"}
    for record in records:
        (out / record).unlink(missing_ok=True)
    for file in sorted(files, key=lambda file: (file.parts[0] == ".made", file in records, file)):
        os.replace(ready / file, out / file)
    shutil.rmtree(ready)


def refuse_folders(files: Iterable[Path]) -> None:
    """ValueError if a folder stands where a file is to be written."""
    for file in files:
        if file.is_dir():
            raise ValueError(f"{file} is a folder, and a file of that name is to be written. Move it away.")
