import pytest
from rows import each_row

from tokasaurus.config.expressions import ExpressionError, evaluate


@each_row(
    "source, value",
    [
        ("(200000)", 200000),
        ("(512 * 1024)", 524288),
        ("((1024 + 512) * 1024)", 1572864),
        ("(1)+(2)", 3),
        ("(-3)", -3),
        ("(+3 - -4)", 7),
        ("(7 / 2)", 3.5),
        ("(7 // 2)", 3),
        ("(-7 // 2)", -4),
        ("(7 % 4)", 3),
        ("(2 ** 10)", 1024),
        ("(2 ** -0)", 1),
        ("(1e6)", 1e6),
        ("(1_000)", 1000),
        ("(0x10)", 16),
        ("(min(3, 2, 5))", 2),
        ("(max(3, 2 * 4))", 8),
        ("(int(7 / 2))", 3),
        ("(round(2.6))", 3),
        ("(round(2.64, 1))", 2.6),
        ("(1, 2 * 3)", (1, 6)),
        ("([1, 2], 3)", ([1, 2], 3)),
        ("(2 ** 62)", 2**62),
    ],
)
def test_values_of_expressions(source, value):
    result = evaluate(source)
    assert result == value
    assert type(result) is type(value)


@each_row(
    "source, position",
    [
        ("(__import__('os').getpid())", 2),
        ("(a + 1)", 2),
        ("(1 + os.x)", 6),
        ("(1 + 'a')", 6),
        ("(1 + b'a')", 6),
        ("(1 + True)", 6),
        ("(1 + None)", 6),
        ("(2j)", 2),
        ("([x for x in (1, 2)])", 2),
        ("(lambda: 1)", 2),
        ("(f'{1}')", 2),
        ("(1 if 2 else 3)", 2),
        ("(1 < 2)", 2),
        ("(1 and 2)", 2),
        ("(not 1)", 2),
        ("(~1)", 2),
        ("(1 << 70)", 2),
        ("(1 @ 2)", 2),
        ("((1, 2)[0])", 2),
        ("(1, *(2, 3))", 5),
        ("({1: 2})", 2),
        ("(x := 1)", 2),
        ("(pow(2, 3))", 2),
        ("(min(3))", 2),
        ("(int())", 2),
        ("(int('7', base=8))", 2),
        ("(max(1, 2, default=3))", 2),
        ("(round(1, 99))", 2),
        ("(round(1, -1000000000000))", 2),
        ("(round(1.5, 0.5))", 2),
        ("(1 + 2 / 0)", 6),
        ("(1 % 0)", 2),
        ("(2 ** 65)", 7),
        ("(2 ** -1)", 7),
        ("(2 ** 63)", 2),
        ("(-2 ** 63)", 3),
        ("(9e99)", 2),
        ("(1e999)", 2),
        ("(1e200 ** 2)", 2),
        ("(9223372036854775808 - 1)", 2),
        ("((-8) ** 0.5)", 2),
        ("(ä + 1)", 2),
        ("(1 + 2 # 3)", 8),
        ("(1 +)", 5),
        ("(1\n+ a)", 6),
    ],
)
def test_forbidden_expressions_are_refused_with_the_position(source, position):
    with pytest.raises(ExpressionError) as caught:
        evaluate(source)
    assert caught.value.position == position, caught.value
    assert f"(character {position})" in str(caught.value)


@each_row("source", ["()+()", "(1", "(1 2)", "(\0)", "", "(1;2)", "(yield)", "(1)) + ((2)"])
def test_text_that_is_not_an_expression_is_refused(source):
    with pytest.raises(ExpressionError):
        evaluate(source)


def test_length_and_depth_are_limited():
    assert evaluate("(" * 20 + "1" + ")" * 20) == 1
    with pytest.raises(ExpressionError, match="20 levels"):
        evaluate("(" * 21 + "1" + ")" * 21)
    with pytest.raises(ExpressionError, match="20 levels"):
        evaluate("(" + "-" * 30 + "1)")
    assert evaluate("(" + "1".rjust(198) + ")") == 1
    with pytest.raises(ExpressionError, match="200 characters"):
        evaluate("(" + "1".rjust(199) + ")")


def test_no_code_runs(tmp_path):
    target = tmp_path / "made"
    with pytest.raises(ExpressionError):
        evaluate(f"(open({str(target)!r}, 'w'))")
    assert not target.exists()
