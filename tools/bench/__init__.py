"""Measure this code on this machine: ours beside what people run today, and beside the floor.

    python tools/bench codes --tokens 1024 --codes 65536 --dim 256      search and one IBQ training step
    python tools/bench data ...                                         the data stream
    python tools/bench head --codes 16384 65536 262144                  loss and sampling of a prior's head
    python tools/bench memory --codes 4096 65536 1048576                a training step's memory as K grows
    python tools/bench kernels                                          what the fused kernels need of a GPU

`bench codes --help` has the options of a subcommand. In an installed wheel this package is `vqscale_bench`, and its
command `vqscale bench`; so its files import each other relatively.
"""
