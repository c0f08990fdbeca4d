"""Jobs of several nodes, each a network namespace with its own sshd: pdsh, Slurm, failures (root; marker `cluster`)."""
