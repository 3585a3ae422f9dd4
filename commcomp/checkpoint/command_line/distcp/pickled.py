"""A pickle read as data, by a machine of our own: it imports nothing, calls nothing and makes no object of a class.

What stands for a class is its name, and what a pickle would make of it a `Record` of that name and its arguments.
Python's own unpickler is not used, however restricted: it also takes memory that a pickle only claims to need.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

_MOST_FIELDS = 100


class Named(NamedTuple):
    """A class or function by where it would be imported from."""

    module: str
    name: str


@dataclass(eq=False, slots=True)
class Record:
    """What `kind` would have been called with, and the state that the result would have been given."""

    kind: Named
    arguments: Any
    state: Any = None

    def field(self, name: str) -> Any:
        """An attribute by its name; None if the state has none of that name. ValueError where it has very many."""
        pairs = self.state if type(self.state) is Pairs else ()
        if len(pairs) > _MOST_FIELDS:  # a record may stand in many places, and is searched for each
            raise ValueError(f"a {self.kind.name} with {len(pairs)} attributes; expected {_MOST_FIELDS} at most")
        return next((value for key, value in pairs if type(key) is str and key == name), None)


class Pairs(list[tuple[Any, Any]]):
    """A dict as its keys and values: nothing is hashed, since keys may be anything."""


@dataclass(frozen=True, eq=False, slots=True)
class Stored:
    """What stands beside the pickle, under this key (a storage of torch.save)."""

    key: Any


def read(data: bytes, names: Container[Named]) -> Any:
    """None, bool, int, float, str, bytes, tuple, list, and `Pairs`, `Named`, `Record` and `Stored`, of one pickle.

    Raises ValueError naming a class or function that is not among `names`, an instruction that has no business in
    plain data, or the byte where it ends too soon.
    """
    machine, position = _Machine(names), 0
    try:
        for instruction, argument, place in pickletools.genops(data):
            position = place or 0
            action = _ACTIONS.get(instruction.name)
            if action is None:
                raise ValueError(f"the instruction {instruction.name}, which plain data have no need of")
            action(machine, argument)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"byte {position} of the pickle: it does not fit what stands before it") from error
    except ValueError as error:
        raise ValueError(f"byte {position} of the pickle: {str(error)[:300]}") from error
    return machine.result


class _Machine:
    def __init__(self, names: Container[Named]) -> None:
        self.names, self.stack, self.marks = names, list[Any](), list[int]()
        self.memo: dict[int, Any] = {}
        self.result: Any = None

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def top(self, count: int) -> list[Any]:
        """So many values, in order, off the stack."""
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise IndexError
        start = len(self.stack) - count
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def to_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def memoize(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise TypeError
        if (named := Named(module, name)) not in self.names:
            raise ValueError(f"it names {module[:100]}.{name[:100]}, which plain data have no need of; nothing was run")
        self.push(named)

    def record(self, kind: Any, arguments: Any) -> None:
        if type(kind) is not Named or type(arguments) is not tuple:
            raise TypeError
        self.push(Pairs() if kind == ORDERED_DICT and not arguments else Record(kind, arguments))

    def build(self, state: Any) -> None:
        target = self.stack[-1]
        if type(target) is not Record or target.state is not None:
            raise TypeError
        target.state = state

    def set_items(self, values: Sequence[Any]) -> None:
        if len(values) % 2 or type(self.stack[-1]) is not Pairs:
            raise TypeError
        self.stack[-1].extend(zip(values[::2], values[1::2]))

    def append(self, values: Sequence[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError
        self.stack[-1].extend(values)

    def stop(self) -> None:
        (self.result,) = self.top(1)
        if self.stack or self.marks:
            raise ValueError("it ends with values left over")


ORDERED_DICT = Named("collections", "OrderedDict")
_Action = Callable[[_Machine, Any], object]
_VALUES = """
    BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES
    BINBYTES8
"""
_ACTIONS: dict[str, _Action] = {
    **{name: lambda machine, value: machine.push(value) for name in _VALUES.split()},
    **{name: lambda machine, _: None for name in ("PROTO", "FRAME")},
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "MEMOIZE": lambda machine, _: machine.memoize(len(machine.memo)),
    **{name: lambda machine, number: machine.memoize(number) for name in ("BINPUT", "LONG_BINPUT")},
    **{name: lambda machine, number: machine.push(machine.memo[number]) for name in ("BINGET", "LONG_BINGET")},
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.top(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.top(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.top(3))),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.to_mark())),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "APPEND": lambda machine, _: machine.append(machine.top(1)),
    "APPENDS": lambda machine, _: machine.append(machine.to_mark()),
    "EMPTY_DICT": lambda machine, _: machine.push(Pairs()),
    "SETITEM": lambda machine, _: machine.set_items(machine.top(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.to_mark()),
    "GLOBAL": lambda machine, names: machine.name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name(*machine.top(2)),
    "REDUCE": lambda machine, _: machine.record(*machine.top(2)),
    "NEWOBJ": lambda machine, _: machine.record(*machine.top(2)),
    "BUILD": lambda machine, _: machine.build(*machine.top(1)),
    "BINPERSID": lambda machine, _: machine.push(Stored(*machine.top(1))),
    "STOP": lambda machine, _: machine.stop(),
}
