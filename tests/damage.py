"""Damaged and hostile adapter files without end, and what reading each of them came to."""

from __future__ import annotations

import json
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from polyadapt.core import attach, load
from polyadapt.core.drawer import find_drawer
from polyadapt.core.errors import AdaptError
from polyadapt.core.store import read_file
from polyadapt.tests.broken_files import forged, grammar, header_end, overwrite, places, raw
from polyadapt.tests.saved_sets import METHODS, net, wake

Header = dict[str, Any]
DEEP = 20_000
HUGE = [1 << 31, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30, -1, -(1 << 63)]
HOSTILE: list[Any] = [
    *HUGE,
    0,
    1e308,
    float("nan"),
    float("inf"),
    True,
    None,
    "",
    "../../etc/passwd",
    "/etc/passwd",
    "a\nb",
    "\x00",
    "\u202e",
    "x" * 10_000,
    [],
    {},
    [[[[[[[[[[]]]]]]]]]],
]
_SITE = ("path", "parameter", "part", "rows", "kind", "shape", "slot")
PATHS = [
    "../../x/A",
    "/etc/passwd",
    "..",
    "\x00",
    "a\nb",
    "",
    ".head/../x",
    "blocks.0/../../A",
    "~",
]


@dataclass(frozen=True)
class Good:
    """A good file, taken apart."""

    content: bytes
    header: Header
    record: str
    data: bytes

    @classmethod
    def of(cls, content: bytes) -> Good:
        end = header_end(content)
        header = json.loads(content[8:end])
        return cls(content, header, header.pop("__metadata__")["polyadapt"], content[end:])

    def signed(self, header: Header, data: bytes | None = None, record: str | None = None) -> bytes:
        """As our own writer would have signed it."""
        return forged(header, self.data if data is None else data, record or self.record)

    def unsigned(self, header: Header) -> bytes:
        """With the digest of the good file."""
        metadata = json.loads(self.content[8 : header_end(self.content)])["__metadata__"]
        return raw({"__metadata__": metadata, **header}, self.data)


def good_sets(folder: Path) -> list[Good]:
    """One file per method and setting, head and extras included."""
    path, found = folder / "good.safetensors", []
    for recipe, at in METHODS:
        made = wake(attach(net(), recipe, at))
        made.extra, made.head = {"labels": ["größer"]}, {"weight": next(net().parameters())}
        made.save(path)
        found.append(Good.of(path.read_bytes()))
    return found


# ---- damage: every result must be refused


def bits(good: Good, dice: random.Random) -> bytes:
    """One to eight flipped bits."""
    changed = bytearray(good.content)
    for _ in range(dice.choice([1, 1, 2, 8])):
        bit = dice.randrange(8 * len(changed))
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def cuts(good: Good, dice: random.Random) -> bytes:
    """Cut off, cut out, twice, zeroed, or with noise in between."""
    content = good.content
    a, b = sorted(dice.sample(range(len(content) + 1), 2))
    pieces = [content[:a], content[b:], content[a:], content[:a] + content[b:]]
    pieces += [content[:b] + content[a:], content[:a] + bytes(b - a) + content[b:]]
    pieces += [content[:a] + dice.randbytes(b - a) + content[b:]]
    return dice.choice(pieces)


def swaps(good: Good, dice: random.Random) -> bytes:
    """Two tensors change names, places, shapes or dtypes, unsigned."""
    header = _swapped(good, dice) if len(good.header) > 1 else good.header
    return bits(good, dice) if header == good.header else good.unsigned(header)


def _swapped(good: Good, dice: random.Random) -> Header:
    header: Header = json.loads(json.dumps(good.header))
    one, two = dice.sample(sorted(header), 2)
    key = dice.choice(["whole", "data_offsets", "shape"])
    if key == "whole":
        header[one], header[two] = header[two], header[one]
    else:
        header[one][key], header[two][key] = header[two][key], header[one][key]
    return header


def headers(good: Good, dice: random.Random) -> bytes:
    """Lengths beyond all bounds, JSON nested without end, keys twice, anything that is JSON."""
    end = header_end(good.content)
    text = good.content[8:end].rstrip()
    key = json.dumps(dice.choice(sorted(good.header) or ["x"])).encode()
    depth = dice.randrange(1, DEEP)
    made = [
        dice.choice(HUGE[:6]).to_bytes(9, "little")[:8] + good.content[8:],
        dice.randrange(1 << 64).to_bytes(8, "little") + good.content[8:],
        raw(b'{"x":' * depth + b"1" + b"}" * depth, good.data),
        raw(text[:-1] + b',"x":' + b"[" * depth + b"]" * depth + b"}", good.data),
        raw(text[:-1] + b"," + key + b":{}}", good.data),
        raw(text[:-1] + b',"__metadata__":{"polyadapt":"{}"}}', good.data),
        raw(grammar(dice), good.data),
        raw(b"{" + b" " * dice.randrange(100_000), b""),
    ]
    return dice.choice(made)


# ---- forgeries: signed, so each is refused or is exactly what it says


def sizes(good: Good, dice: random.Random) -> bytes:
    """A tensor of impossible size, type or place."""
    header: Header = json.loads(json.dumps(good.header))
    if not header:
        return good.signed({"x": grammar(dice)})
    entry = header[dice.choice(sorted(header))]
    key = dice.choice(["shape", "data_offsets", "dtype"])
    huge = dice.choice(HOSTILE)
    values = {
        "shape": [huge, [huge], [huge, 0], [*entry["shape"], 1], entry["shape"][::-1], [1] * 99],
        "data_offsets": [huge, [0, huge], [huge, huge], entry["data_offsets"][::-1], [0, 0]],
        "dtype": [huge, "F64", "F16", "BF16", "I32", "U8", "F8_E4M3", "BOOL"],
    }
    entry[key] = dice.choice(values[key])
    return good.signed(header)


def names(good: Good, dice: random.Random) -> bytes:
    """A tensor under a name that might be taken for a path, or under another's."""
    if len(good.header) > 1 and dice.random() < 0.5:
        return good.signed(_swapped(good, dice))
    header: Header = json.loads(json.dumps(good.header))
    if header:
        header[dice.choice(PATHS)] = header.pop(dice.choice(sorted(header)))
    return good.signed(header)


def numbers(good: Good, dice: random.Random) -> bytes:
    """Other numbers in the tensors, NaN and infinity among them."""
    data = bytearray(good.data)
    for _ in range(dice.choice([1, 2, 64]) if data else 0):
        data[dice.randrange(len(data))] = dice.choice([0, 0x7F, 0x80, 0xFF, dice.randrange(256)])
    return good.signed(good.header, bytes(data))


def records(good: Good, dice: random.Random) -> bytes:
    """One value of the record replaced: settings, sites, fingerprints, versions."""
    record = json.loads(good.record)
    place, key = dice.choice(list(places(record)))
    place[key] = dice.choice([grammar(dice), dice.choice(HOSTILE)])
    if isinstance(place, dict) and dice.random() < 0.1:
        del place[key]
    depth = dice.randrange(1, DEEP)
    text = json.dumps(record)
    if dice.random() < 0.02:
        text = text[:-1] + ', "extra": ' + "[" * depth + "]" * depth + "}"
    return good.signed(good.header, record=text)


DAMAGE: list[Callable[[Good, random.Random], bytes]] = [bits, cuts, swaps, headers]
FORGERIES: list[Callable[[Good, random.Random], bytes]] = [sizes, names, numbers, records]


@dataclass
class Outcome:
    """What came of the files, by kind of damage."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def note(self, kind: str, result: str) -> None:
        """Count one file; whatever is neither refused nor as it says is kept in full."""
        known = result in ("refused", "as it says")
        self.counts[kind, result if known else "wrong"] += 1
        if not known:
            self.wrong.append(f"{kind}: {result}")

    def total(self, result: str) -> int:
        """Files of all kinds with that result."""
        return sum(count for (_, found), count in self.counts.items() if found == result)


def endless(goods: list[Good], seed: int) -> Iterator[tuple[str, bool, bytes]]:
    """(kind, signed, content) that differs from the good file."""
    dice = random.Random(seed)
    while True:
        good, make = dice.choice(goods), dice.choice(DAMAGE + FORGERIES)
        content = make(good, dice)
        if content != good.content:
            yield make.__name__, make in FORGERIES, content


def read_damaged(goods: list[Good], count: int, path: Path, seed: int = 0) -> Outcome:
    """Read so many files, and load into a fresh backbone what reading lets pass."""
    outcome = Outcome()
    path.touch()
    for kind, signed, content in islice(endless(goods, seed), count):
        overwrite(path, content)
        begin = time.perf_counter()
        outcome.note(kind, _result(path, content, signed))
        outcome.slowest = max(outcome.slowest, time.perf_counter() - begin)
    return outcome


def _result(path: Path, content: bytes, signed: bool) -> str:
    model = net()
    try:
        read_file(path)
        made = load(model, path)
    except AdaptError as error:
        line = str(error)
        if not line.isprintable() or str(path) not in line:
            return f"says {line!r}"
        return "refused" if _untouched(model) else "leaves the backbone changed"
    except BaseException:  # the very thing that is searched for: named, counted, reported
        return f"traceback {traceback.format_exc(limit=-2)}"
    return _told(made, content) if signed else "is loaded though damaged"


def _untouched(model: nn.Module) -> bool:
    return find_drawer(model) is None and all(p.requires_grad for p in model.parameters())


def _told(made: Any, content: bytes) -> str:
    """Every number, setting, site and extra is what the file says, and nothing else."""
    good = Good.of(content)
    record = json.loads(good.record)
    held = {f".head/{key}": tensor for key, tensor in made.head.items()} | made.state_dict()
    if held.keys() != good.header.keys():
        return "loaded other tensors than it names"
    for key, tensor in held.items():
        begin, end = good.header[key]["data_offsets"]
        if good.header[key]["dtype"] != "F32":
            continue  # widened without rounding
        if tensor.detach().numpy().tobytes() != good.data[begin:end]:
            return f"loaded other numbers at {key}"
    settings = made.recipe.to_json()
    told = {  # null stands for a method's default, such as alpha = rank
        key: settings.get(key) if value is not None else None
        for key, value in record["recipe"].items()
    }
    sites = [{field: getattr(s, field) for field in _SITE} for s in made.sites]
    pairs = [(told, record["recipe"]), (made.extra, record["extra"]), (sites, record["sites"])]
    same = all(json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True) for a, b in pairs)
    return "as it says" if same else f"loaded other settings: {pairs}"
