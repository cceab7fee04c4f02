"""Mutations of model files that know what a file is made of: counts, lengths, offsets, sizes, types, versions, keys.

Each takes the bytes of a whole file and a `random.Random`, and returns other bytes; equal arguments give equal results. Most mutations
change one or two things and leave the rest consistent, which gets further into a reader than noise does.
"""

import copy
import functools
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

NUMBERS = (0, 1, 2, 3, 7, 8, 12, 31, 32, 33, 64, 127, 128, 255, 256, 257, 1 << 15, (1 << 16) - 1, 1 << 16, 1 << 24, (1 << 31) - 1, 1 << 31)
NUMBERS += ((1 << 32) - 1, 1 << 32, 1 << 40, 1 << 48, 1 << 60, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1)
TEXTS = (b"", b"x", b"\0", b"\n", b"\xff\xfe", b"../../x", b"y" * 65, b"z" * 70_000, "é\u2028".encode(), b"{", b"%s%n")
VALUES = (None, True, False, -1, -(2**63), 10**30, 0.0, 0.5, 1e-320, 1e308, float("nan"), float("inf"), "", "x", "\ud800", "\0", "../x")
VALUES += ("w" * 5000, "a\nb", [], {}, [[]], [None], {"": 0}, [0] * 1000, *NUMBERS)
_DEEP = "[" * 3000


def number(value: int, rng: Random) -> int:
    """A number near `value`, or one at which something overflows."""
    near = (value + 1, value - 1, value + 8, value - 32, value * 2, value // 2, -value)
    return rng.choice(NUMBERS) if rng.random() < 0.6 else rng.choice(near)


def blind(data: bytes, rng: Random) -> bytes:
    """Bytes flipped, taken out, put in, said twice or cut off, without a look at what they mean."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, length = rng.randrange(len(out) + 1), rng.choice((1, 1, 4, 8, 100))
        kind = rng.randrange(6)
        if kind <= 1 and at < len(out):
            out[at] = rng.randrange(256) if kind else out[at] ^ (1 << rng.randrange(8))
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at:at] = rng.randbytes(length)
        elif kind == 4:
            out[at:at] = out[at : at + length]
        else:
            del out[at:]
    return bytes(out)


# --- JSON ------------------------------------------------------------------------------------------------------------


def json_text(text: str, rng: Random) -> str:
    """A JSON document with a few of its nodes changed, gone, copied elsewhere or renamed; sometimes with a key twice, or no JSON."""
    document = [json.loads(text)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change_node(document, rng)
    found = json.dumps(document[0])
    kind = rng.random()
    if kind < 0.04:
        at = found.find("{", rng.randrange(len(found) + 1)) + 1
        key = found[found.find('"', at) + 1 : found.find('"', found.find('"', at) + 1)]
        found = found[:at] + f'"{key}":{rng.choice(("0", "{}", "[]", _DEEP))},' + found[at:]
    elif kind < 0.06:
        at = rng.randrange(len(found) + 1)
        found = found[:at] + rng.choice((_DEEP, "\0", "NaN", "9" * 5000, '"', "}", "\\u0000", "1e999")) + found[at:]
    return found


def _change_node(document: list[Any], rng: Random) -> None:
    places = [(document, 0), *_places(document[0])]
    # Documents are lists of many like things: a first choice among few makes the few large ones as likely.
    place, key = rng.choice(places if rng.random() < 0.7 else places[: 1 + len(places) // 8])
    value, kind = place[key], rng.random()
    if kind < 0.45 and type(value) is int:
        place[key] = number(value, rng)
    elif kind < 0.65:
        place[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind < 0.8:
        other, name = rng.choice(places)
        place[key] = copy.deepcopy(other[name])
    elif place is document:
        place[key] = [value]
    elif isinstance(place, dict):
        del place[key]
        if kind < 0.9:
            place[rng.choice((str(key) + "x", "", "__metadata__", "../x", "k" * 300, rng.choice(list(place) or ["y"])))] = value
    elif kind < 0.9:
        place.insert(key, copy.deepcopy(value))
    else:
        del place[key]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every node below `value`, those near the top first."""
    found: list[tuple[Any, Any]] = []
    rows = [value] if isinstance(value, (dict, list)) else []
    for row in rows:  # which grows
        found += [(row, key) for key in (row if isinstance(row, dict) else range(len(row)))]
        rows += [inner for inner in (row.values() if isinstance(row, dict) else row) if isinstance(inner, (dict, list))]
    return found


def manifest(data: bytes, rng: Random) -> bytes:
    """A JSON file."""
    if rng.random() < 0.05:
        return blind(data, rng)
    return json_text(data.decode(), rng).encode("utf-8", "surrogatepass")


# --- safetensors -----------------------------------------------------------------------------------------------------


def safetensors(data: bytes, rng: Random) -> bytes:
    """A safetensors file: mostly its header as JSON, or that header's length, or what follows."""
    return _around_header(data, rng, json_text)


def packed(data: bytes, rng: Random) -> bytes:
    """A model file of this project: as `safetensors`, and the JSON documents inside the metadata."""

    def inside(text: str, rng: Random) -> str:
        header = json.loads(text)
        name = rng.choice(("config", "assets", "provenance", "tokenizer"))
        found = header["__metadata__"][name] or "{}"
        header["__metadata__"][name] = (
            json_text(found, rng) if len(found) < 10_000 else blind(found.encode(), rng).decode("utf-8", "replace")
        )
        return json.dumps(header)

    return _around_header(data, rng, inside if rng.random() < 0.5 else json_text)


def _around_header(data: bytes, rng: Random, change: Callable[[str, Random], str]) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header, body, kind = data[8 : 8 + size], data[8 + size :], rng.random()
    if kind < 0.05:
        return blind(data, rng)
    if kind < 0.15:
        header = blind(header, rng)
    elif kind < 0.9:
        header = change(header.decode(), rng).encode("utf-8", "surrogatepass")
    else:
        body = body + rng.randbytes(rng.choice((1, 64))) if rng.random() < 0.3 else body[: rng.randrange(len(body) + 1)]
    length = number(len(header), rng) if rng.random() < 0.05 else len(header)
    return (length % (1 << 64)).to_bytes(8, "little") + header + body


# --- GGUF ------------------------------------------------------------------------------------------------------------

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of the types of metadata values
_STRING, _ARRAY = 8, 9

Field = tuple[str, bytes]
"""Kind, "number" or "text" or "raw", and bytes."""


def gguf(data: bytes, rng: Random) -> bytes:
    """A GGUF file: fields and whole entries of its header."""
    if rng.random() < 0.05:
        return blind(data, rng)
    head, entries, infos, rest = (list(part) for part in _gguf_parts(data))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.random()
        group = rng.choice((head, entries, entries, infos, infos))
        if kind < 0.75 or group is head:
            at = rng.randrange(len(group))
            group[at] = _change_field(group[at], group, rng)
        elif kind < 0.9:
            _change_list(group, rng)
            if rng.random() < 0.7:  # the counts follow, or lie
                head[2:] = [[("number", struct.pack("<Q", len(part)))] for part in (infos, entries)]
        elif kind < 0.95:
            rest = [[("raw", rest[0][0][1][: rng.randrange(len(rest[0][0][1]) + 1)])]]
        else:
            rest = [[("raw", rest[0][0][1] + bytes(rng.choice((1, 8, 32, 4096))))]]
    return b"".join(raw for part in (head, entries, infos, rest) for fields in part for _, raw in fields)


def _other_value(rng: Random) -> list[Field]:
    """Type and value of a metadata entry, well formed, that hardly any reader waits for."""

    def of(kind: int, *fields: bytes) -> list[Field]:
        return [("number", struct.pack("<I", kind)), *(("raw", raw) for raw in fields)]

    def array(kind: int, count: int, raw: bytes) -> list[Field]:
        return of(_ARRAY, struct.pack("<IQ", kind, count), raw)

    text = rng.choice(TEXTS)
    string = struct.pack("<Q", len(text)) + text
    number = rng.choice(NUMBERS)
    return rng.choice(
        (
            of(_STRING, string),
            of(7, bytes([number & 1])),
            of(10, struct.pack("<Q", number)),
            of(11, struct.pack("<q", number - (1 << 63))),
            of(6, struct.pack("<f", rng.choice((0.0, -1.0, 1e-45, 3e38, float("nan"), float("inf"))))),
            of(12, struct.pack("<d", rng.choice((0.0, -1e300, 1e300, float("nan"), -float("inf"))))),
            *(array(kind, 2, bytes(2 * size)) for kind, size in _SIZES.items()),
            array(_STRING, 0, b""),
            array(_STRING, 2, string * 2),
            array(_ARRAY, 1, struct.pack("<IQ", _ARRAY, 1)),
        )
    )


def _change_list(group: list[list[Field]], rng: Random) -> None:
    at, other = rng.randrange(len(group)), rng.randrange(len(group))
    kind = rng.randrange(5)
    if kind == 0 and len(group) > 1:
        del group[at]
    elif kind == 1:
        group.insert(at, group[other])  # a name twice
    elif kind == 2:
        group[at], group[other] = group[other], group[at]
    elif kind == 3:
        group[at] = group[at][:2] + group[other][2:]  # one's name with the other's contents
    else:
        group[at] = group[at][:2] + _other_value(rng)


def _change_field(fields: list[Field], group: list[list[Field]], rng: Random) -> list[Field]:
    # The first fields say what the others are; in long arrays they would hardly ever be chosen.
    at = rng.randrange(len(fields)) if rng.random() < 0.5 else rng.randrange(min(len(fields), 7))
    kind, raw = fields[at]
    changed = list(fields)
    if kind == "number":
        value = number(int.from_bytes(raw, "little"), rng)
        changed[at] = kind, (value % (1 << 8 * len(raw))).to_bytes(len(raw), "little")
    elif kind == "text":
        texts = [part for entry in group for name, part in entry[:2] if name == "text"]
        text = rng.choice(texts) if texts and rng.random() < 0.4 else rng.choice(TEXTS)
        changed[at] = kind, text
        if at and len(fields[at - 1][1]) == 8 and rng.random() < 0.8:  # with its length, or not
            changed[at - 1] = "number", struct.pack("<Q", len(text))
    else:
        changed[at] = kind, blind(raw, rng)
    return changed


@functools.lru_cache(maxsize=8)
def _gguf_parts(data: bytes) -> tuple[list[list[Field]], list[list[Field]], list[list[Field]], list[list[Field]]]:
    """A file as magic, version and counts; metadata entries; tensors; and the rest. Raises ValueError or KeyError where it is not valid."""
    place = 0

    def take(kind: str, size: int) -> Field:
        nonlocal place
        place += size
        if place > len(data):
            raise ValueError("the file ends before its header does")
        return kind, data[place - size : place]

    def value_of(field: Field) -> int:
        return int.from_bytes(field[1], "little")

    def string() -> list[Field]:
        length = take("number", 8)
        return [length, take("text", value_of(length))]

    def value(kind: int) -> list[Field]:
        if kind == _STRING:
            return string()
        if kind != _ARRAY:
            return [take("number", _SIZES[kind])]
        inner, count = take("number", 4), take("number", 8)
        if value_of(inner) == _STRING:
            return [inner, count, *(field for _ in range(value_of(count)) for field in string())]
        return [inner, count, take("raw", _SIZES[value_of(inner)] * value_of(count))]

    head = [[take("raw", 4)], [take("number", 4)], [take("number", 8)], [take("number", 8)]]
    entries: list[list[Field]] = []
    for _ in range(value_of(head[3][0])):
        key, kind = string(), take("number", 4)
        entries.append([*key, kind, *value(value_of(kind))])
    infos: list[list[Field]] = []
    for _ in range(value_of(head[2][0])):
        name, rank = string(), take("number", 4)
        infos.append([*name, rank, *(take("number", 8) for _ in range(value_of(rank))), take("number", 4), take("number", 8)])
    return head, entries, infos, [[("raw", data[place:])]]
