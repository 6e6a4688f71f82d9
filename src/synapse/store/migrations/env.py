"""Run by Alembic: the migrations go through the connection, and in the transaction, that `store/migrate.py` opened."""

from alembic import context

from synapse.store.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
context.run_migrations()
