"""What the fork server of processes.py imports once for all the ranks that it will start."""

import os

import torch._dynamo  # imported by torch's optimizers when the first is made

import lumina.train.run
from lumina.train.deepspeed import import_deepspeed

import_deepspeed()
assert torch._dynamo
assert lumina.train.run

os.environ.pop("PYTHONPATH", None)  # it was for finding this package; the ranks run as a user's do
