"""The store of user histories: real time, life-long, read in batches. Needs no JAX.

    schema = seqvault.Schema({"item": "int32", "action": "uint8"})
    with seqvault.Vault.create(path, schema) as vault:
        vault.append(user, {"time": [t], "item": [7], "action": [1]}, sync=True)
        vault.last_n(users, 1000, before=times)   # {"item": [B, 1000], "time": ..., "mask": ...}
        vault.snapshot(elsewhere)                 # immutable, for training
    seqvault.Snapshot(elsewhere).last_n(rows, 200, end=positions)

`Vault` is one writer and many readers; `Snapshot` is what a prepared data set holds. See
docs/seqvault.md for formats, guarantees and figures.
"""

from seqvault.errors import Damage, DamagedError, VaultError
from seqvault.schema import Schema
from seqvault.snapshot import Snapshot, bulk_build
from seqvault.vault import Vault

__all__ = ["Damage", "DamagedError", "Schema", "Snapshot", "Vault", "VaultError", "bulk_build"]
