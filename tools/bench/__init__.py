"""Measure this code on this machine: ours beside what people run today, and beside the floor.

    vqscale bench codes --tokens 1024 --codes 65536 --dim 256      search and one IBQ training step
    vqscale bench data ...                                         the data stream
    vqscale bench gpu                                              all that a machine with a GPU has to show
    vqscale bench head --codes 16384 65536 262144                  loss and sampling of a prior's head
    vqscale bench memory --codes 4096 65536 1048576                a training step's memory as K grows
    vqscale bench quickstart                                       the quickstart's steps beside plain torch loops
    vqscale bench sample --batch 8 --codes 16384                   drawing from every kind of prior, beside transformers
    vqscale bench kernels                                          what the fused kernels need of a GPU
    vqscale bench rounding                                         what scores in bfloat16 and in float8 lose
    vqscale bench save --every 10                                  the share of a step lost to saving
    vqscale bench upkeep --codes 262144 --processes 2              what statistics and revival add to a step

`vqscale bench codes --help` has the options of a subcommand. In a checkout `python tools/bench` is the same program; in
an installed wheel this package is named `vqscale_bench`, so its files import each other relatively.
"""
