"""Arrays that travel to the device together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokasaurus.model.upload import Staging

CPU = torch.device("cpu")
ARRAYS = {
    "some": np.array([3, -1, 2**31 - 1], np.int32),
    "none": np.empty(0, np.int32),
    "wide": np.array([2**40], np.int64),
    "every other": np.arange(6)[::2],
    "fractions": np.array([[0.1, 1e300], [np.nan, -0.0]], np.float64),
    "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "flags": np.array([[[True], [False], [True]]]),
    "bytes": np.arange(250, 256, dtype=np.uint8),
    "no columns": np.empty((3, 0), np.float32),
}


def test_arrays_of_all_types_travel_in_one_buffer():
    staging = Staging(CPU)
    staged = {name: staging.add(array) for name, array in ARRAYS.items()}
    staging.send()
    storages = set()
    for name, array in ARRAYS.items():
        tensor = staged[name].tensor
        assert tensor.numpy().dtype == array.dtype, name
        np.testing.assert_array_equal(tensor.numpy(), array, name)
        assert tensor.is_contiguous(), name
        assert tensor.data_ptr() % tensor.element_size() == 0, name
        storages.add(tensor.untyped_storage().data_ptr())
    assert len(storages) == 1


def test_indices_travel_in_int64():
    staging = Staging(CPU)
    staged = [staging.add_indices(array) for array in (ARRAYS["some"], ARRAYS["wide"])]
    staging.send()
    assert [each.tensor.tolist() for each in staged] == [[3, -1, 2**31 - 1], [2**40]]
    assert {each.tensor.dtype for each in staged} == {torch.int64}


def test_nothing_to_send_is_sent_as_nothing():
    Staging(CPU).send()
    staging = Staging(CPU)
    staged = [staging.add_indices(ARRAYS["none"]) for _ in range(2)]
    staging.send()
    assert [len(each.tensor) for each in staged] == [0, 0]


def test_an_array_arrives_as_it_is_when_it_is_sent():
    array = np.array([1, 2], np.int64)
    staging = Staging(CPU)
    staged = staging.add(array)
    with pytest.raises(AssertionError, match="not sent yet"):
        _ = staged.tensor
    staging.send()
    array[:] = 0
    assert staged.tensor.tolist() == [1, 2]
