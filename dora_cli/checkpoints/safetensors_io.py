"""safetensors files read piece by piece with positioned reads, and written at places known beforehand.

The format: 8 bytes (little-endian length of the header), a JSON header ``name → {dtype, shape, data_offsets}``, then
the bytes of all tensors without gaps. A memory map would count every page it touched into resident memory, so parts
are read into buffers of our own.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_cli.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
FLOATS = ("F64", "F32", "BF16", "F16")  # those a weight can be added to

LARGEST_HEADER = 100_000_000  # the limit of the format's own library
CHUNK = 8 << 20  # bytes


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies.

    ``dtype`` is the file's name for it (``BF16``); ``start`` is in bytes from the beginning of the file.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a file in the order of its bytes, nothing but the header read.

    Raises:
        UserError: the file is missing or is not whole: lengths, names, shapes and the file's size must all agree.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise _damaged(path, f"{size:,} bytes, too few for its header")
        raw = file.read(length)
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(table, dict):
        raise _damaged(path, "its header is not a JSON object")
    table.pop("__metadata__", None)
    placed = [_entry(path, name, fields, 8 + length) for name, fields in table.items()]
    placed.sort(key=lambda entry: (entry.start, entry.nbytes))
    end = 8 + length
    for entry in placed:
        if entry.start != end:
            raise _damaged(path, f"'{entry.name}' starts at byte {entry.start:,}, expected {end:,}")
        end += entry.nbytes
    if end != size:
        raise _damaged(path, f"{size:,} bytes, its header describes {end:,}")
    return {entry.name: entry for entry in placed}


def _entry(path: Path, name: str, fields: Any, data: int) -> Entry:
    try:
        dtype, shape, (start, stop) = fields["dtype"], fields["shape"], fields["data_offsets"]
        integers = all(type(number) is int and number >= 0 for number in (*shape, start, stop))
    except (TypeError, KeyError, ValueError):
        raise _damaged(path, f"the header's entry of '{name}' is incomplete") from None
    if not integers or not isinstance(dtype, str):
        raise _damaged(path, f"the header's entry of '{name}' has wrong types")
    if dtype not in DTYPES:
        raise UserError(f"{path}: '{name}' has the unknown type {dtype}", hint=f"known: {', '.join(DTYPES)}")
    entry = Entry(path, name, dtype, tuple(shape), data + start)
    if stop - start != entry.nbytes:
        raise _damaged(path, f"'{name}' takes {stop - start:,} bytes, its shape {list(shape)} needs {entry.nbytes:,}")
    return entry


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged", where=what)


def write_header(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> dict[str, int]:
    """Start a file: its header, and its whole length reserved as a hole.

    Args:
        tensors: ``(name, dtype, shape)`` in the order of their bytes; wider types first, so that all lie aligned.

    Returns:
        ``name → first byte`` in the file.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + prod(shape) * DTYPES[dtype].itemsize
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    del table["__metadata__"]
    return {name: 8 + len(header) + fields["data_offsets"][0] for name, fields in table.items()}


@contextmanager
def descriptor(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    number = os.open(path, flags)
    try:
        yield number
    finally:
        os.close(number)


def read_into(source: int, start: int, buffer: memoryview, path: Path) -> None:
    """Fill ``buffer`` with the bytes of ``source`` (a descriptor of ``path``) from ``start`` on.

    Raises:
        UserError: the file ends before.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(source, [buffer[done:]], start + done)
        if count == 0:
            raise _damaged(path, f"it ends before byte {start + len(buffer):,}")
        done += count


def write_from(target: int, start: int, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        done += os.pwrite(target, buffer[done:], start + done)


def copy_bytes(entry: Entry, target: int, start: int) -> None:
    """Copy a tensor's bytes to ``start`` in ``target``: inside the kernel where it can, else in chunks."""
    with descriptor(entry.file) as source:
        done = 0
        in_kernel = os.name == "posix" and "copy_file_range" in dir(os)
        while done < entry.nbytes:
            count = min(CHUNK, entry.nbytes - done)
            if in_kernel:
                try:
                    copied = os.copy_file_range(source, target, count, entry.start + done, start + done)
                except OSError:  # another file system, or one that cannot
                    copied = 0
                in_kernel = copied > 0
                done += copied
            else:
                buffer = memoryview(bytearray(count))
                read_into(source, entry.start + done, buffer, entry.file)
                write_from(target, start + done, buffer)
                done += count


def same_bytes(a: Entry, b: Entry) -> bool:
    """Whether two tensors are one in two copies, looked at in chunks."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with descriptor(a.file) as first, descriptor(b.file) as second:
        for done in range(0, a.nbytes, CHUNK):
            one, other = (memoryview(bytearray(min(CHUNK, a.nbytes - done))) for _ in range(2))
            read_into(first, a.start + done, one, a.file)
            read_into(second, b.start + done, other, b.file)
            if one != other:
                return False
    return True


def read_tensor(entry: Entry) -> Tensor:
    """One tensor, in memory of its own.

    Raises:
        UserError: the file ends before, or a floating-point tensor holds a number that is not finite.
    """
    buffer = bytearray(entry.nbytes)
    with descriptor(entry.file) as source:
        read_into(source, entry.start, memoryview(buffer), entry.file)
    if not buffer:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    tensor = torch.frombuffer(buffer, dtype=DTYPES[entry.dtype]).view(entry.shape)
    require_finite(tensor, entry)
    return tensor


def require_finite(tensor: Tensor, entry: Entry) -> None:
    """Raise a UserError that names the tensor where it holds NaN or infinity."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise UserError(
            f"{entry.file}: '{entry.name}' holds numbers that are not finite",
            hint="the training diverged, or the file is damaged",
        )
