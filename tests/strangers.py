"""``parallax`` with a scheduler that takes nobody for its own machine.

Loopback then stands in for a network of strangers, whose nodes have to be let in.
"""

from __future__ import annotations

import sys

from parallax.scheduler import control

control.is_this_machine = lambda host: False

if __name__ == "__main__":
    from parallax.cli.main import main

    sys.exit(main())
