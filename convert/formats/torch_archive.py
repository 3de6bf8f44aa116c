"""The zip archive that `torch.save` writes: where the bytes of each record lie, once all that it says of itself has been checked."""

from __future__ import annotations

import binascii
import io
import itertools
import os
import stat
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

from maverick_jax import stand_ins
from maverick_jax.errors import UserError

MAX_TABLE = 2 << 20  # bytes of the archive's table of contents: 15,000 records
MAX_PICKLE = 8 << 20  # bytes; a rank of Maverick has 300,000
LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # then name and extra field, then the record
BEFORE_1_6 = (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", b"ustar")  # how a file begins; how a tar goes on at byte 257


class Record(NamedTuple):
    """Bytes of the file."""

    offset: int
    nbytes: int


class Archive(NamedTuple):
    """What lies in a file of `torch.save`.

    Attributes:
      pickle: what was saved, but for the tensors' bytes.
      data: those, by the key that the pickle gives them.
    """

    pickle: bytes
    data: dict[str, Record]


def read_archive(file: Path) -> Archive:
    """Look at every record, and read the pickle.

    Raises:
      UserError: no file, or none of `torch.save`; cut short; or its records are not plain bytes of this machine's order, each in a
        place of its own.
    """
    try:
        mode = file.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # to open a pipe would wait for ever
            raise UserError(f"{file} is not a file: fetch it again.")
        with _Stream(file) as stream:
            return _read(file, stream)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error
    except UserError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError) as error:
        raise UserError(f"{file} is damaged or not a file of torch.save ({error}): fetch it again.") from error


class _Stream(io.FileIO):
    """A file of which no large part is read at once, whatever its table of contents says of its size."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_TABLE:
            raise zipfile.BadZipFile(f"a table of contents of {size:,} bytes")
        return super().read(size)


def _read(file: Path, stream: _Stream) -> Archive:
    _check_kind(file, stream)
    archive = zipfile.ZipFile(stream)
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    spans = [_locate(file, stream, info) for info in infos]
    ends = [span.offset + span.nbytes for span in spans]
    starts = [*(info.header_offset for info in infos), archive.start_dir]
    for info, end, (begin, after) in zip(infos, ends, itertools.pairwise(starts), strict=True):
        if not 0 <= begin < end <= after:
            raise ValueError(f"{info.filename} shares bytes with what comes behind it")
    records = {info.filename: span for info, span in zip(infos, spans, strict=True)}
    if len(records) < len(infos):
        raise ValueError("two records have one name")
    folder = min(records, default="").partition("/")[0]
    if (order := _small(stream, records.get(f"{folder}/byteorder"))) not in (b"little", None):
        raise UserError(f"{file} has bytes in {order!a} order: load it where it was saved, and save it again on a little-endian machine.")
    name = f"{folder}/data.pkl"
    if name not in records:
        raise ValueError(f"it has no {name}")
    if records[name].nbytes > MAX_PICKLE:
        raise ValueError(f"{name} has {records[name].nbytes:,} bytes, more than the {MAX_PICKLE:,} of any checkpoint")
    pickle = os.pread(stream.fileno(), records[name].nbytes, records[name].offset)
    checksum = archive.getinfo(name).CRC
    if checksum and binascii.crc32(pickle) != checksum:  # torch leaves it out on request
        raise ValueError(f"{name} has changed since it was written")
    prefix = f"{folder}/data/"
    return Archive(pickle, {path.removeprefix(prefix): span for path, span in records.items() if path.startswith(prefix)})


def _check_kind(file: Path, stream: _Stream) -> None:
    begin = os.pread(stream.fileno(), stand_ins.ENOUGH, 0)
    if (instead := stand_ins.explain_text(begin)) is not None:
        raise UserError(f"{file} {instead}")
    if begin.startswith(BEFORE_1_6[0]) or begin[257:].startswith(BEFORE_1_6[1]):
        raise UserError(f"{file} is in torch's format before 1.6: load it and save it again with torch.save.")
    if begin.startswith(b"PK\3\4") and not zipfile.is_zipfile(stream):
        raise UserError(f"{file} ends before its table of contents does: the download is incomplete; fetch this file again.")


def _locate(file: Path, stream: _Stream, info: zipfile.ZipInfo) -> Record:
    """Where a record's bytes are, by its own header, which must agree with the table of contents."""
    if info.flag_bits & 1:
        raise UserError(f"{file}: {info.filename} is encrypted, which torch.save never does: fetch the released file.")
    if info.compress_type != zipfile.ZIP_STORED:
        raise UserError(
            f"{file}: {info.filename} is compressed, which torch.save never does: fetch the released file, or load this one and "
            "save it again with torch.save."
        )
    if info.compress_size != info.file_size:
        raise ValueError(f"{info.filename} has {info.compress_size:,} bytes and {info.file_size:,}")
    if info.header_offset < 0:
        raise ValueError(f"{info.filename} begins before the file does")
    name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    header = os.pread(stream.fileno(), LOCAL_HEADER.size + len(name), info.header_offset)
    mark, _, flags, method, *_, name_size, extra_size = LOCAL_HEADER.unpack_from(header.ljust(LOCAL_HEADER.size, b"\0"))
    if (mark, flags & 1, method, name_size, header[LOCAL_HEADER.size :]) != (b"PK\3\4", 0, zipfile.ZIP_STORED, len(name), name):
        raise ValueError(f"{info.filename} is not where the table of contents says")
    found = Record(info.header_offset + LOCAL_HEADER.size + name_size + extra_size, info.file_size)
    if found.offset + found.nbytes > os.fstat(stream.fileno()).st_size:
        raise UserError(f"{file} ends before {info.filename} does: the download is incomplete; fetch this file again.")
    return found


def _small(stream: _Stream, record: Record | None) -> bytes | None:
    return record and os.pread(stream.fileno(), min(record.nbytes, 16), record.offset)
