"""``toka-verify``: runs the request of a receipt again, and says what differs."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai

from tokasaurus.config.engine import ENGINE, EngineConfig
from tokasaurus.config.parser import answer_question, parse, print_help
from tokasaurus.config.pipes import ends_with_its_reader
from tokasaurus.config.schema import Schema, flag, flags_of
from tokasaurus.errors import ConfigError, RequestError, TokasaurusError
from tokasaurus.listing import listing
from tokasaurus.observability.logging import configure_logging
from tokasaurus.receipts.comparison import Difference, differences
from tokasaurus.receipts.form import NotAReceipt, altered_parts, checked, found_in
from tokasaurus.scripts.connection import Connection, connect, explain
from tokasaurus.text.params import SamplingParams

__all__ = ["VerifyConfig", "main"]

_GROUP = "Verification"
_MOST_SEED_DIGITS = 19

_TAKEN_FLAGS = (
    "device",
    "dtype",
    "attention",
    "instruction_set",
    "linear",
    "quantization",
    "kv_cache_dtype",
    "load_format",
    "rope_scaling",
    "torch_compile",
    "tp_size",
)
"""The flags that a receipt sets. It may come from anyone, so none that trusts code or writes."""


@dataclass(frozen=True)
class VerifyConfig(EngineConfig):
    """The flags of the engine that runs the request again, and where it is if it runs already."""

    url: str | None = flag(
        None,
        group=_GROUP,
        help="A running engine, such as http://127.0.0.1:10210, which runs the request again.",
        usually="an engine that the command starts",
    )
    ca_file: str | None = flag(
        None,
        group=_GROUP,
        help="A PEM file with the certificates to trust at url.",
        adapts="those that the system trusts",
    )
    cartridges: tuple[str, ...] | None = flag(
        None,
        group=_GROUP,
        help=(
            "The files of the cartridges that the request has, in their order; with url, their "
            "names there."
        ),
        usually="none",
    )


_SCHEMA = Schema(
    target=VerifyConfig,
    program="toka-verify RECEIPT",
    summary="Run the request of a receipt again, and say what differs.\n\n"
    "RECEIPT is a file with a receipt, with an answer that has one, or with a stream as it came;\n"
    "- is standard input. The flags are those of the engine that the command starts. Without them\n"
    "it has the model and the configuration that the receipt names.\n\n"
    "The exit status is 0 if the receipt is verified, 1 if something differs, and 2 if the file\n"
    "is no receipt or the request cannot be run.",
    shortcuts=ENGINE.shortcuts,
    retired=ENGINE.retired,
    foreign=ENGINE.foreign,
    reads_files=True,
    examples=(
        "toka-verify receipt.json",
        "toka-verify answer.json model=meta-llama/Llama-3.2-1B-Instruct",
        "toka-verify receipt.json url=http://127.0.0.1:10210",
    ),
)


_NO_PARAMETERS = frozenset({"prompt_ids", "cartridges"})
"""What a receipt's request has besides sampling parameters."""


class _CannotVerify(Exception):
    """The request cannot be run again; says why."""


@ends_with_its_reader
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status: 0 if the receipt is verified, 1 if something differs, 2 if the command line
        or the file is wrong or the request cannot be run, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:  # a program of its own, which says how far it is
        configure_logging("verify", "INFO")
    try:
        if answer_question(words or ["help"], partial(print_help, _SCHEMA)):
            return 0
        return _verify(words, os.environ)
    except (ConfigError, NotAReceipt, _CannotVerify) as error:
        lines = [_printable(line) for line in str(error).splitlines()]
        print("toka-verify: error:", "\n".join(lines), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _verify(words: list[str], environment: Mapping[str, str]) -> int:
    name, *flags = words
    if "=" in name or (name.startswith("-") and name != "-"):
        raise ConfigError("name the receipt first: toka-verify RECEIPT [model=...]")
    receipt = _read(name)
    altered = altered_parts(receipt)
    for part in altered:
        print(f"altered: {part} does not fit its digest")
    params = _params_of_all(receipt)
    words = [*_flags_of(receipt, params), *flags]
    config = parse(_SCHEMA, words, environment.get("OVERRIDES", ""))
    _check_cartridges(receipt, config)
    again = _run_there(receipt, config) if config.url else _run_here(receipt, params, config)
    found = differences(receipt, again)
    for difference in sorted(found, key=lambda each: not each.decides):
        print(f"{'differs' if difference.decides else 'note'}: {_printable(difference.text)}")
    return _conclude(receipt, altered, found)


def _conclude(receipt: Mapping[str, Any], altered: list[str], found: list[Difference]) -> int:
    num_reasons = len(altered) + sum(each.decides for each in found)
    if num_reasons:
        print(f"not verified: {_counted(num_reasons, 'difference')}")
        return 1
    tokens = [choice["token_ids"] for each in receipt["answer"] for choice in each["choices"]]
    num_tokens = sum(map(len, tokens))
    print(f"verified: {_counted(num_tokens, 'token')} in {_counted(len(tokens), 'sample')}")
    return 0


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _read(name: str) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NotAReceipt(f"{name} cannot be read: {error}") from None
    try:
        return checked(found_in(text))
    except NotAReceipt as error:
        raise NotAReceipt(f"{name}: {error}") from None


# --- what is asked --------------------------------------------------------------------------------


def _flags_of(receipt: Mapping[str, Any], params: Sequence[SamplingParams]) -> list[str]:
    """The command line of an engine like that of a receipt; later words override it."""
    known = flags_of(EngineConfig)
    taken = receipt["configuration"]
    words = {
        name: taken[name] for name in _TAKEN_FLAGS if name in known and taken.get(name) is not None
    }
    if receipt["environment"].get("model") is not None:
        words["model"] = receipt["environment"]["model"]
    words["deterministic"] = True
    words["max_n"] = max(known["max_n"].default, *(each.n for each in params))
    asked = [count or 0 for each in params for count in (each.logprobs, each.prompt_logprobs)]
    if max(asked):
        words["max_topk_logprobs"] = max(asked)
    return [f"{name}={_written(value)}" for name, value in words.items()]


def _check_cartridges(receipt: Mapping[str, Any], config: VerifyConfig) -> None:
    """Raises ConfigError where a request with cartridges would run without them, or the reverse."""
    digests = receipt["request"][0].get("cartridges", [])
    given = config.cartridges or ()
    if not isinstance(digests, list) or any(
        each.get("cartridges", []) != digests for each in receipt["request"]
    ):
        raise NotAReceipt("the prompts of its request have different cartridges")
    if len(digests) != len(given):
        shown = ", ".join(str(digest)[:12] for digest in digests)
        has = f"has cartridges with the digests {shown}" if digests else "has no cartridges"
        raise ConfigError(
            f"the request {has}, and {len(given)} are given; name as many with cartridges=FILE"
        )


def _written(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _params_of_all(receipt: Mapping[str, Any]) -> list[SamplingParams]:
    """The parameters of each prompt, checked: they may come from anyone."""
    fields = [_params_of(each) for each in receipt["request"]]
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    unknown = sorted({name for each in fields for name in each} - known)
    if unknown:
        raise NotAReceipt(f"its request has what this version does not know: {listing(unknown)}")
    try:
        return [SamplingParams(**each) for each in fields]
    except RequestError as error:
        raise NotAReceipt(f"its request is wrong: {error}") from None


def _params_of(request: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request for text that a receipt's request came from."""
    seed, form = request["seed"], request.get("structured_outputs")
    if not (seed.isdecimal() and seed.isascii() and len(seed) <= _MOST_SEED_DIGITS):
        raise NotAReceipt(f"its request has the seed {seed!r}, which is not a number")
    try:
        structured_outputs = None if form is None else json.loads(form)
    except (ValueError, TypeError, RecursionError) as error:
        raise NotAReceipt(
            f"its request has structured_outputs that are not JSON: {error}"
        ) from None
    return {
        **{name: each for name, each in request.items() if name not in _NO_PARAMETERS},
        "seed": int(seed),
        "structured_outputs": structured_outputs,
        "receipt": True,
    }


def _printable(text: str) -> str:
    """A text without what would move a terminal's cursor: a receipt may come from anyone."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _joined(receipts: Sequence[Any]) -> dict[str, Any]:
    """The receipt of several prompts, from the receipts of each."""
    try:
        each = [checked(receipt) for receipt in receipts]
    except NotAReceipt as error:
        raise _CannotVerify(f"the request was run again, and {error}") from None
    if any(len(one["request"]) != 1 for one in each):
        raise _CannotVerify("the request was run again, and its receipt has several prompts")
    return {
        **each[0],
        "request": [request for one in each for request in one["request"]],
        "answer": [answer for one in each for answer in one["answer"]],
    }


# --- where it runs --------------------------------------------------------------------------------


def _run_here(
    receipt: Mapping[str, Any], params: Sequence[SamplingParams], config: VerifyConfig
) -> dict[str, Any]:
    """Runs the request in an engine of this process."""
    from tokasaurus.launch.llm import LLM

    model = config.model or "the bundled model"
    print(f"toka-verify: loading {_printable(model)}", file=sys.stderr)
    paths = [Path(each).absolute() for each in config.cartridges or ()]
    flags = {name: getattr(config, name) for name in flags_of(EngineConfig)}
    try:
        with tempfile.TemporaryDirectory() as directory:
            if paths:
                roots = tuple(str(path.parent) for path in paths)
                flags.update(cartridge_dir=directory, cartridge_roots=roots)
            with LLM(**flags) as llm:
                print("toka-verify: running the request again", file=sys.stderr)
                outputs = llm.generate(
                    [each["prompt_ids"] for each in receipt["request"]],
                    params,
                    use_tqdm=sys.stderr.isatty(),
                    cartridges=[str(path) for path in paths],
                )
                return _joined([output.receipt for output in outputs])
    except TokasaurusError as error:
        raise _CannotVerify(f"the request cannot be run with {model}: {error}") from None


def _run_there(receipt: Mapping[str, Any], config: VerifyConfig) -> dict[str, Any]:
    """Runs the request in an engine that runs already."""
    client = connect(_connection(config))
    receipts = []
    for request in receipt["request"]:
        body = {**_params_of(request), "prompt": request["prompt_ids"], **_named(config)}
        try:
            answer: Any = client.post("/completions", body=body, cast_to=object)
        except openai.OpenAIError as error:
            raise _CannotVerify(explain(error, client)) from None
        receipts.append(answer.get("receipt") if isinstance(answer, dict) else None)
    return _joined(receipts)


def _named(config: VerifyConfig) -> dict[str, Any]:
    """The field of a request that has its cartridges; none without any."""
    named = [{"id": each, "source": "local"} for each in config.cartridges or ()]
    return {"cartridges": named} if named else {}


def _connection(config: VerifyConfig) -> Connection:
    try:
        parts = urlsplit(config.url or "")
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise ConfigError(f"url={config.url}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"url={config.url}: expected an address such as http://127.0.0.1:10210")
    if parts.path.rstrip("/") not in ("", "/v1"):
        raise ConfigError(f"url={config.url}: it may have no path but /v1")
    return Connection(
        host=parts.hostname, port=port, https=parts.scheme == "https", ca_file=config.ca_file
    )


if __name__ == "__main__":
    sys.exit(main())
