"""``toka`` with two replicas, which no flag asks for yet: the resolved one, twice."""

from __future__ import annotations

import dataclasses
import os
import sys

from tokasaurus.config.parser import parse_command_line
from tokasaurus.entry import listen
from tokasaurus.launch.assemble import assemble
from tokasaurus.launch.supervisor import Supervisor


def main() -> int:
    config = parse_command_line(sys.argv[1:], os.environ)
    listener = listen(config.host, config.port)
    config = dataclasses.replace(config, port=listener.getsockname()[1])
    slices = assemble(config)
    num_seqs = 2 * slices.server.max_seqs_per_forward
    slices = dataclasses.replace(
        slices,
        server=dataclasses.replace(slices.server, max_seqs_per_forward=num_seqs),
        replicas=slices.replicas * 2,
    )
    return Supervisor(slices, listener).run()


if __name__ == "__main__":
    sys.exit(main())
