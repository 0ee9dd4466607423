"""Several documents in one row, each as if it were alone: less padding, the same losses."""

from bisect import bisect_left, insort

import numpy as np
import torch

from dora_cli.data.encoded import Encoded

POSITIONS = "position_ids"


def pack(encoded: Encoded, length: int) -> Encoded:
    """Rows of up to ``length`` tokens, filled with whole documents, the longest first, each into the fullest row that
    it fits into. No document is cut, and the same documents always give the same rows.

    Every row has ``position_ids``, which begin at 0 with each document: that is what tells transformers which tokens
    may see each other. Padding counts as documents of one token.

    Args:
        encoded: the documents; no scalar columns.
        length: tokens of a row; no document is longer.

    Returns:
        The rows. ``places`` are those of a row's first document; no ``ids``, since only evaluation names rows.
    """
    assert not encoded.scalars, "what belongs to a document has no place in a row of several"
    rows = _filled(encoded.lengths.tolist(), length)
    order = np.array([document for row in rows for document in row])
    starts, lengths = encoded.offsets[:-1].numpy()[order], encoded.lengths.numpy()[order]
    ends = lengths.cumsum()
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)  # of every token in its document
    taken = torch.from_numpy(np.repeat(starts, lengths) + positions)
    ragged = {name: values[taken] for name, values in encoded.ragged.items()}
    sizes = [int(encoded.lengths[row].sum()) for row in rows]
    first = [row[0] for row in rows]
    return Encoded(
        ragged={**ragged, POSITIONS: torch.from_numpy(positions.astype(np.int32))},
        offsets=torch.tensor([0, *sizes]).cumsum(0),
        scalars={},
        pads={**encoded.pads, POSITIONS: 0},
        side=encoded.side,
        truncated=encoded.truncated,
        places=[encoded.place(i) for i in first],
        notes=[*encoded.notes, f"{len(encoded):,} documents packed into {len(rows):,} rows of up to {length:,} tokens"],
    )


def _filled(lengths: list[int], room: int) -> list[list[int]]:
    """Best fit, longest first: the documents of every row."""
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (room left, row), ascending
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(left, (lengths[document], -1))
        if at == len(left):
            rows.append([document])
            free, row = room - lengths[document], len(rows) - 1
        else:
            free, row = left.pop(at)
            rows[row].append(document)
            free -= lengths[document]
        if free > 0:
            insort(left, (free, row))
    return rows
