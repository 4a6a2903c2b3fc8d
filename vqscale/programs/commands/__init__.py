"""The command lines of the programs: options, what is wrong with them, and what is printed. `vqscale NAME` starts one.

Each file has `main(argv) -> status`; tools/NAME.py in a checkout and launch/train.py are the same programs.
"""
