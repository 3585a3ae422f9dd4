"""Other tensors that one may be coded against: of its snapshot, and of the parent."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from commcomp.checkpoint.codec.float_tensor import Other
from commcomp.checkpoint.codec.matrices import FORMATS
from commcomp.checkpoint.coded import CURRENT, PREVIOUS, HostTensor, Input, Reference
from commcomp.checkpoint.roles import Moments, number_of


class Sources:
    """Other tensors that one may be coded against. `current`: those of this snapshot."""

    def __init__(
        self, tensors: Mapping[str, HostTensor], previous: Reference | None, current: Collection[str]
    ) -> None:
        self._tensors, self._previous, self._current = tensors, previous, current

    def tensor(self, name: str) -> HostTensor:
        """Of this snapshot, whether it may be coded against or not."""
        return self._tensors[name]

    def of(self, like: str, **places: tuple[str, str | None]) -> dict[str, Other]:
        """By role, the floats at each place (snapshot, name); left out is what is not there, or shaped otherwise."""
        found: dict[str, Other] = {}
        for role, (where, name) in places.items():
            other = self.at(where, name)
            tensor = None if name is None else self._tensors.get(name)
            alike = tensor is not None and tensor.dtype in FORMATS and tensor.shape == self._tensors[like].shape
            if other is not None and alike:
                found[role] = other
        return found

    def at(self, where: str, name: str | None) -> Other | None:
        """One tensor's bytes; of the parent's only of dtype and shape that it has now."""
        tensor = None if name is None else self._tensors.get(name)
        if tensor is None or name is None:
            return None
        wide = tensor.dtype == "float32"
        if where == CURRENT:
            return Other(Input(CURRENT, name), tensor.data, wide) if name in self._current else None
        header = None if self._previous is None else self._previous.header(name)
        if header is None or self._previous is None or (header.dtype, header.shape) != (tensor.dtype, tensor.shape):
            return None
        return Other(Input(PREVIOUS, name), self._previous.read(name), wide)

    def count(self, moments: Moments, where: str) -> float | None:
        """How many steps a parameter has taken."""
        step = moments.step if where == CURRENT else moments.step_before
        if not isinstance(step, str):
            return step
        if where == CURRENT:
            return number_of(self._tensors[step].data, self._tensors[step].dtype)
        header = None if self._previous is None else self._previous.header(step)
        if header is None or self._previous is None or header.num_values != 1:
            return None
        return number_of(self._previous.read(step), header.dtype)

    def steps_passed(self, moments: Moments | None) -> float | None:
        """Steps between the snapshots; None where that is not known or not forward."""
        now, before = (None if moments is None else self.count(moments, where) for where in (CURRENT, PREVIOUS))
        return now - before if now is not None and before is not None and now > before else None
