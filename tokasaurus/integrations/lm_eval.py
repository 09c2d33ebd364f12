"""The model type ``tokasaurus`` of lm-evaluation-harness: an engine in the harness's process.

    python -m tokasaurus.integrations.lm_eval run --model tokasaurus \\
        --model_args model=meta-llama/Llama-3.2-1B-Instruct,dp_size=2 --tasks gsm8k

Importing this module registers the type, which is how Python programs use it.
The harness's own command finds no models of others, so the command above stands in its place.
It gives the engine all requests of a kind at once, and the engine makes its batches of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any

import lm_eval.models  # noqa: F401, the harness finds its own only where they come first
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm.auto import tqdm

from tokasaurus.errors import ConfigError, RequestError
from tokasaurus.launch.llm import LLM
from tokasaurus.launch.outputs import RequestOutput
from tokasaurus.text.params import SamplingParams

__all__ = ["TokasaurusLM", "main"]

_DEFAULT_NEW_TOKENS = 256  # as the harness's other models
_DEFAULT_DEVICE = "cuda:0"  # what the harness's command says on every machine
_AT_ONCE = 4096  # prompts, whose logprobs are held together
# What the harness, or this module, decides about every request.
_DECIDED = {"n", "first_k", "stop", "max_tokens", "logprobs", "prompt_logprobs", "receipt"}
_SAMPLING = tuple(each.name for each in fields(SamplingParams) if each.name not in _DECIDED)


@register_model("tokasaurus", "toka")
class TokasaurusLM(TemplateLM):  # type: ignore[misc]  # the harness is not typed
    """An engine, as the harness sees it.

    Args:
        model: a Hugging Face directory or repository id, also as ``pretrained``; None is the
            bundled model.
        max_length: the longest prompt and completion; default the engine's.
        max_gen_toks: of each completion, where a task does not say.
        add_bos_token: whether a prompt begins with the BOS token; default as the tokenizer does.
        device: "cpu" or "cuda"; the harness's default "cuda:0" leaves it to the engine.
        batch_size, max_batch_size: have no effect, since the engine decides.
        flags: those of ``toka``.

    Raises:
        ConfigError: a flag is unknown or wrong.
        ModelError: the model cannot be served.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        pretrained: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = _DEFAULT_NEW_TOKENS,
        add_bos_token: bool | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **flags: Any,
    ) -> None:
        super().__init__()
        if model is not None and pretrained is not None:
            raise ConfigError("model and pretrained are two names for one thing; leave one out")
        if device is not None and device != _DEFAULT_DEVICE:
            flags["device"] = device
        self._name = model or pretrained or "tokasaurus-demo"
        self._llm = LLM(model or pretrained, **flags)
        self._tokenizer = self._llm.get_tokenizer()
        self._max_gen_toks = max_gen_toks
        self.max_length = min(max_length or self._llm.max_model_len, self._llm.max_model_len)
        special = self._tokenizer.info()
        ids = self._tokenizer.special_ids
        self._bos_id, self._eos_id = (ids.get(special[name]) for name in ("bos_token", "eos_token"))
        adds_bos = self._tokenizer.encode("")[:1] == [self._bos_id]
        self._adds_bos = adds_bos if add_bos_token is None else add_bos_token
        if self._adds_bos and self._bos_id is None:
            raise ConfigError("add_bos_token=True: the tokenizer of this model has no BOS token")

    # --- what the harness asks --------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token at the end of a text."""
        found = self._bos_id if self._eos_id is None else self._eos_id
        if found is None:
            raise RequestError("the tokenizer of this model has no EOS token and no BOS token")
        return int(found)

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text without context."""
        return self.eot_token_id if self._bos_id is None else int(self._bos_id)

    @property
    def tokenizer_name(self) -> str:
        """Names the model in the harness's caches."""
        return self._name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids. A text that begins with the BOS token's text gets no second one."""
        ids = self._tokenizer.encode_fragment(string)
        with_bos = self._adds_bos if add_special_tokens is None else add_special_tokens
        if with_bos and self._bos_id is not None and ids[:1] != [self._bos_id]:
            return [int(self._bos_id), *ids]
        return ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template in use, which the harness writes into its results."""
        return self._tokenizer.chat_template({})

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation."""
        return self._tokenizer.chat_text(chat_history, continues=not add_generation_prompt)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = list(self._scores(pairs, disable_tqdm))
        for (texts, _, _), score in zip(requests, scores, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Logprobs of whole texts; those that are too long come in windows."""
        pairs, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 2,  # a token is drawn behind the last one
                context_len=1,
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        sums = [0.0] * len(requests)
        scored = zip(owners, self._scores(pairs, disable_tqdm), strict=True)
        for number, of_one in groupby(scored, key=lambda each: each[0]):
            sums[number] = sum(logprob for _, (logprob, _) in of_one)
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts up to their stop strings."""
        prompts, params = [], []
        for request in requests:
            context, asked = request.args
            each = self._sampling(asked)
            room = self.max_length - (each.max_tokens or 0)
            if room < 1:
                raise RequestError(
                    f"max_gen_toks={each.max_tokens} leaves no room for a prompt within"
                    f" max_length={self.max_length}",
                    "max_gen_toks",
                )
            prompts.append(self.tok_encode(context)[-room:])
            params.append(each)
        outputs = self._llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        texts = [output.outputs[0].text for output in outputs]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def close(self) -> None:
        """Ends the engine."""
        self._llm.close()

    # --- how ----------------------------------------------------------------------------------

    def _scores(
        self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool
    ) -> Iterator[tuple[float, bool]]:
        """Of each continuation: its logprob, and whether greedy decoding would write it."""
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        with tqdm(total=len(pairs), desc="scoring", disable=disable_tqdm) as bar:
            for start in range(0, len(pairs), _AT_ONCE):
                some = pairs[start : start + _AT_ONCE]
                # What does not fit loses its beginning. One place is for the token that is drawn.
                prompts = [(a + b)[-(self.max_length - 1) :] for a, b in some]
                outputs = self._llm.generate(prompts, params, use_tqdm=False)
                for (_, continuation), output in zip(some, outputs, strict=True):
                    yield _score(output, len(continuation))
                bar.update(len(some))

    def _sampling(self, asked: Mapping[str, Any]) -> SamplingParams:
        """A task's ``generation_kwargs``. Raises RequestError for what the engine does not have."""
        fields = dict(asked)
        until = fields.pop("until", None) or []
        stop = [until] if isinstance(until, str) else list(until)
        max_tokens = self._max_gen_toks
        for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
            max_tokens = int(fields.pop(name, max_tokens))
        samples = fields.pop("do_sample", None)
        given = {name: fields.pop(name) for name in _SAMPLING if name in fields}
        if samples is False or (samples is None and "temperature" not in given):
            given["temperature"] = 0.0
        if fields:
            raise RequestError(
                f"generation_kwargs: the engine has no {', '.join(sorted(fields))}; it has until,"
                f" max_gen_toks, do_sample, {', '.join(_SAMPLING)}",
                sorted(fields)[0],
            )
        return SamplingParams(stop=stop or None, max_tokens=max_tokens, **given)


def _score(output: RequestOutput, num_tokens: int) -> tuple[float, bool]:
    """Of the last tokens of a prompt."""
    ids = output.prompt_token_ids
    first = max(1, len(ids) - num_tokens)
    entries = [
        (output.prompt_logprobs or [])[position] or {} for position in range(first, len(ids))
    ]
    chosen = [entry[token_id] for entry, token_id in zip(entries, ids[first:], strict=True)]
    return sum(each.logprob for each in chosen), all(each.rank == 1 for each in chosen)


def main() -> None:
    """The harness's command, which then knows this model type."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
