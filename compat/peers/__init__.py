"""dbm_bitcask beside other stores for Python, in one run of one interpreter.

    python -m compat.peers --keys 200000

- `adapters`: one small adapter per peer, all with the shape of a mapping.
- `workloads`: what is done to each of them, and timed.
- `report`: medians, ratios and bounds, printed.

Rounds are interleaved: each round runs every peer once, in an order that rotates, so that a busy moment of the machine
hits all of them. A ratio compares two peers of the same round. Runs of different interpreters or machines are not
comparable.
"""
