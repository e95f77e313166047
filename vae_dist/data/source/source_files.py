"""Which files a source has, what each holds, and the split that its name says."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from pyarrow import fs

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.source.huggingface import saved_datasets
from vae_dist.data.source.pieces import SourceFile
from vae_dist.errors import DataError

_SPLIT_OF_WORD = {
    "train": "train", "valid": "valid", "val": "valid", "validation": "valid", "dev": "valid", "test": "test",
}  # fmt: skip
_FORMAT_OF_SUFFIX = {
    ".txt": "text", ".text": "text", ".tokens": "wikitext", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".parquet": "parquet", ".tar": "tar", ".tgz": "tar", ".json": "captions_json", ".tsv": "captions_tsv",
    ".token": "captions_tsv",
}  # fmt: skip
# Where the format is given, more names say nothing against it.
_MORE_SUFFIXES = {"text": (".tokens", ".raw"), "wikitext": (".txt", ".text", ".raw"), "captions_tsv": (".txt",)}
# train.txt; wiki.train.tokens, captions_train2017.json; the numbered pieces of a split, train-00000-of-00004.parquet.
_SPLIT_NAME = re.compile(rf"((?:[\w-]+\.|captions_)?({'|'.join(_SPLIT_OF_WORD)})(?:\d{{4}})?)(?:[-_.]\d.*)?")


def find_files(filesystem: fs.FileSystem, path: str, name: str, options: PrepareConfig) -> list[SourceFile]:
    """The files of a source in the order they are read; name is what messages call it.

    Raises:
        DataError: nothing there, nothing of a known kind, or two files for one split.
    """
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        hint = "" if "://" in name else _near(Path(name))
        raise DataError(f"There is no source {name}.{hint} Give a file, a directory, a URL, or `docstrings`.")
    if info.type == fs.FileType.Directory:
        return _datasets_in(filesystem, info.path, name, options) or _files_in(filesystem, info.path, name, options)
    return [as_source_file(info, _format_of(name, info, options), None)]


def as_source_file(info: fs.FileInfo, kind: str, split: str | None) -> SourceFile:
    """A file that was looked up."""
    return SourceFile(info.path, kind, split, info.size, info.mtime_ns or 0)


def _datasets_in(filesystem: fs.FileSystem, folder: str, name: str, options: PrepareConfig) -> list[SourceFile]:
    """What `save_to_disk` left there, if anything; a DatasetDict's other splits are left aside as other files are."""
    if options.format not in ("auto", "datasets"):
        return []
    found = saved_datasets(filesystem, folder)
    if found is None and options.format == "datasets":
        raise DataError(
            f"{name} holds no dataset_dict.json and no state.json, so it is no Hugging Face dataset. Give the folder "
            "that save_to_disk wrote."
        )
    splits = {file.path: _SPLIT_OF_WORD.get((word or "").lower()) for word, file in found or []}
    files = [SourceFile(f.path, f.format, splits[f.path], f.bytes, f.mtime_ns) for _, f in found or []]
    if "train" not in splits.values():
        return [SourceFile(f.path, f.format, None, f.bytes, f.mtime_ns) for f in files]
    return [file for file in files if file.split is not None]


def _files_in(filesystem: fs.FileSystem, folder: str, name: str, options: PrepareConfig) -> list[SourceFile]:
    for recursive in (False, True):
        listed = filesystem.get_file_info(fs.FileSelector(folder, recursive=recursive))
        files = [info for info in sorted(listed, key=lambda info: info.path) if info.is_file]
        known = [info for info in files if _is_data(info.path[len(folder) :], options.format)]
        if known:
            break
    else:
        raise DataError(
            f"{name} holds no file of a known kind ({', '.join(_FORMAT_OF_SUFFIX)}; all but Parquet also with .gz). "
            "Files called train, valid and test are used as the splits."
        )
    splits = {info.path: _split_of(info.path) for info in known}
    if "train" not in splits.values():
        return [as_source_file(info, _format_of(name, info, options), None) for info in known]
    _refuse_ambiguous(name, [path for path in splits if splits[path] is not None])
    return [
        as_source_file(info, _format_of(name, info, options), splits[info.path])
        for info in known
        if splits[info.path] is not None
    ]


def _refuse_ambiguous(name: str, paths: list[str]) -> None:
    """Two different files for one split would silently be read one after the other."""
    first: dict[str, str] = {}
    for path in paths:
        split = str(_split_of(path))
        other = first.setdefault(split, path)
        if _stem(other) != _stem(path) or _ending(other) != _ending(path):
            raise DataError(
                f"{name} holds two versions of the {split} split, {Path(other).name} and {Path(path).name}. Move one "
                "away."
            )


def _format_of(name: str, info: fs.FileInfo, options: PrepareConfig) -> str:
    if options.format != "auto":
        return options.format
    suffix = _suffix(info.path)
    if suffix not in _FORMAT_OF_SUFFIX:
        raise DataError(
            f"The name of {name} does not say what it holds (known: {', '.join(_FORMAT_OF_SUFFIX)}, with or without "
            ".gz). Set prepare.format to text, jsonl, parquet, tar or another."
        )
    return _FORMAT_OF_SUFFIX[suffix]


def _is_data(relative: str, kind: str) -> bool:
    """Whether a file of a folder is read when the format is `kind`."""
    path, suffix = Path(relative), _suffix(relative)
    if any(part.startswith((".", "_")) for part in path.parts):
        return False
    # Many folders hold some JSON that is about the data; COCO's annotations hold more than captions.
    if suffix == ".json" and not path.name.startswith("captions"):
        return False
    own = _FORMAT_OF_SUFFIX.get(suffix)
    return own is not None if kind == "auto" else own == kind or suffix in _MORE_SUFFIXES.get(kind, ())


def _suffix(path: str) -> str:
    return Path(path.removesuffix(".gz")).suffix.lower()


def _ending(path: str) -> str:
    return _suffix(path) + (".gz" if path.endswith(".gz") else "")


def _match(path: str) -> re.Match[str] | None:
    return _SPLIT_NAME.fullmatch(Path(path.removesuffix(".gz")).stem.lower())


def _stem(path: str) -> str | None:
    """What the numbered pieces of one split have in common."""
    match = _match(path)
    return match.group(1) if match else None


def _split_of(path: str) -> str | None:
    match = _match(path)
    return _SPLIT_OF_WORD[match.group(2)] if match else None


def _near(path: Path) -> str:
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=3)
    return f" Did you mean {' or '.join(str(path.parent / n) for n in near)}?" if near else ""
