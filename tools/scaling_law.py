"""Studies, and laws fitted to their tables: `megatron-spo scaling` under the name of a script."""

import sys

if __name__ == "__main__":
    from megatron_spo.cli import main

    sys.exit(main(["scaling", *sys.argv[1:]]))
