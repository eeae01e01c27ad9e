"""Merging shards: one set of results, equal to that of a single run. Needs neither the model nor the images."""

from __future__ import annotations

import os
import shlex
import shutil
from contextlib import suppress
from pathlib import Path

from umiad.errors import DiskError, InputError
from umiad.filerecord import FileRecord, Names, by_index
from umiad.journal import SHARDS, UNFINISHED, ShardFacts, read_facts, read_records, shard_folder, whole
from umiad.scorebook import SCORES, Book, Summary
from umiad.workfolder import FolderLock
from umiad.worklist import Shard


def merge_shards(out: Path) -> Summary:
    """Merge the shards below `out` into `out` and return the summary; the shards stay.

    Writes what one run would have written, byte for byte where the scores are equal, but for peak memory, which
    summary.json lists by shard. Maps and pictures are hard links where the disk knows them, else copies.

    Raises:
        InputError: a shard is missing, damaged, not whole, or belongs to other work; names it and the remedy.
            Nothing has been written then.
        DiskError: the folder cannot be written.
    """
    try:
        shards = _found(out)
        if (out / UNFINISHED).exists():
            reason = f"holds {UNFINISHED}: a run of all files there is not finished"
            raise InputError(
                out, reason, "wait for it, or go on with --resume, or remove that folder; then merge"
            )
        lock = FolderLock(out / SHARDS, job="merge")
        lock.acquire()
        try:
            facts = _checked_facts(out, shards)
            records = sorted(_records(out, facts), key=lambda record: record.index)
            return _write(out, facts, records)
        finally:
            lock.release()
    except OSError as error:
        raise DiskError(f"{out}: cannot be written: {error}") from error


def command_for(shard: Shard, out: Path) -> str:
    """The command that scores a shard, or goes on with it."""
    return f"umiad score MODEL PATH... --out {shlex.quote(str(out))} --shard {shard}"


def _found(out: Path) -> list[Shard]:
    """All shards, which must be those of one number. Raises InputError."""
    names: list[str] = []
    with suppress(FileNotFoundError, NotADirectoryError):
        names = os.listdir(out / SHARDS)
    found = sorted(shard for name in names if (shard := Shard.of_folder(name)) is not None)
    if not found:
        raise InputError(out, f"holds no {SHARDS}", f"score them first: {command_for(Shard(1, 2), out)}")
    first = min(found, key=lambda shard: shard.of)
    for shard in found:
        if shard.of != first.of:
            reason = f"shard {shard} lies beside shard {first}, expected shards of one number"
            raise InputError(out / SHARDS, reason, "delete the folders that do not belong to the rest")
    for number in range(1, first.of + 1):
        if (shard := Shard(number, first.of)) not in found:
            raise InputError(out / SHARDS, f"shard {shard} is missing", command_for(shard, out))
    return found


def _checked_facts(out: Path, shards: list[Shard]) -> list[ShardFacts]:
    """What each shard says it is; all must be parts of one piece of work. Raises InputError."""
    facts: list[ShardFacts] = []
    for shard in shards:
        folder = shard_folder(out, shard)
        anew = f"delete {folder} and score it again: {command_for(shard, out)}"
        try:
            each = read_facts(folder)
        except InputError as error:
            raise InputError(folder, f"shard {shard}: {error.reason}", anew) from error
        if each.shard != shard:
            raise InputError(folder, f"shard {shard}: its folder holds shard {each.shard}", anew)
        if facts and (words := facts[0].difference(each)):
            raise InputError(
                folder, f"shard {shard} was made with {words}, compared with shard {shards[0]}", anew
            )
        facts.append(each)
    return facts


def _records(out: Path, facts: list[ShardFacts]) -> list[FileRecord]:
    """All files of all shards. Raises InputError where one is not done, or its map or picture not there."""
    found: list[FileRecord] = []
    for each in facts:
        folder = shard_folder(out, each.shard)
        records, _ = read_records(folder, each)
        done, wanted = whole(records, folder, by_index), len(each.shard.indices(each.files))
        if done < wanted:
            reason = f"shard {each.shard} is not whole: {done} of {wanted} files are done"
            raise InputError(folder, reason, f"go on with it: {command_for(each.shard, out)}")
        found += records
    return found


def _write(out: Path, facts: list[ShardFacts], records: list[FileRecord]) -> Summary:
    names, fresh = Names(), out / f".{SCORES}.umiad-new"
    try:
        with fresh.open("w", encoding="utf-8") as lines:
            book = Book(out, facts[0], lines)
            for record in records:
                name, stem = names.of(record)
                source = shard_folder(out, Shard(record.index % facts[0].of + 1, facts[0].of))
                inside = record.outputs(by_index(record)[1])
                for (own, _), (target, _) in zip(inside, record.outputs(stem), strict=True):
                    _place(source / own, out / target)
                book.add(record, name, stem)
        fresh.replace(out / SCORES)
    finally:
        fresh.unlink(missing_ok=True)
    book.summary.shard_memory = [each.peak_memory for each in facts]
    return book.finish()


def _place(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the disk knows no such thing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
