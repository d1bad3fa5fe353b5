"""`python -m pythia_fast` is `pythia-fast`."""

import sys

from pythia_fast.cli import main

sys.exit(main())
