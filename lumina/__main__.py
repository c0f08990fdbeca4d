"""`python -m lumina` is `lumina`."""

import sys

from lumina.cli import main

sys.exit(main())
