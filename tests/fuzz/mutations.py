"""Inputs out of inputs: files with bytes changed, texts with words of trouble in them, trees of JSON with a value that nobody wrote.

A case is a folder, {name: content}: bytes are a file, a text is a link and where it leads, and a name that ends in / is an empty folder.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Case = dict[str, bytes | str]
Mutate = Callable[[random.Random, bytes], bytes]

OUTSIDE = "../outside/victim"
"""What no file may lead to: a folder beside the one that a case is in."""

TEXTS = [
    *(
        "",
        " ",
        "a",
        "x" * 300,
        "y" * 5000,
        "\0",
        "a\0b",
        "²",
        "١",
        "1e999",
        "nan",
        "null",
        "true",
        "-1",
        "0x10",
        "1_000",
    ),
    *(
        OUTSIDE,
        f"{OUTSIDE}/run.json",
        f"../{OUTSIDE}",
        "..",
        ".",
        "/",
        "/etc/passwd",
        "~",
        "~nosuchuser",
        "${HOME}",
        "${NOPE}",
        "a/b",
        "a\\b",
    ),
    *(
        "\x1b[31mred\x1b[0m",
        "\x1b]0;title\x07",
        "[/b]",
        "[bold]x[/bold]",
        "[link=x]y[/link]",
        "\u202egnp.exe",
        "a\u200bb",
        "\x9b31m",
    ),
    *(
        "\udcff",
        "\U000e0041",
        "a\rb",
        "a\nb",
        "a\tb",
        "\u2028",
        "<script>alert(1)</script>",
        "</script>",
        '"><img src=x onerror=x>',
    ),
    *(
        "{{ 7*7 }}",
        "{x}",
        "%s",
        "`x` | y",
        "[a](javascript:x)",
        "# h",
        "---",
        "demo",
        "none",
        "lora",
        "peft:lora",
        "complete",
    ),
    *("running", "(a+)+$", "(", "*", "q_proj", "hf_" + "a" * 24, "https://u:p@h/?token=abc", "日本語", "1" * 5000),
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, -1, 3.5, 0.5, -0.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf")),
    *(
        2**31,
        2**32,
        2**63,
        2**64,
        -(2**63) - 1,
        10**30,
        10**400,
        -(10**400),
        [],
        {},
        [[]],
        [None],
        {"": None},
        {"a": {}},
    ),
    *([1, 2], ["a"], [{}], [0.5, "a"], {"kind": "x"}, {"recipe": "lora"}, {"epochs": 1}, {"epochs": "x"}),
]
DEPTHS = (3, 40, 1200, 100_000)
WORDS = [
    *(
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xf0\x9f",
        b"\xc3\x28",
        b"\r",
        b"\n",
        b"\r\n",
        b"\t",
        b'"',
        b'""',
        b"'",
        b",",
        b":",
        b"=",
        b"\\",
    ),
    *(
        b"[",
        b"]",
        b"{",
        b"}",
        b"[[[[",
        b"{}",
        b"[]",
        b"null",
        b"NaN",
        b"Infinity",
        b"-",
        b"1e999",
        b"1" * 5000,
        b"\\u0000",
        b"\\ud800",
    ),
    *(
        b"0",
        b"-1",
        b"18446744073709551616",
        b"true",
        b"\xc2\xb2",
        b"\x1b[31m",
        b"\xe2\x80\xae",
        b"<b>",
        b"..",
        b"/",
        b".",
    ),
]
YAML = [
    *(b"&a ", b"*a", b"<<: *a", b"<<: {r: 1}", b"!!int x", b"!!float x", b"!!binary x", b"!!set {a}", b"!!omap [a]", b"!!python/name:x ", b"!x y"),
    *(b"!!timestamp x", b"2024-99-99", b"0o8", b"0b", b"1:60", b"? ", b"- ", b"| ", b"> ", b"%YAML 1.1\n---\n", b"---\n", b"...\n", b"# "),
    *(b"  ", b"!!null x", b"!!bool x", b"!!str ", b"!!map [", b"!!seq {", b"=", b"~", b".inf", b".nan", b"1" * 5000, b"[" * 60, b"{a: " * 60),
    b"a: &a [x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\n",
]  # fmt: skip


def deep(depth: int, kind: int) -> bytes:
    """JSON nested so deep that a reader that calls itself falls over."""
    return b"[" * depth + b"]" * depth if kind else b'{"a":' * depth + b"1" + b"}" * depth


# ---------------------------------------------------------------------- bytes and lines


def change_bytes(rng: random.Random, content: bytes, words: list[bytes] = WORDS) -> bytes:
    """One change of a few bytes, or of whole lines."""
    at, size = rng.randrange(len(content) + 1), len(content)
    kind = rng.randrange(10)
    if kind == 0 or not size:
        return content[:at] + rng.choice(words) + content[at:]
    if kind == 1:
        end = min(size, at + rng.randrange(1, 9))
        return content[:at] + content[end:]
    if kind == 2:
        at = min(at, size - 1)
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    if kind == 3:
        return content[:at]
    if kind == 4:
        at = min(at, size - 1)
        return content[:at] + rng.choice(words) + content[at + 1 :]
    if kind == 5:
        end = min(size, at + rng.randrange(1, 40))
        return content[:end] + content[at:end] * rng.choice((1, 2, 50)) + content[end:]
    lines = content.splitlines(keepends=True)
    number = rng.randrange(len(lines))
    if kind == 6:
        del lines[number]
    elif kind == 7:
        lines.insert(rng.randrange(len(lines) + 1), lines[number])
    elif kind == 8:
        lines[number] = rng.choice((b"  ", b"\t", b"- ", b"")) + lines[number].lstrip()
    else:
        line = lines[number]
        cut = rng.randrange(len(line) + 1)
        lines[number] = line[:cut] + rng.choice(words) + rng.choice((b"", b"\n"))
    return b"".join(lines)


def lines_and_bytes(rng: random.Random, content: bytes) -> bytes:
    """A text file changed in one to four places."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        content = change_bytes(rng, content)
    return content


# ---------------------------------------------------------------------- trees


def value(rng: random.Random) -> Any:
    """A value that a reader may not expect."""
    return rng.choice(TEXTS) if rng.random() < 0.5 else rng.choice(VALUES)


def change_tree(rng: random.Random, root: Any) -> Any:
    """A tree with one value, key or element changed; the rest is shared with `root`."""
    if isinstance(root, dict) and root and rng.random() < 0.85:
        key = rng.choice(list(root))
        kind = rng.random()
        made = dict(root)
        if kind < 0.7:
            made[key] = change_tree(rng, root[key])
        elif kind < 0.8:
            del made[key]
        elif kind < 0.9:
            made[rng.choice((key + "x", key.upper(), rng.choice(TEXTS), key[:-1]))] = root[key]
        else:
            made[key] = root[rng.choice(list(root))]
        return made
    if isinstance(root, list) and root and rng.random() < 0.8:
        number = rng.randrange(len(root))
        kind = rng.random()
        if kind < 0.7:
            return [*root[:number], change_tree(rng, root[number]), *root[number + 1 :]]
        if kind < 0.8:
            return root[:number] + root[number + 1 :]
        return [*root, root[number] if kind < 0.9 else value(rng)]
    if isinstance(root, (int, float)) and not isinstance(root, bool) and rng.random() < 0.3:
        return rng.choice((-root, root + 1, root * 1000, str(root), float(root) if abs(root) < 1e300 else 0.5, [root]))
    if isinstance(root, str) and rng.random() < 0.4:
        at = rng.randrange(len(root) + 1)
        return root[:at] + rng.choice(TEXTS) + root[at:]
    return value(rng)


def write_tree(rng: random.Random, tree: Any) -> bytes:
    """JSON of a tree, in one of its spellings."""
    return json.dumps(tree, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")


def json_file(rng: random.Random, content: bytes) -> bytes:
    """A JSON file with another tree in it, or a damaged one."""
    if rng.random() < 0.75:
        try:
            tree = json.loads(content)
        except (ValueError, RecursionError):
            return lines_and_bytes(rng, content)
        for _ in range(rng.choice((1, 1, 2, 3))):
            tree = change_tree(rng, tree)
        return write_tree(rng, tree)
    if rng.random() < 0.04:
        return deep(rng.choice(DEPTHS), rng.randrange(2))
    return lines_and_bytes(rng, content)


def json_lines(rng: random.Random, content: bytes) -> bytes:
    """A JSON lines file with another row."""
    lines = content.splitlines(keepends=True)
    if not lines or rng.random() < 0.25:
        return lines_and_bytes(rng, content)
    number = rng.randrange(len(lines))
    lines[number] = json_file(rng, lines[number]) + rng.choice((b"\n", b"\n", b"\n", b"", b"\r\n"))
    return b"".join(lines)


def yaml_file(rng: random.Random, content: bytes) -> bytes:
    """A YAML file: JSON is YAML, so trees change as there; and the marks that only YAML has are strewn in."""
    if rng.random() < 0.4:
        return json_file(rng, content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        content = change_bytes(rng, content, YAML if rng.random() < 0.7 else WORDS)
    return content


# ---------------------------------------------------------------------- safetensors

SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "U64": 8,
}


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes] | None:
    """The header and the data of a file, if it has the form of one."""
    try:
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + length])
    except (ValueError, struct.error, RecursionError, OverflowError):
        return None
    return (header, content[8 + length :]) if isinstance(header, dict) else None


def join_safetensors(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", (len(header) if length is None else length) % 2**64) + header + data


def safetensors_header(rng: random.Random, content: bytes) -> bytes:
    """A file whose header says something else, or is no header."""
    found = split_safetensors(content)
    if found is None or rng.random() < 0.2:
        return lines_and_bytes(rng, content[:2000]) + content[2000:]
    header, data = found
    written = json_file(rng, json.dumps(header).encode())
    odd = rng.choice((0, 1, len(written) - 1, len(written) + 1, 2**32, 2**63, 2**64 - 1))
    return join_safetensors(written, data, odd if rng.random() < 0.15 else None)


def safetensors_tensors(rng: random.Random, content: bytes) -> bytes:
    """A valid file of other tensors: other names, shapes, dtypes and values."""
    found = split_safetensors(content)
    if found is None:
        return content
    header, data = found
    kept: dict[str, tuple[str, list[int], bytes]] = {}
    for name, about in header.items():
        try:
            if name != "__metadata__":
                begin, end = about["data_offsets"]
                kept[name] = (str(about["dtype"]), [int(n) for n in about["shape"]], data[begin:end])
        except (TypeError, KeyError, ValueError, OverflowError):
            return content
    for _ in range(rng.choice((1, 1, 2, 4))):
        if kept:
            _change_tensor(rng, kept)
    said, chunks, at = {}, [], 0
    for name, (dtype, shape, values) in kept.items():
        said[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(values)]}
        chunks.append(values)
        at += len(values)
    written = json.dumps(said | {"__metadata__": {"format": "pt"}}).encode()
    return join_safetensors(written + b" " * (-len(written) % 8), b"".join(chunks))


def _change_tensor(rng: random.Random, kept: dict[str, tuple[str, list[int], bytes]]) -> None:
    name = rng.choice(list(kept))
    dtype, shape, _ = kept[name]
    kind = rng.randrange(7)
    if kind == 0:
        del kept[name]
    elif kind == 1:
        parts = name.split(".")
        parts[rng.randrange(len(parts))] = rng.choice(("", "0", "-1", "99999999999", "x.y", "B1", rng.choice(TEXTS)))
        kept[".".join(parts)] = kept.pop(name) if rng.random() < 0.5 else kept[name]
    elif kind == 2:
        other = rng.choice(list(kept))
        kept[name], kept[other] = kept[other], kept[name]
    else:
        if kind == 3:
            dtype = rng.choice(list(SIZES))
        if kind in (3, 4):
            shape = rng.choice(
                (
                    [],
                    [0],
                    [1],
                    [3],
                    [0, 4],
                    [4, 0],
                    [1, 1],
                    [2, 3],
                    [2, 2, 2],
                    shape[::-1],
                    [*shape, 1],
                    shape[:-1],
                    [1] * 9,
                )
            )
        count = 1
        for n in shape:
            count *= n
        size = count * SIZES.get(dtype, 4)
        if size > 1 << 16:
            return
        fill = rng.choice(
            (None, b"\0", b"\xff", b"\x7f", b"\x80\x7f", b"\xc0\x7f", struct.pack("<q", -1), struct.pack("<q", 2**62))
        )
        kept[name] = (dtype, shape, rng.randbytes(size) if fill is None else (fill * (size // len(fill) + 1))[:size])


# ---------------------------------------------------------------------- GGUF

GGUF_NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the types of values that are numbers; 8 is a text, 9 an array."""
_WIDE = (0, 1, 2, 3, 64, 65, 2**31, 2**32 - 1, 2**32, 2**62, 2**63, 2**64 - 1)
Key = tuple[bytes, int, bytes]
"""Name, type and the value as it is written."""
Placed = tuple[bytes, list[int], int, int]
"""Name, dimensions, type and offset of a tensor."""


def split_gguf(content: bytes) -> tuple[int, list[Key], list[Placed], bytes] | None:
    """Version, keys, tensors and what follows the header of a file, if it has the form of one."""
    at = 8

    def number(kind: str) -> int:
        nonlocal at
        (found,) = struct.unpack_from(f"<{kind}", content, at)
        at += struct.calcsize(f"<{kind}")
        return int(found)

    def text() -> bytes:
        nonlocal at
        size = number("Q")
        at += size
        if at > len(content):
            raise ValueError
        return content[at - size : at]

    def skip(kind: int, depth: int = 0) -> None:
        nonlocal at
        if kind in GGUF_NUMBERS:
            at += GGUF_NUMBERS[kind]
        elif kind == 8:
            text()
        elif kind == 9 and depth < 9:
            inner, count = number("I"), number("Q")
            if inner in GGUF_NUMBERS:
                at += count * GGUF_NUMBERS[inner]
            else:
                for _ in range(min(count, len(content))):
                    skip(inner, depth + 1)
        else:
            raise ValueError

    try:
        version = struct.unpack_from("<I", content, 4)[0]
        counts, keys, tensors = (number("Q"), number("Q")), list[Key](), list[Placed]()
        for _ in range(min(counts[1], 1000)):
            name, kind = text(), number("I")
            begin = at
            skip(kind)
            keys.append((name, kind, content[begin:at]))
        for _ in range(min(counts[0], 1000)):
            name, rank = text(), number("I")
            shape = [number("Q") for _ in range(min(rank, 100))]
            tensors.append((name, shape, number("I"), number("Q")))
    except (struct.error, ValueError, OverflowError):
        return None
    return version, keys, tensors, content[(at + 31) // 32 * 32 :]


def join_gguf(version: int, counts: tuple[int, int], keys: list[Key], tensors: list[Placed], data: bytes) -> bytes:
    """A file of these; the header's `counts`, of tensors and of keys, may be others than there are."""
    parts = [b"GGUF", struct.pack("<IQQ", version % 2**32, *(n % 2**64 for n in counts))]
    for name, kind, value in keys:
        parts += [struct.pack("<Q", len(name)), name, struct.pack("<I", kind % 2**32), value]
    for name, shape, kind, offset in tensors:
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *(n % 2**64 for n in shape))
        parts += [struct.pack("<Q", len(name)), name, dimensions, struct.pack("<IQ", kind % 2**32, offset % 2**64)]
    header = b"".join(parts)
    return header + b"\0" * (-len(header) % 32) + data


def gguf_text(rng: random.Random) -> bytes:
    """A text of a header, with its length before it."""
    text = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if rng.random() < 0.9 else rng.choice(_WIDE)) + text


def gguf_header(rng: random.Random, content: bytes) -> bytes:
    """A file whose header says something else, or is no header."""
    found = split_gguf(content)
    if found is None or rng.random() < 0.2:
        return lines_and_bytes(rng, content[:6000]) + content[6000:]
    version, keys, tensors, data = found[0], [*found[1]], [*found[2]], found[3]
    counts = None
    for _ in range(rng.choice((1, 1, 2, 4))):
        kind = rng.randrange(10)
        if kind < 5 and keys:
            number = rng.randrange(len(keys))
            keys[number : number + 1] = _other_key(rng, keys[number])
        elif kind < 9 and tensors:
            number = rng.randrange(len(tensors))
            tensors[number : number + 1] = _other_tensor(rng, tensors[number])
        elif rng.random() < 0.5:
            version = rng.choice((0, 1, 2, 3, 4, 0x03000000, 2**32 - 1))
        else:
            counts = rng.choice((len(tensors), *_WIDE)), rng.choice((len(keys), *_WIDE))
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data) + 1)]
    return join_gguf(version, counts or (len(tensors), len(keys)), keys, tensors, data)


def _other_key(rng: random.Random, key: Key) -> list[Key]:
    name, kind, value = key
    how = rng.randrange(7)
    if how == 0:
        return []
    if how == 1:
        return [key, key]
    if how == 2:
        return [(rng.choice((name + b"x", name[:-1], rng.choice(TEXTS).encode("utf-8", "surrogatepass"))), kind, value)]
    if how == 3:
        return [(name, rng.choice((*range(14), 2**31)), value)]
    if how == 4:
        return [(name, 8, gguf_text(rng))]
    if how == 5:
        made = rng.choice((*GGUF_NUMBERS, kind if kind in GGUF_NUMBERS else 4))
        filled = rng.choice((b"\0", b"\xff", b"\x7f", b"\1\0\0\0", b"\0\0\xc0\x7f")) * 8
        return [(name, made, filled[: GGUF_NUMBERS[made]])]
    inner, count = rng.choice((*GGUF_NUMBERS, 8, 9, 13)), rng.choice((0, 1, 2, *_WIDE))
    items = b"".join(gguf_text(rng) for _ in range(2)) if inner == 8 else rng.randbytes(16)
    for _ in range(rng.choice((0, 0, 0, 1, 3, 8))):
        items, inner, count = struct.pack("<IQ", inner, count) + items, 9, 1
    return [(name, 9, struct.pack("<IQ", inner, count) + items)]


def _other_tensor(rng: random.Random, tensor: Placed) -> list[Placed]:
    name, shape, kind, offset = tensor
    how = rng.randrange(6)
    if how == 0:
        return []
    if how == 1:
        return [tensor, tensor]
    if how == 2:
        return [
            (
                rng.choice((name[:-1], b"blk.9999." + name, rng.choice(TEXTS).encode("utf-8", "surrogatepass"))),
                shape,
                kind,
                offset,
            )
        ]
    if how == 3:
        other = rng.choice(
            ([], [0], [1], shape[::-1], [*shape, 1], [rng.choice(_WIDE) for _ in shape], [1] * 9, [2**32] * 2)
        )
        return [(name, other, kind, offset)]
    if how == 4:
        return [(name, shape, rng.choice((*range(42), 2**31)), offset)]
    return [(name, shape, kind, rng.choice((offset + 1, *_WIDE)))]
