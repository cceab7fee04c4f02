import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bitnet_jax.training.checksums import checksums, json_digest


@pytest.mark.parametrize("dtype", [np.float32, np.int32, ml_dtypes.bfloat16, np.int8, np.bool_])
def test_every_single_changed_element_changes_the_checksum_of_its_leaf_alone(dtype: type) -> None:
    array = np.arange(12).reshape(3, 4).astype(dtype)
    before = checksums({"a": array, "b": np.zeros(2)})
    for i in range(array.size):
        changed = array.copy()
        changed.view(np.uint8).reshape(-1)[i * array.itemsize] ^= 1
        after = checksums({"a": changed, "b": np.zeros(2)})
        assert after["['a']"] != before["['a']"]
        assert after["['b']"] == before["['b']"]


def test_elements_that_change_places_change_the_checksum() -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    before = checksums(array)
    for axis in range(3):
        assert checksums(np.flip(array, axis)) != before


def test_checksum_does_not_depend_on_where_the_array_is() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert checksums(array) == checksums(jnp.asarray(array)) == checksums(np.asfortranarray(array))


def test_scalars_and_empty_arrays_have_checksums() -> None:
    assert checksums(jnp.int32(3)) != checksums(jnp.int32(4))
    assert checksums(np.zeros((0, 3))).keys() == {""}


def test_digest_of_json_sees_values_and_not_the_order_of_keys() -> None:
    assert json_digest({"a": 1, "b": [1, 2]}) == json_digest({"b": [1, 2], "a": 1})
    assert json_digest({"a": 1, "b": [1, 2]}) != json_digest({"a": 1, "b": [2, 1]})
