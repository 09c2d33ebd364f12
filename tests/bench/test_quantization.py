"""toka-bench quantization, on a few texts."""

from __future__ import annotations

import json

from rows import named

from tokasaurus.bench.main import main
from tokasaurus.bench.quantization import _Answers, _compare

FEW = ["num_texts=3", "max_tokens=4", "dtypes=float32"]


def measured(capsys, *flags):
    assert main(["quantization", *FEW, *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines[:-1], json.loads(lines[-1])


def test_passages_of_the_bundled_model_are_compared(capsys):
    table, values = measured(capsys)
    full, *changed = values["rows"]
    assert len(table) == 2 + 1 + len(changed)
    assert values["texts"] == 3
    assert full["engine"] == "float32"
    assert [each["engine"] for each in changed] == [
        "float32, int8",
        "float32, fp8",
        "float32, kv_cache_fp8",
    ]
    for name in ("perplexity_ratio", "same_top_token", "same_greedy_tokens", "same_continuations"):
        assert full[name] == 1
    assert full["first_difference"] == 4
    # The model was trained on such passages; an untrained one has about 2,048.
    assert 1 < full["perplexity"] < 20
    for each in changed:
        with named(each["engine"]):
            assert each["perplexity"] != full["perplexity"]
            assert abs(each["perplexity_ratio"] - 1) < 0.05


def test_parts_of_a_file_are_compared(capsys, tmp_path):
    path = tmp_path / "text"
    path.write_text("Once upon a time a clever Stegosaurus lived near a quiet lake. " * 20)
    flags = [f"text={path}", "text_tokens=50", "num_texts=2", "changes=int8"]
    _, values = measured(capsys, *flags)
    assert (values["texts"], values["text_tokens"]) == (2, 100)


def test_a_file_that_cannot_be_used_is_refused(capsys, tmp_path):
    short = tmp_path / "short"
    short.write_text("Once")
    for path, reason in ((tmp_path / "absent", "No such file"), (short, "less than 256 tokens")):
        assert main(["quantization", f"text={path}", *FEW]) == 2
        assert reason in capsys.readouterr().err


def test_shares_count_positions_and_continuations():
    one = _Answers(2.0, [1, 2, 3, 4], [[5, 6, 7], [8, 9, 9]])
    other = _Answers(3.0, [1, 2, 3, 5], [[5, 6, 7], [8, 1, 9]])
    row = _compare("other", other, one)
    assert (row.perplexity, row.perplexity_ratio, row.same_top_token) == (3.0, 1.5, 0.75)
    assert (row.same_greedy_tokens, row.same_continuations) == (5 / 6, 0.5)
    assert row.first_difference == (3 + 1) / 2
