"""The store of user histories: built once from sorted columns, read in batches.

    seqvault.bulk_build(path, seqvault.Schema({"item": "int32"}), num_users, blocks)
    vault = seqvault.open(path)
    vault.last_n(users, 200, before=times)  # {"item": [B, 200], "time": ..., "mask": ...}

Users are dense rows 0 .. U - 1 of one immutable snapshot. Needs numpy alone.
"""

from seqvault.build import bulk_build
from seqvault.errors import VaultError
from seqvault.schema import Schema
from seqvault.vault import Vault, open

__all__ = ["Schema", "Vault", "VaultError", "bulk_build", "open"]
