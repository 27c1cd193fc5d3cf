"""The sources that a listing names: a table of paths and captions."""

import csv
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wan_data.sources.captions import (
    LARGEST_LISTING,
    LONGEST_CAPTION,
    NAME_KEYS,
    caption_in,
    check_rows,
    json_lines,
    text_lines,
)
from wan_data.sources.source import NO_UNICODE, SourceFile, source_suffixes
from wan_data.sources.source_table import SourceTable
from wan_data.sources.texts import text_copy
from wan_data.storage.location import Location, StorePath, location
from wan_model.system.safe_reading import require_file

LISTING_SUFFIXES = (".jsonl", ".csv", ".parquet")
_BATCH_ROWS = 4096


def files_of_listing(
    listing: Location, folder: Location | None = None, *, images: bool = False, caption_key: str = "caption"
) -> SourceTable:
    """The rows of a .jsonl, .csv or .parquet file, by name.

    A row has a path under one of ``wan_data.sources.captions.NAME_KEYS``, relative to ``folder``, absolute or a URL,
    and the caption under ``caption_key``; other columns are ignored. A listing in a store names no absolute path.

    Args:
        listing: the file, or the object of a store.
        folder: the folder that paths are relative to; the listing's own folder if None.
        images: images are sources, as videos are.
        caption_key: the column, or key, of the caption.

    Raises:
        ValueError: the listing cannot be read, or has no rows.
        OSError: it cannot be read from the store.
    """
    if listing.suffix.lower() not in LISTING_SUFFIXES:
        raise ValueError(f"{listing} is no listing; expected a file ending in {', '.join(LISTING_SUFFIXES)}")
    if isinstance(listing, StorePath):
        with text_copy(listing, LARGEST_LISTING) as path:
            return _sources_of(path, listing.parent if folder is None else folder, images, caption_key, local=False)
    try:
        require_file(listing)
    except FileNotFoundError:
        raise ValueError(f"{listing} does not exist; expected a listing of paths and captions") from None
    return _sources_of(listing, listing.parent if folder is None else folder, images, caption_key, local=True)


def _sources_of(listing: Path, folder: Location, images: bool, caption_key: str, *, local: bool) -> SourceTable:
    read = {".jsonl": _rows_of_jsonl, ".csv": _rows_of_csv, ".parquet": _rows_of_parquet}[listing.suffix.lower()]
    sources = SourceTable(folder)
    repeated: dict[str, tuple[str, int]] = {}  # where a file is listed for the second time, and how often in all
    for number, (where, row) in enumerate(read(listing, caption_key), start=1):
        check_rows(listing, number)
        if number == 1 and listing.suffix.lower() != ".jsonl":
            _check_columns(listing, row)
        source = _row(where, row, folder, source_suffixes(images=images), caption_key, local=local)
        if not sources.add(source):
            first, times = repeated.get(source.name, (where, 1))
            repeated[source.name] = first, times + 1
    if not len(sources):
        raise ValueError(f"{listing} has no rows; expected one a video, with its path and its caption")
    for name, (where, times) in repeated.items():
        problem = f"it is listed {'twice' if times == 2 else f'{times:,} times'}; keep one row"
        first_row = sources.find(name)
        assert first_row is not None, "it is listed more than once"
        sources.add(SourceFile(f"{name} ({where})", first_row.path, problem=problem))
    return sources


def _check_columns(listing: Path, row: Any) -> None:
    """Refuse a table that has no column of paths, such as one of another separator, once and not row by row."""
    if isinstance(row, dict) and not any(key in row for key in NAME_KEYS):
        columns = ", ".join(repr(str(name)[:60]) for name in list(row)[:10])
        commas = ", and commas between the columns" if listing.suffix.lower() == ".csv" else ""
        raise ValueError(
            f"{listing} has the columns {columns}; expected paths under one of {', '.join(NAME_KEYS)}{commas}"
        )


def _row(
    where: str, row: Any, folder: Location, suffixes: tuple[str, ...], caption_key: str, *, local: bool
) -> SourceFile:
    if isinstance(row, ValueError):
        said = str(row)  # it is named by its line already
        return SourceFile(
            where, None, problem=f"it{said.removeprefix(where)}" if said.startswith(f"{where} ") else said
        )
    listed = next((row[key] for key in NAME_KEYS if isinstance(row.get(key), str) and row[key].strip()), None)
    if listed is None:
        return SourceFile(where, None, problem=f"it has no path: expected one under {', '.join(NAME_KEYS)}")
    try:
        path, name = _place(listed, folder, local=local)
    except ValueError as error:
        # Not under its name, which may have credentials in it.
        return SourceFile(where, None, problem=str(error))
    if path.suffix.lower() not in suffixes:
        return SourceFile(name, path, problem=f"{where} names it; expected a file ending in {', '.join(suffixes)}")
    try:
        name.encode()
        return SourceFile(name, path, caption_in(row, caption_key, where))
    except UnicodeEncodeError:
        return SourceFile(where, path, problem=NO_UNICODE)
    except ValueError as error:
        return SourceFile(name, path, problem=str(error))


def _place(listed: str, folder: Location, *, local: bool) -> tuple[Location, str]:
    """The file, or the object, that a row names, and its name in the dataset.

    Raises:
        ValueError: it is a URL that cannot be read, or a path where there can be none.
    """
    given = location(listed)
    if isinstance(given, StorePath):
        inside = isinstance(folder, StorePath) and given.root == folder.root and given.key.startswith(folder.prefix)
        return given, given.relative_to(folder) if isinstance(folder, StorePath) and inside else str(given)
    key = posixpath.normpath(listed)
    inside = not posixpath.isabs(key) and key.split("/")[0] != ".."
    if isinstance(folder, StorePath) and not posixpath.isabs(key):
        path = location(f"{folder.root}/{posixpath.normpath(posixpath.join(folder.key, key))}")
        return path, key if inside else str(path)
    if not (local or inside):
        raise ValueError("a listing in a store names a path of this machine; expected names in its folder, or URLs")
    path = given if isinstance(folder, StorePath) else folder / given
    if isinstance(folder, Path) and given.is_absolute() and path.is_relative_to(folder):
        return path, os.path.normpath(path.relative_to(folder))
    return path, key


def _rows_of_jsonl(listing: Path, caption_key: str) -> Iterator[tuple[str, Any]]:
    for where, value in json_lines(listing):
        if isinstance(value, dict | ValueError):
            yield where, value
        else:
            yield where, ValueError(f"{where} holds a JSON {type(value).__name__}; expected an object")


def _rows_of_csv(listing: Path, caption_key: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader((text + "\n" for text in text_lines(listing)), strict=True)
    try:
        for row in reader:
            where = f"{listing.name} line {reader.line_num}"
            yield where, ValueError(f"{where} has more cells than the first line has names") if None in row else row
    except csv.Error as error:
        raise ValueError(f"{listing} is not CSV: {error} at line {reader.line_num}") from None


def _rows_of_parquet(listing: Path, caption_key: str) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        raise ValueError(f"{listing} needs pyarrow to be read: pip install 'wan-data[parquet]'") from None
    try:
        names = parquet.read_schema(listing).names
        if caption_key not in names:
            raise ValueError(
                f"{listing} has no column {caption_key!r}, only {', '.join(map(repr, names))}; choose another with "
                "--caption-key"
            )
        columns = [name for name in names if name in (*NAME_KEYS, caption_key)]
        # A few bytes can stand for gigabytes of equal values, which stay one value in a dictionary.
        with parquet.ParquetFile(listing, read_dictionary=columns) as file:
            check_rows(listing, file.metadata.num_rows)
            for number in range(file.num_row_groups):
                size = file.metadata.row_group(number).total_byte_size
                if size > LARGEST_LISTING:
                    raise ValueError(
                        f"{listing} has a row group of {size:,} bytes; expected at most {LARGEST_LISTING:,}"
                    )
            number = 0
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                for name, column in zip(batch.schema.names, batch.columns, strict=True):
                    _check_column(column, f"{listing} has in the column {name!r}")
                for row in batch.to_pylist():
                    number += 1
                    yield f"{listing.name} row {number}", row
    except (ArrowException, OSError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"{listing} is not Parquet: {reason}") from None


def _check_column(column: Any, what: str) -> None:
    """Refuse texts far beyond a caption before each row gets a copy of them."""
    import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
    from pyarrow import compute  # type: ignore[import-untyped,unused-ignore]

    values = column.dictionary if pa.types.is_dictionary(column.type) else column
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return
    longest = compute.max(compute.binary_length(values)).as_py() or 0
    # A letter has at most four bytes.
    if longest > 4 * LONGEST_CAPTION:
        raise ValueError(f"{what} a text of {longest:,} bytes; expected at most {4 * LONGEST_CAPTION:,}")
