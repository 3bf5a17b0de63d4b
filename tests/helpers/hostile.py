"""Hostile versions of good files and texts, from a seed: bytes, lines, JSON values, headers of safetensors, markup.

It does not judge how a reader takes them; `fuzzing.py` does.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from copy import deepcopy
from typing import Any

MARKUP = (
    *(
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "<!--",
        "-->",
        "]]>",
        "</code></pre><b>",
        "&lt;b&gt;",
    ),
    *("![i](https://evil.example/x.png)", "[a](javascript:alert(1))", "<https://evil.example>", "www.evil.example"),
    *(
        "\n---\nbase_model: evil/model\n---\n",
        "\n```\n<b>\n```\n",
        "``` python",
        "| <b> |\n|---|",
        "\n# heading\n\n",
        "- item",
    ),
    *(
        "**b** __c__ *d* _e_ ~~f~~ `g`",
        "$x$ $\\frac{$",
        "{{ 7 * 7 }}{% raw %}",
        "[ref]: https://evil.example",
        "\n    code",
    ),
    *(
        "!!python/object:os.system",
        "key: [",
        "&anchor *alias",
        "'\"",
        "=1+1",
        "\\",
        "<b onclick='x'>",
        "</title><svg/onload=x>",
    ),
)
"""Texts that are markup in HTML, Markdown, YAML, a template or a table."""

ODD = (
    *(
        "",
        " ",
        "x",
        "\0",
        "a\0b",
        "\x1b[31mred",
        "\u202edetr",
        "\ud800",
        "\udfff",
        "\u2028",
        "one\ntwo",
        "\r",
        "\ufeff",
        "nul",
    ),
    *(
        "é",
        "\N{GRINNING FACE}",
        "../..",
        "/",
        "/dev/zero",
        "~",
        ".",
        "nan",
        "-1",
        "1e999",
        "9" * 5000,
        "x" * 300,
        "x" * 5000,
        "%s{0}",
    ),
)
"""Texts that names, paths, terminals or numbers stumble over."""

RAW = {
    "raw: nested deeper than any parser goes": "[" * 100_000 + "]" * 100_000,
    "raw: a number of 5,000 digits": "9" * 5000,
    "raw: a number without end": "1e999",
    "raw: no number": "NaN",
    "raw: below all numbers": "-Infinity",
    "raw: a long text": f'"{"x" * 900_000}"',
    "raw: not JSON": "{'a': }",
}
"""Stand-ins for JSON that Python does not write."""

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 2**70, -(10**400), 0.5, -0.5, 1e308, 5e-324),
    *([], {}, [[]], {"": None}, [None] * 2000, {"a": [{"b": [0]}]}, [["x", "y"]], [1, 2], [0.5]),
)


def text_mutant(text: str, chance: random.Random) -> str:
    """A text with an odd or marked-up part put in, taken out, repeated or exchanged."""
    at, part = chance.randint(0, len(text)), chance.choice(chance.choice((MARKUP, ODD)))
    match chance.randrange(5):
        case 0:
            return part
        case 1:
            return text[:at] + part
        case 2:
            return text[:at] + text[at + chance.randint(0, 9) :]
        case 3:
            return text * chance.choice((2, 3, 50))
        case _:
            return text[:at] + part + text[at:]


def json_mutant(text: str, chance: random.Random) -> str:
    """A JSON text with one to three of its values or keys changed."""
    root = [json.loads(text)]
    for _ in range(chance.choice((1, 1, 2, 3))):
        _change_json(root, chance)
    text = json.dumps(root[0] if root else None)
    for stand_in, raw in RAW.items():
        text = text.replace(json.dumps(stand_in), raw)
    if chance.random() < 0.04 and (at := text.find("{")) >= 0:  # a key that stands there twice
        key = chance.choice([part.split('"')[-1] for part in text.split('":')[:-1]] or ["x"])
        text = f'{text[: at + 1]}"{key}": {json.dumps(chance.choice(VALUES))}, {text[at + 1 :]}'.replace(", }", "}")
    return text


def _change_json(root: list[Any], chance: random.Random) -> None:
    """Change one value at any depth below `root`."""
    places: list[tuple[Any, Any]] = []
    todo: list[Any] = [root]
    while todo:
        part = todo.pop()
        keys = list(part) if isinstance(part, dict) else range(len(part))
        places += [(part, key) for key in keys]
        todo += [part[key] for key in keys if isinstance(part[key], (dict, list)) and len(part[key]) < 1000]
    if not places:
        return
    holder, key = chance.choice(places)
    value = holder[key]
    match chance.randrange(12):
        case 0 if holder is not root:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[text_mutant(key, chance)] = holder.pop(key)
        case 2:
            other, place = chance.choice(places)
            holder[key], other[place] = deepcopy(other[place]), deepcopy(value)
        case 3 if isinstance(holder, list):
            holder[key:key] = [deepcopy(value) for _ in range(chance.choice((1, 2, 100)))]
        case 4:
            for _ in range(chance.choice((1, 1, 2, 14, 40))):
                holder[key] = chance.choice(([holder[key]], {"a": holder[key]}))
        case 5 if isinstance(value, dict):
            value[chance.choice(ODD + MARKUP)] = deepcopy(chance.choice(VALUES))
        case 6 | 7 if isinstance(value, str):
            holder[key] = text_mutant(value, chance)
        case 6 | 7 if isinstance(value, int | float):
            holder[key] = chance.choice(
                (
                    -value,
                    value + 1,
                    value - 1,
                    value * 10 ** chance.randrange(20),
                    float(value) if abs(value) < 1e300 else 0.5,
                )
            )
        case 8:
            holder[key] = chance.choice((str(value)[:5000], [value], bool(value), {"value": value}))
        case 9:
            holder[key] = chance.choice(ODD + MARKUP)
        case 10 if chance.random() < 0.3:
            holder[key] = chance.choice(list(RAW))
        case _:
            holder[key] = deepcopy(chance.choice(VALUES))


def byte_mutant(content: bytes, chance: random.Random) -> bytes:
    """A few bytes flipped, cut off, put in, taken out or repeated; or the whole file empty, doubled or encoded anew."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(changed) + 1)
        match chance.randrange(7):
            case 0 if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                del changed[at:]
            case 2:
                changed[at:at] = chance.randbytes(chance.randint(1, 9))
            case 3:
                changed[at:at] = changed[at : at + chance.choice((1, 50, 5000))]
            case 4:
                changed[at : at + 9] = bytes(len(changed[at : at + 9]))
            case 5 if chance.random() < 0.2:
                text = content.decode("latin-1")
                return chance.choice((b"", content * 2, b"\xef\xbb\xbf" + content, text.encode("utf-16"), bytes(9)))
            case _:
                del changed[at : at + 9]
    return bytes(changed)


def lines_mutant(content: bytes, chance: random.Random) -> bytes:
    """Lines changed as text or as JSON, repeated, taken out, exchanged, or with another line end."""
    lines = content.decode().split("\n")
    at, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    match chance.randrange(8):
        case 0:
            del lines[at]
        case 1:
            lines[at:at] = [lines[other]] * chance.choice((1, 2, 300))
        case 2:
            lines[at], lines[other] = lines[other], lines[at]
        case 3:
            lines[at] += chance.choice(("\r", "\x0b", "\u2028", " ", ",", '"'))
        case 4 | 5 | 6 if lines[at].startswith("{"):
            lines[at] = json_mutant(lines[at], chance)
        case _:
            lines[at] = text_mutant(lines[at], chance)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def safetensors_mutant(content: bytes, chance: random.Random) -> bytes:
    """A header with other offsets, shapes, dtypes, names or texts, or other numbers in the tensors."""
    (size,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    texts, names = header.get("__metadata__", {}), [name for name in header if name != "__metadata__"]
    name, other = chance.choice(names), chance.choice(names)
    tensor = header[name]
    match chance.randrange(10):
        case 0 | 1 | 2 if texts:
            key = chance.choice(list(texts))
            is_json = texts[key][:1] in ("{", "[")
            texts[key] = (json_mutant if is_json and chance.random() < 0.8 else text_mutant)(texts[key], chance)
        case 3:
            shape, offsets = tensor["shape"], tensor["data_offsets"]
            tensor["shape"] = chance.choice(
                ([1, *shape], shape[::-1], shape[:-1], [], [-1], [0], [2**62, 2**62], [10**30])
            )
            if chance.random() < 0.5:
                tensor["data_offsets"] = [offsets[0], chance.choice((offsets[0], offsets[1] + 8, len(body), 2**63))]
        case 4:
            tensor["dtype"] = chance.choice(
                ("F32", "F64", "BOOL", "I64", "U8", "BF16", "F8_E4M3", "C64", "none", 3, None)
            )
        case 5:
            header[text_mutant(name, chance)] = header.pop(name)
        case 6:
            tensor["data_offsets"] = chance.choice(
                (
                    tensor["data_offsets"][::-1],
                    header[other]["data_offsets"],
                    [0, len(body)],
                    [-8, 0],
                    [0],
                    [0.5, 8],
                    None,
                )
            )
        case 7:
            return _framed(json_mutant(json.dumps(header), chance).encode("utf-8", "surrogatepass"), body, chance)
        case 8:
            header[name], header[other] = header[other], tensor
        case _:
            start, end = tensor["data_offsets"]
            number = chance.choice((float("nan"), float("inf"), -1.0, 3e38, -0.5, 1e30, 0.0, 2.0, 1e-40))
            kind = {"F32": "<f", "F64": "<d"}.get(tensor["dtype"], chance.choice(("<d", "<q")))
            one = struct.pack(
                kind, int(number) if kind == "<q" and abs(number) < 9 else 2**40 if kind == "<q" else number
            )
            body = body[:start] + (one * (end - start))[: end - start] + body[end:]
    return _framed(json.dumps(header).encode(), body, chance)


def _framed(header: bytes, body: bytes, chance: random.Random) -> bytes:
    """A safetensors file, rarely with a wrong length of the header or a body of another length."""
    size = len(header)
    if chance.random() < 0.05:
        size = chance.choice((0, 1, size - 1, size + 1, 100_000_001, 2**40, 2**64 - 1))
    if chance.random() < 0.05:
        body = chance.choice((body[:-1], body + b"\0", b"", body * 2))
    return struct.pack("<Q", size) + header + body


def mutant(content: bytes, chance: random.Random) -> bytes:
    """A hostile version of a file of any kind: JSON, lines of JSON or of text, safetensors, or bytes."""
    kinds: list[Callable[[bytes, random.Random], bytes]] = []
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError:
        lines = []
    if len(content) > 8 and content[8:9] == b"{" and b'"data_offsets"' in content:
        kinds = [safetensors_mutant] * 3
    elif lines and lines[0][:1] in ("{", "[") and not (len(lines) > 1 and lines[0].endswith("}")):
        kinds = [lambda content, chance: json_mutant(content.decode(), chance).encode("utf-8", "surrogatepass")] * 3
    elif lines:
        kinds = [lines_mutant] * 3
    return chance.choice([byte_mutant, *kinds])(content, chance)
