"""Everything around the method: images, networks, files, reports, Slurm; a noun a module."""
