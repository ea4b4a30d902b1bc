"""The ops that Pallas kernels are written for, one folder each; docs/kernels.md.

    <op>/api.py          the op: shapes checked, an implementation chosen, the custom VJP
    <op>/reference.py    the XLA path, which runs anywhere
    <op>/pallas_tpu.py   <op>/pallas_gpu.py   forward and backward kernels
    <op>/shapes.py       the real shapes that tests and benchmarks share

Callers import an op from its folder. Nothing here imports anything of ours.
"""
