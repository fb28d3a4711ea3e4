"""What alembic runs: the steps, on the connection (and inside the transaction) that `hub.database` hands over.

Alembic loads this file by its path, outside the package, so it imports nothing of ours.
"""

from __future__ import annotations

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=context.config.attributes["metadata"],
    version_table=context.config.attributes["version_table"],
)
with context.begin_transaction():
    context.run_migrations()
