"""Arrays that travel to the device together."""

from __future__ import annotations

import numpy as np
import torch

from tokasaurus.model.upload import upload, upload_together

CPU = torch.device("cpu")


def test_arrays_travel_in_one_buffer():
    arrays = {
        "some": np.array([3, -1, 2**31 - 1], np.int32),
        "none": np.empty(0, np.int32),
        "wide": np.array([2**40], np.int64),
        "every other": np.arange(6)[::2],
    }
    sent = upload_together(arrays, CPU)
    assert {name: tensor.tolist() for name, tensor in sent.items()} == {
        name: array.tolist() for name, array in arrays.items()
    }
    assert {tensor.dtype for tensor in sent.values()} == {torch.int64}
    full = [tensor for tensor in sent.values() if len(tensor)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in full}) == 1


def test_nothing_to_send_is_sent_as_nothing():
    none = np.empty(0, np.int32)
    assert [len(tensor) for tensor in upload_together({"a": none, "b": none}, CPU).values()] == [
        0,
        0,
    ]


def test_later_changes_of_an_array_do_not_reach_its_copy():
    array = np.array([1, 2], np.int64)
    sent = [upload(array, CPU), upload_together({"array": array}, CPU)["array"]]
    array[:] = 0
    assert [tensor.tolist() for tensor in sent] == [[1, 2], [1, 2]]
