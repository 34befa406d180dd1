"""A thousand sweep files with mistakes nobody thought of: each is valid, or told what is wrong.

The seeds are the sweeps and profiles that ship. A mistake is made in the text (a byte, a line, an
indentation, a tag) or in what the text means (a key, a value, a branch), in the sweep or in its
profile, several at once.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from orchestrator.cli import app

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SWEEPS = Path(__file__).parent.parent / "sweeps"
EXAMPLES = 1000
CPU_SECONDS = 5.0
"""What an answer may cost: of the processor, since the machine may be busy with something else."""

# What needs a package or a file that is not everywhere is read all the same, and refused.
PROFILES = ("tiny", "tiny", "tiny", "smollm2", "llama31_8b")
FILES = tuple(sorted(path.name for path in SWEEPS.glob("*.yaml")))


@dataclass(frozen=True)
class Mistaken:
    """The two files as they are written: bytes, since a mistake need not be text."""

    profile: str
    sweep: bytes
    scale: bytes


# --- mistakes in the text --------------------------------------------------------------------

ODD_TEXT = (
    "~", "true", "yes", "-1", "0", "1.5", "1e400", "-1e308", ".inf", ".nan", "9" * 30, "9" * 5000,
    "0x_", "0o9", "1_000", "2024-01-01", "12:30", '""', "''", "'", '"', "[]", "{}", "[[[]]]", "[",
    "{", "]", "}", "{a: b", "- -", "? a", "|", ">", "&a", "*a", "*nowhere", "&a [*a]", "<<: {}",
    "!!python/object/apply:os.system [id]", "!!python/name:os.system", "!!binary aGk=", "!!set {a}",
    "!!timestamp 2024-01-01", "!!int x", "!!float x", "!!bool x", "!!str 1", "!!null x", "!own 1",
    "!<tag:yaml.org,2002:int> 1", "%YAML 9.9", "---", "...", "#", "@x", "`x`", "../../etc/passwd",
    "/dev/zero", "/", "~/x", "a/b", "x" * 70_000, "é", "\u202e", "\u2028", "\x85", "\ufeff",
    "\U0001f600",
    '"\\ud800"', '"\\x00"', "\x00", "\x07", "[/red]", "[bold]", "{value}", "%s", "winner",
)  # fmt: skip
ODD_BYTES = (
    b"\x00",
    b"\xff",
    b"\xfe\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\r",
    b"\t",
    b"\n",
    b"\x1b[2J",
)


def bomb(levels: int, width: int) -> str:
    """Aliases of aliases: a few lines that stand for `width ** levels` values."""
    lines = ["b0: &b0 [x, x]"]
    for level in range(1, levels):
        lines.append(f"b{level}: &b{level} [{', '.join([f'*b{level - 1}'] * width)}]")
    return "\n".join(lines) + "\n"


def nested(depth: int, opening: str, closing: str) -> str:
    return f"deep: {opening * depth}x{closing * depth}\n"


ENDINGS = (
    bomb(12, 9), bomb(3, 40), bomb(40, 2), nested(30, "[", "]"), nested(50, "{a: ", "}"),
    nested(3000, "[", "]"), nested(3000, "[", ""), "a: &a {b: *a}\n", "a: &a [*a]\n",
    "trial: &t\n  <<: *t\n", "\t\n", "...\n", "---\nname: other\n", "name: twice\n",
    "axes: {seed: {from: 0, to: 1e9}}\n", "? {a: b}\n: c\n", "? [a]\n: c\n", "1: 2\n", "~: 2\n",
    "- a list\n", "merged: true\n", "x: |\n  " + "y" * 100_000 + "\n",
)  # fmt: skip


def _line(draw: st.DrawFn, lines: list[str]) -> int:
    return draw(st.integers(0, len(lines) - 1))


def _edited(edit: Callable[[st.DrawFn, list[str]], None]) -> Callable[[st.DrawFn, str], str]:
    """An edit of the list of lines, as one of the text."""

    def apply(draw: st.DrawFn, text: str) -> str:
        lines = text.splitlines(keepends=True)
        if lines:
            edit(draw, lines)
        return "".join(lines)

    return apply


@_edited
def line_deleted(draw: st.DrawFn, lines: list[str]) -> None:
    del lines[_line(draw, lines)]


@_edited
def line_twice(draw: st.DrawFn, lines: list[str]) -> None:
    lines.insert(_line(draw, lines), lines[_line(draw, lines)])


@_edited
def lines_swapped(draw: st.DrawFn, lines: list[str]) -> None:
    one, other = _line(draw, lines), _line(draw, lines)
    lines[one], lines[other] = lines[other], lines[one]


@_edited
def indented(draw: st.DrawFn, lines: list[str]) -> None:
    at = _line(draw, lines)
    lines[at] = draw(st.sampled_from(["", " ", "  ", "   ", "\t", " " * 60])) + lines[at].lstrip(
        " "
    )


@_edited
def value_odd(draw: st.DrawFn, lines: list[str]) -> None:
    """Something else after the colon."""
    at = _line(draw, lines)
    key, colon, _ = lines[at].partition(":")
    lines[at] = f"{key}{colon} {draw(st.sampled_from(ODD_TEXT))}\n"


@_edited
def key_misspelt(draw: st.DrawFn, lines: list[str]) -> None:
    at = _line(draw, lines)
    key, colon, rest = lines[at].partition(":")
    name = key.strip() or "x"
    other = draw(st.sampled_from([name[:-1], name + "s", name.upper(), name * 2, name + ".x", "."]))
    lines[at] = key.replace(name, other, 1) + colon + rest


def text_inserted(draw: st.DrawFn, text: str) -> str:
    at = draw(st.integers(0, len(text)))
    return text[:at] + draw(st.sampled_from(ODD_TEXT)) + text[at:]


def cut_off(draw: st.DrawFn, text: str) -> str:
    return text[: draw(st.integers(0, len(text)))]


def character_lost(draw: st.DrawFn, text: str) -> str:
    at = draw(st.integers(0, len(text)))
    return text[:at] + text[at + 1 :]


def ended_otherwise(draw: st.DrawFn, text: str) -> str:
    return text + draw(st.sampled_from(ENDINGS))


IN_TEXT = (
    line_deleted, line_twice, lines_swapped, indented, value_odd, key_misspelt, text_inserted,
    cut_off, character_lost, ended_otherwise,
)  # fmt: skip


# --- mistakes in what the text means ---------------------------------------------------------

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1.5, 1e-300, 1e300, 10**12, 10**40, -(10**40), "",
    " ", "x", "true", "1", "../..", "/", "a.b", "é", "[/]", "all", "auto", "random", "winner", [],
    {}, [[]], [None], [1, 1], [1, "1", True], ["x"] * 300, {"a": None}, {"": 1}, {"kind": "x"},
    {"kind": None},
    {"kind": "winner"}, {"kind": "winner", "sweep": "../.."}, {"kind": "folder", "path": "/"},
    {"kind": "hub"}, {"values": [1]}, {"values": [1], "when": {"seed": 1}},
    {"from": 0, "to": 10**9}, {"from": 0, "to": 1, "step": 1e-9}, {"variants": {"x": {"y": 1}}},
)  # fmt: skip
ODD_KEYS = (
    "", " ", ".", "a..b", "kind", "seed", "when", "values", "variants", "distill",
    "prune.depth.keep",
    "source", "source.seed", "data_folder", "<<", "é", "x" * 300, "teacher", "baseline", "rung",
)  # fmt: skip

Place = tuple[Any, Any]
"""A container of the tree, and the key or index in it."""


def places(tree: Any) -> Iterator[Place]:
    """Every value of the tree but the tree itself."""
    found = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, child in list(found):
        yield tree, key
        if isinstance(child, dict | list):
            yield from places(child)


def _place(draw: st.DrawFn, tree: Any) -> Place:
    return draw(st.sampled_from(list(places(tree))))


def value_replaced(draw: st.DrawFn, tree: Any) -> None:
    at, key = _place(draw, tree)
    at[key] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))


def branch_moved(draw: st.DrawFn, tree: Any) -> None:
    """A value stands at another's place."""
    (one, this), (other, that) = _place(draw, tree), _place(draw, tree)
    one[this] = copy.deepcopy(other[that])


def branch_lost(draw: st.DrawFn, tree: Any) -> None:
    at, key = _place(draw, tree)
    del at[key]


def wrapped(draw: st.DrawFn, tree: Any) -> None:
    at, key = _place(draw, tree)
    at[key] = draw(
        st.sampled_from([[at[key]], {"kind": at[key]}, {"values": at[key]}, [at[key]] * 3])
    )


def key_renamed(draw: st.DrawFn, tree: Any) -> None:
    at, key = _place(draw, tree)
    if isinstance(at, dict):
        at[draw(st.sampled_from((*ODD_KEYS, *map(str, tree))))] = at.pop(key)


def key_added(draw: st.DrawFn, tree: Any) -> None:
    at, _ = _place(draw, tree)
    if isinstance(at, dict):
        at[draw(st.sampled_from(ODD_KEYS))] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))


def number_scaled(draw: st.DrawFn, tree: Any) -> None:
    numbers = [(at, key) for at, key in places(tree) if type(at[key]) in (int, float)]
    if numbers:
        at, key = draw(st.sampled_from(numbers))
        at[key] = at[key] * draw(st.sampled_from([-1, 0, 0.5, 3, 1000, 10**9, 1.0]))


IN_TREE = (
    value_replaced, branch_moved, branch_lost, wrapped, key_renamed, key_added, number_scaled,
)  # fmt: skip


# --- putting them together -------------------------------------------------------------------


def _with_text_mistakes(draw: st.DrawFn, text: str, count: int) -> bytes:
    for mistake in draw(st.lists(st.sampled_from(IN_TEXT), min_size=count, max_size=count)):
        text = mistake(draw, text)
    data = text.encode(errors="surrogatepass")
    if draw(st.integers(0, 7)) == 0:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.sampled_from(ODD_BYTES)) + data[at:]
    return data


def _with_tree_mistakes(draw: st.DrawFn, text: str, count: int) -> bytes:
    tree = yaml.safe_load(text)
    for mistake in draw(st.lists(st.sampled_from(IN_TREE), min_size=count, max_size=count)):
        if next(places(tree), None) is not None:
            mistake(draw, tree)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode()


@st.composite
def mistaken(draw: st.DrawFn) -> Mistaken:
    """A shipped sweep and a shipped profile, with one to four mistakes in either."""
    profile = draw(st.sampled_from(PROFILES))
    sweep = (SWEEPS / draw(st.sampled_from(FILES))).read_text()
    sweep = sweep.replace("profile: tiny", f"profile: {profile}", 1)
    scale = (SWEEPS / "profiles" / f"{profile}.yaml").read_text()
    make = draw(st.sampled_from([_with_text_mistakes, _with_tree_mistakes]))
    count = draw(st.sampled_from([1, 1, 2, 4]))
    if draw(st.integers(0, 3)):
        return Mistaken(profile, make(draw, sweep, count), scale.encode())
    return Mistaken(profile, sweep.encode(), make(draw, scale, count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fuzz")
    (made / "profiles").mkdir()
    return made


_NUMBER = itertools.count()


def answered(folder: Path, files: Mistaken, *command: str) -> tuple[Result, float]:
    """What the command line says of the files, and the seconds of CPU that it took."""
    # Names that no other text holds: a message has to name the file that it is about.
    sweep = folder / f"mistaken{next(_NUMBER) % 7}.yaml"
    sweep.write_bytes(files.sweep)
    (folder / "profiles" / f"{files.profile}.yaml").write_bytes(files.scale)
    began = time.process_time()
    arguments = [*command, str(sweep), "--results", str(folder / "results")]
    result = CliRunner().invoke(app, arguments)
    return result, time.process_time() - began


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # to make a failure smaller takes minutes
    suppress_health_check=list(HealthCheck),
)
@given(files=mistaken())
def test_a_mistaken_sweep_is_valid_or_told_what_is_wrong(folder: Path, files: Mistaken) -> None:
    result, seconds = answered(folder, files, "validate")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 2), result.output
    assert "Traceback" not in result.output
    named = [line for line in result.output.splitlines() if str(folder) in line]
    assert named, f"no file is named: {result.output!r}"
    assert seconds < CPU_SECONDS, f"{seconds:.1f} s for {result.output[:300]!r}"
    assert not (folder / "results").exists(), "nothing may be started"
    if result.exit_code == 0:
        _plan_answers(folder, files, result)


def _plan_answers(folder: Path, files: Mistaken, valid: Result) -> None:
    """What is valid can be planned and shown, whatever its texts hold."""
    count = int(valid.output.rsplit("valid, ", 1)[1].split()[0])
    if count > 40:  # printing costs more than reading, and is not what differs
        return
    result, _ = answered(folder, files, "plan")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
