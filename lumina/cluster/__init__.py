"""Many machines: hostfile, Slurm and MPI, what each machine looks like, and jobs that survive losing some of them."""
