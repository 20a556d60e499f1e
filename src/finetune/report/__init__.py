"""Reports over a run: what was done, what came out, what was proved. They read the run directory and nothing else."""
