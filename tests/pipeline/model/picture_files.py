"""Picture files as people have them, the kinds that Pillow reads but does not write included."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def picture(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack((x * 255 // width, y * 255 // height, (x + y) % 256), axis=-1).astype(np.uint8)


def save(path: Path, image: np.ndarray, **kwargs: object) -> Path:
    Image.fromarray(image).save(path, **kwargs)
    return path


def write_tiff(path: Path, samples: np.ndarray, photometric: int, sample_format: int = 1) -> Path:
    """One uncompressed strip. photometric: 0 white is zero, 1 black is zero, 2 RGB; sample_format: 1 whole, 2 signed, 3 float."""
    height, width, count = (*samples.shape, 1)[:3]
    data = samples.tobytes()
    start = 8 + 2 + 9 * 12 + 4
    bits = samples.dtype.itemsize * 8
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, start), (277, count)]
    tags += [(279, len(data)), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data)
    return path


def write_png16(path: Path, samples: np.ndarray, key: tuple[int, ...] = ()) -> Path:
    """uint16 (H, W) or (H, W, 2 | 3 | 4); key: the one grey or colour that is transparent."""
    height, width, count = (*samples.shape, 1)[:3]

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = samples.reshape(height, -1).astype(">u2")
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[count], 0, 0, 0)
    parts = [(b"IHDR", header), *([(b"tRNS", struct.pack(f">{len(key)}H", *key))] if key else [])]
    parts += [(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    return path
