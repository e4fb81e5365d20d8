"""The figures that README promises: one script each, which measures, prints PASS or MISS and exits 1 on a miss.

python -m compat.figures.NAME --help
"""
