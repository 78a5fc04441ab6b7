"""What the recipes of TRL's trainers (sft, reward) have in common before anything is loaded: the batch arithmetic."""

from llmrl.errors import RefusedError


def step_parts(items: str, per_step: int, world_size: int, rows_that_fit: int) -> tuple[int, int]:
    """(rows of one forward pass, forward passes of a step) of each process, so that rows x passes x processes =
    per_step.

    `rows_that_fit` limits the rows, to one at least. `items` is the key that holds `per_step`, for the message of the
    `RefusedError` where the processes cannot share it evenly.
    """
    if per_step % world_size:
        below = per_step - per_step % world_size
        usable = f"{below} or {below + world_size}" if below else str(world_size)
        raise RefusedError(f"{items} {per_step} cannot be shared evenly by {world_size} processes; use {usable}")
    share = per_step // world_size
    rows = max(n for n in range(1, share + 1) if share % n == 0 and n <= max(rows_that_fit, 1))
    return rows, share // rows
