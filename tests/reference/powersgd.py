"""PowerSGD written slowly and plainly from the paper, to check the fast one against.

Vogels, Karimireddy, Jaggi: PowerSGD (arXiv:1905.13727), Algorithm 1 (one rank-r power iteration) and Algorithm 2
(distributed SGD with error feedback), all ranks simulated in one process, one matrix at a time, in fp64.

Two deviations are wanted. The error of a rank is what that rank did not deliver (its input minus P Q_i^T with its own
Q_i), not its input minus the mean: the mean over ranks is the same. And `rounds=1` takes one half of the iteration a
step: even steps send M Q with Q made orthonormal, odd steps send M^T P with P made orthonormal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gram_schmidt(matrix: Tensor) -> Tensor:
    """Orthonormal columns with the span of `matrix` [n, r], column by column; the columns must be independent."""
    columns: list[Tensor] = []
    for index in range(matrix.shape[1]):
        column = matrix[:, index].clone()
        for _ in range(2):  # the second pass removes what rounding left
            for done in columns:
                column = column - done * torch.dot(done, column)
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


class ReferencePowerSGD:
    """N simulated ranks that compress the same list of matrices.

    Args:
        num_ranks: N.
        first_right: the Q [m, r] that each matrix starts with.
        first_left: the P [n, r] that each matrix starts with; used by `rounds=1` only.
        rounds: 2 (as published) or 1 (alternating).
    """

    def __init__(
        self, num_ranks: int, first_right: Sequence[Tensor], first_left: Sequence[Tensor] = (), *, rounds: int = 2
    ) -> None:
        self.num_ranks, self.rounds = num_ranks, rounds
        self.right = [factor.double() for factor in first_right]
        self.left = [factor.double() for factor in first_left]
        self.step_index = 0
        self.residuals: list[list[Tensor]] | None = None
        """By rank, then matrix: what that rank still owes."""
        self.delivered: list[list[Tensor]] | None = None
        """By rank, then matrix: the sum of what was decoded from that rank."""

    def step(self, gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Decoded mean gradient of each matrix; `gradients` by rank, then matrix [n, m]."""
        if self.residuals is None or self.delivered is None:
            self.residuals = [[torch.zeros_like(matrix).double() for matrix in own] for own in gradients]
            self.delivered = [[torch.zeros_like(matrix).double() for matrix in own] for own in gradients]
        decoded = []
        for index in range(len(self.right)):
            inputs = [gradients[rank][index].double() + self.residuals[rank][index] for rank in range(self.num_ranks)]
            shares = self._compress(index, inputs)
            for rank in range(self.num_ranks):
                self.residuals[rank][index] = inputs[rank] - shares[rank]
                self.delivered[rank][index] = self.delivered[rank][index] + shares[rank]
            decoded.append(sum(shares) / self.num_ranks)
        self.step_index += 1
        return decoded

    def _compress(self, index: int, inputs: list[Tensor]) -> list[Tensor]:
        """What is decoded from each rank; moves the warm start of matrix `index`."""
        if self.rounds == 2:
            left = gram_schmidt(sum(matrix @ self.right[index] for matrix in inputs) / self.num_ranks)
            own = [matrix.T @ left for matrix in inputs]
            self.right[index] = sum(own) / self.num_ranks
            return [left @ factor.T for factor in own]
        if self.step_index % 2 == 0:
            right = gram_schmidt(self.right[index])
            own = [matrix @ right for matrix in inputs]
            self.left[index] = sum(own) / self.num_ranks
            return [factor @ right.T for factor in own]
        left = gram_schmidt(self.left[index])
        own = [matrix.T @ left for matrix in inputs]
        self.right[index] = sum(own) / self.num_ranks
        return [left @ factor.T for factor in own]
