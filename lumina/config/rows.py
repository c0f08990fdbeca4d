"""Row counts of matrices: rounded up to whole tiles, where batches are made and where they are cut into chunks."""

from __future__ import annotations

# Matrix libraries prepare code for every shape they meet: oneDNN keeps about 1 MB for each, and a run with new row
# counts at every step grew by 20 MB a step.
ROW_TILE = 64


def round_up(rows: int) -> int:
    """The smallest multiple of ROW_TILE that is not less than `rows`."""
    return -(-rows // ROW_TILE) * ROW_TILE
