"""The process behind one node of a `cluster.nodes.LocalCluster`; it lives as long as its input.

    python -I node_process.py '{"num_cpus": 1, …}'      the keys are those of Ray's RayParams

Run by its path and with -I, so that a node knows of no sources but those that a job brings along.
`ray start` will not do: on loopback it refuses a second node.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Start the node, say in one line of JSON where it is, and end it with the input."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams
    from ray._private.utils import write_ray_address

    given = json.loads(sys.argv[1])
    # Ray's processes die with this one, and this one ends with who started it.
    node = Node(RayParams(**given), head="gcs_address" not in given)
    # As `ray start` does: a job's driver is sent to the cluster of this file, and without it, where
    # the machine has several, to any.
    write_ray_address(node.gcs_address, given["temp_dir"])
    said = {"gcs_address": node.gcs_address, "dashboard": node.webui_url, "id": node.node_id}
    print(json.dumps(said), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
