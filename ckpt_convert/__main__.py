"""``python -m ckpt_convert`` is ``uni-mdm convert``."""

import sys

from common.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
