"""Speed, memory and exactness of vqfast beside what a user would pick instead.

`peers.py` lists every contender, `measure.py` checks and times them, `rows.py` keeps the figures in one CSV a device,
`table.py` and `plot.py` show them. `make bench` runs it all on the CPU, `make gpu` (gpu.py) on a CUDA device.
"""
