"""``LLM(launcher="ray")``: replicas on a cluster, for a Python program."""

from __future__ import annotations

import pytest

from tokasaurus import LLM, SamplingParams

pytest.importorskip("ray", reason="Ray is not installed: pip install 'tokasaurus[ray]'")

FLAGS = {"device": "cpu", "kv_cache_num_tokens": 16384, "max_seqs_per_forward": 16}
PROMPTS = ["A B C D", "one two one two", "7 8 9"] * 10
PARAMS = SamplingParams(max_tokens=40, temperature=0.8, seed=3, ignore_eos=True)


def test_a_program_gets_from_a_cluster_what_it_gets_from_this_machine(cluster):
    with LLM(**FLAGS, cpu_threads=1) as llm:
        expected = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    with LLM(**FLAGS, launcher="ray", ray_address=cluster.address, dp_size=2) as llm:
        found = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert [each.outputs[0].token_ids for each in found] == [
        each.outputs[0].token_ids for each in expected
    ]
