"""Every command block of README.md and docs/ runs, from a fresh folder with sample data: `make test-documents`.

blocks.py reads the blocks and the marks above them, workplace.py makes the folder, runs.py runs them,
warm.py saves them the seconds of their imports.
"""
