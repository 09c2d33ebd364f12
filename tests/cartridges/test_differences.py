"""What a cartridge and a model differ in."""

from dataclasses import replace

from rows import each_row

from tokasaurus.cartridges.differences import differences
from tokasaurus.cartridges.specification import ModelShape

_MODEL = ModelShape(3, 2, 16, "Org/Model-1B", "a" * 64)


@each_row(
    "changes",
    [
        {},
        {"name": ""},
        {"name": "org/model-1b"},
        {"name": "/models/another"},
        {"name": "./another"},
        {"name": "another"},
        {"name": "models/of/mine"},
        {"rope": ""},
    ],
)
def test_a_cartridge_that_fits_differs_in_nothing(changes):
    assert differences(replace(_MODEL, **changes), _MODEL) == []
    assert differences(_MODEL, replace(_MODEL, **changes)) == []


@each_row(
    "changes, says",
    [
        ({"num_layers": 4}, "the cartridge has 4 layers, the model has 3"),
        ({"num_kv_heads": 8}, "the cartridge has 8 KV heads, the model has 2"),
        ({"head_dim": 64}, "the cartridge has 64 numbers per head, the model has 16"),
        ({"name": "org/other"}, "the cartridge is for the model org/other, this is Org/Model-1B"),
        ({"rope": "b" * 64}, "digest bbbbbbbbbbbbbbbb, the model's aaaaaaaaaaaaaaaa"),
    ],
)
def test_each_difference_names_both_values(changes, says):
    (found,) = differences(replace(_MODEL, **changes), _MODEL)
    assert says in found


def test_all_differences_are_told():
    assert len(differences(ModelShape(4, 4, 4, "a/b", "c"), _MODEL)) == 5
