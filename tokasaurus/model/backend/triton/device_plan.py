"""What the kernels of attention need of a batch, on the device.

Decodes without groups are planned there, from the lengths that are there. This gives what
``plan_tasks`` gives, and a row may have no sequence. Since the host does not have to know a length,
it does the same work for any number of sequences, and a graph can contain all of it::

    lengths           70   0  400        the second row has no sequence
    tasks              1   0    2
    partial_starts     0   0    0    2

The host does not know how many tasks there are either. It knows a bound, and behind the last task
there are tasks of zeros, which do nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tokasaurus.model.backend.base import SequenceRows
from tokasaurus.model.backend.grouping import NEVER, choose_groups
from tokasaurus.model.backend.triton import planning
from tokasaurus.model.backend.triton.planning import TASK_SIZE, Plan, Tiles, plan_tasks
from tokasaurus.model.backend.triton.shapes import ALIGNMENT
from tokasaurus.model.upload import Staging
from tokasaurus.rounding import round_up

__all__ = ["DevicePlan", "plan_decodes", "plan_without_groups", "send_plan"]


@dataclass(frozen=True, eq=False)
class DevicePlan:
    """A plan on the device, in int32; ``Plan`` says what it holds, and what may fill it up.

    Attributes:
        row_slots: [rows].
        row_positions: [rows].
        partial_starts: [rows + 1].
        merged_rows: each row that has partial results, at least once.
        few_tasks: [tasks, TASK_SIZE].
        many_tasks: [tasks, TASK_SIZE].
        num_partials: partial results that there has to be room for.
    """

    row_slots: Tensor
    row_positions: Tensor
    partial_starts: Tensor
    merged_rows: Tensor
    few_tasks: Tensor
    many_tasks: Tensor
    num_partials: int


def send_plan(plan: Plan, device: torch.device) -> DevicePlan:
    """Copies a plan to the device, in one copy."""
    arrays = (
        plan.row_slots,
        plan.row_positions,
        plan.partial_starts,
        plan.merged_rows,
        plan.few_tasks.ravel(),
        plan.many_tasks.ravel(),
    )
    sizes = [round_up(len(array), ALIGNMENT) for array in arrays]
    whole = np.zeros(sum(sizes), np.int32)
    for array, part in zip(arrays, np.split(whole, np.cumsum(sizes)[:-1]), strict=True):
        part[: len(array)] = array
    staging = Staging(device)
    staged = staging.add(whole)
    staging.send()
    parts = staged.tensor.split_with_sizes(sizes)
    slots, positions, starts, merged, few, many = (
        part[: len(array)] for part, array in zip(parts, arrays, strict=True)
    )
    tasks = few.view(-1, TASK_SIZE), many.view(-1, TASK_SIZE)
    return DevicePlan(slots, positions, starts, merged, *tasks, plan.num_partials)


def plan_without_groups(rows: SequenceRows, tiles: Tiles) -> DevicePlan:
    """Plans a batch that has decodes and no groups: these on the device, chunks on the host.

    Args:
        rows: of the batch.
        tiles: of the kernels.
    """
    decodes = plan_decodes(*rows.decodes_on_device(), tiles)
    count = rows.num_decodes
    if count == len(rows.slots):
        return decodes
    some = rows.chunks()
    plan = plan_tasks(some, choose_groups(some, 1, 1, NEVER), tiles)
    # Their rows come behind those that decode: the fourth and the sixth number of a task are rows.
    for tasks in (plan.few_tasks, plan.many_tasks):
        tasks[:, [3, 5]] += count
    plan = replace(plan, merged_rows=plan.merged_rows + np.int32(count))
    chunks = send_plan(plan, rows.page_table.device)
    starts = chunks.partial_starts + decodes.partial_starts[-1]
    return DevicePlan(
        row_slots=torch.cat((decodes.row_slots, chunks.row_slots)),
        row_positions=torch.cat((decodes.row_positions, chunks.row_positions)),
        partial_starts=torch.cat((decodes.partial_starts[:-1], starts)),
        merged_rows=torch.cat((decodes.merged_rows, chunks.merged_rows)),
        few_tasks=torch.cat((decodes.few_tasks, chunks.few_tasks)),
        many_tasks=chunks.many_tasks,
        num_partials=decodes.num_partials + chunks.num_partials,
    )


def plan_decodes(slots: Tensor, lengths: Tensor, tiles: Tiles) -> DevicePlan:
    """Plans a batch of decodes without groups. Nothing waits for the device.

    Args:
        slots: [rows] int32, at least one.
        lengths: [rows] int32, with the position of this batch; 0 where there is no sequence.
        tiles: of the kernels.
    """
    num_rows, device = len(slots), slots.device
    # As in ``planning``: the positions that would be a program's share, in whole steps, are a task.
    longest = ((lengths.sum() - 1) // tiles.num_programs).clamp_(min=planning.SHORTEST_TASK - 1)
    parts = (lengths + longest) // (longest + 1)
    quantum = parts.clamp_(min=1) * planning.STEP
    steps = ((lengths + (quantum - 1)) // quantum * planning.STEP).clamp_(min=1)
    num_tasks = (lengths + (steps - 1)) // steps
    ends = num_tasks.cumsum(0)
    # The last task of each row, and as many others as there are shares.
    most_tasks = num_rows + tiles.num_programs
    task = torch.arange(most_tasks, device=device)
    row = torch.searchsorted(ends, task, right=True).clamp_(max=num_rows - 1)
    of_rows = torch.stack((slots.to(torch.int64), lengths.to(torch.int64), steps, ends - num_tasks))
    task_slots, task_lengths, task_steps, firsts = of_rows.index_select(1, row)
    number = task - firsts
    begins, one = number * task_steps, torch.ones_like(row)
    task_ends = torch.minimum(begins + task_steps, task_lengths)
    tasks = torch.stack((task_slots, begins, task_ends, row, one, row, one, number), dim=1)
    tasks *= (task < ends[-1:])[:, None]
    has_partials = num_tasks > 1
    partial_starts = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
    torch.cumsum(num_tasks * has_partials, 0, dtype=torch.int32, out=partial_starts[1:])
    # Fewer rows than there are shares have more than one. The first row fills the list up: to
    # merge it twice, or without partial results, changes nothing.
    room = min(num_rows, tiles.num_programs)
    places = (has_partials.cumsum(0) - 1).where(has_partials, room)
    merged = torch.zeros(room + 1, dtype=torch.int32, device=device)
    merged.scatter_(0, places, torch.arange(num_rows, dtype=torch.int32, device=device))
    return DevicePlan(
        row_slots=slots,
        row_positions=lengths - 1,
        partial_starts=partial_starts,
        merged_rows=merged[:room],
        few_tasks=tasks.to(torch.int32),
        many_tasks=tasks.new_empty(0, TASK_SIZE, dtype=torch.int32),
        # They have their shares, and one more task each at most.
        num_partials=room + tiles.num_programs,
    )
