"""What each of several processes does: its part of a stream, one loss of all.

python stream_processes.py INDEX COUNT PORT FOLDER
"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
import jax

if __name__ == "__main__":  # worker processes import this file
    index, count, port = map(int, sys.argv[1:4])
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", count, index)
    import functools
    import json
    import pathlib

    import jax.numpy as jnp
    import stream_rows

    from jlora import data, sharding
    from jlora.train._prefetch import Prefetched

    folder = pathlib.Path(sys.argv[4])
    stream = data.Streaming(
        data.stream_files(folder / "rows.txt"),
        stream_rows.encode,
        size=8,
        shapes=[(4, 4), (8, 8)],
        window=2,
        seed=1,
        workers=1,
        shard=(index, count),
    )
    mesh = sharding.make_mesh("data=-1")
    total = jax.jit(lambda batch: jnp.sum(batch["input_ids"] ** 2))
    place = functools.partial(sharding.place_batch, mesh=mesh)
    batches = Prefetched(stream.stream(), place, 2, 15)
    said = {"own": [], "all": []}
    for batch in batches:
        said["own"].append(batch.host["input_ids"].tolist())
        said["all"].append(int(total(batch.device)))
    said["position"] = batches.position
    batches.close()
    (folder / f"said-{index}-{count}.json").write_text(json.dumps(said))
