"""`python -m synapse`: the same as the program `synapse`."""

import sys

from synapse.cli.main import main

sys.exit(main())
