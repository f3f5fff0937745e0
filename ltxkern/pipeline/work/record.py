"""One record of a work folder: named tensors in a safetensors file that is there whole or not at all, with a checksum."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ltxkern.pipeline.results.atomic import replacing_file

SUFFIX = ".safetensors"
_HEADER = "ltxkern"


class DamagedRecordError(ValueError):
    """A record that is truncated, changed, or of another run; the message names the file."""


def write_record(path: Path, tensors: Mapping[str, Tensor], run: str) -> None:
    """Write tensors of any device under another name, to the disk, then under this one.

    Args:
        run: name of the run that they belong to.

    Raises:
        OSError: the disk is full or the folder cannot be written; what stood there stays.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Tensors that share memory, as modalities that reuse a prediction do, are refused by the format.
    apart = {name: tensor.clone() if _is_part(tensor) else tensor for name, tensor in held.items()}
    header = {"run": run, "checksum": checksum(apart)}
    with replacing_file(path) as temporary:
        # Not save_file, whose errors do not say that the disk is full.
        temporary.write_bytes(save(apart, metadata={_HEADER: json.dumps(header)}))


def read_record(path: Path, run: str) -> dict[str, Tensor]:
    """The tensors of a record, in memory of their own on the host.

    As the format hands them out they lie in the file, where its header ends, and a matrix product may round otherwise for an
    operand that begins elsewhere than a fresh one does.

    Raises:
        FileNotFoundError: there is none.
        DamagedRecordError: it is not what this run wrote.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedRecordError(f"{path} cannot be read ({error})") from error
    if header.get("checksum") != checksum(tensors):
        raise DamagedRecordError(f"{path} does not have the checksum it was written with")
    if header.get("run") != run:
        raise DamagedRecordError(f"{path} is of another run")
    return tensors


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 over names, dtypes, shapes and bytes: it is there for what disks do, and runs at 4 GB/s."""
    total = 0
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode(), total)
        if tensor.numel():
            total = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, total)
    return total


def _is_part(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.nbytes
