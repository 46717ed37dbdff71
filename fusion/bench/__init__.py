"""The command line, `python -m fusion.bench`: what it measures and analyses, and how it reports."""
