"""``python -m kfac_viz``: see :mod:`kfac_viz.command.main`."""

import os
import signal
import sys

from kfac_viz.command.main import main

if __name__ == "__main__":
    # A stream is None where the shell has closed it.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no mistake
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up on kill, too
    sys.exit(main())
