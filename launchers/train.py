"""What the `deepspeed` launcher starts on every rank: the same command as `lumina train`.

deepspeed --hostfile hostfile launchers/train.py --ds_config ds_configs/zero2.json --config nano --train-data F
"""

import sys

from lumina.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    sys.exit(main())
