"""torchrec_pt on a Ray cluster: submit a run, and the job that it becomes."""
