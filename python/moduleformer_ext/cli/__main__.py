"""`python -m moduleformer_ext.cli`."""

import sys

from moduleformer_ext.cli import main

sys.exit(main())
