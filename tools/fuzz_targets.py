"""What `tools.fuzz` feeds to which reader: files of models and LoRAs, what a run keeps, texts, pictures, requests, bodies."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

MIB = 2**20
DEFAULTS = {"height": 128, "width": 192, "num_frames": 25}
# Beyond what the process has when the first input comes. A picture may have 178,956,970 pixels of four bytes, and be turned.
FILE_LIMIT, PICTURE_LIMIT = 256 * MIB, 2048 * MIB


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        name: of it.
        inputs: strategy of what it is fed with; each is mutated too.
        examples: inputs that it takes, where further mutations start.
        read: reads one input.
        limit: bytes that it may take.
        mutations: for each input that is drawn.
    """

    name: str
    inputs: st.SearchStrategy[bytes]
    examples: tuple[bytes, ...]
    read: Callable[[bytes], object]
    limit: int = FILE_LIMIT
    mutations: int = 19

    def around(self, drawn: bytes, seed: int) -> Iterator[bytes]:
        """The input that was drawn, mutations of it, and of valid ones."""
        draw = random.Random(seed)
        yield drawn
        for index in range(self.mutations):
            yield mutated(drawn if index % 4 == 0 else draw.choice(self.examples), draw)


def mutated(example: bytes, draw: random.Random) -> bytes:
    """An input with a few random edits: bits, bytes, numbers of note, pieces cut, doubled or from elsewhere."""
    data = bytearray(example)
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        place = draw.randrange(len(data) + 1)
        size = draw.choice((1, 1, 2, 4, 8, 64))
        match draw.randrange(7):
            case 0 if place < len(data):
                data[place] ^= 1 << draw.randrange(8)
            case 1:
                data[place : place + size] = draw.randbytes(size)
            case 2:
                data[place : place + size] = b""
            case 3:
                data[place:place] = data[place : place + size]
            case 4:
                number = draw.choice((0, 1, 2**7, 2**15, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1))
                wide = draw.choice("BHIQ")
                packed = struct.pack(draw.choice("<>") + wide, number % 256 ** struct.calcsize(wide))
                data[place : place + len(packed)] = packed
            case 5:
                data[place:] = b""
            case _:
                text = draw.choice(
                    (b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b'""', b"9" * 30, b"\0", b"\xff", b'"', b"true")
                )
                data[place : place + draw.choice((0, len(text)))] = text
    return bytes(data)


_odd: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, -1, 0, 1, 8, 2**31, 2**63, 10**40, 1.5, float("nan"), float("inf"), "", "F32", "a", [], {}, [[]]]
)
_number = st.integers(-2, 40) | _odd


@st.composite
def safetensors(draw: st.DrawFn, keys: Sequence[str]) -> bytes:
    """A file whose header has the form of one, with entries that need not fit each other or the bytes that follow."""
    entries: dict[str, Any] = {}
    end = 0
    for key in draw(st.lists(st.sampled_from(list(keys)) | st.text(max_size=12), max_size=6)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = 4
        for side in shape:
            size *= side
        entry: Any = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
        if draw(st.integers(0, 3)) == 0:
            spoiled = draw(st.sampled_from(["dtype", "shape", "data_offsets", "all"]))
            if spoiled == "all":
                entry = draw(_odd)
            elif spoiled == "dtype":
                entry["dtype"] = draw(st.sampled_from(["BF16", "F8_E4M3", "I64", "F4", "X"]) | _odd)
            else:
                entry[spoiled] = draw(st.lists(_number, max_size=3) | _odd)
        entries[key] = entry
    if draw(st.booleans()):
        entries["__metadata__"] = draw(
            st.dictionaries(
                st.sampled_from(["config", "lora_alpha", "ss_network_alpha", "_quantization_metadata", "format"]),
                st.sampled_from(["{}", "[" * 500, '{"transformer": {"num_layers": 1000000}}', "1e999", "NaN", "8"])
                | _odd,
                max_size=3,
            )
            | _odd
        )
    header = json.dumps(entries).encode()
    length = draw(st.sampled_from([len(header), len(header), len(header), len(header) + 1, 0, 2**40, 2**63]))
    return length.to_bytes(8, "little") + header + bytes(min(end, 4096) + draw(st.sampled_from([0, 0, 0, 1, 8])))


def stored(tensors: dict[str, torch.Tensor], **metadata: str) -> bytes:
    return save(tensors, metadata=metadata or None)


def file_targets(path: Path) -> list[Target]:
    """Readers of model files, of LoRAs and of what a run keeps; `path` is where each input lies."""
    from ltxkern.pipeline.files.demo import DEMO_CONFIGS
    from ltxkern.pipeline.files.found import FoundModel
    from ltxkern.pipeline.files.headers import read_header
    from ltxkern.pipeline.files.lora_file import check_lora_file
    from ltxkern.pipeline.files.lora_layout import parameter_shapes
    from ltxkern.pipeline.files.quantized import with_scales
    from ltxkern.pipeline.model.components import build
    from ltxkern.pipeline.work.record import read_record, write_record

    module = "transformer_blocks.0.attn1"
    whole = parameter_shapes(build("transformer", DEMO_CONFIGS["transformer"]))
    shapes = {name: shape for name, shape in whole.items() if name.startswith(module)}
    columns = shapes[f"{module}.to_q"][1]
    weight = "model.diffusion_model.transformer_blocks.0.attn1.to_q.weight"
    config = json.dumps({"transformer": {"num_layers": 2, "num_attention_heads": 4}, "audio_vae": {"model": {}}})

    def checkpoint(data: bytes) -> object:
        path.write_bytes(data)
        header = read_header(path)
        found = (header.components, header.layer_formats, header.config)
        with_scales(path, header.tensors, [header], header.config)
        return found, FoundModel.of(path)

    def lora(data: bytes) -> object:
        path.write_bytes(data)
        check_lora_file(path)
        return check_lora_file(path, transformer=shapes).changes(read=True)

    def record(data: bytes) -> object:
        path.write_bytes(data)
        return read_record(path, "run")

    factors = {"lora_A.weight": torch.ones(2, columns), "lora_B.weight": torch.ones(columns, 2)}
    official = {f"diffusion_model.transformer_blocks.0.attn1.to_q.{key}": value for key, value in factors.items()}
    low = {
        "lora_down.weight": factors["lora_A.weight"],
        "lora_up.weight": factors["lora_B.weight"],
        "alpha": torch.ones(()),
    }
    kohya = {f"lora_unet_transformer_blocks_0_attn1_to_q.{key}": value for key, value in low.items()}
    loras = (
        stored(official),
        stored(kohya, ss_network_alpha="2", ss_network_dim="2"),
        stored({**official, f"{weight}_scale": torch.ones(1)}),
    )
    models = (
        stored({weight: torch.ones(2, 2), f"{weight}_scale": torch.ones(1)}, config=config),
        stored(
            {"vocoder.conv.weight": torch.ones(2), "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, config=config
        ),
    )
    write_record(path, {"video": torch.ones(3), "done": torch.tensor(2)}, "run")
    records = (path.read_bytes(),)
    keys = [weight, f"{weight}_scale", f"{weight[:-6]}comfy_quant", "scaled_fp8", "vocoder.a", *official, *kohya]
    found = [("checkpoint", models, checkpoint), ("lora", loras, lora), ("record", records, record)]
    return [Target(name, safetensors(keys) | st.binary(max_size=64), examples, read) for name, examples, read in found]


def text_targets(path: Path) -> list[Target]:
    """Readers of YAML, of lines of a batch, and of the manifest of a work folder."""
    from ltxkern.commands import generate
    from ltxkern.commands.batching.items import read_items
    from ltxkern.commands.text_files import read_config
    from ltxkern.pipeline.work.folder import MANIFEST, read_manifest

    parser = argparse.ArgumentParser()
    generate.add_parser(parser.add_subparsers())
    parser = _last_parser(parser)
    manifest = path.with_name(MANIFEST)

    def config(data: bytes) -> object:
        path.write_bytes(data)
        return read_config(parser, str(path))

    def batch(data: bytes) -> object:
        path.write_bytes(data)
        return read_items(path)

    def kept(data: bytes) -> object:
        manifest.write_bytes(data)
        return read_manifest(path.parent)

    pairs = zip("abcdefgh", "bcdefghi", strict=True)
    laughs = "seed: &a [x, x]\n" + "".join(
        f"{later}: &{later} [{', '.join([f'*{one}'] * 9)}]\n" for one, later in pairs
    )
    yaml = (
        "prompt: a kite\nheight: 64\nimage: [a.png, b.png:8]\n",
        "video-stg-blocks: [1, 2]\nno-plan: true\nseed: 0x1F\n",
        "prompt: !!python/object/apply:os.system ['true']\n",
        laughs,
    )
    lines = ('{"prompt": "a", "seed": 3, "name": "kite"}\n{"prompt": "b", "image": ["a.png"]}\n',)
    manifests = {"run": "a", "facts": {"seed": 1}, "command": None, "earlier": {}, "finished": False, "format": 1}
    names = st.sampled_from(
        ["prompt", "seed", "height", "image", "lora", "frame-rate", "quiet", "run", "format", "name"]
    )
    values = st.recursive(_odd | st.text(max_size=6), lambda inner: st.lists(inner, max_size=3), max_leaves=4)
    mappings = st.dictionaries(names, values, max_size=4).map(lambda found: json.dumps(found).encode())
    found = [("config", yaml, config), ("batch", lines, batch), ("manifest", (json.dumps(manifests),), kept)]
    return [
        Target(name, mappings | st.text(max_size=40).map(str.encode) | st.binary(max_size=40), raw, read)
        for name, texts, read in found
        for raw in [tuple(text.encode() for text in texts)]
    ]


def _last_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    found: argparse.ArgumentParser = actions[-1].choices["generate"]
    return found


def picture_target(path: Path) -> Target:
    """The reader of pictures, with a small one of each kind as people have them."""
    from ltxkern.pipeline.model.pictures import read_picture

    examples = []
    for kind in (
        "PNG",
        "JPEG",
        "GIF",
        "WEBP",
        "TIFF",
        "BMP",
        "PPM",
        "ICO",
        "TGA",
        "PCX",
        "JPEG2000",
        "DDS",
        "MPO",
        "SGI",
    ):
        for mode in ("RGB", "RGBA", "L", "P", "I;16", "CMYK", "F", "1"):
            buffer = io.BytesIO()
            with contextlib.suppress(OSError, ValueError, KeyError):
                Image.new("RGB", (24, 16), (90, 120, 30)).convert(mode).save(buffer, kind)
                examples.append(buffer.getvalue())

    def read(data: bytes) -> object:
        path.write_bytes(data)
        return read_picture(path)

    return Target("picture", st.binary(max_size=64), tuple(examples), read, PICTURE_LIMIT)


def request_target() -> Target:
    """A request as Python or JSON hands it over: values of any kind in every field."""
    from ltxkern.pipeline.run.request import PRESETS, GenerationRequest
    from ltxkern.pipeline.sampling.guidance import GuidanceScales
    from ltxkern.pipeline.sampling.latents import Geometry

    fields = [name for name in GenerationRequest.__dataclass_fields__ if name != "preset"]
    scales = list(GuidanceScales.__dataclass_fields__)
    usual = [64, 128, 1088, 9, 25, 24.0, "24000/1001", "stage1", 0.5, 10**9, 10**18 * 64, -64, 1e300, 2**64]
    values = _odd | st.sampled_from(usual) | st.text(max_size=8) | st.lists(_number, max_size=3)
    drawn = st.fixed_dictionaries(
        {
            "preset": st.sampled_from(sorted(PRESETS)),
            "fields": st.dictionaries(st.sampled_from(fields), values, max_size=5),
            "scales": st.dictionaries(st.sampled_from(scales), values, max_size=2),
        }
    ).map(lambda found: json.dumps(found).encode())

    def read(data: bytes) -> object:
        try:
            content = json.loads(data)
            preset, given_fields = PRESETS[content["preset"]], dict(content["fields"])
            guided = content["scales"]
        except (ValueError, TypeError, KeyError, RecursionError, AttributeError):
            return None  # what is no request at all is refused where JSON is read
        if not set(given_fields) <= set(fields) or not set(guided) <= set(scales):
            return None
        if guided:
            given_fields["video_guidance"] = GuidanceScales(**guided)
        usual: dict[str, Any] = {"prompt": "a", "height": 128, "width": 192, "num_frames": 9, "preset": preset}
        request = GenerationRequest(**(usual | given_fields))
        request.validate(Geometry())
        return request.stages(Geometry())

    example = json.dumps(
        {"preset": "hq", "fields": {"seed": 3, "steps": 4, "images": []}, "scales": {"cfg": 3.0}}
    ).encode()
    return Target("request", drawn, (example,), read, mutations=1)


def body_targets() -> list[Target]:
    """The reader of a request's body over HTTP, where the service is installed."""
    if find_spec("pydantic") is None:
        return []
    from ltxkern.pipeline.run.request import PRESETS
    from ltxkern.pipeline.sampling.latents import Geometry
    from ltxkern.service.fields import Offer, body_model, read_body

    model = body_model(DEFAULTS)
    chosen: Any = SimpleNamespace(preset=PRESETS["hq"], model=SimpleNamespace(geometry=Geometry()))
    names = [*model.model_fields, "preset", "path", "__class__"]
    values = st.recursive(_number | st.text(max_size=6), lambda inner: st.lists(inner, max_size=3), max_leaves=4)
    bodies = st.dictionaries(st.sampled_from(names), values, max_size=5).map(lambda found: json.dumps(found).encode())
    whole = {"prompt": "a kite", "seed": 3, "images": [{"frame": 0, "strength": 0.5}], "video_guidance": {"cfg": 3.0}}

    def read(data: bytes) -> object:
        return Offer(chosen, DEFAULTS).request(read_body(model, data), [Path("a.png")]).stages(Geometry())

    examples = (json.dumps(whole).encode(), b'{"prompt": "a", "height": 64, "width": 128, "num_frames": 9, "steps": 2}')
    return [Target("body", bodies | st.binary(max_size=40), examples, read, mutations=3)]


def targets(folder: Path) -> list[Target]:
    """All of them; inputs lie in `folder`."""
    path = folder / "input.safetensors"
    return [*file_targets(path), *text_targets(path), picture_target(path), request_target(), *body_targets()]
