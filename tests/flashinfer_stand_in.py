"""A stand-in for FlashInfer, on any device: its signatures, its checks, and results in float64.

It has the parts of the module that the backend calls, and of their parameters those that it passes.
``tests/model/backend/test_flashinfer_package.py`` compares the signatures with the package's. The
stand-in refuses what FlashInfer refuses, and what FlashInfer would take and then read wrongly:

- another dtype than the planned one, and index arrays of another type than int32,
- host arrays on the device, and the other way round,
- tensors that are not contiguous where kernels need it, and keys unlike values in their strides,
- a run without a plan, with a number of rows or a size of pages that was not planned,
- pages outside of the cache, and lengths that do not fit their pages.

It does not read what a kernel would not read either: of pages, positions that were not named. Of
tensors without numbers (``fake_cuda``) it checks everything else.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

__all__ = [
    "DTYPES",
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "append_paged_kv_cache",
    "attend_paged",
    "jit",
    "merge_state_in_place",
]

__version__ = "0.6.14"

DTYPES = [torch.float16, torch.bfloat16]
"""Those that kernels exist for. A test may add float32, to see the composition without rounding."""

_LN_2 = math.log(2)
_TENSOR_LAYOUTS = ("NHD", "HND")


def _refuse(reason):
    raise ValueError(f"the stand-in for FlashInfer refuses: {reason}")


def _check_indices(name, tensor, device=None):
    if tensor.dtype != torch.int32:
        _refuse(f"{name} is {tensor.dtype}, not int32")
    if tensor.dim() != 1 or not tensor.is_contiguous():
        _refuse(f"{name} is not one contiguous row of numbers")
    if device is not None and tensor.device != device:
        _refuse(f"{name} is on {tensor.device}, not on {device}")


def _check_contiguous(name, tensor):
    if not tensor.is_contiguous():
        _refuse(f"{name} is not contiguous")


def _check_cache(pages, dtype, layout):
    if layout not in _TENSOR_LAYOUTS:
        _refuse(f"layout {layout}")
    if not isinstance(pages, tuple):
        _refuse("keys and values are no tuple")
    keys, values = pages
    if keys.stride() != values.stride() or keys.stride(-1) != 1:
        _refuse("keys and values differ in strides, or the numbers of a head are apart")
    if keys.dtype != dtype or values.dtype != dtype:
        _refuse(f"the cache is {keys.dtype}, and {dtype} was planned")
    # Numbers in e4m3 cannot be indexed on the CPU. Their bytes can.
    if dtype.itemsize == 1:
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    return (keys, values) if layout == "HND" else (keys.transpose(1, 2), values.transpose(1, 2))


def _numbers(kept):
    return (kept.view(torch.float8_e4m3fn) if kept.dtype == torch.uint8 else kept).double()


def attend_paged(
    query, keys, values, query_starts, page_starts, pages, last_page_lengths, *, is_causal, scale
):
    """What a kernel computes, in float64.

    Returns the output, [rows, heads, head_dim], and the LSE to base 2, [rows, heads].
    """
    num_rows, num_heads, head_dim = query.shape
    _, num_kv_heads, page_size, _ = keys.shape
    output = torch.zeros(num_rows, num_heads, head_dim, dtype=torch.float64)
    lse = torch.full((num_rows, num_heads), -math.inf, dtype=torch.float64)
    starts, bounds = query_starts.tolist(), page_starts.tolist()
    for request, last in enumerate(last_page_lengths.tolist()):
        first, end = starts[request : request + 2]
        its_pages = pages[bounds[request] : bounds[request + 1]].long()
        if not len(its_pages) or first == end:
            continue
        if not 0 < last <= page_size:
            _refuse(f"the last page of request {request} has {last} positions")
        if (its_pages < 0).any() or (its_pages >= len(keys)).any():
            _refuse(f"request {request} reads pages outside of the cache")
        length = (len(its_pages) - 1) * page_size + last
        mine = [
            _numbers(each[its_pages]).transpose(0, 1).flatten(1, 2)[:, :length]
            for each in (keys, values)
        ]
        wide = [each.repeat_interleave(num_heads // num_kv_heads, dim=0) for each in mine]
        scores = torch.einsum("rhd,hld->rhl", query[first:end].double(), wide[0]) * scale
        if is_causal:
            count = end - first
            if count > length:
                _refuse(f"request {request} has {count} rows and {length} positions")
            seen = torch.ones(count, length, dtype=torch.bool).tril(length - count)
            scores.masked_fill_(~seen[:, None], -math.inf)
        output[first:end] = torch.einsum("rhl,hld->rhd", scores.softmax(-1), wide[1])
        lse[first:end] = scores.logsumexp(-1) / _LN_2
    return output, lse


class _Wrapper:
    """What both wrappers share."""

    def __init__(self, workspace, layout, backend):
        if workspace.dtype != torch.uint8:
            _refuse(f"the workspace is {workspace.dtype}")
        self._device, self._layout, self._backend = workspace.device, layout, backend
        self._planned = None

    def _plan(self, arrays, seq_lens, num_heads, num_kv_heads, head_dim, page_size, options):
        """``arrays``: starts of rows, starts of pages, pages, lengths of last pages."""
        cpu = torch.device("cpu")
        query_starts, page_starts, pages, last_page_lengths = arrays
        for name, array in (
            ("query starts", query_starts),
            ("page starts", page_starts),
            ("lengths of last pages", last_page_lengths),
            ("lengths", seq_lens),
        ):
            _check_indices(name, array, cpu)
        _check_indices("pages", pages, self._device)
        with unset_fake_temporarily():
            num_rows = int(query_starts[-1])
            self._check_lengths(*arrays, seq_lens, page_size)
        if head_dim not in (64, 128, 256) or num_heads % num_kv_heads:
            _refuse(f"{num_heads} heads, {num_kv_heads} key heads of {head_dim}")
        if options["q_data_type"] not in DTYPES:
            _refuse(f"no kernels for {options['q_data_type']}")
        self._planned = SimpleNamespace(
            arrays=[array.clone() for array in arrays],
            num_rows=num_rows,
            shape=(num_heads, head_dim),
            cache_shape=(num_kv_heads, page_size, head_dim),
            **options,
        )

    def _check_lengths(
        self, query_starts, page_starts, pages, last_page_lengths, seq_lens, page_size
    ):
        if len(pages) != page_starts[-1] or len(page_starts) != len(query_starts):
            _refuse("there are not as many pages or requests as the starts say")
        expected = (page_starts.diff() - 1).clamp(min=0) * page_size + last_page_lengths
        if not torch.equal(seq_lens.as_subclass(torch.Tensor), expected):
            _refuse("lengths and pages disagree")
        # FlashInfer looks for the longest like this.
        if len(seq_lens) and max(seq_lens).item() != expected.max():
            _refuse("max() of the lengths is not the longest")

    def _run(self, query, pages, out, lse, return_lse):
        planned = self._planned
        if planned is None:
            _refuse("run() was called before plan()")
        if query.dtype != planned.q_data_type:
            _refuse(f"queries are {query.dtype}, and {planned.q_data_type} was planned")
        if query.device != self._device:
            _refuse(f"queries are on {query.device}")
        if query.shape != (planned.num_rows, *planned.shape):
            _refuse(f"queries are {tuple(query.shape)}, and {planned.num_rows} rows were planned")
        if query.stride(-1) != 1:
            _refuse("the numbers of a query are apart")
        keys, values = _check_cache(pages, planned.kv_data_type, self._layout)
        if keys.shape[1:] != planned.cache_shape:
            _refuse(f"pages are {tuple(keys.shape[1:])}, and {planned.cache_shape} was planned")
        if out is None:
            out = query.new_empty(query.shape)
        if out.dtype != query.dtype or out.shape != query.shape:
            _refuse("the output is unlike the queries")
        _check_contiguous("the output", out)
        if lse is not None and (lse.dtype != torch.float32 or lse.shape != query.shape[:2]):
            _refuse("the LSE is not [rows, heads] in float32")
        if isinstance(query, FakeTensor):
            return out if lse is None else (out, lse)
        result, sums = attend_paged(
            query, keys, values, *planned.arrays, is_causal=planned.causal, scale=planned.sm_scale
        )
        out.copy_(result)
        if not return_lse:
            return out
        if lse is None:
            lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        _check_contiguous("the LSE", lse)
        lse.copy_(sums)
        return out, lse


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    """Requests of any number of rows."""

    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        *,
        backend="auto",
    ):
        if backend not in ("fa2", "fa3"):
            _refuse(f"backend={backend} takes what the device has")
        super().__init__(float_workspace_buffer, kv_layout, backend)

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        *,
        causal=False,
        sm_scale=None,
        q_data_type="float16",
        kv_data_type=None,
        seq_lens=None,
        max_token_per_sequence=None,
    ):
        arrays = qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        with unset_fake_temporarily():
            most = int(qo_indptr.diff().max())
        if max_token_per_sequence != most:
            _refuse(f"max_token_per_sequence={max_token_per_sequence}, and the most are {most}")
        if self._backend == "fa3" and not causal:
            _refuse("fa3 for a group")
        options = {
            "causal": causal,
            "sm_scale": sm_scale,
            "q_data_type": q_data_type,
            "kv_data_type": kv_data_type,
        }
        self._plan(arrays, seq_lens, num_qo_heads, num_kv_heads, head_dim_qk, page_size, options)

    def run(self, q, paged_kv_cache, *args, out=None, lse=None, return_lse=False):
        assert not args
        return self._run(q, paged_kv_cache, out, lse, return_lse)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    """Requests of one row."""

    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        *,
        use_tensor_cores=False,
        backend="auto",
    ):
        if not use_tensor_cores or backend != "fa2":
            _refuse(f"backend={backend}, use_tensor_cores={use_tensor_cores}")
        super().__init__(float_workspace_buffer, kv_layout, backend)

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        *,
        q_data_type="float16",
        kv_data_type=None,
        sm_scale=None,
        seq_lens=None,
    ):
        with unset_fake_temporarily():
            starts = torch.arange(len(indptr), dtype=torch.int32)
        arrays = starts, indptr, indices, last_page_len
        options = {
            "causal": False,
            "sm_scale": sm_scale,
            "q_data_type": q_data_type,
            "kv_data_type": kv_data_type,
        }
        self._plan(arrays, seq_lens, num_qo_heads, num_kv_heads, head_dim, page_size, options)

    def run(self, q, paged_kv_cache, *args, out=None, lse=None, return_lse=False):
        assert not args
        return self._run(q, paged_kv_cache, out, lse, return_lse)


def append_paged_kv_cache(
    append_key,
    append_value,
    batch_indices,
    positions,
    paged_kv_cache,
    kv_indices,
    kv_indptr,
    kv_last_page_len,
    kv_layout="NHD",
):
    """Writes each row's key and value to its position within its request's pages."""
    device = append_key.device
    keys, values = _check_cache(paged_kv_cache, append_key.dtype, kv_layout)
    for name, array in (
        ("requests of rows", batch_indices),
        ("positions", positions),
        ("pages", kv_indices),
        ("page starts", kv_indptr),
        ("lengths of last pages", kv_last_page_len),
    ):
        _check_indices(name, array, device)
    if append_key.stride(-1) != 1 or append_value.stride(-1) != 1:
        _refuse("the numbers of a key or value are apart")
    if not len(append_key) == len(append_value) == len(batch_indices) == len(positions):
        _refuse("there are not as many positions as keys")
    if len(kv_indptr) != len(kv_last_page_len) + 1:
        _refuse("there are not as many starts of pages as requests")
    if isinstance(append_key, FakeTensor):
        return
    if kv_indptr[-1] != len(kv_indices):
        _refuse("there are not as many pages or requests as the starts say")
    columns = positions.long() // keys.shape[2]
    places = kv_indptr[batch_indices.long()] + columns
    if (columns < 0).any() or (places >= kv_indptr[batch_indices.long() + 1]).any():
        _refuse("a position is outside of its request's pages")
    pages, offsets = kv_indices[places].long(), positions.long() % keys.shape[2]
    keys[pages, :, offsets] = append_key.view(keys.dtype)
    values[pages, :, offsets] = append_value.view(keys.dtype)


def merge_state_in_place(v, s, v_other, s_other, mask=None):
    """Merges a partial result into another one. The LSE are to base 2."""
    for name, tensor in (("v", v), ("s", s), ("v_other", v_other), ("s_other", s_other)):
        _check_contiguous(name, tensor)
    if v.dtype not in DTYPES or v.dtype != v_other.dtype:
        _refuse(f"there is no merge of {v.dtype} and {v_other.dtype}")
    if s.dtype != torch.float32 or s_other.dtype != torch.float32:
        _refuse("an LSE is not float32")
    if v.shape != v_other.shape or s.shape != s_other.shape or s.shape != v.shape[:2]:
        _refuse("partial results differ in shape")
    assert mask is None
    lse = torch.stack((s, s_other)).double() * _LN_2
    shares = lse.softmax(0)[..., None]
    v.copy_((torch.stack((v, v_other)).double() * shares).sum(0))
    s.copy_(lse.logsumexp(0) / _LN_2)


def _gen_batch_prefill_module(
    backend,
    dtype_q,
    dtype_kv,
    dtype_o,
    dtype_idx,
    head_dim_qk,
    head_dim_vo,
    pos_encoding_mode,
    use_sliding_window,
    use_logits_soft_cap,
    use_fp16_qk_reduction,
):
    """What knows whether kernels are built."""
    return SimpleNamespace(is_compiled=backend == "fa3" and head_dim_qk == 128)


jit = SimpleNamespace(gen_batch_prefill_module=_gen_batch_prefill_module)
