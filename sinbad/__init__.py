"""Everything around the method: images, networks, files, reports, Slurm; a noun a module."""

__version__ = "1.0.0"
