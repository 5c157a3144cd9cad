"""The same where the command ``cosup`` is not installed: python -m cosup.bench.gpu"""

import sys

from cosup.bench.gpu import run

if __name__ == "__main__":
    sys.exit(not run())
