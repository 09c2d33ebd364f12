import dataclasses
import hashlib
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import each_row

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.resolve import resolve
from tokasaurus.config.slices import ModelFacts
from tokasaurus.errors import ConfigError
from tokasaurus.protocol.messages import LogprobsMode

FACTS = ModelFacts(
    path="/models/tiny",
    vocab_size=2048,
    num_layers=64,
    hidden_size=64,
    num_heads=64,
    num_kv_heads=64,
    intermediate_size=64,
    max_position_embeddings=4096,
    kv_elements_per_token=1000,
    num_parameters=1_000_000,
    num_product_parameters=900_000,
    num_product_rows=1000,
    activation_elements_per_token=0,
    eos_token_ids=(1, 2),
    sampling_defaults={"temperature": 0.6, "top_k": 50},
)
GIB = 2**30


def slices(
    *,
    facts=FACTS,
    num_cuda_devices=0,
    memory_bytes=24 * GIB,
    bfloat16_instructions=None,
    **flags,
):
    return resolve(
        EngineConfig(**flags),
        facts,
        num_cuda_devices=num_cuda_devices,
        memory_bytes=memory_bytes,
        bfloat16_instructions=bfloat16_instructions,
    )


def manager_of(**arguments):
    (replica,) = slices(**arguments).replicas
    return replica.manager


def problems(**arguments):
    with pytest.raises(ConfigError) as caught:
        slices(**arguments)
    return str(caught.value).splitlines()


def test_a_graph_has_room_for_no_more_pages_than_a_request_may_have():
    for flags, tokens in (
        ({}, 4096),
        ({"max_num_tokens_per_request": 1001}, 1008),
        ({"cudagraph_max_kv_indices_per_seq": 10}, 160),
    ):
        (replica,) = slices(num_cuda_devices=1, **flags).replicas
        assert replica.workers[0].cudagraph_max_tokens == tokens


def test_default_configuration():
    result = slices()
    (replica,) = result.replicas
    (worker,) = replica.workers
    manager, server = replica.manager, result.server
    assert (manager.page_size, manager.num_pages, manager.num_slots) == (16, 8192, 2048)
    assert (manager.max_seqs_per_forward, manager.max_tokens_per_forward) == (1024, 8192)
    assert (manager.max_request_tokens, manager.scheduling_steps_ahead) == (4096, 8)
    assert (manager.stop_lag, manager.check_invariants, manager.force_preemption) == (
        16,
        False,
        False,
    )
    assert (worker.device, worker.dtype, worker.attention) == ("cpu", "float32", "auto")
    assert (worker.rope_scaling, worker.num_threads) == (None, None)
    assert (server.model_name, server.model_root) == ("tokasaurus-demo", "/models/tiny")
    assert server.tokenizer_path == "/models/tiny"
    assert (server.max_topk_logprobs, worker.max_topk_logprobs) == (20, 20)
    assert server.logprobs_mode is LogprobsMode.TEMPERATURE
    assert server.sampling_defaults == {"temperature": 0.6, "top_k": 50}
    assert server.eos_token_ids == (1, 2)
    assert (result.log_level, result.log_procs, result.local_proc_name) == ("INFO", None, "server")


def test_a_replica_has_a_worker_for_each_stage():
    (replica,) = slices(pp_size=3).replicas
    assert [worker.rank for worker in replica.workers] == [0, 1, 2]
    assert {worker.num_ranks for worker in replica.workers} == {3}
    assert replica.manager.num_lanes == 3
    assert slices(pp_size=3, pp_num_buffer_stages=2).replicas[0].manager.num_lanes == 5
    assert slices(pp_num_buffer_stages=2).replicas[0].manager.num_lanes == 1
    with pytest.raises(ConfigError, match="pp_size=65: the model has 64 layers"):
        slices(pp_size=65)


def test_each_stage_has_a_worker_for_each_share():
    (replica,) = slices(pp_size=2, tp_size=4).replicas
    assert [worker.rank for worker in replica.workers] == list(range(8))
    assert {(worker.pp_size, worker.tp_size) for worker in replica.workers} == {(2, 4)}


def test_shares_that_are_not_whole_heads_are_refused_with_those_that_are():
    facts = dataclasses.replace(FACTS, num_heads=12, num_kv_heads=4, intermediate_size=48)
    for size in (1, 2, 4, 12):
        assert len(slices(facts=facts, tp_size=size).replicas[0].workers) == size
    working = "these do: 1, 2, 4, 12"
    for size, reason in (
        (5, "num_attention_heads=12"),
        (24, "num_attention_heads=12"),
        (3, "num_key_value_heads=4, nor is it a multiple of them"),
    ):
        (line,) = problems(facts=facts, tp_size=size)
        assert line == f"tp_size={size} does not divide the model's {reason}; {working}"
    facts = dataclasses.replace(facts, intermediate_size=50)
    (line,) = problems(facts=facts, tp_size=4)
    assert line == "tp_size=4 does not divide the model's intermediate_size=50; these do: 1, 2"


def test_overlapping_needs_workers_that_share_layers():
    (line,) = problems(async_tp_threshold=6144)
    assert line.startswith("async_tp_threshold=6144 is for devices that share layers")
    (replica,) = slices(async_tp_threshold=6144, tp_size=2).replicas
    assert {worker.async_tp_threshold for worker in replica.workers} == {6144}


def test_the_rooms_get_the_same_sizes():
    result = slices(page_size=8, kv_cache_num_tokens=1024, max_seqs_per_forward=4)
    (replica,) = result.replicas
    manager, (worker,), server = replica.manager, replica.workers, result.server
    assert (worker.rank, worker.tp_size, worker.pp_size) == (0, 1, 1)
    for name in ("page_size", "num_pages", "num_slots", "max_tokens_per_forward"):
        assert getattr(manager, name) == getattr(worker, name)
    for room in (manager, worker, server):
        assert room.max_request_tokens == 1024
        assert room.max_seqs_per_forward == 4


def test_every_choice_reaches_its_room():
    result = slices(
        model="org/name",
        tokenizer="/other",
        served_model_name="mine",
        rope_scaling={"factor": 2.0},
        trust_remote_code=True,
        cpu_threads=3,
        attention="reference",
        logprobs_mode="raw",
        max_topk_logprobs=5,
        allocator_sanity_checks=True,
        bump_city_population_me=True,
        log_procs=("model", "server"),
        local_proc_name="model",
        shutdown_timeout_s=1,
        port=0,
    )
    server, worker = result.server, result.replicas[0].workers[0]
    assert (server.model_name, server.model_root, server.tokenizer_path) == (
        "mine",
        "org/name",
        "/other",
    )
    assert (server.port, server.shutdown_timeout_s) == (0, 1.0)
    assert server.logprobs_mode is LogprobsMode.RAW
    assert (server.trust_remote_code, worker.trust_remote_code) == (True, True)
    assert json.loads(worker.rope_scaling) == {"factor": 2.0}
    assert (worker.num_threads, worker.attention, worker.max_topk_logprobs) == (3, "reference", 5)
    manager = result.replicas[0].manager
    assert (manager.check_invariants, manager.force_preemption) == (True, True)
    assert (result.log_procs, result.local_proc_name) == (("worker", "server"), "worker")
    assert slices(model="org/name").server.model_name == "org/name"


# --- device and dtype ----------------------------------------------------------------------------


@each_row(
    "flags, num_cuda_devices, expected",
    [
        ({}, 0, ("cpu", "float32")),
        ({}, 1, ("cuda", "bfloat16")),
        ({"device": "cpu"}, 1, ("cpu", "float32")),
        ({"device": "cuda"}, 1, ("cuda", "bfloat16")),
        ({"dtype": "float16"}, 1, ("cuda", "float16")),
        ({"dtype": "bfloat16"}, 0, ("cpu", "bfloat16")),
    ],
)
def test_device_and_dtype(flags, num_cuda_devices, expected):
    worker = slices(num_cuda_devices=num_cuda_devices, **flags).replicas[0].workers[0]
    assert (worker.device, worker.dtype) == expected


def test_each_rank_of_each_replica_has_the_next_visible_device():
    for flags, indices in (
        ({}, [[0]]),
        ({"dp_size": 3}, [[0], [1], [2]]),
        ({"dp_size": 2, "pp_size": 2}, [[0, 1], [2, 3]]),
    ):
        replicas = slices(num_cuda_devices=8, **flags).replicas
        found = [[worker.device_index for worker in replica.workers] for replica in replicas]
        assert found == indices, flags
    (one, two) = slices(dp_size=2).replicas
    assert one == two
    assert one.workers[0].device_index is None


def test_too_few_devices_are_one_error_that_counts_them():
    (line,) = problems(num_cuda_devices=3, dp_size=2, pp_size=2)
    assert line.startswith("dp_size=2 x pp_size=2 needs 4 CUDA devices, and 3 are visible; lower")
    (line,) = problems(num_cuda_devices=1, dp_size=2)
    assert line.startswith("dp_size=2 needs 2 CUDA devices, and 1 is visible")
    assert "CUDA_VISIBLE_DEVICES" in line
    # CUDA_VISIBLE_DEVICES="" hides all of them.
    (line,) = problems(num_cuda_devices=0, dp_size=2, device="cuda")
    assert line.startswith("device=cuda: PyTorch finds no CUDA device here; leave device out")
    assert len(slices(num_cuda_devices=0, dp_size=2).replicas) == 2


def test_replicas_share_the_memory_of_a_cpu_and_not_that_of_devices():
    many = {"facts": LARGE, "memory_bytes": 12 * 10**9, "kv_cache_num_tokens": "auto"}
    whole = slices(**{**many, "memory_bytes": 6 * 10**9}).replicas[0].manager.num_pages
    for replica in slices(**many, dp_size=2).replicas:
        assert replica.manager.num_pages == whole
    one = slices(**many, num_cuda_devices=2).replicas[0].manager.num_pages
    for replica in slices(**many, dp_size=2, num_cuda_devices=2).replicas:
        assert replica.manager.num_pages == one
    plan = slices(**many, dp_size=2).memory_plan.line
    assert plan.startswith("memory: cpu has 12.0 GB free, 6.0 GB for each of 2 workers; ")


def test_the_server_has_the_seats_of_all_replicas():
    result = slices(dp_size=3, max_seqs_per_forward=4)
    assert result.server.max_seqs_per_forward == 12
    assert [replica.manager.max_seqs_per_forward for replica in result.replicas] == [4, 4, 4]


def test_quantization_conflicts_with_what_cannot_multiply_int8():
    (worker,) = slices(quantization="int8").replicas[0].workers
    assert worker.quantization == "int8"
    for flags, message in (
        (
            {"device": "cuda", "num_cuda_devices": 1},
            "only device=cpu has kernels for it, and device=cuda runs on cuda; leave it out, or"
            " set device=cpu",
        ),
        (
            {"num_cuda_devices": 1},
            "only device=cpu has kernels for it, and device=auto runs on cuda; leave it out, or"
            " set device=cpu",
        ),
        (
            {"dtype": "float16"},
            "its kernels are for activations in float32 and bfloat16; set dtype to one of them, or"
            " leave it out",
        ),
        (
            {"linear": "plain"},
            "linear=plain multiplies by weights in dtype; leave one of them out",
        ),
    ):
        assert problems(quantization="int8", **flags) == [f"quantization=int8: {message}"], flags


def test_auto_takes_bfloat16_on_cpu_if_checkpoint_and_processor_have_it():
    for checkpoint, instructions, expected, reason in (
        ("bfloat16", "amx", "bfloat16", "as the checkpoint has it, and instruction_set=amx"),
        ("bfloat16", None, "float32", "although the checkpoint has bfloat16, which the kernels"),
        ("float16", "amx", "float32", "although the checkpoint has float16, which the kernels"),
        ("float32", "amx", "float32", "as the checkpoint has it"),
        (None, "amx", "float32", "since neither the checkpoint nor config.json says another"),
    ):
        facts = dataclasses.replace(FACTS, dtype=checkpoint)
        result = slices(facts=facts, bfloat16_instructions=instructions)
        assert result.replicas[0].workers[0].dtype == expected, (checkpoint, instructions)
        assert result.dtype_plan.startswith(f"dtype=auto: {expected}, {reason}"), result.dtype_plan
    asked = slices(facts=facts, bfloat16_instructions="amx", dtype="float16")
    assert asked.dtype_plan == "dtype=float16: as asked"


def test_cuda_without_a_device_is_an_error():
    (line,) = problems(device="cuda")
    assert line.startswith("device=cuda: ")


# --- limits that adapt ---------------------------------------------------------------------------


@each_row(
    "flags, expected",
    [
        ({"max_tokens_per_forward": 128}, (128, 128)),
        ({"max_tokens_per_forward": 2048}, (1024, 2048)),
        ({"max_seqs_per_forward": 4}, (4, 8192)),
        ({"max_seqs_per_forward": 10000}, (10000, 10000)),
        ({"max_seqs_per_forward": 64, "max_tokens_per_forward": 64}, (64, 64)),
    ],
)
def test_batch_sizes_adapt_to_each_other(flags, expected):
    manager = manager_of(**flags)
    assert (manager.max_seqs_per_forward, manager.max_tokens_per_forward) == expected
    assert manager.num_slots == 2 * expected[0]


def test_conflicting_batch_sizes():
    (line,) = problems(max_seqs_per_forward=65, max_tokens_per_forward=64)
    assert "max_seqs_per_forward=65" in line
    assert "max_tokens_per_forward=64" in line


@each_row(
    "flags, page_size, num_pages",
    [
        ({"page_size": 48}, 48, 2730),
        ({"page_size": 200000}, 200000, 1),
        ({"kv_cache_num_tokens": 1000}, 16, 63),
        ({"kv_cache_num_tokens": 1}, 16, 1),
        ({"kv_cache_num_tokens": 1000, "page_size": 8}, 8, 125),
        ({"max_num_tokens_per_request": 4000}, 16, 8192),
    ],
)
def test_page_size_and_number_of_pages(flags, page_size, num_pages):
    manager = manager_of(**flags)
    assert (manager.page_size, manager.num_pages) == (page_size, num_pages)


def test_a_cache_size_that_is_not_a_multiple_of_the_page_size():
    (line,) = problems(kv_cache_num_tokens=1000, page_size=16)
    assert "kv_cache_num_tokens=1000" in line
    assert "page_size=16" in line
    assert "992 or 1008" in line
    (line,) = problems(kv_cache_num_tokens=5, page_size=16)
    assert "kv_cache_num_tokens=16," in line


def test_the_longest_request():
    assert manager_of().max_request_tokens == 4096
    assert manager_of(kv_cache_num_tokens=1024).max_request_tokens == 1024
    assert manager_of(max_num_tokens_per_request=99).max_request_tokens == 99
    (line,) = problems(max_num_tokens_per_request=2000, kv_cache_num_tokens=1000)
    assert "max_num_tokens_per_request=2000" in line
    assert "kv_cache_num_tokens=1000" in line
    (line,) = problems(max_num_tokens_per_request=4097)
    assert "4096 positions" in line


def test_the_kv_cache_grows_for_a_large_request():
    facts = dataclasses.replace(FACTS, max_position_embeddings=10**6)
    manager = manager_of(facts=facts, max_num_tokens_per_request=200001)
    assert manager.num_pages == math.ceil(200001 / 16)
    assert manager.max_request_tokens == 200001


def test_the_most_top_logprobs():
    assert slices(max_topk_logprobs=None).server.max_topk_logprobs == 0
    assert slices(max_topk_logprobs=10**4).server.max_topk_logprobs == 2048


# --- memory --------------------------------------------------------------------------------------


# In float32 the weights take 4 GB, a token of the KV cache 400 KB, and a batch 200 KB in the layers
# and 128 KB in the sampler for each token; in bfloat16 all but the sampler take half.
LARGE = dataclasses.replace(
    FACTS,
    num_parameters=10**9,
    num_product_parameters=8 * 10**8,
    num_product_rows=10**5,
    kv_elements_per_token=100_000,
    activation_elements_per_token=50_000,
)
PROCESS = 512 << 20


def partials(batch_tokens, facts=LARGE, tp_size=1):
    """The bytes of attention's partial results on CUDA: two for each row."""
    head_dim = facts.kv_elements_per_token // (2 * facts.num_layers * facts.num_kv_heads)
    return 2 * batch_tokens * facts.num_heads // tp_size * (head_dim + 1) * 4


def for_cuda(batch_tokens, facts=LARGE, tp_size=1, num_bytes=2):
    """The bytes of partial results, and of the rows of the largest CUDA graph."""
    rows = min(batch_tokens, EngineConfig().cudagraph_max_size)
    graph = rows * 50_000 * num_bytes + partials(rows, facts, tp_size)
    return partials(batch_tokens, facts, tp_size) + graph


def needed(kv_tokens, batch_tokens, num_bytes=4, *, on_cuda=False):
    """The bytes of weights, KV cache, batch and process."""
    batch = batch_tokens * (50_000 * num_bytes + 64 * FACTS.vocab_size)
    batch += for_cuda(batch_tokens, num_bytes=num_bytes) if on_cuda else 0
    return PROCESS + (10**9 + kv_tokens * 100_000) * num_bytes + batch


def test_the_default_kv_cache_leaves_a_tenth_of_the_memory_free():
    """Without flags, a batch adapts to the memory first."""
    for flags, batch in (
        ({"memory_bytes": 12 * 10**9}, 8192),
        ({"memory_bytes": 7 * 10**9}, 2048),
        ({"memory_bytes": 12 * 10**9, "dtype": "bfloat16"}, 8192),
        ({"memory_bytes": 12 * 10**9, "num_cuda_devices": 1}, 8192),
        ({"memory_bytes": 12 * 10**9, "load_format": "dummy"}, 8192),
    ):
        manager = manager_of(facts=LARGE, **flags)
        is_narrow = "dtype" in flags or "num_cuda_devices" in flags
        num_bytes = 2 if is_narrow else 4
        assert manager.max_tokens_per_forward == batch, flags
        on_cuda = "num_cuda_devices" in flags
        used = needed(manager.num_pages * 16, batch, num_bytes, on_cuda=on_cuda)
        page = 16 * 100_000 * num_bytes
        assert used <= 0.9 * flags["memory_bytes"] < used + 2 * page, flags
    for flags in (
        {"memory_bytes": 10**12},
        {"memory_bytes": None},
        {"memory_bytes": None, "num_cuda_devices": 1},
        {"memory_bytes": None, "kv_cache_num_tokens": "auto"},
    ):
        assert manager_of(facts=LARGE, **flags).num_pages == 131072 // 16, flags


def test_each_worker_has_its_part_of_weights_and_kv_cache():
    """On a CPU all workers have one memory; each GPU is one worker's."""
    facts = dataclasses.replace(LARGE, num_kv_heads=4)
    flags = {"facts": facts, "max_tokens_per_forward": 1000, "kv_cache_num_tokens": 2000}
    batch = 1000 * (50_000 * 4 + 64 * FACTS.vocab_size)
    # Eight ranks have four heads of keys and values: two ranks share one.
    for size, kv_share in ((2, 2), (4, 4), (8, 4)):
        enough = PROCESS + batch + 4 * 10**9 // size + 2000 * 400_000 // kv_share
        on_cuda = enough + for_cuda(1000, facts, size, 4)
        for num_devices, bytes_of_all in ((0, size * enough), (8, on_cuda)):
            flags |= {"tp_size": size, "num_cuda_devices": num_devices, "dtype": "float32"}
            assert manager_of(**flags, memory_bytes=bytes_of_all).num_pages == 125
            assert problems(**flags, memory_bytes=bytes_of_all - 10**6)


def test_a_stage_has_room_for_the_most_layers_that_it_may_get():
    """The head takes as long as 16 of 64 layers, so the first stage has 40 of them."""
    flags = {"facts": LARGE, "max_tokens_per_forward": 1000, "kv_cache_num_tokens": 2000}
    batch = 1000 * (50_000 * 4 + 64 * FACTS.vocab_size)
    weights, kv = 4 * (2 * 10**8 + 5 * 10**8), 2000 * 400_000 * 40 // 64
    enough = PROCESS + batch + for_cuda(1000, num_bytes=4) + weights + kv
    flags |= {"pp_size": 2, "num_cuda_devices": 2, "dtype": "float32"}
    assert manager_of(**flags, memory_bytes=enough).num_pages == 125
    assert problems(**flags, memory_bytes=enough - 10**6)


def test_an_auto_kv_cache_takes_what_is_left():
    manager = manager_of(facts=LARGE, memory_bytes=10**12, kv_cache_num_tokens="auto")
    assert manager.num_pages > 131072 // 16
    used = needed(manager.num_pages * 16, 8192)
    assert used <= 0.9 * 10**12 < used + 2 * 16 * 400_000
    flags = {"max_seqs_per_forward": 4, "max_num_tokens_per_request": 1000}
    manager = manager_of(facts=LARGE, memory_bytes=10**12, kv_cache_num_tokens="auto", **flags)
    assert manager.num_pages == 4 * math.ceil(1000 / 16), "running sequences fill no more"


def test_an_explicit_kv_cache_may_take_all_that_weights_and_batches_leave():
    flags = {"facts": LARGE, "max_tokens_per_forward": 1000}
    flags["memory_bytes"] = needed(2000, 1000)
    assert manager_of(**flags, kv_cache_num_tokens=2000).num_pages == 125
    (line,) = problems(**flags, kv_cache_num_tokens=2016)
    assert line == (
        "kv_cache_num_tokens=2016 needs a KV cache of 2016 tokens, 806.4 MB in float32; cpu has"
        " 5.7 GB free, and beside 4.0 GB of weights, 331.1 MB for batches of 1000 tokens and"
        " 536.9 MB for the process this holds 2000; kv_cache_num_tokens=2000 fits, and auto takes"
        " what fits, less a tenth of the free memory"
    )
    assert manager_of(**flags, kv_cache_num_tokens=4000, dtype="bfloat16").num_pages == 250
    flags["memory_bytes"] = needed(15, 1000)
    (line,) = problems(**flags, kv_cache_num_tokens=16)
    assert line.endswith("this holds 15; auto takes what fits, less a tenth of the free memory")


def test_batches_that_do_not_fit_are_refused_with_those_that_do():
    flags = {"facts": LARGE, "memory_bytes": needed(100, 5000)}
    (line,) = problems(**flags, max_tokens_per_forward=9000)
    assert line == (
        "max_tokens_per_forward=9000 needs 3.0 GB for the tensors of a batch; cpu has 6.2 GB free,"
        " of which 4.0 GB are for weights and 536.9 MB for the process;"
        " max_tokens_per_forward=4096 fits"
    )
    assert manager_of(**flags, max_tokens_per_forward=4096).max_tokens_per_forward == 4096
    (line,) = problems(**flags, max_seqs_per_forward=9000)
    assert line.startswith("max_seqs_per_forward=9000 needs 3.0 GB for the tensors of a batch;")
    (line,) = problems(facts=LARGE, memory_bytes=needed(0, 1))
    assert line.startswith("the smallest batch needs ")
    assert line.endswith("max_tokens_per_forward=1 fits")


def test_memory_too_small_for_a_request():
    memory_bytes = needed(2000, 256)
    (line,) = problems(facts=LARGE, memory_bytes=memory_bytes, max_num_tokens_per_request=4000)
    assert "max_num_tokens_per_request=4000" in line
    (line,) = problems(facts=LARGE, memory_bytes=needed(15, 256))
    assert "page_size=16" in line
    assert "this holds 15;" in line


def test_memory_too_small_for_the_weights():
    (line,) = problems(facts=LARGE, memory_bytes=4 * 10**9, kv_cache_num_tokens=1600)
    assert line == (
        "model=tokasaurus-demo: the weights take 4.0 GB in float32 and the process 536.9 MB, and"
        " cpu has 4.0 GB free; dtype=bfloat16 takes half; otherwise free memory, or serve a smaller"
        " model"
    )
    (line,) = problems(facts=LARGE, memory_bytes=2 * 10**9, model="org/large", num_cuda_devices=1)
    assert line == (
        "model=org/large: the weights take 2.0 GB in bfloat16 and the process 536.9 MB, and cuda"
        " has 2.0 GB free; free memory, or serve a smaller model"
    )


def test_the_plan_of_memory_is_one_line():
    flags = {"facts": LARGE, "max_tokens_per_forward": 1000, "kv_cache_num_tokens": 2000}
    assert slices(memory_bytes=6 * 10**9, **flags).memory_plan.line == (
        "memory: cpu has 6.0 GB free; 4.0 GB for weights in float32, 800.0 MB for a KV cache of"
        " 2000 tokens, at most 331.1 MB for a batch of 1000 tokens, 536.9 MB for the process,"
        " 332.1 MB to spare"
    )
    assert slices(memory_bytes=None, num_cuda_devices=1, **flags).memory_plan.line == (
        "memory: the free memory of cuda is unknown; 2.0 GB for weights in bfloat16, 400.0 MB for a"
        " KV cache of 2000 tokens, at most 251.4 MB for a batch of 1000 tokens, 536.9 MB for the"
        " process"
    )


def test_the_plan_counts_quantized_weights():
    """A byte for each number of a product, 8 bytes for each row; the others keep the dtype."""
    result = slices(facts=LARGE, memory_bytes=6 * 10**9, quantization="int8", dtype="bfloat16")
    others, products, rows = 2 * 10**8, 8 * 10**8, 10**5
    assert (
        f"{(2 * others + products + 8 * rows) / 1e9:.1f} GB for weights in int8 and bfloat16"
        in (result.memory_plan.line)
    )
    (line,) = problems(
        facts=LARGE, memory_bytes=10**9, quantization="int8", kv_cache_num_tokens=1600
    )
    assert "the weights take 1.6 GB in int8 and float32" in line
    assert "dtype=bfloat16" not in line


def test_the_parts_of_the_plan_add_up_to_what_its_limits_need():
    flags = {"facts": LARGE, "max_tokens_per_forward": 1000, "kv_cache_num_tokens": 2000}
    for num_devices, num_bytes in ((0, 4), (1, 2)):
        plan = slices(memory_bytes=6 * 10**9, num_cuda_devices=num_devices, **flags).memory_plan
        total = needed(2000, 1000, num_bytes, on_cuda=num_devices > 0)
        assert sum(item.num_bytes for item in plan.items) == total
        assert (plan.kv_tokens, plan.most_kv_tokens) == (2000, 2000)
        assert plan.free_bytes == 6 * 10**9


def test_a_measurement_may_raise_what_is_left_to_it_and_never_below_a_request():
    """What was asked for is fixed. Otherwise the longest request needs the least."""
    flags = {"facts": LARGE, "num_cuda_devices": 1}
    # A page takes 3.2 million bytes, and the weights 2 billion.
    for memory_bytes, asked, least, most in (
        (12 * 10**9, {"kv_cache_num_tokens": 2000}, 125, 125),
        (12 * 10**9, {"kv_cache_num_tokens": "auto"}, 256, 2957),
        (12 * 10**9, {"max_num_tokens_per_request": 100}, 7, 2957),
        (10**12, {}, 256, 8192),
        (10**12, {"kv_cache_num_tokens": "auto", "max_seqs_per_forward": 2}, 256, 512),
        (3 * 10**9, {"max_tokens_per_forward": 256}, 27, 144),
    ):
        (replica,) = slices(memory_bytes=memory_bytes, **flags, **asked).replicas
        (worker,) = replica.workers
        assert (worker.least_pages, worker.most_pages) == (least, most), asked
        assert least <= worker.num_pages <= most
        assert replica.manager.num_pages == worker.num_pages
        assert replica.manager.max_request_tokens <= worker.least_pages * 16


def test_e4m3_takes_a_byte_for_each_number_of_the_cache():
    flags = {"facts": LARGE, "max_tokens_per_forward": 1000, "kv_cache_num_tokens": 2000}
    sizes = {}
    for kept in ("auto", "fp8", "fp8_e4m3"):
        result = slices(memory_bytes=6 * 10**9, kv_cache_dtype=kept, **flags)
        (worker,) = result.replicas[0].workers
        assert worker.kv_cache_dtype == ("auto" if kept == "auto" else "fp8_e4m3")
        sizes[kept] = {item.name: item.num_bytes for item in result.memory_plan.items}["KV cache"]
    assert sizes == {"auto": 800 * 10**6, "fp8": 200 * 10**6, "fp8_e4m3": 200 * 10**6}
    (line,) = problems(attention="compiled", kv_cache_dtype="fp8")
    assert line.startswith("kv_cache_dtype=fp8: attention=compiled has no kernels for it")


def test_fp8_weights_run_on_both_devices_and_in_bfloat16_on_cuda():
    assert slices(quantization="fp8").replicas[0].workers[0].quantization == "fp8"
    assert slices(quantization="fp8", num_cuda_devices=1).replicas[0].workers[0].dtype == "bfloat16"
    (line,) = problems(quantization="fp8", num_cuda_devices=1, dtype="float16")
    assert line.startswith("quantization=fp8: on cuda its results are in bfloat16")


# --- everything together -------------------------------------------------------------------------


def test_every_conflict_is_reported_at_once():
    lines = problems(
        device="cuda",
        kv_cache_num_tokens=1000,
        page_size=16,
        max_num_tokens_per_request=5000,
        max_seqs_per_forward=20,
        max_tokens_per_forward=10,
    )
    assert [line.split()[0].rstrip(":") for line in lines] == [
        "device=cuda",
        "kv_cache_num_tokens=1000",
        "max_seqs_per_forward=20",
        "max_num_tokens_per_request=5000",
        "max_num_tokens_per_request=5000",
    ]


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(
        ["kv_cache_num_tokens", "page_size", "max_seqs_per_forward", "max_tokens_per_forward"]
    ),
    value=st.integers(1, 300_000),
)
def test_one_explicit_limit_never_conflicts(name, value):
    manager = manager_of(**{name: value})
    assert 1 <= manager.max_seqs_per_forward <= manager.max_tokens_per_forward
    assert 1 <= manager.max_request_tokens <= manager.num_pages * manager.page_size
    assert manager.num_slots == 2 * manager.max_seqs_per_forward
    if name == "kv_cache_num_tokens":
        assert value <= manager.num_pages * manager.page_size < value + 16
    else:
        assert getattr(manager, name) == value


def test_only_digests_of_keys_reach_the_server():
    server = slices(api_key=("abc", "abc", "other")).server
    assert len(server.api_key_digests) == 2
    assert "abc" not in repr(server)
    assert slices().server.api_key_digests == slices().server.admin_key_digests == ()
    server = slices(admin_api_key=("a", "b", "a")).server
    assert len(server.admin_key_digests) == 2
    assert server.api_key_digests == ()
    assert "number 2" in problems(api_key=("abc", "a b"))[0]
    assert "number 1" in problems(api_key=("abc max_request_priority=1000001",))[0]


def test_a_key_may_bring_its_own_priority():
    server = slices(
        api_key=("plain", "urgent max_request_priority=20"),
        admin_api_key=("admin",),
        max_request_priority=5,
    ).server
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in ("plain", "urgent", "admin")]
    assert server.api_key_digests == tuple(digests[:2])
    assert server.admin_key_digests == (digests[2],)
    assert server.key_priorities == {digests[1]: 20, digests[2]: 1_000_000}
    assert server.max_request_priority == 5


@each_row(
    "url, address",
    [
        ("127.0.0.1:9125", ("127.0.0.1", 9125)),
        ("stats.example.org", ("stats.example.org", 8125)),
        ("udp://[::1]:7", ("::1", 7)),
        ("statsd://h:1", ("h", 1)),
        (None, None),
    ],
)
def test_statsd_addresses(url, address):
    assert slices(statsd_server_url=url).server.statsd_address == address


@each_row("url", ["h:x", "h:70000", "http://h:1", "h:1/path", ":8125", "::1:5"])
def test_wrong_statsd_addresses_are_errors(url):
    assert "statsd_server_url" in problems(statsd_server_url=url)[0]


def test_auto_considers_smaller_groups_unless_the_user_sets_a_limit():
    def limits(**flags):
        manager = slices(**flags).replicas[0].manager
        return manager.min_group_size, manager.min_prefix_len

    assert limits() == (4, 64)
    assert limits(use_hydragen=True) == (32, 256)
    for use in (None, True):
        given = {"hydragen_min_group_size": 9, "hydragen_min_prefix_len": 100}
        assert limits(use_hydragen=use, **given) == (9, 100), use


def test_shared_prefixes_are_offered_unless_they_are_switched_off():
    for use, offered in ((True, True), (False, False), (None, True), ("auto", True)):
        result = slices(use_hydragen=use)
        assert result.replicas[0].manager.use_groups is offered, use
        expected = None if use == "auto" else use
        assert result.replicas[0].workers[0].use_groups is expected, use


def test_determinism_that_cannot_be_is_refused_and_otherwise_explained():
    for flags, obstacle in (
        ({"attention": "reference"}, "attention=reference"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype=fp8"),
        ({"torch_compile": True}, "torch_compile=T"),
        ({"device": "cuda"}, "device=cuda"),
    ):
        machine = {"num_cuda_devices": int("device" in flags)}
        with pytest.raises(ConfigError) as refused:
            slices(deterministic=True, **machine, **flags)
        assert str(refused.value).startswith("deterministic=T: "), flags
        assert obstacle in str(refused.value), flags
        plan = slices(**machine, **flags).determinism_plan
        assert plan.startswith("not deterministic: "), plan
        assert obstacle in plan, plan
    for asked, begin in ((True, "deterministic: "), (None, "deterministic if"), (False, "not")):
        plan = slices(deterministic=asked).determinism_plan
        assert plan.startswith(begin), plan
