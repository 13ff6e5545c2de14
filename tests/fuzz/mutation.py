"""Mutations of files: of bytes as such, and of what the formats that readers know are made of.

A mutation that breaks a checksum shows only that the checksum is looked at. So archives, PNG files and arrays are also
taken apart, changed inside, and put together again with lengths and checksums that are right.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import pickletools
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np

COMMAND = "touch executed"
NUMBERS = (0, 1, 2, 3, 7, 255, 256, 4095, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)
NAMES = (
    "../executed",
    "/tmp/smalti-fuzz-executed",
    "pipe:touch executed",
    "a/../../executed",
    "",
    ".",
    "..",
    "x" * 300,
    "CON",
    "\x1b[31mred",
    "two\nlines",
    "-rf",
    "~",
    "$(touch executed)",
    "{0..99999999}",
    "*",
    "é" * 50,
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    7,
    10**6,
    10**12,
    2**63,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "0",
    "1e9",
    [],
    {},
    [[]],
    [0],
    [0, 0],
    [-1, -1],
    [[1, 1]],
    {"name": "x"},
    {"name": None},
    *NAMES,
)


class _ByReduce:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (COMMAND,)


class _ByEvaluation:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"__import__('os').system('{COMMAND}')",)


_TEXT = COMMAND.encode()
HOSTILE_OPCODES = (
    *(
        pickle.dumps(attack(), protocol)[2 if protocol > 1 else 0 : -1]
        for attack in (_ByReduce, _ByEvaluation)
        for protocol in (0, 2)
    ),
    b"(S'" + _TEXT + b"'\nios\nsystem\n",  # INST
    b"(cos\nsystem\nS'" + _TEXT + b"'\no",  # OBJ
    b"cos\nsystem\n(S'" + _TEXT + b"'\ntR",  # GLOBAL, REDUCE
    b"cos\nsystem\nS'" + _TEXT + b"'\n\x85R",
    b"cposix\nsystem\nS'" + _TEXT + b"'\n\x85R",
    b"ctorch._utils\n_rebuild_tensor_v2\n(N}\x8c\x0c__defaults__)stb",  # BUILD sets an attribute of a function
    b"ctorch.serialization\nload\nS'executed'\n\x85R",
    b"cnumpy\nload\n(S'a.npy'\nI0\nI01\ntR",
    b"ctoy_side_effect\nInnocent\n)R",
    b"cbuiltins\ngetattr\n(cos\nS'system'\ntR",
    b"c__builtin__\nexec\nS'import os; os.system(\"" + _TEXT + b"\")'\n\x85R",
    b"cnumpy\nndarray\n(I1000000\nI1000000\ntS'f8'\n\x86R",
    b"cnumpy\nndarray\n(I1000000000000\ntS'u1'\n\x86R",
    b"c_codecs\nencode\nVtouch\nVrot13\n\x86R",
)
YAML_TAGS = (
    f'!!python/object/apply:os.system ["{COMMAND}"]',
    f'!!python/object/new:os.system ["{COMMAND}"]',
    "!!python/object/apply:subprocess.check_output [[touch, executed]]",
    "!!python/name:os.system",
    "!!python/module:toy_side_effect",
    "!!binary R0lGODlhDAAMAIQAAP==",
    "!!timestamp 99999-99-99",
    "!!int x",
    "!!set {a, b}",
    "&a [*a, *a]",
    "*unknown",
    "<<: [1]",
    "2026-02-31",
    "0o7777777",
    "1:99:99",
    "? [a]\n: b",
    "[" * 3000,
    "{a: " * 3000,
    "[" * 100000 + "]" * 100000,
    "- " * 3000,
    "&a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n"
    "g: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nvariants: &h [*g,*g,*g,*g,*g,*g,*g,*g,*g]",
    "\x00",
    "\t",
    "\x85",
    "\ufeff",
    "%YAML 9.9\n---",
    "---\n",
    "...\n",
)


def mutated(name: str, content: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """A file with one to three changes; `others` are whole files that parts may be taken from."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        content = _changed(name, content, random, others)
    return content


def _changed(name: str, content: bytes, random: Random, others: Sequence[bytes], depth: int = 0) -> bytes:
    inside = _inside(name, content) if random.random() < 0.7 else None
    if inside is None or depth > 2:
        return _bytes(content, random, others)
    try:
        return inside(content, random, others, depth)
    except Exception:  # noqa: BLE001  # an earlier mutation broke the format
        return _bytes(content, random, others)


Inside = Callable[[bytes, Random, Sequence[bytes], int], bytes]


def _inside(name: str, content: bytes) -> Inside | None:
    """What changes the inside of a file, told by its first bytes and its name."""
    if content.startswith(b"PK\x03\x04"):
        return _zip
    if content.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")):
        return _packed
    if content[257:262] == b"ustar":
        return _tar
    if content.startswith(b"\x93NUMPY"):
        return _npy
    if content.startswith(b"\x89PNG"):
        return _png
    if content.startswith(b"\xff\xd8"):
        return _jpeg
    if content.startswith(b"RIFF"):
        return _riff
    if name.endswith(".safetensors"):
        return _safetensors
    if content.startswith((b"\x80", b"(", b"]q")) or name.endswith((".pkl", ".pt", ".pth", ".bin")):
        return _pickle
    if name.endswith((".json", ".jsonl")):
        return _json
    if name.endswith((".yaml", ".yml")):
        return _yaml
    if name.endswith((".txt", ".csv", ".cls")):
        return _text
    return None


def _bytes(content: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Bits, lengths, blocks; whatever the format is."""
    data = bytearray(content)
    size = len(data)
    kind = random.randrange(10)
    at = random.randrange(size) if size else 0
    length = min(random.choice((1, 2, 4, 8, 64, 512, 4096)), size - at)
    match kind:
        case 0 | 1 if size:
            for _ in range(random.choice((1, 1, 2, 8, 64))):
                data[random.randrange(size)] ^= 1 << random.randrange(8)
        case 2 if size:
            data[at : at + length] = bytes([random.choice((0, 1, 0x7F, 0x80, 0xFF, 0x20))]) * length
        case 3 if size:
            width = random.choice((1, 2, 4, 8))
            number = random.choice(NUMBERS) % 2 ** (8 * width)
            data[at : at + width] = number.to_bytes(width, random.choice(("little", "big")))
        case 4:
            del data[at:]
        case 5:
            data[at:at] = data[at : at + length] * random.choice((1, 2, 50))
        case 6:
            del data[at : at + length]
        case 7:
            other = random.choice(others) if others else b""
            data[at:] = other[random.randrange(len(other) + 1) :]
        case 8:
            data[at:at] = random.randbytes(length)
        case 9 if random.random() < 0.05:
            data = bytearray(random.choice((b"", b"\0" * 1000, random.randbytes(300), b"once upon a time\n" * 9)))
        case _:
            data.extend(random.randbytes(length))
    return bytes(data)


def _zip(content: bytes, random: Random, others: Sequence[bytes], depth: int) -> bytes:
    """Members changed, dropped, doubled, renamed or packed, with right checksums."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = random.randrange(len(members))
    name, inner = members[at]
    kind = random.randrange(8)
    if kind < 5:
        members[at] = name, _changed(name, inner, random, [*others, *(other for _, other in members)], depth + 1)
    elif kind == 5:
        del members[at]
    elif kind == 6:
        members.insert(at, (name, random.choice(members)[1]))
    else:
        members[at] = random.choice((random.choice(NAMES), random.choice(members)[0])), inner
    buffer = io.BytesIO()
    method = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, inner in members:
            info = zipfile.ZipInfo(name.replace("\x00", ""))
            info.compress_type = method
            archive.writestr(info, inner)
            if random.random() < 0.002:  # a bomb: more than memory may take, in little
                archive.writestr("bomb" + name, bytes(64 << 20), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _packed(content: bytes, random: Random, others: Sequence[bytes], depth: int) -> bytes:
    """What is inside changed, and packed again as something."""
    unpack = {b"\x1f": gzip.decompress, b"B": bz2.decompress, b"\xfd": lzma.decompress}[content[:1]]
    inner = _changed("", unpack(content), random, others, depth + 1)
    return random.choice((lambda data: gzip.compress(data, 1), bz2.compress, lzma.compress))(inner)


def _tar(content: bytes, random: Random, others: Sequence[bytes], depth: int) -> bytes:
    """Members changed, renamed, turned into links or devices, with wrong sizes, sparse; with right checksums."""
    members = []
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for info in tar:
            reader = tar.extractfile(info) if info.isreg() else None
            members.append((info, reader.read() if reader else b""))
    at = random.randrange(len(members))
    info, inner = members[at]
    kind = random.randrange(10)
    if kind < 4:
        inner = _changed(info.name, inner, random, [*others, *(other for _, other in members)], depth + 1)
        info.size = len(inner)
        members[at] = info, inner
    elif kind == 4:
        del members[at]
    elif kind == 5:
        members.insert(random.randrange(len(members) + 1), random.choice(members))
    elif kind == 6:
        ending = random.choice((info.name[-4:], "", ".cls", ".json", ".npy", ".png", ".a.b"))
        info.name = random.choice(NAMES).replace("\x00", "") + ending
    elif kind == 7:
        info.type = random.choice(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
        )
        info.linkname = random.choice(("/etc/passwd", "../executed", info.name))
    elif kind == 8:
        raw = bytearray(content)
        starts = [place for place in range(0, len(raw), 512) if raw[place + 257 : place + 262] == b"ustar"]
        start = random.choice(starts)
        field, width = random.choice(
            ((124, 12), (124, 12), (100, 8), (136, 12), (156, 1), (0, 100), (345, 155), (329, 8))
        )
        value = random.choice(
            (
                b"77777777777",
                b"00000000000",
                b"\x80" + b"\xff" * 11,
                b"\xff" * 12,
                b"S",
                b"L",
                b"x",
                b"g",
                b"\x80\0\0\0\0\0\0\1\0\0\0\0",
                b"00000200000",
                b" " * 12,
                b"-0000000001",
            )
        )
        raw[start + field : start + field + width] = value[:width].ljust(width, b"\0")
        if value == b"S":  # sparse: so many zeros that nobody has
            raw[start + 483 : start + 495] = b"\x80\0\0\0\0\0\1\0\0\0\0\0"
        raw[start + 148 : start + 156] = b" " * 8
        raw[start + 148 : start + 156] = b"%06o\0 " % sum(raw[start : start + 512])
        return bytes(raw)
    else:
        info.pax_headers = {"size": str(random.choice(NUMBERS)), "path": random.choice(NAMES).replace("\x00", "")}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=random.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as tar:
        for info, inner in members:
            tar.addfile(info, io.BytesIO(inner))
    return buffer.getvalue()


def _npy(content: bytes, random: Random, others: Sequence[bytes], depth: int) -> bytes:
    """Another type, another shape, objects, or a header that is no header."""
    array = np.load(io.BytesIO(content), allow_pickle=False)
    descr = random.choice(
        (np.lib.format.dtype_to_descr(array.dtype),) * 3
        + (
            "|O",
            "<f8",
            "<i8",
            "|u1",
            "<U9",
            "|V8",
            "<M8[ns]",
            "<c16",
            "|S1000000000",
            [("a", "<i4"), ("b", "|O")],
            "x" * 99,
        )
    )
    shape = random.choice(
        (
            array.shape,
            array.shape,
            (),
            (0,),
            (10**9, 10**9),
            (2**62, 4),
            (-1,),
            array.shape[::-1],
            (1,) * 40,
            (*array.shape, 1),
            (2**63,),
            array.shape[:-1] or (3,),
            "x",
            None,
            (1.5,),
        )
    )
    header = {"descr": descr, "fortran_order": random.choice((False, False, True, 1, None)), "shape": shape}
    text = random.choice(
        (
            repr(header),
            repr(header),
            repr(header),
            "(" * 500 + ")" * 500,
            "{}",
            "[" * 9000,
            f"__import__('os').system('{COMMAND}')",
            repr({**header, "more": 1}),
        )
    )
    values = random.choice((array.tobytes(), array.tobytes()[:-1], pickle.dumps(_ByReduce()), b"", array.tobytes() * 3))
    raw = text.encode() + b"\n"
    version = random.choice((b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"))
    count = struct.pack("<H", len(raw) % 65536) if version == b"\x01\x00" else struct.pack("<I", len(raw))
    return b"\x93NUMPY" + version + count + raw + values


def _png(content: bytes, random: Random, others: Sequence[bytes], depth: int) -> bytes:
    """Chunks changed, dropped, doubled or moved, with right checksums; sizes beyond all bounds; texts that unfold."""
    chunks, place = [], 8
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    at = random.randrange(len(chunks))
    kind, inner = chunks[at]
    match random.randrange(7):
        case 0:
            header = bytearray(chunks[0][1])
            start = random.choice((0, 4))
            header[start : start + 4] = struct.pack(">I", random.choice((0, 1, 2, 20000, 100000, 2**31 - 1, 2**32 - 1)))
            chunks[0] = chunks[0][0], bytes(header)
        case 1:
            header = bytearray(chunks[0][1])
            header[random.randrange(8, 13)] = random.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
            chunks[0] = chunks[0][0], bytes(header)
        case 2:
            chunks[at] = kind, _bytes(inner, random, others)
        case 3:
            del chunks[at]
        case 4:
            chunks.insert(random.randrange(len(chunks) + 1), chunks[at])
        case 5:
            unfolding = zlib.compress(bytes(100 << 20), 1) if random.random() < 0.01 else zlib.compress(b"a" * 9999)
            added = random.choice(
                (
                    (b"zTXt", b"a\0\0" + unfolding),
                    (b"iCCP", b"a\0\0" + unfolding),
                    (b"tEXt", b"a\0b"),
                    (b"iTXt", b"a\0\1\0\0\0" + unfolding),
                    (b"tRNS", random.randbytes(3)),
                    (b"IDAT", unfolding),
                    (b"PLTE", random.randbytes(9)),
                    (b"acTL", struct.pack(">II", 2**31, 0)),
                    (b"eXIf", b"MM\0*"),
                )
            )
            chunks.insert(random.randrange(1, len(chunks) + 1), added)
        case 6:
            chunks[at] = random.choice((b"IDAT", b"PLTE", b"IEND", b"fdAT", b"\0\0\0\0")), inner
    return content[:8] + b"".join(
        struct.pack(">I", len(inner)) + kind + inner + struct.pack(">I", zlib.crc32(kind + inner))
        for kind, inner in chunks
    )


def _jpeg(content: bytes, random: Random, others: Sequence[bytes], depth: int) -> bytes:
    """A marker, a length, or the sizes in the frame's header."""
    data = bytearray(content)
    places = [found.start() for found in re.finditer(rb"\xff[\xc0-\xfe]", content)]
    at = random.choice(places)
    match random.randrange(4):
        case 0:
            data[at + 1] = random.choice((0xC0, 0xC1, 0xC2, 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE1, 0xEE, 0xFE))
        case 1:
            data[at + 2 : at + 4] = struct.pack(">H", random.choice((0, 1, 2, 3, 8, 65535)))
        case 2:
            frame = next(place for place in places if content[place + 1] in (0xC0, 0xC2))
            start = frame + random.choice((4, 5, 7, 9, 11))
            data[start : start + 2] = struct.pack(">H", random.choice((0, 1, 257, 20000, 65535)))
        case 3:
            data[at:at] = b"\xff\xe1" + struct.pack(">H", 40) + b"Exif\0\0MM\0*" + random.randbytes(28)
    return bytes(data)


def _riff(content: bytes, random: Random, others: Sequence[bytes], depth: int) -> bytes:
    """A chunk's name, length or sizes."""
    data = bytearray(content)
    at = random.choice((4, 8, 12, 16, 20, 24, 26, 28))
    data[at : at + 4] = random.choice(
        (b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"ALPH", struct.pack("<I", random.choice(NUMBERS) % 2**32))
    )
    return bytes(data)


def _safetensors(content: bytes, random: Random, others: Sequence[bytes], depth: int) -> bytes:
    """The header as JSON, with its right length."""
    (length,) = struct.unpack("<Q", content[:8])
    header = _json(content[8 : 8 + length], random, others, depth)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _pickle(content: bytes, random: Random, others: Sequence[bytes], depth: int) -> bytes:
    """Hostile opcodes in the place of others, or put in between; opcodes dropped, doubled, or with other arguments."""
    places = [place for _, _, place in pickletools.genops(content)]
    at = random.randrange(len(places))
    start, end = places[at], places[at + 1] if at + 1 < len(places) else places[at] + 1
    attack = random.choice(HOSTILE_OPCODES)
    match random.randrange(6):
        case 0:
            return content[:start] + attack + content[end:]
        case 1:
            return content[:start] + attack + b"0" + content[start:]  # POP
        case 2:
            return content[:start] + content[end:]
        case 3:
            return content[:end] + content[start:end] + content[end:]
        case 4:
            return content[:start] + _bytes(content[start:end], random, others) + content[end:]
        case _:
            return attack + b"0" + content


def _json(content: bytes, random: Random, others: Sequence[bytes], depth: int) -> bytes:
    """A value replaced, a key renamed, dropped or doubled, deep nesting; of JSON lines, in one of them."""
    lines = content.split(b"\n")
    if len(lines) > 2 and lines[0].endswith((b"}", b'"')):
        at = random.randrange(len(lines) - 1)
        lines[at] = _json(lines[at], random, others, depth)
        return b"\n".join(lines)
    root = [json.loads(content)]
    nodes: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            nodes.append((node, key))
            if isinstance(node[key], dict | list):
                collect(node[key])

    collect(root)
    node, key = random.choice(nodes)
    match random.randrange(8):
        case 0 | 1 | 2 | 3:
            node[key] = random.choice(VALUES)
        case 4:
            del node[key]
        case 5 if isinstance(node, dict):
            node[random.choice((*NAMES, *map(str, node)))] = node.pop(key)
        case 6 if isinstance(node[key], int):
            node[key] = random.choice(
                (node[key] + 1, node[key] - 1, -node[key], str(node[key]), node[key] * 1000, node[key] + 0.5)
            )
        case 7:
            return random.choice((b"[" * 100000, b'{"a":' * 100000, b"1" * 5000, b"\xff\xfe", b"null", b"NaN", b'"x"'))
        case _:
            node[key] = [node[key]]
    return json.dumps(root[0] if root else None).encode()


def _yaml(content: bytes, random: Random, others: Sequence[bytes], depth: int) -> bytes:
    """A value replaced by a tag, an alias or something odd; lines moved, doubled, dropped."""
    lines = content.decode().split("\n")
    at = random.randrange(len(lines))
    key, colon, _ = lines[at].partition(": ")
    odd = random.choice((*YAML_TAGS, *(json.dumps(value) for value in VALUES)))
    match random.randrange(8):
        case 0 | 1 | 2 | 3 if colon:
            lines[at] = f"{key}: {odd}"
        case 4:
            lines.insert(at, random.choice(lines))
        case 5:
            del lines[at]
        case 6:
            lines[at] = " " * random.choice((1, 2, 4, 7)) + lines[at]
        case 7:
            lines.insert(at, odd)
        case _:
            return _text(content, random, others, depth)
    return "\n".join(lines).encode()


def _text(content: bytes, random: Random, others: Sequence[bytes], depth: int) -> bytes:
    """A word replaced by another."""
    words = re.split(rb"(\W+)", content)
    words[random.randrange(len(words))] = random.choice(
        (*(str(value).encode() for value in VALUES), b"\xff", b"\x00", b'"', b"\n")
    )
    return b"".join(words)
