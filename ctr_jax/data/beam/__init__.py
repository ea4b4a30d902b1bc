"""Data preparation by many workers: Apache Beam around the shared preparation, sharded by user.

rows.py cuts the raw files by user; shards.py is what a worker does with the users of one shard;
merging.py puts the shards' results in the one order of a prepared data set; engine.py runs it all.
docs/preparation.md tells what crosses the network and what a worker must hold.
"""
