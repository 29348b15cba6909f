"""`python -m tapegrad` is the command `tapegrad`."""

import sys

from tapegrad.cli import main

sys.exit(main())
