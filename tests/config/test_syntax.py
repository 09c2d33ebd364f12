"""Every rule of the command line's grammar, on a dataclass made for it."""

# ruff: noqa: RUF009  # flag() makes a field
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from rows import each_row

from tokasaurus.config.parser import parse
from tokasaurus.config.schema import Retired, Schema, check_fields, flag
from tokasaurus.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = flag(0.5, help="A number.")
    name: str | None = flag(None, help="A text.")

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Middle:
    inner: Inner = flag(Inner(), help="")
    depth: int = flag(1, help="A number.")


@dataclass(frozen=True, kw_only=True)
class Sample:
    text: str = flag("start", help="A text.", may_be_empty=True)
    maybe: str | None = flag(None, help="A text or None.")
    raw: str = flag("", help="Taken as it is.", verbatim=True, may_be_empty=True)
    count: int = flag(1, help="An integer.", aliases=("number",), minimum=-5, maximum=10**6)
    limit: int | None = flag(None, help="An integer or None.")
    share: float = flag(0.0, help="A number.")
    flip: bool = flag(False, help="A switch.")
    items: tuple[str, ...] = flag((), help="Texts.")
    options: Mapping[str, Any] | None = flag(None, help="A mapping.")
    level: str = flag("info", help="A choice.", choices=("info", "Warning"))
    anything: Any = flag(None, help="Whatever the grammar says.", may_be_empty=True)
    a: Middle = flag(Middle(), help="")

    def __post_init__(self):
        check_fields(self)


def _both(first: Any, second: Any = 2, *, third: Any = None) -> dict[str, Any]:
    """Sets three."""
    return {"anything": (first, second, third)}


def _loud() -> dict[str, Any]:
    """Warnings."""
    return {"level": "warning"}


SAMPLE = Schema(
    target=Sample,
    program="sample",
    summary="A sample.",
    shortcuts={"both": _both, "loud": _loud},
    retired={"old": Retired(int, 5, "it is gone"), "old_switch": Retired(bool, True, "gone")},
    reads_files=True,
)


def read(*arguments, overrides=""):
    return parse(SAMPLE, arguments, overrides)


@each_row(
    "argument, value",
    [
        ("anything=word", "word"),
        ("anything=a=b", "a=b"),
        ("anything=", ""),
        ("anything=T", True),
        ("anything=F", False),
        ("anything=True", True),
        ("anything=False", False),
        ("anything=None", None),
        ("anything=12", 12),
        ("anything=-12", -12),
        ("anything=1_000", 1000),
        ("anything=2.5", 2.5),
        ("anything=1e3", 1000.0),
        ("anything='1'", "1"),
        ('anything="a b"', "a b"),
        ("anything='it", "'it"),
        ("anything=[1, 'a', [2]]", [1, "a", [2]]),
        ("anything={'a': 1}", {"a": 1}),
        ('anything={"a": [true, null]}', {"a": [True, None]}),
        ("anything=(1, 2)", (1, 2)),
        ("anything=('a', 'b')", ("a", "b")),
        ("anything=(2 * 1024)", 2048),
        ("anything=(1)+(2)", 3),
        ("anything=(2) apples", "(2) apples"),
        ("anything=1 # one", "1 # one"),
        ("anything=2j", "2j"),
        ("anything=f", "f"),
        ("anything=C:\\d", "C:\\d"),
    ],
)
def test_literals_without_a_type(argument, value):
    result = read(argument).anything
    assert result == value
    assert type(result) is type(value)


@each_row("broken", ["[1, 2", "{'a': 1", "[a]", "{a}", "[1]]", "{1: }"])
@each_row("key", ["anything", "text", "items", "options", "count"])
def test_unclosed_brackets_are_errors(key, broken):
    if key == "items" and broken[0] == "{":
        return  # a list of texts has no braces: this is a file pattern
    with pytest.raises(ConfigError, match=key):
        read(f"{key}={broken}")


@each_row(
    "argument, value",
    [
        ("text=123", "123"),
        ("text=1e3", "1e3"),
        ("text=T", "T"),
        ("text=None", "None"),
        ("text=", ""),
        ("text=a=b", "a=b"),
        ("text='(1)'", "(1)"),
        ("text=(1)+(2)", "3"),
        ("text=a(1)", "a(1)"),
        ("text=~/dir with space/ä", "~/dir with space/ä"),
    ],
)
def test_texts_are_taken_as_written(argument, value):
    assert read(argument).text == value


def test_none_resets_an_optional_text():
    assert read("maybe=a").maybe == "a"
    assert read("maybe=a", "maybe=None").maybe is None
    assert read("maybe='None'").maybe == "None"


@each_row("raw", ["(1)", "[1", "'a'", "None", "T", "a=b", ""])
def test_a_verbatim_flag_takes_any_text(raw):
    assert read(f"raw={raw}").raw == raw


@each_row(
    "word, value",
    [
        *((word, True) for word in ["t", "T", "true", "True", "TRUE", "yes", "on", "1", "(1)"]),
        *(
            (word, False)
            for word in ["f", "F", "false", "False", "no", "No", "off", "0", "(1 - 1)"]
        ),
    ],
)
def test_spellings_of_true_and_false(word, value):
    assert read(f"flip={word}").flip is value


@each_row("word", ["2", "maybe", "", "None", "1.5", "tru", "[1]"])
def test_other_spellings_of_true_and_false_are_errors(word):
    with pytest.raises(ConfigError, match=r"flip=.*true or false"):
        read(f"flip={word}")


@each_row(
    "written, value",
    [("7", 7), ("7.0", 7), ("1e3", 1000), ("(1024*1024/4)", 262144), ("(1e5)", 100000), ("-3", -3)],
)
def test_spellings_of_integers(written, value):
    result = read(f"count={written}").count
    assert result == value
    assert type(result) is int


@each_row(
    "written",
    ["2.7", "(7 / 2)", "T", "abc", "", "None", "1 2", "[1]", "1,2", "1e30", "1e999", "007"],
)
def test_values_that_are_not_integers_are_errors(written):
    with pytest.raises(ConfigError, match=r"count=.*expected an integer"):
        read(f"count={written}")


def test_spellings_of_numbers():
    assert read("share=2").share == 2.0
    assert type(read("share=2").share) is float
    assert read("share=1e-3").share == 0.001
    for wrong in ("nan", "inf", "1e999", "T", "None", "a"):
        with pytest.raises(ConfigError, match="share"):
            read(f"share={wrong}")


def test_ranges_and_choices():
    assert read("level=WARNING").level == "Warning"
    with pytest.raises(ConfigError, match=r"level=.*info, Warning; the nearest is Warning"):
        read("level=warn")
    with pytest.raises(ConfigError, match="count=-6: must be at least -5"):
        read("count=-6")
    with pytest.raises(ConfigError, match="count=2000000: must be at most 1000000"):
        read("count=2e6")
    with pytest.raises(ConfigError, match="maybe='': must not be empty"):
        read("maybe=")


@each_row(
    "arguments, items",
    [
        (["items=a"], ("a",)),
        (["items=a, b"], ("a", "b")),
        (["items=*.json,*.txt"], ("*.json", "*.txt")),
        (["items=['a', 'b']"], ("a", "b")),
        (["items=('a', 'b')"], ("a", "b")),
        (["items="], ()),
        (["--list", "items", "a", "b c", "list--"], ("a", "b c")),
        (["--list", "items", "a=b", "--show", "3", "list--"], ("a=b", "--show", "3")),
        (["--list", "items", "list--"], ()),
        (["items=a", "--list", "items", "b", "list--"], ("b",)),
    ],
)
def test_spellings_of_lists(arguments, items):
    assert read(*arguments).items == items


def test_a_list_of_anything():
    assert read("--list", "anything", "1", "(2 * 3)", "T", "x", "list--").anything == [
        1,
        6,
        True,
        "x",
    ]


@each_row("arguments", [["--list", "items", "a"], ["--list", "list--"], ["--list"], ["items=[1]"]])
def test_broken_lists_are_errors(arguments):
    with pytest.raises(ConfigError, match="list"):
        read(*arguments)


def test_nested_keys():
    value = read("a.inner.rate=2", "a.depth=(2 + 1)", "a.inner.name=x").a
    assert value == Middle(inner=Inner(rate=2.0, name="x"), depth=3)


def test_nested_keys_of_a_mapping():
    assert read("options.x=1", "options.y.z=T", "options.w=word").options == {
        "x": 1,
        "y": {"z": True},
        "w": "word",
    }
    assert read("options={'x': 1, 'y': 2}", "options.x=3").options == {"x": 3, "y": 2}
    assert read("options.x=3", "options={'y': 2}").options == {"y": 2}
    assert read("options.x=3", "options=None").options is None


def test_keys_in_scopes():
    arguments = [
        "--in",
        "a",
        "depth=2",
        "--in",
        "inner",
        "rate=3",
        "in--",
        "depth=4",
        "in--",
        "text=x",
    ]
    value = read(*arguments)
    assert value.a == Middle(inner=Inner(rate=3.0), depth=4)
    assert value.text == "x"
    arguments = ["--in", "options", "--list", "x", "1", "b", "list--", "in--"]
    assert read(*arguments).options == {"x": [1, "b"]}


@each_row(
    "arguments, words",
    [
        (["a.inner.rat=1"], ["a.inner", "rat", "rate"]),
        (["a.iner.rate=1"], ["'a'", "iner", "inner"]),
        (["text.x=1"], ["text.x", "no keys"]),
        (["options.x=1", "options.x.y=2"], ["options.x.y", "no keys"]),
        (["a=1"], ["a.inner", "a.depth"]),
        (["a.inner.rate=x"], ["a.inner.rate", "a number"]),
        (["--in", "a", "depth=2"], ["--in a", "in--"]),
        (["in--"], ["in-- without"]),
        (["--in"], ["--in"]),
        (["--in", "a", ".loud", "in--"], [".loud", "'a'"]),
    ],
)
def test_wrong_paths_are_errors(arguments, words):
    with pytest.raises(ConfigError) as caught:
        read(*arguments)
    assert all(word in str(caught.value) for word in words), caught.value


def test_later_values_win():
    assert read("count=1", "number=2", "--count=3", "count=4").count == 4
    assert read("level=info", ".loud").level == "Warning"
    assert read(".loud", "level=info").level == "info"


@each_row(
    "arguments",
    [
        ["--count=7"],
        ["--count", "7"],
        ["--number", "(3 + 4)"],
        ["-count=7"],
        ["--count", "1", "count=7"],
    ],
)
def test_keys_with_dashes(arguments):
    assert read(*arguments).count == 7


def test_dashes_of_switches_and_values():
    assert read("--flip").flip is True
    assert read("--flip", "--count", "7").count == 7
    assert read("--flip", "f", "count=7").flip is False
    assert read("--share", "-1.5").share == -1.5
    assert read("--a.depth", "3").a.depth == 3
    assert read("--text", "--flip").text == "--flip"
    with pytest.raises(ConfigError, match="--count: a value is missing"):
        read("--count")


@each_row(
    "word, guess",
    [("flip", "flip=T"), ("count", "count=..."), ("number", "number=..."), ("other", "text=other")],
)
def test_a_word_alone_that_names_a_flag_is_taken_for_one_by_the_error(word, guess):
    with pytest.raises(ConfigError, match="expected key=value") as caught:
        read(word)
    assert str(caught.value).endswith(f"perhaps {guess}")


@each_row(
    "argument, value",
    [
        (".both(1)", (1, 2, None)),
        (".both(1,k)", (1, "k", None)),
        (".both(1, second=3, third=(2 * 4))", (1, 3, 8)),
        (".both(max(1, min(2, 3)), (1, 2))", (2, (1, 2), None)),
        (".both((1 + 1) * 2, third='a,b)')", (4, 2, "a,b)")),
        (".both(T, [1, 2], third={'a': 1})", (True, [1, 2], {"a": 1})),
        (".both(-1)", (-1, 2, None)),
    ],
)
def test_arguments_of_shortcuts(argument, value):
    assert read(argument).anything == value


def test_shortcuts_without_arguments():
    assert read(".loud").level == "Warning"
    assert read(".loud()").level == "Warning"


@each_row(
    "argument, words",
    [
        (".lod", [".lod", ".loud"]),
        (".loud(1)", [".loud", "too many"]),
        (".both", [".both", "first"]),
        (".both(1, fourth=2)", [".both", "fourth"]),
        (".both(1, **{})", [".both"]),
        (".both(1", [".both(1"]),
        (".both(1)(2)", [".both(1)(2)"]),
        (".both(__import__('os').getpid())", ["__import__"]),
        (".both(open)+1(2)", [".both"]),
    ],
)
def test_wrong_shortcuts_are_errors(argument, words):
    with pytest.raises(ConfigError) as caught:
        read(argument)
    assert all(word in str(caught.value) for word in words), caught.value


@each_row(
    "argument, words",
    [
        ("cuont=1", ["cuont", "the nearest is 'count'"]),
        ("--cuont", ["cuont", "'count'"]),
        ("zzz=1", ["unknown flag 'zzz'; --help lists all flags"]),
        ("word", ["'word'", "key=value", "text=word"]),
        ("=1", ["'=1'"]),
        ("a b=1", ["'a b=1'"]),
        ("a..b=1", ["'a..b=1'"]),
        ("--", ["'--'"]),
        ("./dir", ["'./dir'"]),
    ],
)
def test_unknown_words_are_errors(argument, words):
    with pytest.raises(ConfigError) as caught:
        read(argument)
    assert all(word in str(caught.value) for word in words), caught.value


def test_all_errors_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        read("cuont=1", "count=x", "word", ".lod", "flip=maybe")
    assert len(str(caught.value).splitlines()) == 5


def test_errors_of_expressions_name_flag_value_and_position():
    with pytest.raises(ConfigError) as caught:
        read("count=(2 * x)")
    message = str(caught.value)
    assert message.startswith("count='(2 * x)': ")
    assert "'x'" in message
    assert "(character 6)" in message


def test_retired_flags_warn_once(capsys):
    read("old=3", "--old", "4", "--old-switch", "count=2")
    assert capsys.readouterr().err == (
        "sample: warning: old has no effect: it is gone\n"
        "sample: warning: old_switch has no effect: gone\n"
    )
    with pytest.raises(ConfigError, match="old='x'"):
        read("old=x")


def test_overrides_follow_the_arguments():
    value = read("count=1", "text=x", overrides="count=2 maybe='a b' .loud")
    assert (value.count, value.text, value.maybe, value.level) == (2, "x", "a b", "Warning")
    with pytest.raises(ConfigError, match="OVERRIDES: count"):
        read(overrides="count=x")
    with pytest.raises(ConfigError, match="OVERRIDES: no closing quotation"):
        read(overrides="text='open")


# --- config files ---------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sample.yaml"

    def write(text):
        path.write_text(text)
        return f"config={path}"

    return write


def test_a_file_has_the_same_keys(file):
    argument = file(
        """
        text: word
        number: (2 * 1024)
        share: 3
        flip: yes
        items: [a, b]
        options: {x: 1}
        options.y: 2
        level: WARNING
        maybe: null
        a: {inner: {rate: 4}, depth: (1 + 1)}
        """
    )
    value = read(argument)
    assert (value.text, value.count, value.share, value.flip) == ("word", 2048, 3.0, True)
    assert (value.items, value.options, value.level) == (("a", "b"), {"x": 1, "y": 2}, "Warning")
    assert value.a == Middle(inner=Inner(rate=4.0), depth=2)


def test_a_file_is_read_in_its_place(file):
    argument = file("count: 5")
    assert read("count=1", argument).count == 5
    assert read(argument, "count=1").count == 1
    assert read("--config", argument.partition("=")[2]).count == 5


@each_row(
    "text, words",
    [
        ("cuont: 1", ["sample.yaml: ", "cuont", "'count'"]),
        ("count: two", ["sample.yaml: ", "count='two'", "an integer"]),
        ("count: 2.5", ["count=2.5", "an integer"]),
        ("text: 12", ["text=12", "expected text"]),
        ("- a", ["expected a mapping"]),
        ("1: a", ["expected a mapping"]),
        ("a: [", ["not YAML"]),
        ("config: other.yaml", ["do not include"]),
        ("text: !!python/object/apply:os.getpid []", ["not YAML"]),
    ],
)
def test_wrong_files_are_errors(file, text, words):
    with pytest.raises(ConfigError) as caught:
        read(file(text))
    assert all(word in str(caught.value) for word in words), caught.value


def test_empty_and_missing_files(file, tmp_path):
    assert read(file("# nothing")) == Sample()
    with pytest.raises(ConfigError, match=r"missing\.yaml.*No such file"):
        read(f"config={tmp_path}/missing.yaml")


# --- --show and --help ----------------------------------------------------------------------------


def test_show_prints_what_a_file_can_hold(file, capsys):
    arguments = ["text=None", "count=7", "items=a,b", "options.x=(1, 2)", "a.inner.rate=2", ".loud"]
    with pytest.raises(SystemExit) as caught:
        read("--show", *arguments)
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "count: 7\n" in shown
    again = read(file(shown))
    assert again.a.inner.rate == 2.0
    assert (again.text, again.count, again.items) == ("None", 7, ("a", "b"))


def test_show_with_an_error_prints_nothing(capsys):
    with pytest.raises(ConfigError):
        read("count=x", "--show")
    assert capsys.readouterr().out == ""


@each_row("word", ["--help", "-h"])
@each_row("columns", ["20", "80", "300"])
def test_help_fits_the_terminal(word, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as caught:
        read("nonsense", word)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "count=1" in out
    assert "Also called number" in out
    assert ".both" in out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= max(int(columns), 80)
    assert all(line == line.rstrip() for line in out.splitlines())
