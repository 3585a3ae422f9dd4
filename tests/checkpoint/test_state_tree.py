"""State dicts apart and together, their JSON, and what a snapshot refuses."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections import OrderedDict, defaultdict, deque, namedtuple
from datetime import datetime
from enum import IntEnum
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commcomp.checkpoint import SnapshotStore
from commcomp.checkpoint.state_tree import MAX_DEPTH, MAX_NAME_BYTES, TensorPlace, join, paths_of, places, split
from commcomp.checkpoint.tree_json import from_json, to_json
from tests.checkpoint.states import assert_same, plain, states, tensor_of_bytes


@given(states)
def test_apart_and_together(state):
    parts = split(state)
    text = json.dumps(to_json(parts.skeleton), allow_nan=False)
    skeleton = from_json(json.loads(text))
    assert paths_of(skeleton) == parts.paths or "nan" in str(parts.paths)
    assert {place.name for place in places(skeleton)} == parts.tensors.keys()
    together = join(skeleton, lambda place: parts.tensors[place.name])
    given_tensors, got_tensors = split(state).tensors, split(together).tensors
    assert list(given_tensors) == list(got_tensors)
    assert all(given_tensors[name] is got_tensors[name] for name in given_tensors)
    assert_same(join(skeleton, lambda place: None), join(parts.skeleton, lambda place: None))


def _nested(kind: str, value: object) -> object:
    if kind == "attribute":
        outer: OrderedDict = OrderedDict()
        outer.__dict__["inner"] = value
        return outer
    wraps = {"list": [value], "tuple": (value,), "dict": {"a": value}, "ordered": OrderedDict(a=value)}
    return wraps[kind]


@st.composite
def _odd_dicts(draw: st.DrawFn, inner: st.SearchStrategy) -> object:
    """With keys nested deep, attributes of any name, dtypes and sizes that torch has."""
    result = draw(st.sampled_from([dict, OrderedDict]))()
    for _ in range(draw(st.integers(0, 2))):
        key: object = draw(plain.filter(lambda value: type(value) is not dict))
        for _ in range(draw(st.sampled_from([0, 1, 2, 97, 98, 99, 100, 101, 150]))):
            key = (key,)
        result[key] = draw(inner)
    if type(result) is OrderedDict:
        names = st.text(max_size=5) | st.sampled_from(["items", "__x", "_ok", "clear", "__class__", "ok", 3, "é"])
        result.__dict__.update(draw(st.dictionaries(names, inner, max_size=2)))
    return result


_odd_leaves = plain | st.sampled_from([torch.quint8, torch.qint32, torch.Size([3, 0]), torch.zeros(2), np.ones(1)])
_odd_states = st.recursive(_odd_leaves, lambda inner: st.lists(inner, max_size=2) | _odd_dicts(inner), max_leaves=5)
_kinds = st.sampled_from(["list", "tuple", "dict", "ordered", "attribute"])


@given(_odd_states, st.lists(_kinds, max_size=3), _kinds, st.sampled_from([0, 1, 50, 94, 95, 96, 97, 98, 99, 100]))
def test_whatever_is_taken_apart_comes_back_from_its_json(state, outer, kind, depth):
    for each in [*outer, *[kind] * depth]:
        state = _nested(each, state)
    try:
        parts = split(state)
    except (TypeError, ValueError) as error:
        assert "the state dict" in str(error)
        return
    skeleton = from_json(json.loads(json.dumps(to_json(parts.skeleton), allow_nan=False)))
    assert_same(state, join(skeleton, lambda place: parts.tensors[place.name]))


def _with_attribute(name: object) -> OrderedDict:
    state = OrderedDict(a=1)
    state.__dict__[name] = 3
    return state


def _deep_key(levels: int) -> object:
    key: object = 1
    for _ in range(levels):
        key = (key,)
    return key


@pytest.mark.parametrize(
    "value, words",
    [
        *[(_with_attribute(name), "an attribute") for name in ("odd name", "__x", "items", "é", 3)],
        ({_deep_key(98): 1}, "nested deeper than 100"),
        ({_deep_key(5000): 1}, "nested deeper than 100"),
        ({"dtype": torch.quint8}, "the dtype torch.quint8"),
        ({torch.qint8: 1}, "the dtype torch.qint8"),
    ],
)
def test_a_save_refuses_by_place_what_no_load_would_take(tmp_path, value, words):
    store = SnapshotStore(tmp_path, threads=1)
    with pytest.raises((TypeError, ValueError), match=r"'model/0[/']") as caught:
        store.save(1, {"model": [value]})
    assert words in str(caught.value) and store.steps() == []


def test_what_is_nested_as_deep_as_can_be_loads(tmp_path):
    store = SnapshotStore(tmp_path, threads=1)
    for step, kind in enumerate(("list", "tuple", "dict", "ordered", "attribute")):
        state: object = {_deep_key(MAX_DEPTH - 1): 1} if kind == "dict" else torch.ones(2)
        for _ in range(0 if kind == "dict" else MAX_DEPTH):
            state = _nested(kind, state)
        store.save(step, state)
        assert_same(state, store.load(step))


def test_metadata_is_nested_no_deeper_than_it_can_be_read(tmp_path):
    def nested(levels: int) -> dict:
        return {"a": nested(levels - 1)} if levels else {}

    store, deep = SnapshotStore(tmp_path, threads=1), nested(MAX_DEPTH)
    store.save(1, {}, deep)
    assert store.info(1).metadata == deep
    with pytest.raises(TypeError, match="metadata is nested deeper than 100"):
        store.save(2, {}, {"a": deep})
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(TypeError, match="metadata is no JSON"):
        store.save(2, {}, deep)


@given(plain)
def test_plain_values_are_exact(value):
    assert_same(value, from_json(json.loads(json.dumps(to_json(value), allow_nan=False))))


def test_shared_tensors_are_one_and_other_views_are_not():
    base = torch.arange(12.0)
    alias, array = base.view(12), np.arange(3)
    state = {"a": base, "b": alias, "c": base[:6], "d": base.view(3, 4), "e": array, "f": array[:], "g": array[::-1]}
    parts = split(state)
    assert list(parts.tensors) == ["a", "c", "d", "e", "g"]
    assert parts.paths["a"] == (("a",), ("b",)) and parts.paths["e"] == (("e",), ("f",))


def test_empty_tensors_are_told_apart():
    one, other = torch.empty(0), torch.empty(0)
    assert list(split([one, other, one]).tensors) == ["0", "1"]


def test_names_are_unique_and_bounded():
    huge, t = "k" * 10_000, [torch.zeros(1) for _ in range(6)]
    state = {"0": t[0], 0: t[1], "a/b": t[2], "a": {"b": t[3]}, huge: t[4], huge + "x": t[5]}
    parts = split(state)
    assert list(parts.tensors)[:4] == ["0", "0#2", "a/b", "a/b#2"] and len(parts.tensors) == 6
    assert all(len(name.encode()) <= MAX_NAME_BYTES for name in parts.tensors)
    assert_same(state, join(from_json(to_json(parts.skeleton)), lambda place: parts.tensors[place.name]))


def test_the_metadata_of_a_module_comes_back():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state = model.state_dict()
    parts = split(state)
    together = join(from_json(to_json(parts.skeleton)), lambda place: parts.tensors[place.name])
    assert together._metadata == state._metadata and together._metadata["1"]["version"] == 2


def test_left_out_tensors_leave_lists_their_length():
    from commcomp.checkpoint.state_tree import LEFT_OUT

    skeleton = split({"a": torch.zeros(1), "b": [torch.zeros(1), 3, (torch.zeros(2),)]}).skeleton
    assert join(skeleton, lambda place: LEFT_OUT) == {"b": [None, 3, (None,)]}


class _Own(torch.Tensor):
    pass


def _quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to drop them
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


_Point = namedtuple("_Point", "x y")


@pytest.mark.parametrize(
    "value, words",
    [
        (torch.eye(3).to_sparse(), "to_dense"),
        (_quantised(), "int_repr"),
        (torch.empty(3, device="meta"), "meta device"),
        (torch.ones(3).as_subclass(_Own), "as_subclass"),
        (_Point(1, 2), "namedtuple to a tuple"),
        (defaultdict(int), "collections.defaultdict"),
        ({1, 2}, "builtins.set"),
        (Path("a"), "pathlib"),
        (IntEnum("_Kind", "A").A, "_Kind"),
        (datetime(2020, 1, 1), "datetime.datetime"),
        (torch.device("cpu"), "torch.device"),
        (torch.Generator(), "Generator"),
        (bytearray(b"x"), "builtins.bytearray"),
        (range(3), "builtins.range"),
        (deque([1]), "collections.deque"),
        (torch.nn.Linear(1, 1), "state_dict()"),
        (object(), "builtins.object"),
        (np.array(["text"]), "numpy dtype <U4"),
        (np.zeros(3, ">f4"), "native byte order"),
        (np.zeros(3, np.longdouble), "numpy dtype"),
        (np.datetime64("2020-01-01"), "numpy dtype"),
        ({frozenset(): 1}, "a key of type builtins.frozenset"),
    ],
)
def test_what_cannot_be_held_is_refused_by_place(value, words):
    with pytest.raises(TypeError, match=r"optimizer/state/0") as caught:
        split({"optimizer": {"state": [value]}})
    assert words in str(caught.value)


def test_dtensors_are_refused_with_the_remedy():
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        tensor = DTensor.from_local(torch.ones(3), dist.init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(TypeError, match=r"'model/w' in the state dict is a tensor that is a DTensor.*full_state"):
            split({"model": {"w": tensor}})
    finally:
        dist.destroy_process_group()


def test_what_holds_itself_is_refused():
    state: dict = {}
    state["self"] = state
    with pytest.raises(ValueError, match=f"deeper than {MAX_DEPTH} levels, or holds itself"):
        split(state)


@pytest.mark.parametrize(
    "node",
    [
        {"float": "00"},
        {"float": 3},
        {"int": "0xg"},
        {"complex": ["00" * 8]},
        {"bytes": "*"},
        {"dtype": "float33"},
        {"scalar": ["float32", "00"]},
        {"size": [1.5]},
        {"size": [1 << 64]},
        {"tensor": 3},
        {"tuple": 3},
        {"dict": [[1]]},
        {"dict": [[[1], 2]]},
        {"dict": [[{"tuple": [[1]]}, 2]]},
        {"ordered": [], "attributes": [["__class__", 1]]},
        {"ordered": [], "attributes": [["keys", 1]]},
        {"dict": [], "attributes": []},
        {"unknown": 1},
        {},
        1.5,
    ],
)
def test_json_that_is_no_tree_is_refused(node):
    with pytest.raises(ValueError):
        from_json([node])


_FORMS = st.sampled_from(["dict", "ordered", "tuple", "float", "int", "size", "scalar", "tensor", "attributes"])


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_FORMS, inner, max_size=2),
    )
)
def test_any_json_is_a_tree_or_a_value_error(node):
    with contextlib.suppress(ValueError):
        from_json(node)


def test_deep_json_is_refused():
    node: object = None
    for _ in range(MAX_DEPTH + 2):
        node = [node]
    with pytest.raises(ValueError, match="deeper"):
        from_json(node)


def test_kinds_of_places():
    skeleton = split(OrderedDict(t=torch.zeros(1), a=np.zeros(1))).skeleton
    assert skeleton["t"] == TensorPlace("t") and skeleton["a"] == TensorPlace("a", is_array=True)
    assert tensor_of_bytes(b"", torch.int4, (0, 3)).shape == (0, 3)
