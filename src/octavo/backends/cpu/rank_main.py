"""The main program of a rank: `python -P -m octavo.backends.cpu.rank_main CONNECTION STEPS CALIBRATION KV LINE...`.

RankProcess starts it. CONNECTION leads to its parent (rank_program.Parent); the others are the file descriptors of
Place.
"""

import sys
from collections.abc import Callable

from octavo.backends.rank_process import Allocate, Allocated, Load, Loaded
from octavo.backends.rank_program import Parent, open_model, run_rank
from octavo.model.shard import Shard

from .backend import load_shard
from .program import Place


def load(place: Place, message: Load, parent: Parent) -> Callable[[], None]:
    """Load a part of a model. Return the function that follows rank 0."""
    checkpoint, spec, parameters = open_model(message)
    shard = Shard(spec, message.rank, message.size)
    backend = load_shard(shard, parameters, place, progress=lambda done, total: None, **message.settings)
    checkpoint.verify()
    parent.send(Loaded(backend.weight_bytes, backend.footprint.page_bytes))
    backend.allocate_kv(parent.next(Allocate).pages)
    parent.send(Allocated())
    return backend.follow


if __name__ == "__main__":
    connection, steps, calibration, kv, *lines = map(int, sys.argv[1:])
    place = Place(steps, calibration, kv, tuple(lines))
    sys.exit(run_rank(connection, lambda message, parent: load(place, message, parent)))
